"""The data module: examples in any accepted format, and loaders over the rows of the iterate."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning import keyed
from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import EpochBatches, PairDataset, RowLoader
from spin_lightning.data.formats import read_data
from spin_lightning.data.read_report import checked_bad_rows
from spin_lightning.data.sources import source_name
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import (
    MOST,
    RunFolderError,
    SettingError,
    is_number,
    is_whole,
)
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import BadRow, Conversation, Example

_MOST_VAL_EXAMPLES = 256
# Collating is quick: more processes than this would only fill the machine.
_MOST_WORKERS = 256
# With fewer prompts than this, holding whole prompts out would leave little to learn or to test.
_FEWEST_PROMPTS = 64


class SelfPlayDataModule(L.LightningDataModule):
    """Prompts and real responses, and the loaders over the synthetic rows made from them.

    The rows of an iterate are made by the `SelfPlay` callback; the loaders are asked for anew at
    every epoch and read the rows of the iterate at hand.

    Some examples are held out: whole prompts, or, where there are few prompts, as in the testbed,
    single responses.

    Args:
        data: A json, jsonl, parquet or csv file, a folder of them, or a hub id
            `owner/name[:split]`.
        columns: Our names (`messages`, or `prompt` and `response`) to the file's columns, where
            they are not recognized.
        max_examples: Use this many examples, picked by the seed; all if nothing is said.
        prompts_per_iterate: Examples that an iterate is made from, another pick for each; all if
            nothing is said.
        samples_per_prompt: Generated responses per example.
        max_prompt_tokens: Examples with longer prompts are left out.
        max_response_tokens: One cap for real and generated responses, the stop id counted.
        val_fraction: Share of the examples that is held out, at most 256 of them; 0 for none.
        val_examples: Number of examples that is held out, instead of a share.
        val_data: Held-out examples from another file or hub id, instead of a share.
        batch_size: Pairs of a batch on one device.
        num_workers: Processes that collate batches.
        bad_rows: Leave out rows that cannot be used and report them (`skip`, up to half of the
            rows; `skip_any`, however many), or refuse the data (`refuse`).

    Raises:
        SettingError: A value is out of range.
    """

    def __init__(
        self,
        data: str,
        columns: dict[str, str] | None = None,
        max_examples: int | None = None,
        prompts_per_iterate: int | None = None,
        samples_per_prompt: int = 1,
        max_prompt_tokens: int | None = 512,
        max_response_tokens: int = 256,
        val_fraction: float = 0.05,
        val_examples: int | None = None,
        val_data: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        bad_rows: Literal["skip", "skip_any", "refuse"] = "skip",
    ) -> None:
        """Keep the settings; data is read by `setup`."""
        super().__init__()
        self.data = data
        self.columns = columns
        self.max_examples = max_examples
        self.prompts_per_iterate = prompts_per_iterate
        self.samples_per_prompt = samples_per_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.val_fraction = val_fraction
        self.val_examples = val_examples
        self.val_data = val_data
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.bad_rows = bad_rows
        self.format: PromptFormat | None = None
        self.train: list[Example] = []
        self.val: list[Example] = []
        self.run_folder: RunFolder | None = None
        self._hashes: dict[str, str] = {}
        self._check_ranges()

    # ------------------------------------------------------------------ examples

    def setup(self, stage: str) -> None:
        """Read and tokenize the examples, and hold some out.

        Raises:
            DataError: The data cannot be used.
        """
        if self.format is not None:
            return
        module = self._module
        if stage == "fit":
            module.check_trainer()
        if module.refresh == "reservoir" and self.prompts_per_iterate is not None:
            raise SettingError(
                "data.prompts_per_iterate",
                self.prompts_per_iterate,
                "every iterate has other prompts, and refresh: reservoir keeps rows",
                fix="set model.refresh: all, or play on all prompts",
            )
        module.check_model()
        text_format = PromptFormat.of(module.tokenizer, module.generation_stop_ids)
        examples = self._read(self.data, "data", text_format, self.max_examples)
        if self.val_data is not None:
            self.train = examples
            limit = _MOST_VAL_EXAMPLES if self.val_examples is None else self.val_examples
            self.val = self._read(self.val_data, "val_data", text_format, limit)
            held_out = f"{len(self.val)} examples of {source_name(self.val_data)}"
        else:
            self.train, self.val, held_out = hold_out(examples, self._val_count(len(examples)))
        _check_ids([*self.train, *self.val], text_format, module.vocabulary)
        self.format = text_format
        self._hashes = {"data": content_hash(self.train), "val_data": content_hash(self.val)}
        rank_zero_info(f"Data: {len(self.train)} examples to play on, held out {held_out}.")

    def iterate_examples(self, t: int) -> list[Example]:
        """The examples that the rows of iterate t are made from."""
        count = self.prompts_per_iterate
        if count is None or count >= len(self.train):
            return self.train
        return [self.train[i] for i in keyed.subset(self.seed, t, len(self.train), count)]

    def rows_at(self, t: int) -> int:
        """Number of training rows of iterate t, known before they are made."""
        prompts = min(self.prompts_per_iterate or len(self.train), len(self.train))
        return prompts * self.samples_per_prompt * int(self._module.rows_per_sample(t))

    def batches_per_epoch(self, t: int, world_size: int) -> int:
        """Number of batches that each rank sees in an epoch on the rows of iterate t."""
        return len(EpochBatches(self.rows_at(t), self.batch_size, world_size=world_size))

    def rank_share(self, t: int, batch_idx: int, *, held_out: bool = False) -> float:
        """What this rank's mean over a batch of iterate t weighs, see `EpochBatches.share`."""
        trainer = self._trainer
        ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        rows = len(self.val) if held_out else self.rows_at(t)
        return EpochBatches(rows, self.batch_size, **ranks).share(batch_idx)

    def fingerprint_fields(self) -> dict[str, Any]:
        """What must stay the same for rows to be those of the same run."""
        assert self.format is not None
        return {
            **self._hashes,
            "prompts_per_iterate": self.prompts_per_iterate,
            "samples_per_prompt": self.samples_per_prompt,
            "max_response_tokens": self.max_response_tokens,
            "batch_size": self.batch_size,
            "stop_ids": list(self.format.stop_ids),
            "chat_template": self.format.template_hash,
        }

    # ------------------------------------------------------------------ rows

    def train_dataloader(self) -> RowLoader:
        """A loader over the training rows of the iterate at hand, in this epoch's order.

        Raises:
            RunFolderError: The rows are not all there.
        """
        return self._loader(self._run.rows(self._module.iterate), self._trainer.current_epoch)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        """A loader over the held-out rows of the iterate at hand; none without any."""
        if not self.val:
            return []
        return self._loader(self._run.val_rows(self._module.iterate), epoch=None)

    def _loader(self, folder: Path, epoch: int | None) -> RowLoader:
        assert self.format is not None
        module, trainer = self._module, self._trainer
        table = read_rows(folder)
        return RowLoader(
            PairDataset(table, module.reference(module.iterate)),
            EpochBatches(
                rows=len(table),
                batch_size=self.batch_size,
                seed=self.seed,
                epoch=epoch,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            ),
            collate_fn=collate,
            num_workers=self.num_workers,
        )

    @property
    def _run(self) -> RunFolder:
        if self.run_folder is None:
            raise RunFolderError(
                "no rows were made yet",
                fix="train with the SelfPlay callback, which makes them, before asking for loaders",
            )
        return self.run_folder

    # ------------------------------------------------------------------ details

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return keyed.global_seed()

    @property
    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RunFolderError(
                "this data module is not attached to a Trainer, whose module brings the tokenizer",
                fix="pass it to Trainer.fit(module, datamodule)",
            )
        return self.trainer

    @property
    def _module(self) -> Any:
        return self._trainer.lightning_module

    def _read(
        self, source: object, setting: str, text_format: PromptFormat, limit: int | None
    ) -> list[Example]:
        conversations, report = read_data(source, self.columns, setting)
        for note in report.notes():
            rank_zero_info(f"{report.source}: {note}")
        if limit is not None and limit < len(conversations):
            picked = keyed.subset(self.seed, 0, len(conversations), limit)
            conversations = [conversations[i] for i in picked]
        examples, unfit = self._tokenize(conversations, text_format)
        skipped = checked_bad_rows(report, unfit, len(conversations), self.bad_rows)
        if skipped:
            rank_zero_info(f"{report.source}: left out {skipped}")
        return examples

    def _tokenize(
        self, conversations: Iterable[Conversation], text_format: PromptFormat
    ) -> tuple[list[Example], list[BadRow]]:
        made = [
            text_format.tokenize(
                conversation,
                max_prompt_tokens=self.max_prompt_tokens,
                max_response_tokens=self.max_response_tokens,
                context=self._module.context_length,
            )
            for conversation in conversations
        ]
        return (
            [example for example in made if isinstance(example, Example)],
            [row for row in made if isinstance(row, BadRow)],
        )

    def _val_count(self, examples: int) -> int:
        share = min(_MOST_VAL_EXAMPLES, round(self.val_fraction * examples))
        count = share if self.val_examples is None else self.val_examples
        if count >= examples:
            raise SettingError(
                "data.val_examples",
                count,
                f"there are only {examples} examples in all",
                fix="hold out fewer",
            )
        return count

    def _check_ranges(self) -> None:
        positive = (
            "max_examples",
            "prompts_per_iterate",
            "samples_per_prompt",
            "max_prompt_tokens",
            "max_response_tokens",
            "batch_size",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1):
                raise SettingError(
                    f"data.{name}", value, "out of range", fix="give a whole number, 1 or more"
                )
        if self.bad_rows not in ("skip", "skip_any", "refuse"):
            raise SettingError(
                "data.bad_rows",
                self.bad_rows,
                "there is no such choice",
                fix="skip, skip_any, or refuse",
            )
        for name, most in (("val_examples", MOST), ("num_workers", _MOST_WORKERS)):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 0, most):
                raise SettingError(
                    f"data.{name}", value, "out of range", fix=f"give a whole number, 0 to {most}"
                )
        if not is_number(self.val_fraction) or not 0 <= self.val_fraction < 1:
            raise SettingError(
                "data.val_fraction", self.val_fraction, "out of range", fix="give a share in [0, 1)"
            )


