"""A real vLLM server as a process of its own, from the environment that `make vllm-test` builds."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

VLLM = Path(os.environ.get("VLLM_BIN") or Path(__file__).parents[2] / ".venv-vllm" / "bin" / "vllm")
_STARTS_WITHIN = 420.0


class VllmProcess:
    """`vllm serve` at a free port; start it, kill it, start it again at the same port.

    Args:
        model: The base's folder.
        log: File for its output, appended to at each start.
        options: Further options.
        eager: Whether it computes without compiling first.
        variables: Further environment variables.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *options: str,
        eager: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log, self.options = model, log, options
        self.eager, self.variables = eager, dict(variables or {})
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        return [
            *(str(VLLM), "serve", str(self.model), "--host", "127.0.0.1"),
            *("--port", str(self.port), "--dtype", "float32"),
            *(("--enforce-eager",) if self.eager else ()),
            # A seeded request whose prompt is read in parts ends vLLM's engine on a CPU.
            "--no-enable-chunked-prefill",
            *("--generation-config", "vllm", "--max-model-len", "64", "--enable-lora"),
            *("--max-loras", "8", "--max-lora-rank", "16", *self.options),
        ]

    def start(self) -> None:
        """Start the process; `wait` waits for it."""
        variables = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **self.variables,
        }
        without = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env={**without, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        assert self.process is not None
        end = time.monotonic() + _STARTS_WITHIN
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"no server: {self.log.read_text(errors='replace')[-3000:]}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop its processes inside the block: waiting for requests keeps a core busy."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it and the processes that it has started, at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def answers(self) -> int:
        """Completions that it has answered, log-probs of prompts included, over all starts."""
        text = self.log.read_text(errors="replace")
        return len(re.findall(r'"POST /v1/completions HTTP/1.1" 200', text))
