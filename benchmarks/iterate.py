"""One whole self-play iterate, compared with `generate` and TRL."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours, peer
from benchmarks.setup import Setup, benchmark
from benchmarks.timing import Figure, interleaved, median_ratio
from benchmarks.workload import words_of
from spin_lightning.data.dataset import Pair

_ROWS = 32
_ROUNDS = 3
_EPOCHS = 2
# All responses have this length: a model with random weights hardly ever produces a stop token.
_CAP = 96
_THEIR_BATCH = 64


def run(setup: Setup) -> Iterator[Figure]:
    """Yield the figures of one iterate: generate, score, two epochs."""
    for name, quantization in {"iterate": "none", "iterate_nf4": "nf4"}.items():
        if name in setup.goals:
            yield _figure(setup, name, quantization)


def _figure(setup: Setup, name: str, quantization: str) -> Figure:
    """Time both sides.

    Our time includes loading the model and writing rows, adapter and checkpoint. The other side has
    the model loaded and keeps everything in memory.
    """
    figure = Figure(name)
    pairs = setup.workload("A").pairs(setup.count(_ROWS), setup.vocabulary)
    cap = 4 if setup.tiny else _CAP
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "examples.jsonl"
        data.write_text("\n".join(map(_example, pairs)) + "\n")
        sides: dict[str, Callable[[int], Any]] = {
            "ours": lambda _: ours.play_iterate(setup, data, cap, _EPOCHS, quantization)
        }
        if peer.is_there():
            model = peer.load_model(setup, quantization)
            sides["trl"] = lambda _: _theirs(setup, model, pairs, cap, Path(folder))
        else:
            figure.note = peer.MISSING
        figure.seconds = interleaved(sides, setup.rounds(_ROUNDS), setup.device, warmup=0)
    if "trl" in sides:
        figure.fields["ratio"] = median_ratio(figure.seconds["trl"], figure.seconds["ours"])
    return figure


def _theirs(
    setup: Setup, model: peer.PeftModel, pairs: Sequence[Pair], cap: int, out: Path
) -> None:
    prompts = [pair.prompt_ids.tolist() for pair in pairs]
    with peer.acting_as(model, 1):
        written = peer.generate(model, prompts, [cap] * len(prompts), _THEIR_BATCH)
    answered = [
        pair._replace(generated_ids=np.array(ids)) for pair, ids in zip(pairs, written, strict=True)
    ]
    # The reference of the previous iterate; DPOTrainer copies it from the adapter again.
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    peer.train(peer.make_trainer(setup, model, answered, out, _EPOCHS))


def _example(pair: Pair) -> str:
    return json.dumps({"prompt": words_of(pair.prompt_ids), "response": words_of(pair.real_ids)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    benchmark(run, "iterate", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