def hold_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example], str]:
    """Split off at most `count` examples: whole prompts, or responses where there are few prompts.

    Which ones depends on the seed. A prompt that occurs several times goes to one side whole.

    Args:
        examples: All examples.
        count: How many to hold out; less where no prompt has few enough responses.

    Returns:
        The examples to train on, those held out, and a phrase that says what was held out.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.prompt_ids, []).append(i)
    by_prompt = len(groups) >= _FEWEST_PROMPTS
    clusters = list(groups.values()) if by_prompt else [[i] for i in range(len(examples))]
    seed = keyed.global_seed()
    order = keyed.epoch_order(keyed.row_key(seed, -1, 0, 0), 0, len(clusters))
    held: set[int] = set()
    for cluster in order:
        # A prompt with more responses than are still wanted stays, and a smaller one is looked for.
        if len(held) + len(clusters[cluster]) <= count:
            held.update(clusters[cluster])
    train = [example for i, example in enumerate(examples) if i not in held]
    val = [example for i, example in enumerate(examples) if i in held]
    if by_prompt:
        return train, val, f"{len(val)} examples with prompts of their own"
    return (
        train,
        val,
        (f"{len(val)} responses (not prompts: the data has only {len(groups)} different prompts)"),
    )


def _check_ids(examples: Sequence[Example], text_format: PromptFormat, vocabulary: int) -> None:
    """Refuse a tokenizer that writes ids which the model has no embedding for."""
    largest = max(
        text_format.pad_id,
        *text_format.stop_ids,
        *(max(*example.prompt_ids, *example.real_ids) for example in examples),
    )
    if largest >= vocabulary:
        raise SettingError(
            "model",
            text_format.tokenizer.name_or_path,
            f"its tokenizer writes the id {largest}, and it has {vocabulary} embeddings",
            fix="use the tokenizer that the model was trained with",
        )


def content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the ids of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        lengths = (example.example_id, len(example.prompt_ids), len(example.real_ids))
        ids = (*example.prompt_ids, *example.real_ids)
        digest.update(struct.pack(f"<3q{len(ids)}i", *lengths, *ids))
    return digest.hexdigest()
