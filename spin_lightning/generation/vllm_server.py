"""One vLLM server over HTTP: what it serves, adapters, responses and log-probs of prompts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spin_lightning.errors import SpinError, first_line, missing_extra
from spin_lightning.redaction import masked

if TYPE_CHECKING:
    import httpx

# The variable in which vLLM itself takes the key.
_KEY: Final = "VLLM_API_KEY"
_CONNECT_SECONDS: Final = 10.0
_GET_SECONDS: Final = 30.0
# A server closes connections that were idle for 5 seconds.
_KEEPALIVE_SECONDS: Final = 2.0
# Busy, overloaded or about to stop; 500 is also how a server answers whose engine has died.
_PASSING: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class ServerAway(Exception):
    """A server does not answer, or not as it should; it may after a while."""


class ModelUnknown(ServerAway):
    """A server does not know an adapter, most often since it was restarted."""


class ServerRefused(SpinError):
    """A server will not do what it is asked to, however often."""


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
        name: The base's name in requests.
        context: Most tokens of prompt and response together.
        version: Of vLLM.
    """

    name: str
    context: int
    version: str


@dataclass(frozen=True)
class Completion:
    """A reply as it came: ids of a response and the log-prob of each, nats."""

    ids: list[int]
    logps: list[float]


class VllmServer:
    """A server.

    Args:
        url: Its address, with or without `/v1`.
        timeout: Seconds until a request without an answer is given up.
        concurrency: Most requests in flight.

    Raises:
        SettingError: The client is not installed.
    """

    def __init__(self, url: str, timeout: float, concurrency: int) -> None:
        """Open no connection yet."""
        if importlib.util.find_spec("httpx") is None:
            raise missing_extra("generation.engine", "httpx", "vllm")
        import httpx

        self._timeout = timeout
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(_KEY)
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # Reading the certificates takes longer than many a request.
            verify=self.url.startswith("https:"),
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=concurrency,
                keepalive_expiry=_KEEPALIVE_SECONDS,
            ),
        )

    async def close(self) -> None:
        """Close the connections, which ends the requests on them."""
        await self._client.aclose()

    async def served(self) -> Served:
        """Ask what it serves.

        Raises:
            ServerAway: There is no answer, or it is not vLLM's.
            ServerRefused: It wants another key, or is not a vLLM server.
        """
        # A server whose engine has died still lists its models for a moment.
        health = await self._send("GET", "/health")
        if health.status_code in _PASSING:
            raise ServerAway(_words(health))
        reply = await self._json("GET", "/v1/models")
        try:
            (base, *_) = [card for card in reply["data"] if card.get("parent") is None]
            name, context = str(base["id"]), int(base["max_model_len"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerRefused(
                f"generation.servers: {self.url} is not a vLLM server (its /v1/models lists no "
                "model with a max_model_len)",
                fix="give the URL of a vLLM server, such as http://localhost:8000",
            ) from error
        version = await self._json("GET", "/version")
        return Served(name, context, str(version.get("version", "unknown")))

    async def check_loads_adapters(self) -> None:
        """Check that adapters can be loaded while it runs.

        Raises:
            ServerRefused: They cannot.
        """
        # Without a name nothing is loaded; the answer tells whether there is such a request at all.
        reply = await self._send(
            "POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}
        )
        if reply.status_code in (404, 405):
            raise ServerRefused(
                f"{self.url} cannot load adapters while it runs",
                fix="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora: "
                "spin-lightning serve prints the command",
            )

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter from a folder, unless it has one of this name.

        Raises:
            ServerAway: There is no answer.
            ServerRefused: It cannot load it, such as for its rank.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        reply = await self._send("POST", "/v1/load_lora_adapter", body)
        if reply.is_success:
            return
        problem = _words(reply)
        if "already been loaded" in problem:
            return
        # A failure inside its engine is 500, and so is an adapter that does not fit.
        if reply.status_code in _PASSING and not (await self._is_healthy()):
            raise ServerAway(problem)
        raise ServerRefused(
            f"{self.url} does not load the adapter in {folder} ({problem})", fix=_advice(problem)
        )

    async def unload_adapter(self, name: str) -> None:
        """Let it forget an adapter; one that it does not know is forgotten already."""
        await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def wake_up(self) -> None:
        """Wake it up if it sleeps.

        Raises:
            ServerAway: There is no answer.
            ServerRefused: It has no sleep mode.
        """
        if (await self._sleep_mode("GET", "/is_sleeping")).get("is_sleeping"):
            await self._sleep_mode("POST", "/wake_up")

    async def go_to_sleep(self) -> None:
        """Let it free its card; its weights stay in the host's memory.

        Raises:
            ServerAway: There is no answer.
            ServerRefused: It has no sleep mode.
        """
        await self._sleep_mode("POST", "/sleep?level=1")

    async def _sleep_mode(self, method: str, path: str) -> dict[str, Any]:
        reply = await self._send(method, path)
        if reply.status_code in _PASSING:
            raise ServerAway(_words(reply))
        if not reply.is_success:
            raise ServerRefused(
                f"generation.sleep: {self.url} has no sleep mode ({_words(reply)})",
                fix="start it with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode "
                "(spin-lightning serve --sleep prints the command), or set generation.sleep: false",
            )
        content = reply.json() if reply.content else {}
        return content if isinstance(content, dict) else {}

    async def complete(self, body: Mapping[str, Any]) -> Completion:
        """Sample a response.

        Args:
            body: The request of `/v1/completions`.

        Raises:
            ServerAway: There is no answer, or it is not a whole one.
            ServerRefused: It refuses the request.
        """
        choice = await self._choice({**body, "return_token_ids": True, "logprobs": 0})
        if "token_ids" not in choice:
            raise ServerRefused(
                f"{self.url} returns no token ids", fix="use vLLM 0.10.2 or newer, which do"
            )
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise ServerRefused(
                f"{self.url} has changed the ids of the prompt",
                fix="start it without options that cut or extend prompts",
            )
        try:
            logps = [float(logp) for logp in choice["logprobs"]["token_logprobs"]]
            return Completion([int(i) for i in choice["token_ids"]], logps)
        except (KeyError, TypeError, ValueError) as error:
            raise ServerAway(f"a malformed reply ({first_line(error)})") from error

    async def prompt_logps(self, model: str, ids: Sequence[int]) -> list[float]:
        """log p of each token of a prompt but the first, given those before it, nats.

        Args:
            model: The base's name, or an adapter's.
            ids: The prompt, two tokens or more.

        Raises:
            ServerAway: There is no answer, or it is not a whole one.
            ServerRefused: It refuses the request, such as for an id that its model lacks.
        """
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0}
        choice = await self._choice({**body, "temperature": 0.0})
        try:
            found = choice["prompt_logprobs"][1:]
            return [float(each[str(i)]["logprob"]) for i, each in zip(ids[1:], found, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerAway(f"a malformed reply ({first_line(error)})") from error

    async def _choice(self, body: Mapping[str, Any]) -> dict[str, Any]:
        reply = await self._json("POST", "/v1/completions", body)
        try:
            (choice,) = reply["choices"]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerAway("a malformed reply (no choice)") from error
        if not isinstance(choice, dict):
            raise ServerAway("a malformed reply (no choice)")
        return choice

    async def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send a request and read its reply.

        Raises:
            ModelUnknown: It has no such model.
            ServerAway: There is no answer, it cannot answer now, or its answer is not JSON.
            ServerRefused: It refuses the request.
        """
        reply = await self._send(method, path, body)
        if reply.status_code in _PASSING:
            raise ServerAway(_words(reply))
        if reply.status_code == 404 and "does not exist" in _words(reply):
            raise ModelUnknown(_words(reply))
        if not reply.is_success:
            problem = _words(reply)
            raise ServerRefused(f"{self.url}{path} refuses ({problem})", fix=_advice(problem))
        try:
            content = reply.json()
        except ValueError as error:
            raise ServerAway("a malformed reply (it is not JSON)") from error
        if not isinstance(content, dict):
            raise ServerAway("a malformed reply (it is not an object)")
        return content

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        import httpx

        try:
            if method == "GET":
                # Answers that need no computation; a server that hangs should be noticed.
                return await self._client.get(path, timeout=min(self._timeout, _GET_SECONDS))
            return await self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise ServerAway(f"no answer in time ({type(error).__name__})") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise ServerAway(first_line(error)) from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ServerRefused(
                f"generation.servers: {self.url} is not a URL ({first_line(error)})",
                fix="give URLs such as http://localhost:8000",
            ) from error

    async def _is_healthy(self) -> bool:
        try:
            return bool((await self._send("GET", "/health")).is_success)
        except ServerAway:
            return False


def _words(reply: httpx.Response) -> str:
    """The message in a reply that is an error."""
    try:
        content = reply.json()
        error = content.get("error", content)
        text = error["message"] if isinstance(error, dict) else str(content.get("detail", error))
    except (ValueError, KeyError, AttributeError):
        text = reply.text
    text = " ".join(str(text).split())[:300]
    return masked(f"{reply.status_code}: {text}", [os.environ.get(_KEY)])


def _advice(problem: str) -> str:
    """What to do about a refusal."""
    known = {
        "max_lora_rank": "start it with a larger --max-lora-rank",
        "lora is not enabled": "start it with --enable-lora",
        "no adapter found": "let it see the run folder under the same path as this process",
        "max_model_len": "start it with a larger --max-model-len",
        "context length": "start it with a larger --max-model-len",
        "out of vocabulary": "let it serve the run's base",
        "401": f"export {_KEY} with the server's key",
        "403": f"export {_KEY} with the server's key",
        "404": "check the URL: it is a vLLM server's, such as http://localhost:8000",
    }
    fixes = (fix for words, fix in known.items() if words in problem.lower())
    general = "start the server as spin-lightning serve prints it, and see its log"
    return next(fixes, general)
