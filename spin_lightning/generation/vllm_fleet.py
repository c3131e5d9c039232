"""Dealing requests to vLLM servers: the least busy first, through time-outs and restarts."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from spin_lightning.errors import SpinError
from spin_lightning.generation.vllm_server import (
    Completion,
    ModelUnknown,
    Served,
    ServerAway,
    VllmServer,
)

_LOG = logging.getLogger(__name__)
# Times that a request is sent, whatever happens to the servers in the meantime.
_ATTEMPTS: Final = 5
# Back-off after a failure, seconds; it doubles with each until the next success.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
# Seconds in which all servers should be admitted, so that the first does not get all requests.
_OPENING: Final = 3.0
# Seconds that closing may take after Ctrl-C.
_CLOSING: Final = 3.0
T = TypeVar("T")


@dataclass
class Job:
    """A request on its way.

    Attributes:
        index: Its place among the requests.
        body: What is sent, without the model.
        adapter: Name of the adapter; None for the base.
        attempts: How often it was sent.
    """

    index: int
    body: dict[str, Any]
    adapter: str | None
    attempts: int = 0


@dataclass
class Post:
    """A server as this process sees it while it has requests for it.

    Attributes:
        server: The server.
        served: What it serves; None while it gets no requests.
        is_new: Whether it may be another process than the one that was checked last.
        in_flight: Requests that it has not answered yet.
        loaded: Names of the adapters that it has.
        failures: Failures since its last success.
        away_since: When it was first found away, seconds; None while it answers.
        is_dropped: Whether it was away for too long.
        problem: The last failure.
        loading: Held while an adapter is loaded.
    """

    server: VllmServer
    served: Served | None = None
    is_new: bool = True
    in_flight: int = 0
    loaded: set[str] = field(default_factory=set)
    failures: int = 0
    away_since: float | None = None
    is_dropped: bool = False
    problem: str = ""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def fail(self, error: ServerAway) -> None:
        """Note a failure; the server gets no requests until it was looked at."""
        self.served, self.problem = None, str(error)
        self.failures += 1
        if isinstance(error, ModelUnknown):
            self.forget()

    def forget(self) -> None:
        """Note that it may have been restarted: nothing is known about it."""
        self.is_new = True
        self.loaded.clear()

    @property
    def pause(self) -> float:
        """Seconds until the next attempt."""
        return (
            min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self.failures - 1)) if self.failures else 0.0
        )


class Fleet:
    """The servers of a run, for one list of requests.

    Args:
        posts: The servers.
        adapters: Folder of each adapter by its name.
        admit: Checks a new server before it gets requests; returns what it serves.
        concurrency: Most requests in flight at a server.
        patience: Seconds to wait for a server that is away.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        adapters: Mapping[str, Path],
        admit: Callable[[VllmServer], Awaitable[Served]],
        concurrency: int,
        patience: float,
    ) -> None:
        """Send nothing yet."""
        self._posts = posts
        self._adapters = adapters
        self._admit = admit
        self._concurrency = self._width = concurrency
        self._patience = patience
        self._open: deque[Job] = deque()

    async def run(self, jobs: Sequence[Job], take: Callable[[Job, Completion], None]) -> None:
        """Have every request answered.

        Args:
            jobs: The requests.
            take: Called with each reply; it raises `ServerAway` for one that cannot be used.

        Raises:
            SpinError: No server is left, a server refuses, or a request failed too often.
        """
        self._open = deque(jobs)
        # Room for a server that comes a little later.
        self._width = min(self._concurrency, math.ceil(len(jobs) / len(self._posts)))
        tasks: set[asyncio.Task[None]] = set()
        try:
            tasks |= {asyncio.create_task(self._bring_back(post)) for post in self._posts}
            await asyncio.wait(tasks, timeout=_OPENING)
            while self._open or any(post.in_flight for post in self._posts):
                tasks |= {asyncio.create_task(self._send(*deal, take)) for deal in self._deals()}
                if not tasks:
                    raise self._none_left()
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                errors = [error for task in done if (error := task.exception()) is not None]
                if errors:
                    raise errors[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _deals(self) -> list[tuple[Post, Job]]:
        """Requests to send now, each with the server that has the fewest."""
        deals = []
        while self._open:
            free = [p for p in self._posts if p.served and p.in_flight < self._width]
            if not free:
                break
            post = min(free, key=lambda p: p.in_flight)
            post.in_flight += 1
            deals.append((post, self._open.popleft()))
        return deals

    async def _send(self, post: Post, job: Job, take: Callable[[Job, Completion], None]) -> None:
        job.attempts += 1
        try:
            take(job, await self._complete(post, job))
        except ServerAway as error:
            if job.attempts >= _ATTEMPTS:
                raise _failed_too_often(post, error) from error
            self._open.appendleft(job)
            was_admitted = post.served is not None
            post.in_flight -= 1
            if was_admitted:
                # The first of those that failed together; it waits for the server.
                post.fail(error)
                await self._bring_back(post)
        except BaseException:
            post.in_flight -= 1
            raise
        else:
            post.in_flight -= 1
            post.failures = 0

    async def _complete(self, post: Post, job: Job) -> Completion:
        served = post.served
        if served is None:
            raise ServerAway(post.problem)
        if job.adapter is not None:
            async with post.loading:
                if job.adapter not in post.loaded:
                    await post.server.load_adapter(job.adapter, self._adapters[job.adapter])
                    post.loaded.add(job.adapter)
        return await post.server.complete({"model": job.adapter or served.name, **job.body})

    async def _bring_back(self, post: Post) -> None:
        """Wait until a server can be admitted; drop it if that takes too long."""
        while post.served is None:
            await asyncio.sleep(post.pause)
            try:
                # A server that was away has lost its requests: it is idle when it is admitted.
                look = self._admit(post.server) if post.is_new else post.server.served()
                post.served = await look
                post.is_new = False
            except ServerAway as error:
                post.fail(error)
                post.forget()
                if self._is_lost(post):
                    return
        if post.away_since is not None:
            _LOG.warning("%s answers again.", post.server.url)
        post.away_since, post.is_dropped = None, False

    def _is_lost(self, post: Post) -> bool:
        """Whether a server that is away was waited for long enough; logs each change once."""
        now = time.monotonic()
        if post.away_since is None:
            post.away_since = now
            _LOG.warning(
                "%s does not answer (%s); waiting for it, up to %g s.",
                post.server.url,
                post.problem,
                self._patience,
            )
        if now - post.away_since < self._patience:
            return False
        if not post.is_dropped:
            post.is_dropped = True
            _LOG.warning("%s is left out: it was away for too long.", post.server.url)
        return True

    def _none_left(self) -> SpinError:
        problems = [f"{post.server.url}: {post.problem}" for post in self._posts]
        return no_answer(problems, f"after {self._patience:g} s ")


def no_answer(problems: Sequence[str], when: str = "") -> SpinError:
    """The error for servers none of which answers.

    Args:
        problems: URL and problem of each.
        when: How long they were waited for, with a blank behind it.
    """
    return SpinError(
        f"generation.servers: none answers {when}({'; '.join(problems)})",
        fix="check the URLs, start the servers (spin-lightning serve prints the command) and run "
        "the same command again: finished responses are kept",
    )


def _failed_too_often(post: Post, error: ServerAway) -> SpinError:
    return SpinError(
        f"a request to {post.server.url} failed {_ATTEMPTS} times; the last problem was {error}",
        fix="see the server's log, and run the same command again: finished responses are kept; "
        "for time-outs raise generation.request_timeout or lower generation.concurrency",
    )


def run_apart(coroutine: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a thread of its own, since a notebook's own thread runs a loop already.

    Ctrl-C cancels it and is passed on at once.
    """
    outcome: Future[T] = Future()
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def body() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.set_result((asyncio.get_running_loop(), task))
        return await coroutine()

    def work() -> None:
        try:
            outcome.set_result(asyncio.run(body()))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, daemon=True, name="vllm requests")
    thread.start()
    try:
        return outcome.result()
    except BaseException:
        if not outcome.done():
            loop, task = running.result()
            loop.call_soon_threadsafe(task.cancel)
            thread.join(_CLOSING)
        raise
