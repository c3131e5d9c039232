"""A local stand-in of the hub's HTTP API, as far as an upload needs it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class StandIn:
    """What the hub got.

    Attributes:
        status: Status of its answers; not 200 for a hub that refuses everything.
        tokens: The tokens of all requests.
        repositories: The requests to create one.
        files: Contents of the files by path, after the commit.
        address: Where it listens.
    """

    status: int = 200
    tokens: set[str] = field(default_factory=set)
    repositories: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    large: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def hub(status: int = 200) -> Iterator[StandIn]:
    """Listen on a free port inside the block."""
    seen = StandIn(status)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, content: object, status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True})

        def do_PUT(self) -> None:
            seen.large[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            body = self.body()
            token = self.headers.get("Authorization", "")
            seen.tokens.add(token)
            if seen.status != 200:
                # A careless server, which repeats the token in its message.
                self.answer({"error": f"invalid credentials {token}"}, seen.status)
            elif self.path == "/api/repos/create":
                seen.repositories.append(json.loads(body))
                self.answer({"url": f"{seen.address}/me/mine"})
            elif "/preupload/" in self.path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("tensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif self.path.endswith("/objects/batch"):
                self.answer(
                    {
                        "transfer": "basic",
                        "objects": [self.upload(o) for o in json.loads(body)["objects"]],
                    }
                )
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        seen.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        seen.files[value["path"]] = seen.large[value["oid"]]
                url = f"{seen.address}/me/mine/commit/{'1' * 40}"
                self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
            else:
                self.answer({})

        def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
            link = {"href": f"{seen.address}/put/{wanted['oid']}"}
            return {**wanted, "authenticated": True, "actions": {"upload": link}}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
