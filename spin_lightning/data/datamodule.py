"""The data module: examples in any accepted format, and loaders over the rows of an iterate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning import keyed
from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import EpochBatches, PairDataset, RowLoader
from spin_lightning.data.examples import ExampleReader, check_ids, content_hash
from spin_lightning.data.formats import read_data
from spin_lightning.data.held_out import MOST_HELD_OUT, held_out_count, hold_out
from spin_lightning.data.read_report import ReadReport
from spin_lightning.data.sources import source_name
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import (
    MOST,
    RunFolderError,
    SettingError,
    check_settings,
    is_number,
    is_whole,
)
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import Conversation, Example, ModuleForData

# Collating is fast: more processes would only use up the machine.
_MOST_WORKERS = 256
# Settings that are positive integers.
_COUNTS = (
    "max_examples",
    "prompts_per_iterate",
    "samples_per_prompt",
    "max_prompt_tokens",
    "max_response_tokens",
    "batch_size",
)


class SelfPlayDataModule(L.LightningDataModule):
    """Prompts and real responses, and the loaders over the synthetic rows made from them.

    The `SelfPlay` callback makes the rows of an iterate. The loaders are rebuilt at every epoch and
    read the rows of the current iterate.

    Some examples are held out: whole prompts, or single responses if there are few prompts, as in
    the testbed.

    Args:
        data: A json, jsonl, parquet or csv file, a folder of them, or a hub id
            `owner/name[:split]`.
        columns: Our names (`messages`, or `prompt` and `response`) to the file's columns, if these
            are not recognized.
        max_examples: Number of examples to use, drawn with the seed; default all.
        prompts_per_iterate: Number of examples per iterate, drawn again for each; default all.
        samples_per_prompt: Generated responses per example.
        max_prompt_tokens: Examples with longer prompts are skipped.
        max_response_tokens: Cap of real and generated responses, including the stop id.
        val_fraction: Share of the examples to hold out, at most 256 of them; 0 for none.
        val_examples: Number of examples to hold out, instead of a share.
        val_data: Held-out examples from another file or hub id, instead of a share.
        batch_size: Pairs in a batch on one device.
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
        """Keep the settings. `setup` reads the data."""
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
                "every iterate has other prompts, so refresh: reservoir cannot keep rows",
                fix="set model.refresh: all, or play on all prompts",
            )
        module.check_model()
        text_format = PromptFormat.of(module.tokenizer, module.generation_stop_ids)
        held_out = self._read(text_format)
        check_ids([*self.train, *self.val], text_format, module.vocabulary)
        self.format = text_format
        self._hashes = {"data": content_hash(self.train), "val_data": content_hash(self.val)}
        rank_zero_info(f"Data: {len(self.train)} examples for training, held out {held_out}.")

    def _read(self, text_format: PromptFormat) -> str:
        """Read the examples of both sets, and return a description of those held out."""
        reader = ExampleReader(
            text_format=text_format,
            read_conversations=self.read_conversations,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            context=self._module.context_length,
            bad_rows=self.bad_rows,
            seed=self.seed,
        )
        examples = reader.read(self.data, "data", self.max_examples)
        if self.val_data is None:
            count = held_out_count(len(examples), self.val_fraction, self.val_examples)
            self.train, self.val, held_out = hold_out(examples, count)
            return held_out
        limit = MOST_HELD_OUT if self.val_examples is None else self.val_examples
        self.train, self.val = examples, reader.read(self.val_data, "val_data", limit)
        return f"{len(self.val)} examples of {source_name(self.val_data)}"

    def read_conversations(
        self, source: object, setting: str
    ) -> tuple[list[Conversation], ReadReport]:
        """Read a source as text; override this for a format of your own.

        Args:
            source: What `data` or `val_data` names.
            setting: Which of the two, for messages.

        Returns:
            The conversations, and what became of the rows (`ReadReport.of_rows`).
        """
        return read_data(source, self.columns, setting)

    def iterate_examples(self, t: int) -> list[Example]:
        """The examples that rows of iterate t are made from."""
        count = self.prompts_per_iterate
        if count is None or count >= len(self.train):
            return self.train
        return [self.train[i] for i in keyed.subset(self.seed, t, len(self.train), count)]

    def rows_at(self, t: int) -> int:
        """Number of training rows of iterate t, which need not be made yet."""
        prompts = min(self.prompts_per_iterate or len(self.train), len(self.train))
        return prompts * self.samples_per_prompt * self._module.rows_per_sample(t)

    def batches_per_epoch(self, t: int, world_size: int) -> int:
        """Number of batches that each rank gets in an epoch on the rows of iterate t."""
        return len(EpochBatches(self.rows_at(t), self.batch_size, world_size=world_size))

    def rank_share(self, t: int, batch_idx: int, *, held_out: bool = False) -> float:
        """Weight of this rank's mean over a batch of iterate t, see `EpochBatches.share`."""
        trainer = self._trainer
        ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        rows = len(self.val) if held_out else self.rows_at(t)
        return EpochBatches(rows, self.batch_size, **ranks).share(batch_idx)

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings and data that all rows of a run have in common."""
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
        """A loader over the training rows of the current iterate, in this epoch's order.

        Raises:
            RunFolderError: Rows are missing.
        """
        return self._loader(self.rows_folder(self._module.iterate), self._trainer.current_epoch)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        """A loader over the held-out rows of the current iterate; no loader if there are none."""
        if not self.val:
            return []
        return self._loader(self._run.val_rows(self._module.iterate), epoch=None)

    def rows_folder(self, t: int) -> Path:
        """Folder of the training rows of iterate t."""
        return self._run.rows(t)

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
                "no rows have been made yet",
                fix="train with the SelfPlay callback, which makes rows before loaders are used",
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
                "this data module is not attached to a Trainer, whose module has the tokenizer",
                fix="pass it to Trainer.fit(module, datamodule)",
            )
        return self.trainer

    @property
    def _module(self) -> ModuleForData:
        return cast(ModuleForData, self._trainer.lightning_module)

    def _check_ranges(self) -> None:
        if self.bad_rows not in ("skip", "skip_any", "refuse"):
            raise SettingError(
                "data.bad_rows",
                self.bad_rows,
                "there is no such choice",
                fix="skip, skip_any, or refuse",
            )
        counts = {
            name: (value is None or is_whole(value, 1), "a whole number, 1 or more")
            for name, value in ((name, getattr(self, name)) for name in _COUNTS)
        }
        held_out, fraction = self.val_examples, self.val_fraction
        check_settings(
            self,
            {
                **counts,
                "val_examples": (
                    held_out is None or is_whole(held_out, 0),
                    f"a whole number, 0 to {MOST}",
                ),
                "num_workers": (
                    is_whole(self.num_workers, 0, _MOST_WORKERS),
                    f"a whole number, 0 to {_MOST_WORKERS}",
                ),
                "val_fraction": (
                    is_number(fraction) and 0 <= fraction < 1,
                    "a number in [0, 1)",
                ),
            },
            prefix="data.",
        )
