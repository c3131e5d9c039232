"""Fixtures that many tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.run.folder import RunFolder
from spin_lightning.testbed import TestbedPaths, ensure
from tests.toys.runs import play, write_examples


@pytest.fixture(autouse=True)
def _restore_random_state() -> Iterator[None]:
    """A test that seeds leaves the random state and the announced seed as they were."""
    state, seed = torch.get_rng_state(), os.environ.get("PL_GLOBAL_SEED")
    yield
    torch.set_rng_state(state)
    os.environ.pop("PL_GLOBAL_SEED", None)
    if seed is not None:
        os.environ["PL_GLOBAL_SEED"] = seed


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and a word-level tokenizer that adds BOS; context 64."""
    folder = tmp_path_factory.mktemp("tiny_model")
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_model_dir: Path) -> FrozenBase:
    """The tiny model as a float32 base."""
    return FrozenBase(str(tiny_model_dir), compute_dtype="float32")


@pytest.fixture(scope="session")
def testbed_seed_0() -> TestbedPaths:
    """The embedded testbed, made once and then kept in the user's cache folder as for a user."""
    return ensure(seed=0)


@pytest.fixture(scope="session")
def finished_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Iterates 0 to 4 of SPIN on the tiny model. Not to be written to: copy it."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_examples(folder / "examples.jsonl")
    play(folder / "run", tiny_model_dir, data, epochs=4)
    return RunFolder(folder / "run")
