"""Causality is tested by changing the last token, not by an architecture's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spin_lightning.errors import SettingError
from spin_lightning.policies.causality import check_causal
from spin_lightning.policies.loading import load_base
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.shared_prefix import ARCHITECTURES
from tests.generation.test_architectures import FAMILIES, OTHERS
from tests.toys.models import family_config, random_model, write_model
from tests.toys.runs import play, write_examples

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")
DECODERS: dict[str, dict[str, Any]] = {
    "gemma": {"intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 2},
    **FAMILIES,
    **OTHERS,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_refused_by_what_they_compute(family, dtype, tmp_path):
    folder = write_model(family_config(family, 24, intermediate_size=128), tmp_path)
    with pytest.raises(SettingError, match=rf"type '{family}' is not causal.*decoder-only.*is_dec"):
        load_base(FrozenBase(str(folder), compute_dtype=dtype))


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_with_weights_of_the_usual_size_are_refused_as_well(family, tmp_path):
    config = family_config(family, 24, intermediate_size=128, initializer_range=0.02)
    folder = write_model(config, tmp_path)
    with pytest.raises(SettingError, match="is not causal"):
        load_base(FrozenBase(str(folder), compute_dtype="float32"))


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_that_are_set_to_decode_are_causal(family, tmp_path):
    config = family_config(family, 24, intermediate_size=128, is_decoder=True)
    load_base(FrozenBase(str(write_model(config, tmp_path)), compute_dtype="float32"))


def test_every_packed_architecture_is_among_the_decoders():
    assert set(DECODERS) >= ARCHITECTURES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", sorted(DECODERS))
def test_decoders_pass(family, dtype, tmp_path):
    folder = write_model(family_config(family, 23, **DECODERS[family]), tmp_path)
    load_base(FrozenBase(str(folder), compute_dtype=dtype))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_decoders_pass_and_quantized_encoders_do_not(quantization, tmp_path):
    llama = write_model(family_config("llama", 24, intermediate_size=128), tmp_path / "llama")
    bert = write_model(family_config("bert", 24, intermediate_size=128), tmp_path / "bert")
    settings = {"quantization": quantization, "compute_dtype": "float32"}
    load_base(FrozenBase(str(llama), **settings))
    with pytest.raises(SettingError, match="'bert' is not causal"):
        load_base(FrozenBase(str(bert), **settings))


def test_decoder_whose_layers_look_ahead_is_refused_whatever_its_name():
    """A Llama with a layer that adds the mean over all tokens, later ones included."""
    model = random_model(family_config("llama", 24, intermediate_size=128)).eval()

    class LookAhead(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0.01 * x.mean(dim=1, keepdim=True)

    model.model.norm = nn.Sequential(LookAhead(), model.model.norm)
    with pytest.raises(SettingError, match=r"model='here': .*type 'llama' is not causal"):
        check_causal(FrozenBase("here", compute_dtype="float32"), model)


@pytest.mark.parametrize("family", ENCODERS)
def test_fit_with_an_encoder_ends_before_rows_are_made(family, tiny_model_dir, tmp_path):
    config = family_config(family, 24, intermediate_size=128)
    model = write_model(config, tmp_path / "model")
    for file in tiny_model_dir.glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    data = write_examples(tmp_path / "data.jsonl")
    with pytest.raises(SettingError, match="is not causal"):
        play(tmp_path / "run", model, data)
    assert not list((tmp_path / "run").rglob("*.parquet"))
