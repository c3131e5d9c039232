"""Tokenizers built from a corpus, and a small Llama trained from scratch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import torch
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spin_lightning.callbacks.console import console
from spin_lightning.errors import SettingError
from spin_lightning.logps import response_token_logps
from spin_lightning.packing import pack_padded
from spin_lightning.types import SequenceBatch

TokenIds = Sequence[int]

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WARMUP = 0.05
_WEIGHT_DECAY = 0.01
_MAX_GRADIENT_NORM = 1.0
_BATCHES_PER_WINDOW = 16


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, for prompts and responses without a chat template.

    Encoding with special tokens puts `<s>` before a text, and never `</s>` after it.

    Args:
        texts: Every word that occurs in them, split at white space, gets an id.
    """
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {token: i for i, token in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML-like template.

    Any string survives encoding and decoding unchanged. Every digit is a separate token, which
    makes sums easier to learn. `<|im_end|>` ends a turn, `<|endoftext|>` only pads.

    Args:
        texts: The corpus.
        vocabulary: Maximum number of tokens, of which 256 are bytes and 3 are special.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def small_config(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, heads: int, context: int
) -> LlamaConfig:
    """Describe a small Llama for a tokenizer.

    Args:
        tokenizer: Defines the vocabulary and the special ids.
        hidden: Width; a multiple of 2 · `heads`.
        layers: Number of blocks.
        heads: Attention heads of a block.
        context: Longest sequence, in tokens.

    Raises:
        SettingError: `hidden` does not split into heads of even width.
    """
    if hidden % (2 * heads):
        raise SettingError(
            "hidden",
            hidden,
            f"rotary positions need {heads} heads of even width",
            fix=f"give a multiple of {2 * heads}",
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        # transformers' default of 0.02 suits widths in the thousands; here it would waste half of
        # the training.
        initializer_range=hidden**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_small_llama(
    config: LlamaConfig,
    examples: Sequence[tuple[TokenIds, TokenIds]],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
    description: str = "Training a small Llama",
) -> LlamaForCausalLM:
    """Train a Llama from random weights to predict responses given their prompts.

    Minimizes −log p(y|x) per response token with AdamW, a short warm-up and a cosine decay to
    zero. Random numbers come from separate generators, so the global state does not change.

    Args:
        config: The model's sizes.
        examples: Pairs (prompt ids, response ids with the stop id).
        steps: Optimizer steps; the same seed then gives the same weights on one machine.
        minutes: Wall time instead of `steps`.
        batch_size: Pairs per step.
        learning_rate: Peak of the schedule.
        seed: Seed of the initial weights and the order of the examples.
        device: Where to train.
        description: Label of the progress bar.

    Returns:
        The model in eval mode, float32, on the CPU.

    Raises:
        SettingError: Not exactly one of `steps` and `minutes` is given, or it is not positive.
    """
    progress_of = _progress_clock(steps, minutes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=_WEIGHT_DECAY)
    batches = _batches(examples, batch_size, config.pad_token_id or 0, seed)
    with _training_bar() as bar:
        task = bar.add_task(description, total=1.0, loss=math.nan, rate=0.0)
        started, step = time.monotonic(), 0
        while (progress := progress_of(step)) < 1:
            rate = learning_rate * _schedule(progress)
            loss = _train_step(model, optimizer, next(batches).to(device), rate)
            step += 1
            bar.update(
                task,
                completed=progress_of(step),
                loss=float(loss),
                rate=step / (time.monotonic() - started),
            )
    return model.cpu().eval()


def _progress_clock(steps: int | None, minutes: float | None) -> Callable[[int], float]:
    """Progress of the training, 0 to 1, as a function of the steps taken."""
    given = [value for value in (steps, minutes) if value is not None]
    if len(given) != 1 or given[0] <= 0:
        raise SettingError(
            "steps",
            steps,
            f"exactly one of steps and minutes must be set, and minutes={minutes!r}",
            fix="give a positive number of steps, or of minutes, and not both",
        )
    if minutes is None:
        return lambda step: step / given[0]
    started = time.monotonic()
    return lambda _: (time.monotonic() - started) / (60 * minutes)


def _schedule(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; a factor of the learning rate."""
    if progress < _WARMUP:
        return (progress + 0.01) / (_WARMUP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


def _batches(
    examples: Sequence[tuple[TokenIds, TokenIds]], batch_size: int, pad_id: int, seed: int
) -> Iterator[SequenceBatch]:
    """Endless shuffled batches; similar lengths share a batch, so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    window = batch_size * _BATCHES_PER_WINDOW
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda i: sum(map(len, examples[i])))
            batches = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
            for k in torch.randperm(len(batches), generator=generator).tolist():
                prompts, responses = zip(*(examples[i] for i in batches[k]), strict=True)
                yield pack_padded(prompts, responses, pad_id)


def _train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: SequenceBatch, rate: float
) -> Tensor:
    """Take one step at learning rate `rate`; returns the loss before it, a scalar."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    token_logps, mask = response_token_logps(model, batch)
    loss = -token_logps[mask].mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach()


def _training_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:.1f} steps/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
