"""Tokens per second of the generation engines: ours, a vLLM server, transformers' `generate`.

64 prompts, each answered by one of four iterates, float32 on two cores. It needs vLLM in
`.venv-vllm` (`make vllm-test` installs it) and starts the server itself, which is paused while the
others compute; `--eager` switches off vLLM's compiler.

    python -m benchmarks.engines --size smollm2
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from benchmarks import ours, peer
from benchmarks.generation import unit
from benchmarks.setup import Setup, parser, quiet, setup_of
from benchmarks.timing import machine, median_ratio
from benchmarks.workload import STOP
from spin_lightning.generation.base import Request
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.vllm import VllmGenerator
from tests.toys.vllm_process import VllmProcess

_ROWS = 64
_CORES = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__)
    options.add_argument("--eager", action="store_true", help="vLLM without its compiler")
    options.add_argument("--rounds", type=int, default=2)
    given = options.parse_args(arguments)
    setup = setup_of(given)
    torch.set_num_threads(_CORES)
    setup.out.mkdir(parents=True, exist_ok=True)
    more = ["--max-model-len", "512", "--max-loras", str(ours.ADAPTERS + 1)]
    server = VllmProcess(
        setup.base.resolve(),
        setup.out / "vllm.log",
        *more,
        eager=given.eager,
        # By default vLLM leaves one core to its other processes.
        variables={"VLLM_CPU_OMP_THREADS_BIND": f"0-{_CORES - 1}", "OMP_NUM_THREADS": str(_CORES)},
    )
    try:
        server.start()
        server.wait()
        with quiet():
            _compare(setup, server, given.rounds)
    finally:
        server.kill()


def _compare(setup: Setup, server: VllmProcess, rounds: int) -> None:
    module = ours.load_module(setup)
    ours.use_iterates(module.policy, setup)
    model = peer.load_model(setup, adapters=ours.ADAPTERS)
    local = ours.decoder(module)
    vllm = VllmGenerator((STOP,), GenerationSettings(engine="vllm", servers=[server.url]))

    def theirs(asked: Sequence[Request]) -> int:
        return sum(_length(ids) for ids in peer.generate_in_turn(model, asked, _ROWS))

    def answered(generator: ours.Generator) -> Callable[[Sequence[Request]], int]:
        return lambda asked: sum(len(r.ids) for r in generator.generate(module.policy, asked))

    sides = {"ours": answered(local), "vLLM": answered(vllm), "generate": theirs}
    short = [replace(request, cap=2) for request in unit(setup, 0, _ROWS // ours.ADAPTERS)]
    for side in sides.values():
        side(short)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        asked = unit(setup, i, _ROWS // ours.ADAPTERS)
        for name, side in sides.items():
            with nullcontext() if name == "vLLM" else server.paused():
                start = time.perf_counter()
                tokens = side(asked)
            speeds[name].append(tokens / (time.perf_counter() - start))
            print(f"round {i}: {name} {speeds[name][-1]:.1f} tokens/s, {tokens} tokens", flush=True)
    for name in ("vLLM", "generate"):
        print(f"ours / {name}: {median_ratio(speeds['ours'], speeds[name]):.2f}")
    print(f"vLLM / generate: {median_ratio(speeds['vLLM'], speeds['generate']):.2f}")
    print(f"{setup.size}, {setup.dtype_name}, {_ROWS} prompts: {machine(setup.device)}")


def _length(ids: Sequence[int]) -> int:
    """Tokens up to the stop id."""
    return ids.index(STOP) + 1 if STOP in ids else len(ids)


if __name__ == "__main__":
    main(sys.argv[1:])
