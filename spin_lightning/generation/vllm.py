"""Generation on vLLM servers, which load the iterates' adapters while they run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.errors import SettingError, SpinError
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.generation.base_check import BaseCheck, other_base
from spin_lightning.generation.journal import Journal
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.vllm_fleet import Fleet, Job, Post, no_answer, run_apart
from spin_lightning.generation.vllm_server import Completion, Served, ServerAway, VllmServer
from spin_lightning.policies.adapter_check import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from spin_lightning.policies.base import Policy
from spin_lightning.run.fingerprint import fingerprint, folder_hashes

# Not iterate.json, to which metrics are added.
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_SEEDS = (1 << 63) - 1
# Servers that this process has logged; an engine is made for each iterate.
_TOLD: set[tuple[str, Served]] = set()


def token_mixture_refused() -> SettingError:
    """The error for an opponent that is mixed with the base at every token."""
    return SettingError(
        "generation.engine",
        "vllm",
        "a server samples each token from one policy, and this opponent mixes an iterate with the "
        "base at every token",
        fix="set generation.engine: local, or mixture: sequence",
    )


@dataclass(frozen=True)
class _Adapters:
    """Adapters that some requests need.

    Attributes:
        names: Names on the servers, by iterate; the bare base has none.
        folders: Their folders, by name.
        start: Name of iterate 0's; None if that is the bare base.
        trial: Name of one that is loaded and forgotten, to see whether a server can; None for none.
    """

    names: Mapping[int, str]
    folders: Mapping[str, Path]
    start: str | None
    trial: str | None


@dataclass
class VllmGenerator(Generator):
    """Samples on vLLM servers: a request per row, all iterates in one stream.

    Prompts are sent as ids, and ids come back. Every sampling setting is sent, and the seed is the
    row's key. A server adds up in an order that depends on what else it computes, so the same
    requests give the same responses up to rounding.

    Attributes:
        stop_ids: A response ends with the first of these.
        settings: Sampling settings, the servers and how they are used.
    """

    stop_ids: tuple[int, ...]
    settings: GenerationSettings
    computes_elsewhere: ClassVar[bool] = True
    _base: BaseCheck | None = field(default=None, init=False)
    _digests: dict[Path, str] = field(default_factory=dict, init=False)
    _admitted: dict[str, Served] = field(default_factory=dict, init=False)

    def check(self, longest: int) -> None:
        """Check that servers answer, take sequences of this length, and load adapters.

        Raises:
            SpinError: None answers, or one cannot be used.
        """
        run_apart(lambda: self._check(longest))

    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Sample one response per request, on whichever server is free.

        Raises:
            SettingError: A request is for a token-level mixture.
            SpinError: No server is left, one serves another base, or one refuses an adapter.
        """
        if any(request.policy.mixes_base for request in requests):
            raise token_mixture_refused()
        folders = {i: policy.iterate_folder(i) for i in {0, *(r.opponent for r in requests)}}
        journal = Journal(None if self.scratch is None else self.scratch / "responses.jsonl")
        keys = [self._key(request, folders[request.opponent]) for request in requests]
        known = {i: journal.found[key] for i, key in enumerate(keys) if key in journal.found}
        self._progress(len(known))
        missing = [i for i in range(len(requests)) if i not in known]
        # Together, where a server has fewer places for adapters than there are iterates.
        missing.sort(key=lambda i: requests[i].opponent)
        vocabulary = _vocabulary(policy)

        def take(job: Job, completion: Completion) -> None:
            request = requests[job.index]
            response = checked_response(completion, request.cap, self.stop_ids, vocabulary)
            journal.add(keys[job.index], response)
            known[job.index] = response
            self._progress(1)

        try:
            if missing:
                self._send([(i, requests[i]) for i in missing], policy, folders, take)
        finally:
            journal.close()
        return [known[i] for i in range(len(requests))]

    def rest(self) -> None:
        """Put the servers to sleep, where they are to sleep; one that is away sleeps already."""
        if self.settings.sleep:
            run_apart(self._put_to_sleep)

    @property
    def deviations(self) -> Mapping[str, Any]:
        """The servers' version: their kernels round in their own way."""
        versions = {served.version for served in self._admitted.values()}
        return {"generated by": f"vLLM {', '.join(sorted(versions))}"} if versions else {}

    # ------------------------------------------------------------------ requests

    def _send(
        self,
        requests: Sequence[tuple[int, Request]],
        policy: Policy,
        folders: Mapping[int, Path | None],
        take: Callable[[Job, Completion], None],
    ) -> None:
        longest = max(request.total for _, request in requests)
        if self._base is None:
            self._base = BaseCheck.of(policy, [r.prompt_ids for _, r in requests], longest)
        adapters = self._adapters(policy, folders)
        jobs = [Job(i, self._body(r), adapters.names.get(r.opponent)) for i, r in requests]

        async def run() -> None:
            servers = self._servers()
            fleet = Fleet(
                [Post(server) for server in servers],
                adapters.folders,
                lambda server: self._admit(server, longest, adapters),
                self.settings.concurrency,
                self.settings.patience,
            )
            try:
                await fleet.run(jobs, take)
            finally:
                await asyncio.gather(*(server.close() for server in servers))

        run_apart(run)

    def _adapters(self, policy: Policy, folders: Mapping[int, Path | None]) -> _Adapters:
        names = {i: self._name(folder) for i, folder in folders.items() if folder is not None}
        by_name = {names[i]: folder.resolve() for i, folder in folders.items() if folder}
        trial = None
        if not names and not self._admitted and self.scratch is not None:
            # At iterate 0 no adapter is needed: without a trial, a server that cannot load one is
            # noticed only after the first iterate was trained.
            folder = self.scratch / "trial"
            folder.mkdir(parents=True, exist_ok=True)
            policy.snapshot(folder)
            trial = self._name(folder)
            by_name[trial] = folder.resolve()
        return _Adapters(names, by_name, names.get(0), trial)

    def _name(self, folder: Path) -> str:
        """An adapter's name, which no other content and no other folder has.

        A server may hold iterates of other runs, and reads one from its folder again.
        """
        place = {"content": self._digest(folder), "folder": str(folder.resolve())}
        return f"{folder.name}-{fingerprint(place)[:20]}"

    def _digest(self, folder: Path) -> str:
        if folder not in self._digests:
            self._digests[folder] = fingerprint(folder_hashes(folder, _ADAPTER_FILES))
        return self._digests[folder]

    def _key(self, request: Request, folder: Path | None) -> str:
        """What a response depends on."""
        adapter = None if folder is None else self._digest(folder)
        return fingerprint({**self._body(request), "adapter": adapter, "key": request.key})

    def _body(self, request: Request) -> dict[str, Any]:
        """The request, with everything that a server may have its own defaults for."""
        settings = self.settings
        greedy = settings.top_k == 1
        return {
            "prompt": list(request.prompt_ids),
            "max_tokens": request.cap,
            "min_tokens": 0,
            "n": 1,
            "temperature": 0.0 if greedy else settings.temperature,
            "top_p": 1.0 if greedy else settings.top_p,
            "top_k": 0 if greedy else settings.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # (-1 stands for no seed.)
            "seed": request.key & _SEEDS,
            "stop": [],
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "return_tokens_as_token_ids": True,
        }

    def _progress(self, responses: int) -> None:
        if self.on_progress is not None and responses:
            self.on_progress(responses)

    # ------------------------------------------------------------------ servers

    def _servers(self) -> list[VllmServer]:
        settings = self.settings
        return [
            VllmServer(url, settings.request_timeout, settings.concurrency)
            for url in dict.fromkeys(settings.servers)
        ]

    async def _check(self, longest: int) -> None:
        servers = self._servers()
        problems = []
        try:
            for server in servers:
                try:
                    _check_context(server.url, await server.served(), longest)
                    await server.check_loads_adapters()
                except ServerAway as error:
                    problems.append(f"{server.url}: {error}")
        finally:
            await asyncio.gather(*(server.close() for server in servers))
        if len(problems) == len(servers):
            raise no_answer(problems)

    async def _put_to_sleep(self) -> None:
        servers = self._servers()
        try:
            for server in servers:
                with suppress(ServerAway):
                    await server.go_to_sleep()
        finally:
            await asyncio.gather(*(server.close() for server in servers))

    async def _admit(self, server: VllmServer, longest: int, adapters: _Adapters) -> Served:
        """Check that a server computes this run's iterates."""
        assert self._base is not None
        served = await server.served()
        if self.settings.sleep:
            await server.wake_up()
        _check_context(server.url, served, longest)
        if adapters.trial is not None:
            await server.load_adapter(adapters.trial, adapters.folders[adapters.trial])
            await server.unload_adapter(adapters.trial)
        if adapters.start is not None:
            await server.load_adapter(adapters.start, adapters.folders[adapters.start])
        gap = await self._base.gap(server, adapters.start or served.name)
        # (A NaN is refused.)
        if not gap <= self.settings.largest_gap:
            raise other_base(server.url, served.name, gap, self.settings.largest_gap)
        if (server.url, served) not in _TOLD:
            _TOLD.add((server.url, served))
            rank_zero_info(
                f"{server.url}: vLLM {served.version} serves {served.name}; its log-probs differ "
                f"from ours by {gap:.2g} nats per token on the first prompts."
            )
        self._admitted[server.url] = served
        return served


