"""A server that speaks the part of vLLM's protocol that the engine uses, with faults on demand.

It computes with transformers and peft, token by token, and draws from torch's generator.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.toys.adapters import plain_model

# A fault takes the handler and says whether it has answered the request.
Fault = Callable[["_Handler"], bool]
NextTokens = Callable[[tuple[int, ...]], Tensor]


class StandIn:
    """A server on a free port of this machine.

    Args:
        base: Folder of the model that it serves.
        context: Its max_model_len.
        max_rank: Largest rank of an adapter; None: it was started without adapters.
        runtime: Whether adapters can be loaded while it runs.

    Attributes:
        faults: Taken from the left, one for each completion that is asked for.
        bodies: Every completion that was asked for, in order; without those of log-probs.
        served: How often each request was answered, by its seed.
        loads: Names of adapters in the order in which they were loaded.
        sleeps: Whether it sleeps; None without a sleep mode.
    """

    def __init__(
        self, base: Path, context: int = 64, max_rank: int | None = 16, runtime: bool = True
    ) -> None:
        self.base, self.context, self.max_rank, self.runtime = base, context, max_rank, runtime
        self.models: dict[str, NextTokens] = {str(base): next_tokens(base)}
        self.adapters: dict[str, NextTokens] = {}
        self.faults: deque[Fault] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.served: Counter[int] = Counter()
        self.loads: list[str] = []
        self.sleeps: bool | None = None
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start to listen, at the port of last time."""
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and forget every adapter, as a process that ends."""
        self._server.shutdown()
        self._server.server_close()
        self.adapters.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def load(self, name: str, folder: str) -> tuple[int, str]:
        """Load an adapter; status and message as vLLM's."""
        if not name or not folder:
            return 400, "Both 'lora_name' and 'lora_path' must be provided."
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        if self.max_rank is None:
            return 500, "Call to add_lora method failed: 'LoRA is not enabled. Use --enable-lora'"
        config = Path(folder) / "adapter_config.json"
        if not config.exists():
            return 404, f"Loading lora {name} failed: No adapter found for {folder}"
        rank = json.loads(config.read_text())["r"]
        if rank > self.max_rank:
            return 500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
        self.adapters[name] = next_tokens(self.base, Path(folder))
        self.loads.append(name)
        return 200, "Success"

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A choice, as vLLM returns it."""
        model = {**self.models, **self.adapters}[body["model"]]
        draw = torch.Generator().manual_seed(body.get("seed") or 0)
        prompt, ids, logps = list(body["prompt"]), [], []
        while len(ids) < body["max_tokens"] and ids[-1:] not in [[i] for i in _stops(body)]:
            logits = model((*prompt, *ids))[-1]
            token = int(logits.argmax())
            if body["temperature"]:
                scaled = (logits / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(scaled, 1, generator=draw))
            ids.append(token)
            logps.append(float(logits.log_softmax(-1)[token]))
        choice = {"token_ids": ids, "prompt_token_ids": prompt}
        choice["logprobs"] = {"token_logprobs": logps}
        if "prompt_logprobs" in body:
            table = model(tuple(prompt)).log_softmax(-1)
            found = [{str(i): {"logprob": float(table[k, i])}} for k, i in enumerate(prompt[1:])]
            choice["prompt_logprobs"] = [None, *found]
        return choice


def _stops(body: Mapping[str, Any]) -> list[int]:
    return list(body.get("stop_token_ids") or [])


@functools.cache
def next_tokens(base: Path, adapter: Path | None = None) -> NextTokens:
    """Logits after each of some ids; computed once for each sequence."""
    model = plain_model(base, adapter)

    @functools.cache
    @torch.no_grad()
    def logits(ids: tuple[int, ...]) -> Tensor:
        return model(torch.tensor([ids])).logits[0]

    return logits


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """A client that has given up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"
    # Otherwise each answer waits for the client's system to acknowledge its headers.
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        card = {"id": str(self.stand_in.base), "parent": None}
        card["max_model_len"] = self.stand_in.context
        pages = {
            "/health": {},
            "/version": {"version": "0.0.stand-in"},
            "/v1/models": {"data": [card]},
        }
        if self.stand_in.sleeps is not None:
            pages["/is_sleeping"] = {"is_sleeping": self.stand_in.sleeps}
        if self.path in pages:
            self.reply(200, pages[self.path])
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
        stand_in = self.stand_in
        if self.path == "/v1/completions":
            self.complete(body)
        elif self.path == "/v1/load_lora_adapter" and stand_in.runtime:
            with stand_in.lock:
                status, message = stand_in.load(body["lora_name"], body["lora_path"])
            self.reply(status, {"error": {"message": message}} if status != 200 else {})
        elif self.path == "/v1/unload_lora_adapter" and stand_in.runtime:
            stand_in.adapters.pop(body["lora_name"], None)
            self.reply(200, {})
        elif self.path in ("/sleep?level=1", "/wake_up") and stand_in.sleeps is not None:
            stand_in.sleeps = self.path != "/wake_up"
            self.reply(200, b"")
        else:
            self.reply(404, {"detail": "Not Found"})

    def complete(self, body: dict[str, Any]) -> None:
        stand_in = self.stand_in
        if body["model"] not in {**stand_in.models, **stand_in.adapters}:
            message = f"The model `{body['model']}` does not exist."
            return self.reply(404, {"error": {"message": message}})
        if "prompt_logprobs" not in body:
            with stand_in.lock:
                stand_in.bodies.append(body)
                fault = stand_in.faults.popleft() if stand_in.faults else None
            if fault is not None and fault(self):
                return None
        with stand_in.lock:
            choice = stand_in.complete(body)
        if "prompt_logprobs" not in body:
            stand_in.served[body["seed"]] += 1
        return self.reply(200, {"choices": [choice]})

    def reply(self, status: int, content: object) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def status(code: int, content: object = None) -> Fault:
    """Answer with this instead."""

    def fault(handler: _Handler) -> bool:
        handler.reply(code, content if content is not None else {"error": {"message": "a fault"}})
        return True

    return fault


def hang_up(handler: _Handler) -> bool:
    """Close the connection without an answer."""
    handler.close_connection = True
    return True


def late(seconds: float) -> Fault:
    """Answer after a while."""

    def fault(handler: _Handler) -> bool:
        time.sleep(seconds)
        return False

    return fault


def forget(handler: _Handler) -> bool:
    """Lose the adapters first, as by a restart in between."""
    handler.stand_in.adapters.clear()
    return status(404, {"error": {"message": "The model `x` does not exist."}})(handler)
