"""Models and pairs of all benchmarks, generated from seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spin_lightning.data.dataset import Pair
from spin_lightning.policies import gguf
from spin_lightning.run.packages import package_folder
from spin_lightning.types import Example

PAD, STOP = 0, 2
_FIRST_WORD = 4
PAIRS_PER_STEP = 8

# Llama-like. smollm2 has the real weights of SmolLM2-135M-Instruct if its package is installed. The
# sizes of 1b and 7b are those of Llama 3.2 1B and Mistral 7B.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "22m": {
        "vocab_size": 32000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths: lognormal around a median and clipped, or uniform."""

    shortest: int
    longest: int
    median: int | None = None

    def draw(self, source: random.Random) -> int:
        """One length, in tokens."""
        if self.median is None:
            return source.randint(self.shortest, self.longest)
        drawn = int(source.lognormvariate(math.log(self.median), 0.45))
        return min(self.longest, max(self.shortest, drawn))


@dataclass(frozen=True)
class Workload:
    """Pairs of random words.

    Attributes:
        prompt: Lengths of prompts.
        response: Lengths of real and generated responses, including the stop id.
    """

    prompt: Lengths
    response: Lengths

    def pairs(self, count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
        """`count` pairs; the reference's log-probs are left at 0."""
        source = random.Random(seed)
        pairs = []
        for _ in range(count):
            lengths = [self.prompt.draw(source), *(self.response.draw(source) for _ in range(2))]
            prompt, real, generated = (_words(source, n, vocabulary) for n in lengths)
            real[-1] = generated[-1] = STOP
            pairs.append(Pair(prompt, real, generated, 0.0, 0.0))
        return pairs


WORKLOADS = {
    "A": Workload(Lengths(32, 256, median=118), Lengths(16, 160, median=88)),
    "B": Workload(Lengths(480, 544), Lengths(48, 80)),
    "tiny": Workload(Lengths(4, 12), Lengths(2, 8)),
}


def batches_of(workload: Workload, count: int, vocabulary: int) -> list[list[Pair]]:
    """`count` batches of a step, with reference log-probs that leave a margin of a few nats."""
    pairs = [
        pair._replace(
            reference_real=-10.0 * len(pair.real_ids),
            reference_generated=-10.0 * len(pair.generated_ids) - 5.0,
        )
        for pair in workload.pairs(count * PAIRS_PER_STEP, vocabulary)
    ]
    return [pairs[i : i + PAIRS_PER_STEP] for i in range(0, len(pairs), PAIRS_PER_STEP)]


def pair_of_lengths(prompt: int, response: int, vocabulary: int, seed: int = 0) -> Pair:
    """One pair of exactly these lengths."""
    workload = Workload(Lengths(prompt, prompt), Lengths(response, response))
    return workload.pairs(1, vocabulary, seed)[0]


def examples_of(pairs: Sequence[Pair]) -> list[Example]:
    """The pairs as examples to answer."""
    return [
        Example(i, tuple(pair.prompt_ids.tolist()), tuple(pair.real_ids.tolist()), True)
        for i, pair in enumerate(pairs)
    ]


def words_of(ids: Sequence[int]) -> str:
    """Ids as text that the tokenizer turns into the same ids; the stop id is left to templates."""
    return " ".join(f"w{i}" for i in ids if i != STOP)


def has_weights(size: str) -> bool:
    """Whether a size has the weights of a trained model here; otherwise they are random."""
    return size in gguf.PACKAGED and package_folder(gguf.PACKAGED[size][0]) is not None


def base_model(size: str, dtype: torch.dtype, folder: Path, device: str = "cpu") -> Path:
    """A folder with a model and the tokenizer of random words, made on first use."""
    trained = has_weights(size)
    kind = "-trained" if trained else ""
    path = folder / f"{size}{kind}-{str(dtype).removeprefix('torch.')}"
    if (path / "tokenizer.json").exists():
        return path
    model = _trained(size, dtype) if trained else _random(SIZES[size], dtype, device)
    model.save_pretrained(path)
    _tokenizer(SIZES[size]["vocab_size"]).save_pretrained(path)
    return path


def _trained(size: str, dtype: torch.dtype) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(gguf.model_folder(size), dtype=dtype)
    shape = {name: getattr(model.config, name) for name in SIZES[size]}
    if shape != SIZES[size]:
        raise RuntimeError(f"{size} has the shape {shape}, not {SIZES[size]}")
    model.config.pad_token_id, model.config.eos_token_id = PAD, STOP
    return model


def _random(sizes: dict[str, Any], dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=STOP,
        dtype=dtype,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=dtype)


def _words(source: random.Random, count: int, vocabulary: int) -> np.ndarray[Any, Any]:
    ids = [source.randrange(_FIRST_WORD, vocabulary) for _ in range(count)]
    return np.array(ids, dtype=np.int32)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word per id, so that text and ids are the same."""
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    words += [f"w{i}" for i in range(len(words), vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
