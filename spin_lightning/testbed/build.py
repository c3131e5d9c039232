"""Builds the testbed on disk: an ordinary model folder and an ordinary data file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spin_lightning.data.formats import read_conversations
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import DataError, SettingError
from spin_lightning.run.cache import cache_root, make_once, scratch_folder
from spin_lightning.testbed.exact import token_ids
from spin_lightning.testbed.language import Language, sample
from spin_lightning.testbed.small_model import (
    TokenIds,
    byte_tokenizer,
    small_config,
    train_small_llama,
    word_tokenizer,
)
from spin_lightning.types import Conversation, Example

# Part of the folder's name. Increase it whenever the same seed gives different bytes.
VERSION: Final = 1
DATA_ROWS: Final = 13_056
NOISE: Final = 0.2
_BASE_STEPS = 600
_BASE_BATCH = 128
_CONTEXT = 32
_MARKER = "testbed.json"


@dataclass(frozen=True)
class TestbedPaths:
    """Paths of a testbed.

    Attributes:
        model: Folder of the base model and its tokenizer.
        data: JSON lines of prompt and response, drawn from p_data.
        language: The exact distributions, for `Language.load`.
    """

    model: Path
    data: Path
    language: Path


def ensure(seed: int = 0, cache_dir: Path | None = None) -> TestbedPaths:
    """Build the testbed of a seed once; later calls return its paths immediately.

    The base is a small Llama trained on the language's dialect, so that self-play has a known
    distance to go. The global random state does not change, and the same machine builds the same
    bytes each time.

    Args:
        seed: Seed of the language, the samples and the base model.
        cache_dir: Folder of all testbeds; default `cache_root()`.

    Returns:
        The three paths, all of which exist.

    Raises:
        SettingError: The cache folder cannot be written.
    """
    root = cache_root() if cache_dir is None else cache_dir
    folder = root / f"testbed-v{VERSION}-seed{seed}"
    make_once(folder, lambda made: _build(made, seed))
    return TestbedPaths(folder / "model", folder / "data.jsonl", folder / "language.json")


def ensure_noisy(seed: int = 0, cache_dir: Path | None = None) -> TestbedPaths:
    """`ensure`, with data of which a share of `NOISE` has a wrong response.

    A wrong response is one of the language's, uniformly; held-out examples have them too. The
    language beside the data is the clean one, so that exact figures judge by what the data should
    have been.

    Args:
        seed: As for `ensure`, and of the errors.
        cache_dir: Likewise.

    Returns:
        The clean testbed's model, and the paths of the noisy data and of the language.

    Raises:
        SettingError: The cache folder cannot be written.
    """
    root = cache_root() if cache_dir is None else cache_dir
    clean = ensure(seed, root)
    folder = root / f"testbed-noisy-v{VERSION}-seed{seed}"
    make_once(folder, lambda made: _spoil(made, clean, seed))
    return TestbedPaths(clean.model, folder / clean.data.name, folder / clean.language.name)


def train_base(
    data: str,
    out: Path,
    *,
    columns: dict[str, str] | None = None,
    minutes: float = 3.0,
    steps: int | None = None,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 4,
    vocabulary: int = 2048,
    context: int = 512,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Train a small chat model from scratch on a data set, as a base for self-play on it.

    At best it is fluent in the style of the data: enough to measure self-play, not to solve tasks.

    Args:
        data: A file or data set in any accepted format.
        out: Folder to write the model and its tokenizer to: new, empty, or of an earlier call.
        columns: Names of the columns, if they are not recognized.
        minutes: Wall time of the training.
        steps: Optimizer steps instead of `minutes`, for a reproducible result.
        hidden: Width of the model.
        layers: Number of its blocks.
        heads: Attention heads of a block.
        vocabulary: Maximum number of tokens of the byte-level BPE tokenizer.
        context: Longest sequence in tokens; longer responses are cut, examples with longer prompts
            are left out.
        batch_size: Examples per step.
        learning_rate: Peak of the schedule.
        seed: Seed of the initial weights and the order of the examples.

    Returns:
        `out`.

    Raises:
        DataError: The data has no usable example.
        SettingError: `out` holds something else, or the sizes do not fit.
    """
    _check_out(out)
    conversations, _ = read_conversations(data, columns)
    tokenizer = byte_tokenizer(_texts(conversations), vocabulary)
    examples = _tokenized(conversations, tokenizer, context)
    if not examples:
        raise DataError(
            f"{data} has no example that fits into {context} tokens",
            fix="raise context, or check the data's columns",
        )
    model = train_small_llama(
        small_config(tokenizer, hidden=hidden, layers=layers, heads=heads, context=context),
        examples,
        steps=steps,
        minutes=minutes if steps is None else None,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        description="Training a small base",
    )
    with scratch_folder(out.parent) as scratch:
        _save(model, tokenizer, scratch)
        made_from = {"data": data, "steps": steps, "minutes": minutes, "seed": seed}
        (scratch / _MARKER).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        # File by file, so that no other file in the folder is ever removed.
        for file in scratch.iterdir():
            file.replace(out / file.name)
    return out


def _build(folder: Path, seed: int) -> None:
    folder.mkdir()
    language = Language.make(seed)
    language.save(folder / "language.json")
    # Separate seeds: the base must not be trained on the samples that self-play learns from.
    data_seed, base_seed = 2 * seed, 2 * seed + 1
    lines = (
        json.dumps({"prompt": language.prompts[x], "response": language.responses[y]})
        for x, y in sample(language.log_probs, DATA_ROWS, data_seed)
    )
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    tokenizer = word_tokenizer([*language.prompts, *language.responses])
    prompts, responses = token_ids(tokenizer, language)
    drawn = sample(language.dialect_log_probs, _BASE_STEPS * _BASE_BATCH, base_seed)
    # The number of threads changes the order of sums, and so the last bits of the weights.
    with _single_thread():
        model = train_small_llama(
            small_config(tokenizer, hidden=64, layers=2, heads=4, context=_CONTEXT),
            [(prompts[x], responses[y]) for x, y in drawn],
            steps=_BASE_STEPS,
            batch_size=_BASE_BATCH,
            seed=base_seed,
            description="Training the testbed's base, once",
        )
    _save(model, tokenizer, folder / "model")


def _spoil(folder: Path, clean: TestbedPaths, seed: int) -> None:
    folder.mkdir()
    language = Language.load(clean.language)
    language.save(folder / clean.language.name)
    draw = random.Random(seed)
    rows = [json.loads(line) for line in clean.data.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if draw.random() < NOISE:
            row["response"] = draw.choice(language.responses)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / clean.data.name).write_text(lines, encoding="utf-8")


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _texts(conversations: Iterable[Conversation]) -> Iterator[str]:
    for conversation in conversations:
        yield from (message["content"] for message in conversation.prompt)
        yield conversation.response


def _tokenized(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerFast, context: int
) -> Sequence[tuple[TokenIds, TokenIds]]:
    """Prompt ids and response ids of every conversation that fits, as self-play will see them."""
    text_format = PromptFormat.of(tokenizer, None)
    made = (
        text_format.tokenize(
            conversation, max_prompt_tokens=None, max_response_tokens=context, context=context
        )
        for conversation in conversations
    )
    return [(one.prompt_ids, one.real_ids) for one in made if isinstance(one, Example)]


def _check_out(out: Path) -> None:
    if not out.exists() or (out / _MARKER).is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise SettingError(
            "out",
            str(out),
            "it holds something that this command did not write",
            fix="give a folder that does not exist yet",
        )


@contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
