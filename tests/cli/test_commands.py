"""The commands other than `fit` and `validate`."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_lightning import load_iterate
from spin_lightning.run.folder import RunFolder


def test_testbed_command_says_where_model_and_data_lie(spin, testbed_seed_0, capsys):
    spin("testbed")
    told = capsys.readouterr().out
    assert f"model: {testbed_seed_0.model}" in told
    assert f"data:  {testbed_seed_0.data}" in told


def test_export_adapter_and_merged_model_give_the_iterates_logits(finished, spin, tmp_path):
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    model, _ = load_iterate(finished, 2)
    with torch.no_grad():
        wanted = model(ids).logits
    spin("export", finished, tmp_path / "adapter", "--iterate", 2)
    kept = RunFolder(finished).iterate(2) / "adapter_model.safetensors"
    assert (tmp_path / "adapter" / kept.name).read_bytes() == kept.read_bytes()
    spin("export", finished, tmp_path / "merged", "--merge", "true")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, wanted, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{run}", "{out}", "--iterate", "7"], "has no iterate 7"),
        (["export", "{run}", "{out}", "--iterate", "0"], "is the base model"),
        (["export", "{run}", "{run}"], "the folder is not empty"),
        (["report", "{out}"], "holds no iterates"),
        (["evaluate", "{run}"], "nothing to evaluate. Fix: give --tasks or --mt_bench"),
        (["evaluate", "--run", "{run}"], "nothing to evaluate"),  # the older spelling
        (["evaluate", "--iterates", "0", "--run={run}"], "nothing to evaluate"),
        (["evaluate", "{out}", "--tasks", "{out}"], "lm_eval has no such task"),
        (["evaluate"], "the following arguments are required: run"),
        (["study", "--config", "x", "--variants", "2"], "it does not name a class"),
        (["testbed", "--data", "{out}"], "--data needs a model folder to write. Fix: give --out"),
    ],
)
def test_command_on_what_is_not_there_says_what_to_do(
    arguments, message, finished, spin, tmp_path, capsys
):
    places = {"run": str(finished), "out": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as end:
        spin(*(argument.format(**places) for argument in arguments))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_report_of_two_runs_makes_a_table_and_a_picture(finished, spin, tmp_path, capsys):
    spin("report", finished, finished, "--out", tmp_path)
    assert "val/real_nll_per_token" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_evaluate_without_the_harness_says_how_to_install_it(finished, spin, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        spin("evaluate", finished, "--tasks", "arc_challenge")
    assert end.value.code == 2
    assert "pip install 'spin-lightning[eval]'" in capsys.readouterr().err


def test_evaluate_dashes_are_accepted_where_underscores_are(finished, spin, tmp_path, capsys):
    for option in ("--mt_bench", "--mt-bench"):
        with pytest.raises(SystemExit):
            spin("evaluate", finished, option, tmp_path / "nothing")
        assert "nothing to evaluate" not in capsys.readouterr().err
