"""Small runs that the tests of the loop share."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from spin_lightning import SPIN, SelfPlayDataModule, SelfPlayModule


def write_examples(path: Path, count: int = 120, words: int = 10) -> Path:
    """A jsonl file of short random texts with distinct prompts."""
    draw = random.Random(0)
    lines = []
    for i in range(count):
        prompt = f"w{i % words} w{i // words % words} w{i // words**2 % words}"
        response = " ".join(f"w{draw.randrange(words)}" for _ in range(draw.randrange(1, 6)))
        lines.append(json.dumps({"prompt": prompt, "response": response}))
    path.write_text("\n".join(lines) + "\n")
    return path


def quiet_trainer(
    root: Path | None, epochs: int = 2, callbacks: Sequence[Callback] = (), **settings: Any
) -> L.Trainer:
    """A trainer on the CPU that prints no progress and, by default, logs nothing."""
    return L.Trainer(
        max_epochs=epochs,
        default_root_dir=root,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **{"logger": False, **settings},
    )


def play(
    root: Path,
    model: Path,
    data: Path,
    *,
    variant: type[SelfPlayModule] = SPIN,
    epochs: int = 2,
    ckpt_path: Path | None = None,
    callbacks: Sequence[Callback] = (),
    settings: dict[str, Any] | None = None,
    data_settings: dict[str, Any] | None = None,
    trainer_settings: dict[str, Any] | None = None,
    seed: int = 1,
) -> tuple[SelfPlayModule, SelfPlayDataModule, L.Trainer]:
    """Play a small run to its end, in this process."""
    L.seed_everything(seed, verbose=False)
    module = variant(
        model=str(model),
        **{"learning_rate": 3e-3, "generation": {"unit_size": 32}, **(settings or {})},
    )
    datamodule = SelfPlayDataModule(
        str(data), **{"batch_size": 32, "max_response_tokens": 8, **(data_settings or {})}
    )
    trainer = quiet_trainer(root, epochs, callbacks, **(trainer_settings or {}))
    trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
    return module, datamodule, trainer


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file of rows and every adapter of a run, by relative path."""
    files = (p for p in sorted(root.rglob("*")) if p.suffix in {".parquet", ".safetensors"})
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def logged(root: Path) -> list[dict[str, str]]:
    """The lines of a run's metrics.csv, without empty cells and timings."""
    with (root / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        {name: value for name, value in line.items() if value and not name.startswith("speed/")}
        for line in lines
    ]


def recorded(root: Path) -> list[dict[str, Any]]:
    """What the iterate.json of every iterate holds, without timings."""
    records = [
        json.loads(file.read_text()) for file in sorted(root.glob("iterates/*/iterate.json"))
    ]
    for record in records:
        for name in ("seconds", "speed", "peak_memory", "phase_peaks"):
            (record["training"] or {}).pop(name, None)
    return records
