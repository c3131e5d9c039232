"""Iterates of a run folder, loaded and exported."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.export.model import export_iterate
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings, adapter_base
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.saved import load_iterate
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord
from tests.toys.adapters import logits, plain_logits, write_adapter
from tests.toys.models import write_wide_model


def write_run(root: Path, model: Path, quantization: str) -> RunFolder:
    """A run of two iterates: the bare base and an adapter."""
    run = RunFolder(root)
    base = FrozenBase(str(model), quantization=quantization, compute_dtype="float32")
    for t in (0, 1):
        if t:
            write_adapter(model, run.iterate(t), seed=t)
        run.write_record(IterateRecord(t, base=asdict(base)))
    AutoTokenizer.from_pretrained(model).save_pretrained(run.tokenizer)
    return run


@pytest.fixture(scope="module", params=["none", "nf4"])
def run(request, tiny_model_dir, tmp_path_factory) -> RunFolder:
    model = write_wide_model(tiny_model_dir, tmp_path_factory.mktemp("wide"))
    return write_run(tmp_path_factory.mktemp("run"), model, request.param)


def wanted_logits(run: RunFolder, t: int) -> torch.Tensor:
    base = run.record(t).base
    return plain_logits(base["name"], run.iterate(t) if t else None, base["quantization"])


@pytest.mark.parametrize("t", [0, 1])
def test_load_iterate_is_what_transformers_and_peft_load_by_hand(t, run):
    model, tokenizer = load_iterate(run.root, t)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(logits(model), wanted_logits(run, t), atol=1e-4, rtol=0)
    assert tokenizer("w3 w4")["input_ids"] == [1, 7, 8]


@pytest.mark.parametrize("t", [0, 1])
def test_export_iterate_merged_is_a_plain_model_that_needs_neither_run_nor_peft(t, run, tmp_path):
    wanted = wanted_logits(run, t)
    out = export_iterate(run.root, t, tmp_path / "out", merge=True)
    assert not (out / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert getattr(model.config, "quantization_config", None) is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(logits(model.eval()), wanted, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(out)("w3 w4")["input_ids"] == [1, 7, 8]


def test_export_iterate_is_a_peft_adapter_that_does_not_need_the_run(tiny_model_dir, tmp_path):
    run = write_run(tmp_path / "run", tiny_model_dir, "none")
    wanted = wanted_logits(run, 1)
    out = export_iterate(run.root, 1, tmp_path / "new" / "out")
    shutil.rmtree(run.root)
    assert not (out / "iterate.json").exists()
    torch.testing.assert_close(plain_logits(tiny_model_dir, out), wanted, atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(out)("w3 w4")["input_ids"] == [1, 7, 8]


def test_export_iterate_into_a_folder_with_content_is_refused(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingError, match=r"out=.*not empty.*Fix: name a new folder"):
        export_iterate(run.root, 1, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_export_iterate_that_is_the_bare_base_is_refused_unless_merged(run, tmp_path):
    with pytest.raises(SettingError, match=r"iterate=0: it is the base model.*--merge"):
        export_iterate(run.root, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("act", [load_iterate, lambda root, t: export_iterate(root, t, root / "x")])
def test_iterate_that_the_run_does_not_have_is_named(act, run):
    with pytest.raises(RunFolderError, match=r"has no iterate 5; it has \[0, 1\]"):
        act(run.root, 5)


def test_iterates_have_the_same_names_everywhere(run, tmp_path):
    model, _ = load_iterate(run.root, "last")
    with torch.no_grad():
        torch.testing.assert_close(logits(model), wanted_logits(run, 1), atol=1e-4, rtol=0)
    mixture, _ = load_iterate(run.root, "mixture")
    assert mixture.mixture.weights == {0: 0.5, 1: 0.5}
    assert (export_iterate(run.root, "last", tmp_path / "last") / "adapter_config.json").exists()
    with pytest.raises(SettingError, match=r"iterate='mixture'.*Fix: .*load_mixture"):
        export_iterate(run.root, "mixture", tmp_path / "mixture")
    for act in (load_iterate, lambda root, t: export_iterate(root, t, tmp_path / "x")):
        with pytest.raises(SettingError, match=r"iterate='lsat': there is no such iterate"):
            act(run.root, "lsat")


def test_relative_base_is_found_from_the_working_directory_or_the_run(
    tiny_model_dir, tmp_path, monkeypatch
):
    shutil.copytree(tiny_model_dir, tmp_path / "here" / "base")
    run = write_run(tmp_path / "run", tmp_path / "here" / "base", "none")
    record = run.record(1)
    base, fields = {**record.base, "name": "base"}, {"base_files": {"config.json": "0f"}}
    run.write_record(replace(record, base=base, fingerprint_fields=fields))
    monkeypatch.chdir(tmp_path / "here")
    load_iterate(run.root, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=r"model='base': the base model .*Fix: if it was moved"):
        load_iterate(run.root, 1)
    shutil.move(tmp_path / "here" / "base", run.root / "base")
    load_iterate(run.root, 1)


@pytest.mark.parametrize("start", ["fresh", "from an adapter"])
def test_adapters_name_their_base_by_its_absolute_path(
    start, tiny_model_dir, tmp_path, monkeypatch
):
    """A PEFT folder is loaded by its base's name, from whatever folder its user is in."""
    shutil.copytree(tiny_model_dir, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    # Saved beside its base, and by PEFT itself: "base" is all that it has.
    adapter = write_adapter(Path("base"), tmp_path / "adapter", seed=1)
    assert base_name(adapter) == "base"
    base = FrozenBase("base", compute_dtype="float32")
    policy = LoraPolicy(base, LoraSettings(), None if start == "fresh" else str(adapter))
    policy.snapshot(tmp_path / "snapshot")
    assert base_name(tmp_path / "snapshot") == str((tmp_path / "here" / "base").resolve())
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "snapshot").eval()
    wanted = plain_logits(tiny_model_dir, None if start == "fresh" else adapter)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def test_exported_adapter_names_the_base_where_it_is_now(tiny_model_dir, tmp_path, monkeypatch):
    """Earlier versions wrote the base's name into adapters as it was given."""
    run = write_run(tmp_path / "run", tiny_model_dir, "none")
    config = run.iterate(1) / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": "models/base"}))
    out = export_iterate(run.root, 1, tmp_path / "out")
    assert base_name(out) == str(tiny_model_dir.resolve())
    exported = json.loads((out / "adapter_config.json").read_text())
    assert {**exported, "base_model_name_or_path": fields["base_model_name_or_path"]} == fields


def test_adapter_on_a_hub_id_names_the_hub_id_and_its_revision():
    base = FrozenBase("owner/name", revision="v1")
    assert adapter_base(base) == {"base_model_name_or_path": "owner/name", "revision": "v1"}


def base_name(adapter: Path) -> str:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_base_is_absolute_where_it_is_a_folder(tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tiny_model_dir.parent)
    assert FrozenBase(tiny_model_dir.name).absolute.name == str(tiny_model_dir.resolve())
    assert FrozenBase("owner/name").absolute.name == "owner/name"
