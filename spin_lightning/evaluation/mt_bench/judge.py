"""Requests to an OpenAI-compatible judge: rate-limited, retried, cached."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spin_lightning.errors import SettingError, SpinError, missing_extra
from spin_lightning.evaluation.counting import counting
from spin_lightning.evaluation.mt_bench.data import Query
from spin_lightning.evaluation.settings import JudgeSettings
from spin_lightning.redaction import masked
from spin_lightning.run.files import append_line, read_lines
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.validation import TEXT, WHOLE, check_fields

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError


class JudgeError(SpinError):
    """Some requests to the judge failed."""


@dataclass(frozen=True)
class Verdict:
    """The judge's reply to a query.

    Attributes:
        text: The reply.
        prompt_tokens: Tokens of the query, as the server counts them.
        completion_tokens: Tokens of the reply.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int


class Judge:
    """Requests verdicts from a judge, and stores each one in a file as soon as it arrives.

    The key of a verdict is a hash of all that it depends on: model, settings and every word of the
    query. A verdict that is in the file is not requested again.

    Args:
        settings: The judge.

    Raises:
        SettingError: The client is not installed, or there is no key for OpenAI's own server.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        """Create the client, without a request."""
        if importlib.util.find_spec("openai") is None:
            raise missing_extra("mt_bench", "openai", "eval")
        self.settings = settings
        self._client = _client(settings)
        self._rate = _RateLimit(settings.requests_per_minute)

    def verdicts(self, queries: Sequence[Query], path: Path) -> list[Verdict]:
        """The verdict on every query, in their order.

        Args:
            queries: The queries.
            path: JSON lines of verdicts, FastChat's fields and ours; verdicts are added as they
                arrive.

        Raises:
            JudgeError: Some were refused, or failed after all retries; the others are stored.
        """
        known = read_verdicts(path)
        keys = [self._key(query) for query in queries]
        missing = {key: q for key, q in zip(keys, queries, strict=True) if key not in known}
        failures = self._request(missing, known, path)
        if failures:
            there = sum(key in known for key in keys)
            raise JudgeError(
                f"the judge {self.settings.model} gave {there} of {len(keys)} verdicts; the last "
                f"error was {type(failures[-1]).__name__}: "
                # A server may echo the key.
                + masked(str(failures[-1]), [os.environ.get(self.settings.key_variable)]),
                fix="check judge.base_url, judge.model and the key, and run the command again: "
                f"the verdicts in {path} are not requested again",
            )
        return [known[key] for key in keys]

    def _request(
        self, missing: Mapping[str, Query], known: dict[str, Verdict], path: Path
    ) -> list[OpenAIError]:
        """Request and store the missing verdicts; return the errors of those that failed."""
        from openai import OpenAIError

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
                self._store(path, key, missing[key], known[key])

        try:
            with counting("judging", len(futures), "verdicts") as count:
                for future in as_completed(list(futures)):
                    take(future)
                    count(1)
                    if failures and _is_hopeless(failures[-1]):
                        break
        finally:
            # Requests in flight are paid for, so they are stored even if the run is interrupted.
            pool.shutdown(wait=True, cancel_futures=True)
            for future in [f for f in futures if not f.cancelled()]:
                take(future)
        return failures

    def _key(self, query: Query) -> str:
        return fingerprint(
            {**self.settings.request_fields, "system": query.system, "user": query.user}
        )

    def _ask(self, query: Query) -> Verdict:
        self._rate.wait()
        reply = self._client.chat.completions.create(
            messages=[
                {"role": "system", "content": query.system},
                {"role": "user", "content": query.user},
            ],
            **self.settings.request_fields,
        )
        usage = reply.usage
        return Verdict(
            text=reply.choices[0].message.content or "",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
        )

    def _store(self, path: Path, key: str, query: Query, verdict: Verdict) -> None:
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


class _RateLimit:
    """Spaces the starts of requests evenly, to at most so many a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._interval
        time.sleep(max(0.0, start - time.monotonic()))


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """The stored verdicts by their keys.

    Raises:
        RunFolderError: A line of the file is damaged.
    """
    return dict(read_lines(path, _read_row))


def _read_row(content: object) -> tuple[str, Verdict]:
    row = check_fields(content, _RULES, required=_RULES)
    return row["key"], Verdict(row["judgment"], row["prompt_tokens"], row["completion_tokens"])


_RULES: Final = {
    "key": TEXT,
    "judgment": TEXT,
    "prompt_tokens": WHOLE,
    "completion_tokens": WHOLE,
}


def _client(settings: JudgeSettings) -> OpenAI:
    from openai import OpenAI

    key = os.environ.get(settings.key_variable)
    if key is None and settings.base_url is None:
        raise SettingError(
            "judge.key_variable",
            settings.key_variable,
            "there is no such environment variable, and OpenAI's server needs a key",
            fix=f"export {settings.key_variable}, or name another server with --judge.base_url",
        )
    return OpenAI(
        api_key=key or "none",
        base_url=settings.base_url,
        max_retries=settings.retries,
        timeout=settings.timeout,
    )


def _is_hopeless(error: Exception) -> bool:
    """Whether all other requests would fail in the same way."""
    from openai import (
        APIConnectionError,
        APITimeoutError,
        AuthenticationError,
        NotFoundError,
        PermissionDeniedError,
    )

    hopeless = APIConnectionError, AuthenticationError, NotFoundError, PermissionDeniedError
    return isinstance(error, hopeless) and not isinstance(error, APITimeoutError)
