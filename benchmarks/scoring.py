"""Reference log-probs under the base and four iterates, from scratch and with known scores."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import ours, peer
from benchmarks.setup import Setup, benchmark
from benchmarks.timing import Figure, interleaved, median_ratio
from benchmarks.workload import PAIRS_PER_STEP, examples_of
from spin_lightning.data.dataset import Pair

_ROWS = 32
_ROUNDS = 3
_NEWEST = ours.ADAPTERS
# With fewer rows a fifth of them, at t = 4, would be too far from its expectation to be judged.
_COUNTED_ROWS = 2000
_MEMBERS = range(_NEWEST + 1)


def run(setup: Setup) -> Iterator[Figure]:
    """Yield the figures of scoring."""
    pairs = setup.workload("A").pairs(setup.count(_ROWS), setup.vocabulary)
    scoring = _scoring(setup, pairs)
    model = peer.load_model(setup, adapters=ours.ADAPTERS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before = scoring.make(_NEWEST - 1, root / "before", None)
        numbers = itertools.count()
        seconds = interleaved(
            {
                "first": lambda _: scoring.make(_NEWEST, root / f"{next(numbers)}", None),
                "next": lambda _: scoring.make(_NEWEST, root / f"{next(numbers)}", before),
                "loop": lambda _: _loop(model, pairs),
            },
            setup.rounds(_ROUNDS),
            setup.device,
        )
    for name in ("first", "next"):
        ratio = median_ratio(seconds["loop"], seconds[name])
        yield Figure(
            f"scoring_{name}",
            {"ratio": ratio},
            seconds={"ours": seconds[name], "loop": seconds["loop"]},
        )
    if "reservoir" in setup.goals:
        yield _reservoir(setup)


def _scoring(setup: Setup, pairs: Sequence[Pair]) -> ours.Scoring:
    module = ours.load_module(setup)
    ours.use_iterates(module.policy, setup)
    answers = ours.KnownAnswers(
        {tuple(p.prompt_ids.tolist()): tuple(p.generated_ids.tolist()) for p in pairs}
    )
    synthesis = ours.synthesis_of(setup, module.policy, answers)
    return ours.Scoring(synthesis, examples_of(pairs))


def _loop(model: peer.PeftModel, pairs: Sequence[Pair]) -> None:
    """Score every response under every member, in padded batches with as many rows as a step."""
    prompts = [pair.prompt_ids.tolist() for pair in pairs] * 2
    responses = [pair.real_ids.tolist() for pair in pairs]
    responses += [pair.generated_ids.tolist() for pair in pairs]
    for member in _MEMBERS:
        with peer.acting_as(model, member):
            peer.padded_logps(model, prompts, responses, batch_size=2 * PAIRS_PER_STEP)


def _reservoir(setup: Setup) -> Figure:
    """Count the responses that fictitious play generates, with a tiny model.

    Of N rows, iterate t needs N / (t + 1) new responses if the others are kept.
    """
    tiny = Setup("tiny", "cpu", "float32", setup.out, tiny=True)
    rows = 20 if setup.tiny else _COUNTED_ROWS
    scoring = _scoring(tiny, tiny.workload("A").pairs(rows, tiny.vocabulary))
    answers = scoring.synthesis.generator
    assert isinstance(answers, ours.KnownAnswers)
    asked = []
    with tempfile.TemporaryDirectory() as folder:
        before = None
        for t in _MEMBERS:
            answers.asked = 0
            before = scoring.make(t, Path(folder) / str(t), before)
            asked.append(answers.asked)
    excess = max(n * (t + 1) / rows for t, n in enumerate(asked))
    counts = ", ".join(f"{n / rows:.3f}" for n in asked)
    return Figure("reservoir", {"excess": excess}, note=f"share generated at t = 0 to 4: {counts}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    benchmark(run, "scoring", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
