"""Whether an exported folder is the iterate, as transformers and PEFT alone load it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from spin_lightning.data.numbering import place
from spin_lightning.data.samples import plain_prompt_ids
from spin_lightning.data.tokenize import listed
from spin_lightning.errors import SpinError, first_line
from spin_lightning.export.expected import Expected, ExpectedRow
from spin_lightning.out_of_memory import is_out_of_memory
from spin_lightning.policies.exported import load_exported, plain_logps
from spin_lightning.types import Message

# Largest accepted difference of a row's log-prob, in nats per square root of a token: rounding of
# single tokens adds up like a random walk. The passes of a run may differ by as much themselves
# (`policies.self_check`), float32 aside, where merging rounds as well.
_FLOAT32: Final = 0.01
_NARROW: Final = 0.2
_INT8: Final = 0.3
# For runs that keep no conversations.
_GREETING: Final = (
    Message(role="user", content="What is the capital of France?"),
    Message(role="assistant", content="Paris."),
    Message(role="user", content="And of Spain?"),
)


class ExportError(SpinError):
    """An exported folder is not the iterate; it was not kept."""


@dataclass(frozen=True)
class Verification:
    """An exported folder that is the iterate.

    Attributes:
        rows: The rows.
        logps: log-prob of each from the exported folder, nats.
        bounds: Largest accepted difference of each, nats.
        source: Where the run's log-probs come from, in words.
        prompts: What the ids of prompts were compared with, in words.
    """

    rows: Sequence[ExpectedRow]
    logps: Sequence[float]
    bounds: Sequence[float]
    source: str
    prompts: str

    @property
    def largest(self) -> float:
        """Largest difference of a log-prob, nats."""
        return max(abs(row.logp - logp) for row, logp in zip(self.rows, self.logps, strict=True))

    def __str__(self) -> str:
        """For the user."""
        return (
            f"Verified with transformers and PEFT alone on {len(self.rows)} rows "
            f"({self.source}): log-probs differ by at most {self.largest:.2g} nats. {self.prompts}"
        )

    def table(self) -> list[list[str]]:
        """A line per row below a head."""
        head = ["row", "tokens", "log-prob in the run", "exported", "difference", "accepted"]
        return [
            head,
            *(
                [
                    row.name,
                    str(len(row.response_ids)),
                    f"{row.logp:.4f}",
                    f"{logp:.4f}",
                    f"{logp - row.logp:+.2g}",
                    f"{bound:.2g}",
                ]
                for row, logp, bound in zip(self.rows, self.logps, self.bounds, strict=True)
            ),
        ]


def verify(folder: Path, expected: Expected, changed: Sequence[str]) -> Verification:
    """Compare an exported folder with what the run says.

    Args:
        folder: The folder.
        expected: What the run says.
        changed: Files of the base that are not those of the run, for the message.

    Raises:
        ExportError: It writes other prompts, stops elsewhere, or gives other log-probs.
    """
    tokenizer = _tokenizer(folder)
    prompts = check_prompts(tokenizer, expected)
    _check_stops(folder, expected)
    logps = _logps(folder, expected)
    bounds = [_bound(expected, row) for row in expected.rows]
    for row, logp, bound in zip(expected.rows, logps, bounds, strict=True):
        if not abs(logp - row.logp) <= bound:
            raise ExportError(
                f"the export was not kept: {row.name} has log-prob {logp:.3f} when transformers "
                f"loads it, and {row.logp:.3f} in the run (accepted difference: {bound:.2g} nats "
                f"on {len(row.response_ids)} tokens){_cause(expected, changed)}",
                fix=_fix(expected, changed),
            )
    return Verification(expected.rows, logps, bounds, expected.source, prompts)


def check_prompts(tokenizer: PreTrainedTokenizerBase, expected: Expected) -> str:
    """Compare the prompts that a tokenizer writes with the run's, id by id.

    Returns:
        What was compared, in a sentence.

    Raises:
        ExportError: A prompt has other ids.
    """
    for sample in expected.samples:
        name = f"the prompt of example {place(sample.example_id)}"
        ids = _prompt(tokenizer, sample.turns, sample.tools, expected, name)
        _compare_ids(ids, sample.prompt_ids, name, tokenizer)
    if expected.samples:
        return f"The chat template writes {len(expected.samples)} prompts with the run's ids."
    name = "a prompt of three turns"
    turns = _GREETING if expected.tokenizer.chat_template is not None else _GREETING[-1:]
    own = _prompt(expected.tokenizer, turns, (), expected, name)
    _compare_ids(_prompt(tokenizer, turns, (), expected, name), own, name, tokenizer)
    for row in expected.rows:
        text = str(expected.tokenizer.decode(list(row.prompt_ids)))
        ids, own_ids = (
            t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, expected.tokenizer)
        )
        _compare_ids(tuple(ids), tuple(own_ids), f"the prompt of {row.name}", tokenizer)
    return "The run keeps no conversations: its tokenizer was compared with the exported one."


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ExportError(
            f"the export was not kept: its tokenizer cannot be read ({first_line(error)})",
            fix="restore the run's tokenizer folder from a copy",
        ) from error


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    tools: Any,
    expected: Expected,
    name: str,
) -> tuple[int, ...]:
    try:
        return plain_prompt_ids(tokenizer, turns, tools, expected.date)
    except TemplateError as error:
        raise ExportError(
            f"the export was not kept: its chat template does not accept {name} "
            f"({first_line(error)})",
            fix=_TEMPLATE_FIX,
        ) from error


_TEMPLATE_FIX: Final = (
    "restore the run's tokenizer folder, with the chat template that the run was made with, from a "
    "copy of the run"
)


def _compare_ids(
    ids: tuple[int, ...], own: tuple[int, ...], name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse ids that are not the run's, naming the first that differs."""
    for i, (one, other) in enumerate(zip_longest(ids, own)):
        if one != other:
            raise ExportError(
                f"the export was not kept: {name} has other ids than in the run. Id {i} is "
                f"{_shown(one, tokenizer)} by the exported chat template, and "
                f"{_shown(other, tokenizer)} in the run",
                fix=_TEMPLATE_FIX,
            )


