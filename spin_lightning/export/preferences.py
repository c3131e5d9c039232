"""The rows of an iterate as a preference data set for TRL: prompt, chosen and rejected."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.data.numbering import place
from spin_lightning.data.samples import plain_prompt_ids
from spin_lightning.data.thoughts import settle, thinking_message
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import DataError, RunFolderError, first_line
from spin_lightning.export.checks import ExportError
from spin_lightning.export.model import CARD, new_folder
from spin_lightning.rows.manifest import read_manifest
from spin_lightning.rows.store import RowTable, read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import Conversation

_TOKENIZER: Final = "tokenizer"
_CHECKED: Final = 8
_CARD: Final = """\
---
configs:
- config_name: default
  data_files:
{files}
tags:
- trl
- preference
- spin-lightning
---

# Rows of iterate {t} ({variant})

`chosen` is the response of the data set, `rejected` what the opponent of iterate {t} generated for
the same prompt. {form} `finished` says whether the generated response ended by itself: TRL ends
every response, also those that were cut at {cap} tokens.

```python
from datasets import load_dataset
from transformers import AutoTokenizer

rows = load_dataset("{name}", split="train")
tokenizer = AutoTokenizer.from_pretrained("{name}/tokenizer")
```

`DPOTrainer(model, train_dataset=rows, processing_class=tokenizer)` trains on them; the tokenizer
has the chat template of the run.

