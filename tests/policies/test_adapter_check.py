"""Models and adapters in one place: transformers must never load an adapter unasked."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_lightning import SPIN
from spin_lightning.errors import SettingError
from spin_lightning.policies import loading
from spin_lightning.policies.loading import load_base, read_base
from spin_lightning.policies.pretrained import FrozenBase, load_config
from tests.toys.adapters import logits, plain_logits, write_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE, BOTH, ADAPTER = "owner/base", "owner/both", "owner/adapter"


@pytest.fixture
def hub(tiny_model_dir, tmp_path, monkeypatch) -> Path:
    """The hub's cache on this machine, with a model, an adapter, and a model with an adapter."""
    root = tmp_path / "hub"
    for name in (BASE, BOTH, ADAPTER):
        folder = root / f"models--{name.replace('/', '--')}"
        files = folder / "snapshots" / COMMIT
        if name != ADAPTER:
            shutil.copytree(tiny_model_dir, files)
        if name != BASE:
            write_adapter(tiny_model_dir, files, seed=1)
            config = json.loads((files / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = BASE
            (files / "adapter_config.json").write_text(json.dumps(config))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return root


def test_transformers_itself_loads_the_adapter_of_a_hub_id(hub, tiny_model_dir):
    """Why this is checked: with the adapter, logits are not those of the model."""
    with torch.no_grad():
        found = logits(AutoModelForCausalLM.from_pretrained(BOTH).eval())
    assert (found - plain_logits(tiny_model_dir)).abs().max() > 0.1


def test_hub_id_without_an_adapter_is_the_model(hub, tiny_model_dir):
    with torch.no_grad():
        found = logits(load_base(FrozenBase(BASE, compute_dtype="float32")))
    torch.testing.assert_close(found, plain_logits(tiny_model_dir), atol=1e-5, rtol=0)


@pytest.mark.parametrize("revision", [None, COMMIT])
@pytest.mark.parametrize("act", [load_config, load_base])
def test_hub_id_with_a_model_and_an_adapter_is_refused(act, revision, hub):
    more = f" --revision {COMMIT}" if revision else ""
    wanted = (
        rf"model='owner/both': it holds a model and an adapter.*Fix: .*"
        rf"hf download owner/both{more} --local-dir both and give .*--model.initial_adapter"
    )
    with pytest.raises(SettingError, match=wanted):
        act(FrozenBase(BOTH, revision=revision, compute_dtype="float32"))


def test_hub_id_of_an_adapter_names_the_commands(hub):
    wanted = (
        r"model='owner/adapter': it is an adapter, not a model. Fix: download it with: hf download "
        r"owner/adapter --local-dir adapter and give --model.model owner/base "
        r"--model.initial_adapter adapter"
    )
    with pytest.raises(SettingError, match=wanted):
        SPIN(ADAPTER).check_model()


def test_adapter_that_was_out_of_reach_when_it_was_looked_for_is_found_in_the_model(
    hub, monkeypatch, tiny_base
):
    config = load_config(tiny_base)
    monkeypatch.setattr(loading, "load_config", lambda base: config)
    with pytest.raises(SettingError, match="it holds a model and an adapter"):
        read_base(FrozenBase(BOTH, compute_dtype="float32"))


def test_folder_with_a_model_and_an_adapter_is_refused(tiny_model_dir, tmp_path):
    """transformers loads the adapter of such a folder without a word."""
    folder = tmp_path / "both"
    shutil.copytree(tiny_model_dir, folder)
    write_adapter(tiny_model_dir, folder, seed=1)
    with pytest.raises(SettingError, match=r"model=.*a model and an adapter.*--model.initial_ad"):
        load_config(FrozenBase(str(folder)))


def test_adapter_as_model_names_the_command(tiny_model_dir, tmp_path):
    adapter = write_adapter(tiny_model_dir, tmp_path / "adapter", seed=1)
    wanted = f"--model.model {tiny_model_dir} --model.initial_adapter {adapter}"
    with pytest.raises(SettingError, match=rf"it is an adapter, not a model.*{re.escape(wanted)}"):
        load_config(FrozenBase(str(adapter)))
    (adapter / "adapter_config.json").write_text("null")
    with pytest.raises(SettingError, match=r"--model.model <its base model> --model.initial_adap"):
        load_config(FrozenBase(str(adapter)))
