"""Reading a base model without its weights."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
)

from spin_lightning import SPIN
from spin_lightning.errors import SettingError
from spin_lightning.policies.pretrained import (
    FrozenBase,
    check_quantizable,
    content_hashes,
    context_length,
    generation_stop_ids,
    load_config,
    load_tokenizer,
    skeleton,
)
from tests.toys.adapters import write_adapter

SMALL = {"vocab_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = LlamaConfig(hidden_size=64, intermediate_size=128, **SMALL)
NARROW = LlamaConfig(hidden_size=32, intermediate_size=64, **SMALL)
# Its experts' weights are stacked in one tensor each, which is not a linear layer.
MIXTRAL = MixtralConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=4,
)
GPT2 = GPT2Config(vocab_size=24, n_positions=48, n_embd=64, n_layer=1, n_head=2)
MAMBA = MambaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=1, state_size=4)
MAMBA = MambaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=1, state_size=4)
NARROW_GPT2 = GPT2Config(vocab_size=24, n_positions=48, n_embd=32, n_layer=1, n_head=2)


@pytest.fixture
def saved(tmp_path):
    """Turns a configuration into a base in a folder."""

    def save(config: PretrainedConfig, **settings) -> FrozenBase:
        config.save_pretrained(tmp_path)
        return FrozenBase(str(tmp_path), **settings)

    return save


@pytest.mark.parametrize(
    ("compute_dtype", "capability", "dtype"),
    [
        ("auto", None, torch.float32),
        ("auto", (7, 5), torch.float32),
        ("auto", (8, 0), torch.bfloat16),
        ("float32", (8, 0), torch.float32),
        ("float16", None, torch.float16),
    ],
)
def test_frozen_base_dtype_auto_is_bfloat16_on_gpus_that_compute_in_it(
    compute_dtype, capability, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert FrozenBase("any", compute_dtype=compute_dtype).dtype == dtype


def test_load_config_switches_every_dropout_of_the_base_off(saved):
    config = load_config(saved(GPT2))
    assert GPT2.resid_pdrop == GPT2.embd_pdrop == GPT2.attn_pdrop == 0.1
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_load_config_of_a_folder_without_a_language_model_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingError, match=r"model=.*no causal language model can be read"):
        load_config(FrozenBase(str(tmp_path)))


def test_load_tokenizer_of_a_folder_without_one_is_refused(saved, tiny_base):
    assert load_tokenizer(tiny_base)("w3 w4")["input_ids"] == [1, 7, 8]
    with pytest.raises(SettingError, match=r"tokenizer cannot be read.*save_pretrained"):
        load_tokenizer(saved(LLAMA))


@pytest.mark.parametrize(("config", "length"), [(LLAMA, 2048), (GPT2, 48), (MAMBA, 2048)])
def test_context_length_is_the_positions_of_the_config(config, length, saved):
    assert context_length(saved(config)) == length


@pytest.mark.parametrize(("named", "stops"), [(None, 7), ([2, 5], [2, 5]), (3, 3)])
def test_generation_stop_ids_come_from_the_generation_config_if_there_is_one(
    named, stops, saved, tmp_path
):
    base = saved(LlamaConfig(eos_token_id=7))
    if named is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert generation_stop_ids(base) == stops


def test_content_hashes_of_a_folder_are_those_of_what_defines_the_model(tiny_base):
    folder = Path(tiny_base.name)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    names.append("tokenizer_config.json")
    assert content_hashes(tiny_base) == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
    }


def test_skeleton_has_names_and_shapes_of_the_model_and_no_memory(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base.name)
    found = skeleton(tiny_base)
    assert all(parameter.is_meta for parameter in found.parameters())
    assert {n: p.shape for n, p in found.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_check_quantizable_accepts_models_of_mostly_linear_layers(config, quantization, saved):
    check_quantizable(saved(config, quantization=quantization))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA kernels take any width")
@pytest.mark.parametrize("config", [NARROW, NARROW_GPT2])
def test_check_quantizable_refuses_widths_that_cpu_kernels_get_wrong(config, saved):
    with pytest.raises(SettingError, match=r"'nf4'.*multiple of 64.*Fix: set quantization: none"):
        check_quantizable(saved(config, quantization="nf4"))
    check_quantizable(saved(config, quantization="int8"))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_check_quantizable_refuses_a_model_of_mostly_other_weights(quantization, saved):
    """Of 32 dimensions, 4 experts and 24 words.

    Linear: 4 · 32² of attention and 24 · 32 of the head, 4,864. Not: 4 · 3 · 64 · 32 of experts,
    4 · 32 of the router and 3 · 32 of the norms, 24,800. Embeddings count on neither side.
    """
    base = saved(MIXTRAL, quantization=quantization)
    message = (
        rf"quantization='{quantization}'.*only 4,864 of 29,664 weights of model type 'mixtral'"
    )
    with pytest.raises(SettingError, match=message):
        check_quantizable(base)
    check_quantizable(FrozenBase(base.name))


def test_check_quantizable_refuses_a_model_that_is_quantized_already(saved):
    config = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(SettingError, match=r"already quantized by its own config.*Fix: set"):
        check_quantizable(saved(config, quantization="nf4"))


# ------------------------------------------------------------------------------ files that change


def test_files_that_change_in_the_same_process_are_read_again(tiny_base, tmp_path):
    shutil.copytree(tiny_base.name, tmp_path / "model")
    base, folder = FrozenBase(str(tmp_path / "model")), tmp_path / "model"
    before = load_tokenizer(base), load_config(base), skeleton(base)
    again = load_tokenizer(base), load_config(base), skeleton(base)
    assert all(one is other for one, other in zip(before, again, strict=True))

    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(base).chat_template == "{{ messages[0].content }}"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_tokenizer(base)("w3 w4")["input_ids"] == [7, 8]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert load_config(base).num_hidden_layers == 1
    assert len(skeleton(base).model.layers) == 1


def test_tokenizer_of_a_module_stays_while_a_new_module_reads_the_mended_one(
    tiny_model_dir, tmp_path
):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    old = SPIN(str(tmp_path / "model"))
    assert old.tokenizer.chat_template is None
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert old.tokenizer.chat_template is None
    new = SPIN(str(tmp_path / "model"))
    assert new.tokenizer.chat_template == "{{ messages[0].content }}"


# ------------------------------------------------------------------------------ paths


def test_tilde_in_paths_of_model_and_adapter_is_the_home_folder(
    tiny_model_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    adapter = write_adapter(tmp_path / "model", tmp_path / "adapter", seed=1)
    module = SPIN("~/model", initial_adapter="~/adapter")
    assert module.policy_spec.base.name == str(tmp_path / "model")
    assert module.policy_spec.initial_adapter == str(adapter)
    module.check_model()
    assert module.policy_spec.fingerprint_fields()["initial_adapter"]
