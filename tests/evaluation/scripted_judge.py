"""A local judge with scripted replies, over the protocol of OpenAI's server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A status and, at 200, the judge's reply.
Reply = tuple[int, str]


@dataclass
class ScriptedJudge:
    """The requests to a scripted judge.

    Attributes:
        base_url: For `JudgeSettings`.
        asked: (system, user) of every request, in the order they came.
        bodies: The requests themselves.
        most_at_once: Requests that were under way together, at most.
    """

    base_url: str
    asked: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def scripted_judge(reply: Callable[[str, str, int], Reply]) -> Iterator[ScriptedJudge]:
    """Serve `reply(system, user, number of the request from 0)` until the block ends."""
    judge = ScriptedJudge("")
    lock, under_way = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            system, user = (message["content"] for message in body["messages"])
            with lock:
                number = len(judge.asked)
                judge.asked.append((system, user))
                judge.bodies.append({**body, "path": self.path})
                judge.headers.append({k.lower(): v for k, v in self.headers.items()})
                under_way[0] += 1
                judge.most_at_once = max(judge.most_at_once, under_way[0])
            try:
                status, text = reply(system, user, number)
            finally:
                with lock:
                    under_way[0] -= 1
            choice = {"index": 0, "message": {"role": "assistant", "content": text}}
            content = {
                "id": str(number),
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{**choice, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
            }
            if status != 200:
                content = {"error": {"message": text}}
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After-Ms", "10")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    judge.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
