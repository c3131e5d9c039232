"""Small models written from a config: any architecture, the same weights each time, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def write_model(config: PretrainedConfig, folder: Path, seed: int = 0) -> Path:
    """A folder with `random_model(config)` and no tokenizer."""
    random_model(config, seed).save_pretrained(folder)
    return folder


def family_config(family: str, vocab_size: int, **settings: Any) -> PretrainedConfig:
    """Two layers, width 64, four heads, context 64, pad 0, BOS 1, EOS 2; weights of 0.2."""
    return AutoConfig.for_model(
        family,
        **{
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        },
    )


def write_tiny_model(folder: Path) -> Path:
    """A two-layer Llama and a word-level tokenizer that adds BOS; 24 words, context 64."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return write_model(config, folder)


def write_wide_model(tiny: Path, folder: Path) -> Path:
    """The tiny model and its tokenizer again, as wide as NF4 needs.

    bitsandbytes 0.50 mixes up the blocks of 64 of a layer whose input width is not a multiple of 64
    when it de-quantizes on a CPU.
    """
    config = AutoConfig.from_pretrained(tiny, hidden_size=64, intermediate_size=128, head_dim=16)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return write_model(config, folder)