def checked_response(
    completion: Completion, cap: int, stop_ids: Sequence[int], vocabulary: int
) -> Response:
    """The response in a reply.

    Args:
        completion: The reply.
        cap: Most tokens of the response.
        stop_ids: It ends with the first of these.
        vocabulary: Number of ids of the model.

    Raises:
        ServerAway: It is not a whole response, as from a server that is shutting down.
    """
    ids, logps = completion.ids, completion.logps
    stops = [place for place, i in enumerate(ids) if i in stop_ids]
    if not ids or len(ids) != len(logps) or len(ids) > cap:
        raise ServerAway(f"a reply of {len(ids)} ids and {len(logps)} log-probs for {cap} tokens")
    if not all(0 <= i < vocabulary for i in ids):
        raise ServerAway("a reply with an id that is not in the vocabulary")
    if stops and stops[0] != len(ids) - 1:
        raise ServerAway("a reply that goes on after a stop id")
    if not stops and len(ids) < cap:
        raise ServerAway(
            f"a reply that ends after {len(ids)} of {cap} tokens at id {ids[-1]}, which is not a "
            f"stop id ({', '.join(map(str, stop_ids))}): start servers with "
            "--generation-config vllm"
        )
    logp = math.fsum(logps)
    if not math.isfinite(logp):
        raise ServerAway("a reply with a log-prob that is not finite")
    return Response(tuple(ids), bool(stops), logp)


def _check_context(url: str, served: Served, longest: int) -> None:
    if served.context < longest:
        raise SpinError(
            f"generation.servers: {url} takes {served.context} tokens, and prompts with their "
            f"responses have up to {longest}",
            fix=f"start it with --max-model-len {longest}, or lower data.max_prompt_tokens or "
            "data.max_response_tokens",
        )


def _vocabulary(policy: Policy) -> int:
    model: Any = policy.model
    return int(model.config.get_text_config().vocab_size)
