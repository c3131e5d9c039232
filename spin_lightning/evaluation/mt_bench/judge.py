"""Asking an OpenAI-compatible judge: at a pace, again after errors, and never twice."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_lightning.errors import (
    RunFolderError,
    SettingError,
    SpinError,
    first_line,
)
from spin_lightning.evaluation.mt_bench.data import Query
from spin_lightning.evaluation.settings import JudgeSettings
from spin_lightning.redaction import masked
from spin_lightning.run.files import writing
from spin_lightning.run.fingerprint import fingerprint

if TYPE_CHECKING:
    from openai import OpenAI

# What is kept of a verdict.
_SAID = ("judgment", "prompt_tokens", "completion_tokens")


class JudgeError(SpinError):
    """The judge did not answer everything."""


@dataclass(frozen=True)
class Verdict:
    """What the judge said.

    Attributes:
        text: Its words.
        prompt_tokens: Tokens it read, as the server counts them.
        completion_tokens: Tokens it wrote.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int


class Judge:
    """Asks a judge, and keeps every verdict in a file as soon as it is there.

    A verdict is known by all that it depends on: model, settings and every word of the query. What
    is in the file is never asked again.

    Args:
        settings: Who judges.

    Raises:
        SettingError: The client is not installed, or there is no key for OpenAI's own server.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        """Make the client; nothing is asked yet."""
        if importlib.util.find_spec("openai") is None:
            raise SettingError(
                "mt_bench",
                "openai",
                "the client of the judge is not installed",
                fix="run: pip install 'spin-lightning[eval]'",
            )
        self.settings = settings
        self._client = _client(settings)
        self._pace = _Pace(settings.requests_per_minute)

    def verdicts(self, queries: Sequence[Query], path: Path) -> list[Verdict]:
        """The verdict on every query, in their order.

        Args:
            queries: What to ask.
            path: JSON lines of verdicts, FastChat's fields and ours; grows as verdicts come.

        Raises:
            JudgeError: Some were refused, or failed after all retries; the others are kept.
        """
        from openai import OpenAIError

        known = _read_verdicts(path)
        keys = [self._key(query) for query in queries]
        missing = {key: q for key, q in zip(keys, queries, strict=True) if key not in known}
        failures: list[OpenAIError] = []
        pool = ThreadPoolExecutor(self.settings.concurrency)
        futures = {pool.submit(self._ask, query): key for key, query in missing.items()}

        def take(future: Future[Verdict]) -> None:
            key = futures.pop(future)
            try:
                known[key] = future.result()
            except OpenAIError as error:
                failures.append(error)
            else:
                self._keep(path, key, missing[key], known[key])

        try:
            for future in as_completed(list(futures)):
                take(future)
                if failures and _is_hopeless(failures[-1]):
                    break
        finally:
            # What is under way is paid for, also when the run is interrupted.
            pool.shutdown(wait=True, cancel_futures=True)
            for future in [f for f in futures if not f.cancelled()]:
                take(future)
        if failures:
            there = sum(key in known for key in keys)
            raise JudgeError(
                f"the judge {self.settings.model} gave {there} of {len(keys)} verdicts; the last "
                f"error was {type(failures[-1]).__name__}: "
                # A server may repeat the key that it was given.
                + masked(str(failures[-1]), [os.environ.get(self.settings.key_variable)]),
                fix="check judge.base_url, judge.model and the key, and run the command again: "
                f"the verdicts in {path} are not asked for again",
            )
        return [known[key] for key in keys]

    def _key(self, query: Query) -> str:
        return fingerprint({**self.settings.asked, "system": query.system, "user": query.user})

    def _ask(self, query: Query) -> Verdict:
        self._pace.wait()
        reply = self._client.chat.completions.create(
            messages=[
                {"role": "system", "content": query.system},
                {"role": "user", "content": query.user},
            ],
            **self.settings.asked,
        )
        usage = reply.usage
        return Verdict(
            text=reply.choices[0].message.content or "",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
        )

    def _keep(self, path: Path, key: str, query: Query, verdict: Verdict) -> None:
        row = {
            "key": key,
            "question_id": query.question_id,
            "turn": query.turn,
            "game": query.game,
            "judge": [self.settings.model, query.prompt],
            "user_prompt": query.user,
            "judgment": verdict.text,
            "prompt_tokens": verdict.prompt_tokens,
            "completion_tokens": verdict.completion_tokens,
            "tstamp": time.time(),
        }
        append_line(path, row)


class _Pace:
    """Lets requests start no faster than so many a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._interval
        time.sleep(max(0.0, start - time.monotonic()))


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add a line of JSON, on the disk when this returns."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read what `append_line` wrote; a last line that a crash has torn is cut off the file.

    Raises:
        RunFolderError: A line before it is damaged.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    rows = []
    # (Not by splitlines, which knows more ends of lines than JSON escapes.)
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                raise ValueError("it has no key")
        except (ValueError, RecursionError) as error:
            raise damaged_line(path, number, error) from error
        rows.append(row)
    return rows


def damaged_line(path: Path, number: int, error: Exception) -> RunFolderError:
    """The error for a line that `append_line` did not write."""
    return RunFolderError(
        f"line {number} of {path} is damaged ({first_line(error)})",
        fix="delete this line: what it held is asked for again, all else is kept",
    )


def _read_verdicts(path: Path) -> dict[str, Verdict]:
    verdicts = {}
    for number, row in enumerate(read_lines(path), 1):
        text, read, written = (row.get(name) for name in _SAID)
        if not isinstance(text, str) or not isinstance(read, int) or not isinstance(written, int):
            raise damaged_line(path, number, ValueError("it holds no verdict"))
        verdicts[row["key"]] = Verdict(text, read, written)
    return verdicts


def _client(settings: JudgeSettings) -> OpenAI:
    from openai import OpenAI

    key = os.environ.get(settings.key_variable)
    if key is None and settings.base_url is None:
        raise SettingError(
            "judge.key_variable",
            settings.key_variable,
            "there is no such environment variable, and OpenAI's server asks for a key",
            fix=f"export {settings.key_variable}, or name another server with --judge.base_url",
        )
    return OpenAI(
        api_key=key or "none",
        base_url=settings.base_url,
        max_retries=settings.retries,
        timeout=settings.timeout,
    )


def _is_hopeless(error: Exception) -> bool:
    """Whether every other request would fail the same way."""
    from openai import (
        APIConnectionError,
        APITimeoutError,
        AuthenticationError,
        NotFoundError,
        PermissionDeniedError,
    )

    hopeless = APIConnectionError, AuthenticationError, NotFoundError, PermissionDeniedError
    return isinstance(error, hopeless) and not isinstance(error, APITimeoutError)