{check}
"""


@dataclass(frozen=True)
class Texts:
    """The texts of a run's data, read again from their source.

    Attributes:
        text_format: How the run turns text into ids.
        train: The conversations of `data`, by example id.
        held_out: Those of `val_data`; the same as `train` where the run holds out a share.
    """

    text_format: PromptFormat
    train: Mapping[int, Conversation]
    held_out: Mapping[int, Conversation]


def export_preferences(
    run_dir: str | Path,
    t: int | str,
    out: str | Path,
    texts: Texts,
    notify: Callable[[str], None] = print,
) -> Path:
    """Write the rows that iterate t made as a preference data set.

    Training rows are the split `train`, held-out rows the split `test`. Where the run uses a chat
    template, prompts and responses are lists of messages, else plain text. Before the folder gets
    its name, prompts and responses of eight rows of each split are turned into ids as TRL does it,
    and compared with the ids of the rows.

    Args:
        run_dir: The run folder.
        t: Index of the iterate, "best", or "last": the newest one that made training rows.
        out: The folder to write; it must be empty or not exist.
        texts: The data, read again.
        notify: Receives what the user should know, line by line.

    Returns:
        The folder.

    Raises:
        RunFolderError: The iterate made no rows with responses.
        DataError: The data are not those of the run.
        ExportError: TRL would read other ids than those of the rows.
    """
    run = RunFolder(Path(run_dir))
    t = _newest_with_rows(run) if t == "last" else run.index_of(t)
    run.check_tokenizer()
    with new_folder(Path(out)) as staged:
        train = _read(run, t)
        splits = [("train", train, texts.train)]
        if read_manifest(run.val_rows(t)) is not None:
            splits.append(("test", read_rows(run.val_rows(t)), texts.held_out))
        checks = []
        for split, table, conversations in splits:
            rows, check = _checked_rows(table, conversations, texts.text_format)
            checks.append(f"{split}: {check}")
            notify(checks[-1])
            _write(rows, staged / f"{split}.parquet")
        texts.text_format.tokenizer.save_pretrained(staged / _TOKENIZER)
        names = [split for split, _, _ in splits]
        card = _card(run, t, Path(out).name, names, checks, texts.text_format)
        (staged / CARD).write_text(card, encoding="utf-8")
    return Path(out)


def _checked_rows(
    table: RowTable, conversations: Mapping[int, Conversation], text_format: PromptFormat
) -> tuple[list[dict[str, Any]], str]:
    """The rows as TRL reads them, and what their check found.

    TRL joins a prompt and a response that are plain texts. Some tokenizers read a text that stands
    alone as if a blank were before it, so that the response has to begin with one.
    """
    joints = ("", " ") if text_format.template is None else ("",)
    for joint in joints:
        rows = [_row(table, i, conversations, text_format, joint) for i in range(len(table))]
        try:
            return rows, check_rows(rows, table, text_format)
        except ExportError:
            if joint == joints[-1]:
                raise
    raise AssertionError("the last joint returned or raised")


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        pq.write_table(pa.Table.from_pylist(rows), path)
    except pa.ArrowException as error:
        raise DataError(
            f"the rows do not fit the columns of a table ({first_line(error)})",
            fix="give tool calls arguments of the same types in every row",
        ) from error


def check_rows(
    rows: Sequence[Mapping[str, Any]], table: RowTable, text_format: PromptFormat
) -> str:
    """Turn some rows into ids as TRL does, and compare them with those of the run.

    Returns:
        What was found, in a sentence.

    Raises:
        ExportError: Ids of a prompt or of a real response are others.
    """
    step = max(1, len(rows) // _CHECKED)
    checked = range(0, len(rows), step)[:_CHECKED]
    same = 0
    for i in checked:
        prompt = tuple(table.prompt_ids[i].tolist())
        name = f"row {i} (example {place(int(table.example_id[i]))})"
        if _ids(rows[i], None, text_format) != prompt:
            raise ExportError(
                f"the export was not kept: TRL would read other ids for the prompt of {name} than "
                "those of the run",
                fix=_SPELLED_OUT,
            )
        real = (*prompt, *table.real_ids[i].tolist())
        if _ids(rows[i], "chosen", text_format)[: len(real)] != real and table.real_finished[i]:
            raise ExportError(
                f"the export was not kept: TRL would read other ids for the chosen response of "
                f"{name} than those of the run",
                fix=_SPELLED_OUT,
            )
        generated = (*prompt, *table.generated_ids[i].tolist())
        same += _ids(rows[i], "rejected", text_format)[: len(generated)] == generated
    cut = int((~table.finished).sum())
    return (
        f"{len(rows):,} rows, {cut:,} with a generated response that was cut. Of {len(checked)} "
        f"rows, TRL reads prompts and chosen responses with the run's ids, and {same} rejected "
        "ones (sampled tokens need not be those that their text is split into)."
    )


_SPELLED_OUT: Final = (
    "train on the rows' ids with spin_lightning.load_rows: texts that spell out special tokens, "
    "and tokenizers that join prompt and response, cannot be handed over as text"
)


def _ids(row: Mapping[str, Any], side: str | None, text_format: PromptFormat) -> tuple[int, ...]:
    """Ids of a prompt, alone or with a response, as TRL computes them."""
    tokenizer, template = text_format.tokenizer, text_format.template
    if template is None:
        end = tokenizer.eos_token if side else ""
        text = row["prompt"] + (row[side] if side else "") + end
        return tuple(tokenizer(text)["input_ids"])
    tools = json.loads(row["tools"]) if row.get("tools") else ()
    if side is None:
        return plain_prompt_ids(tokenizer, row["prompt"], tools, template.date)
    text = template.render([*row["prompt"], *row[side]], to_be_answered=False, tools=tools)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _newest_with_rows(run: RunFolder) -> int:
    found = [t for t in run.known_iterates() if read_manifest(run.rows(t)) is not None]
    return max(found, default=0)


def _read(run: RunFolder, t: int) -> RowTable:
    table = read_rows(run.rows(t))
    if not len(table.generated_ids.values):
        raise RunFolderError(
            f"the rows of iterate {t} of {run.root} have no generated responses",
            fix="export the rows of a run that plays against an opponent",
        )
    return table


def _row(
    table: RowTable,
    i: int,
    conversations: Mapping[int, Conversation],
    text_format: PromptFormat,
    joint: str,
) -> dict[str, Any]:
    """A row as TRL reads it; `joint` stands before plain responses."""
    example = int(table.example_id[i])
    conversation = conversations.get(example)
    known = tuple(table.prompt_ids[i].tolist())
    spoken = None if conversation is None else settle(conversation, text_format.thoughts)
    if spoken is None or text_format.prompt_ids(spoken.turns, spoken.tools) != known:
        raise DataError(
            f"example {place(example)} of the data is not the one of the run",
            fix="restore the data that the run was made with, at the place that its config.yaml "
            "names",
        )
    generated = table.generated_ids[i].tolist()
    answer = str(text_format.tokenizer.decode(generated[:-1] if table.finished[i] else generated))
    finished = bool(table.finished[i])
    if text_format.template is None:
        prompt: Any = spoken.turns[0]["content"]
        chosen: Any = joint + spoken.text
        rejected: Any = joint + answer
    else:
        said = (
            spoken.message
            if spoken.thought is None
            else thinking_message(spoken, in_text=spoken.in_text)
        )
        prompt = [dict(turn) for turn in spoken.turns]
        chosen, rejected = [dict(said)], [{"role": "assistant", "content": answer}]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if spoken.tools:
        row["tools"] = json.dumps([dict(tool) for tool in spoken.tools], ensure_ascii=False)
    return {**row, "finished": finished, "example_id": example}


def _card(
    run: RunFolder,
    t: int,
    name: str,
    splits: Sequence[str],
    checks: Sequence[str],
    text_format: PromptFormat,
) -> str:
    manifest = read_manifest(run.rows(t))
    assert manifest is not None
    form = (
        "Texts are plain: the tokenizer has no chat template."
        if text_format.template is None
        else "Both are lists of messages."
    )
    return _CARD.format(
        files="\n".join(f"  - split: {s}\n    path: {s}.parquet" for s in splits),
        t=t,
        variant=run.record(t).variant,
        form=form,
        cap=manifest.cap,
        name=name,
        check="\n".join(f"- {check}" for check in checks),
    )
