"""The data module: examples in any accepted format, and loaders over the rows of an iterate."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning import keyed
from spin_lightning.data.collate import collate
from spin_lightning.data.data_record import DataRecord, chosen
from spin_lightning.data.dataset import EpochBatches, PairDataset, RowLoader
from spin_lightning.data.examples import ExampleReader, check_ids, content_hash
from spin_lightning.data.formats import Turns, read_data
from spin_lightning.data.held_out import MOST_HELD_OUT, held_out_count, hold_out
from spin_lightning.data.overview import Overview
from spin_lightning.data.read_report import BadRows, ReadReport
from spin_lightning.data.samples import SampleConversation, sample_conversations
from spin_lightning.data.settings import check_data_settings
from spin_lightning.data.sources import source_name
from spin_lightning.data.thoughts import Thoughts
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import Conversation, Example, ModuleForData

# Files, hub ids, lists of them, and data that lies in memory; see `sources.open_source`.
Source = str | Path | list[str] | Any


class SelfPlayDataModule(L.LightningDataModule):
    """Prompts and real responses, and the loaders over the synthetic rows made from them.

    The `SelfPlay` callback makes the rows of an iterate. The loaders are rebuilt at every epoch and
    read the rows of the current iterate.

    Some examples are held out: whole prompts, or single responses if there are few prompts, as in
    the testbed.

    Args:
        data: A file (json, jsonl, ndjson, csv, tsv, parquet, arrow), a folder of them, a pattern
            such as `data/*.jsonl`, a hub id, or gsm8k_small, each with `:split` or without; a list
            of these; in a notebook also a list of dictionaries, a DataFrame or a `Dataset`.
        columns: Our names (`messages`, or `prompt` and `response`) to the file's columns, if these
            are not recognized.
        max_examples: Number of examples to use, drawn with the seed; default all.
        prompts_per_iterate: Number of examples per iterate, drawn again for each; default all.
        samples_per_prompt: Generated responses per example.
        max_prompt_tokens: Examples with longer prompts are skipped.
        max_response_tokens: Cap of real and generated responses, including the stop id.
        val_fraction: Share of the examples to hold out, at most 256 of them; 0 for none.
        val_examples: Number of examples to hold out, instead of a share.
        val_data: Held-out examples from another source like `data`, instead of a share.
        batch_size: Pairs in a batch on one device.
        num_workers: Processes that collate batches.
        bad_rows: Leave out rows that cannot be used and report them (`skip`, up to half of the
            rows; `skip_any`, however many), or refuse the data (`refuse`).
        chat_template: File with a Jinja chat template that replaces the tokenizer's.
        chat_template_kwargs: Variables of the chat template, such as `enable_thinking: false`.
        thoughts: What becomes of thoughts in the data (`reasoning_content`, `thinking` or a
            `<think>` part): leave out examples that have one (`refuse`), make it part of the
            answer (`keep`), or remove it (`drop`).
        turns: Make an example of the `last` answer of a conversation, or of `all` of its answers,
            each with the turns before it as its prompt.

    Raises:
        SettingError: A value is out of range, or there is no such choice.
    """

    def __init__(
        self,
        data: Source,
        columns: dict[str, str] | None = None,
        max_examples: int | None = None,
        prompts_per_iterate: int | None = None,
        samples_per_prompt: int = 1,
        max_prompt_tokens: int | None = 512,
        max_response_tokens: int = 256,
        val_fraction: float = 0.05,
        val_examples: int | None = None,
        val_data: Source = None,
        batch_size: int = 8,
        num_workers: int = 0,
        bad_rows: BadRows = "skip",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        thoughts: Thoughts = "refuse",
        turns: Turns = "last",
    ) -> None:
        """Keep the settings. `setup` reads the data."""
        super().__init__()
        # Not by save_hyperparameters: data in memory do not belong into checkpoints and logs.
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
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.thoughts = thoughts
        self.turns = turns
        self.format: PromptFormat | None = None
        self.train: list[Example] = []
        self.val: list[Example] = []
        self.samples: list[SampleConversation] = []
        self.run_folder: RunFolder | None = None
        self.overviews: list[Overview] = []
        self._hashes: dict[str, str] = {}
        self._read_for: tuple[Hashable, ...] = ()
        check_data_settings(self)

    # ------------------------------------------------------------------ examples

    def setup(self, stage: str) -> None:
        """Read and tokenize the examples, and hold some out.

        Doing it again changes nothing, unless the model, the seed or the run has changed.

        Raises:
            DataError: The data cannot be used.
        """
        module = self._module
        if stage == "fit":
            module.check_trainer()
        self._check_prompts(module)
        module.check_model()
        date = self._date()
        read_for = (
            module.tokenizer,
            str(module.generation_stop_ids),
            module.vocabulary,
            module.context_length,
            self.seed,
            date,
        )
        if self.format is not None and self._read_for == read_for:
            return
        text_format = self.make_format(module, date)
        reader = self.make_reader(module, text_format)
        held_out = self._read(reader)
        self.samples = sample_conversations(self.val or self.train, reader.texts, text_format)
        check_ids([*self.train, *self.val], text_format, module.vocabulary)
        self.format, self._read_for = text_format, read_for
        self._hashes = {"data": content_hash(self.train), "val_data": content_hash(self.val)}
        rank_zero_info(f"Data: {len(self.train)} examples for training, held out {held_out}.")

    def make_format(self, module: ModuleForData, date: dt.date | None = None) -> PromptFormat:
        """How these settings turn text into ids for a model.

        Args:
            module: The model's module.
            date: The date that a chat template writes as today's; default today.
        """
        return PromptFormat.of(
            module.tokenizer,
            module.generation_stop_ids,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            thoughts=self.thoughts,
            date=date,
        )

    def make_reader(self, module: ModuleForData, text_format: PromptFormat) -> ExampleReader:
        """How these settings read a source for a model."""
        return ExampleReader(
            text_format=text_format,
            read_conversations=self.read_conversations,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            context=module.context_length,
            bad_rows=self.bad_rows,
            seed=self.seed,
        )

    def _read(self, reader: ExampleReader) -> str:
        """Read the examples of both sets, and return a description of those held out."""
        examples, overview = reader.read(self.data, "data", self.max_examples)
        self.overviews = [overview]
        if self.val_data is None:
            count = held_out_count(len(examples), self.val_fraction, self.val_examples)
            self.train, self.val, held_out = hold_out(examples, count)
            return held_out
        limit = MOST_HELD_OUT if self.val_examples is None else self.val_examples
        self.train = examples
        self.val, overview = reader.read(self.val_data, "val_data", limit)
        self.overviews.append(overview)
        return f"{len(self.val)} examples of {source_name(self.val_data)}"

    def _check_prompts(self, module: ModuleForData) -> None:
        """Refuse other prompts at every iterate where rows of an earlier one are needed."""
        if self.prompts_per_iterate is None:
            return
        needs = {
            "refresh: reservoir cannot keep rows": (
                module.refresh == "reservoir",
                "set model.refresh: all, or play on all prompts",
            ),
            f"iterate 0 has not answered those that {type(module).__name__} needs": (
                module.uses_first_responses,
                "play on all prompts: leave data.prompts_per_iterate out",
            ),
        }
        for problem, (is_needed, fix) in needs.items():
            if is_needed:
                raise SettingError(
                    "data.prompts_per_iterate",
                    self.prompts_per_iterate,
                    f"every iterate has other prompts, so {problem}",
                    fix=fix,
                )

    def records(self) -> list[dict[str, Any]]:
        """What was read from each source, with three examples, as plain values for the report."""
        assert self.format is not None, "setup() chose it"
        shown = (self.train, self.val)
        return [
            DataRecord.of(overview, chosen(examples), self.format.tokenizer).to_json()
            for overview, examples in zip(self.overviews, shown, strict=False)
        ]

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
        return read_data(source, self.columns, setting, self.turns)

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

    def window_share(self, t: int, batch_idx: int, batches: int, limit: int) -> float:
        """Weight of a batch of iterate t in its step, see `EpochBatches.window_share`."""
        world_size = self._trainer.world_size
        rows = EpochBatches(self.rows_at(t), self.batch_size, world_size=world_size)
        return rows.window_share(batch_idx, batches, limit)

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
            # The default is left out: runs of versions without this setting can be resumed.
            **({} if self.turns == "last" else {"turns": self.turns}),
        }

    # ------------------------------------------------------------------ rows

    def train_dataloader(self) -> RowLoader:
        """A loader over the training rows of the current iterate, in this epoch's order.

        Raises:
            RunFolderError: Rows are missing.
        """
        return self._loader(self.rows_folder, self._trainer.current_epoch)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        """A loader over the held-out rows of the current iterate; no loader if there are none."""
        if not self.val:
            return []
        return self._loader(self._run.val_rows, epoch=None)

    def rows_folder(self, t: int) -> Path:
        """Folder of the training rows of iterate t."""
        return self._run.rows(t)

    def _loader(self, folder: Callable[[int], Path], epoch: int | None) -> RowLoader:
        assert self.format is not None
        module, trainer = self._module, self._trainer
        t, table = module.iterate, read_rows(folder(module.iterate))
        first = read_rows(folder(0)) if module.uses_first_responses else None
        return RowLoader(
            PairDataset(table, module.reference(t), module.further_references(t), first),
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

    def _date(self) -> dt.date:
        """The date that a chat template writes as today's: that of the run's first start."""
        trainer = self._trainer
        root = Path(trainer.default_root_dir)
        # A trainer without a folder of its own starts a new run.
        first = None if root.resolve() == Path.cwd() else RunFolder(root).first_date()
        # One date for all ranks, which may start on both sides of midnight.
        date: dt.date = trainer.strategy.broadcast(first or dt.date.today())
        return date

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