def _shown(token: int | None, tokenizer: PreTrainedTokenizerBase) -> str:
    return "missing" if token is None else f"{token} ({tokenizer.decode([token])!r})"


def _check_stops(folder: Path, expected: Expected) -> None:
    if expected.stop_ids is None:
        return
    stops = sorted(listed(GenerationConfig.from_pretrained(folder).eos_token_id))
    if stops != sorted(expected.stop_ids):
        raise ExportError(
            f"the export was not kept: its generation config stops at {stops}, and the run's "
            f"responses at {sorted(expected.stop_ids)}",
            fix="export again, with nothing else writing into the folder",
        )


def _logps(folder: Path, expected: Expected) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = load_exported(folder, expected.base, device)
        return list(plain_logps(model, [row.pair for row in expected.rows]))
    # transformers, PEFT and bitsandbytes raise errors of many classes.
    except Exception as error:
        if is_out_of_memory(error):
            fix = "export on a machine with more memory, such as the one of the run"
        else:
            fix = "install the versions of transformers and peft that the run used"
        raise ExportError(
            f"the export was not kept: transformers cannot load it ({first_line(error)})", fix=fix
        ) from error


def _bound(expected: Expected, row: ExpectedRow) -> float:
    base = expected.base
    # (On a CPU, bitsandbytes computes with 4-bit weights in bfloat16, whatever the dtype.)
    is_exact = base.quantization == "none" and base.dtype == torch.float32
    share = _INT8 if base.quantization == "int8" else _FLOAT32 if is_exact else _NARROW
    return share * math.sqrt(len(row.response_ids))


def _cause(expected: Expected, changed: Sequence[str]) -> str:
    if not changed:
        return ""
    return f". The base model {expected.base.name} is not the run's: {', '.join(changed)} differs"


def _fix(expected: Expected, changed: Sequence[str]) -> str:
    if changed:
        return f"put the base model of the run at {expected.base.name} again"
    return (
        "install the versions of transformers, peft and bitsandbytes that the run used, and export "
        "on the device of the run"
    )
