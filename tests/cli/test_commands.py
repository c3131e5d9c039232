"""The commands other than `fit` and `validate`."""

import json

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


def test_data_command_shows_counts_lengths_and_examples(spin, tiny_model_dir, tmp_path, capsys):
    lines = [{"prompt": f"w{i % 9} w1", "response": "w2 w3 w4", "id": i} for i in range(10)]
    lines.append({"prompt": "w1", "response": ""})
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spin(
        *("data", "--data", source, "--model", tiny_model_dir),
        *("--max_response_tokens", 3, "--examples", 1, "--tokens"),
    )
    shown = capsys.readouterr().out
    assert "11 rows read with 10 examples, 10 used. Left out: 1 row, 0 examples." in shown
    assert "1 left out: an empty response (row 10)" in shown
    assert "Columns (rows with a value): prompt (11), response (10). Not used: id (10)." in shown
    assert "10 of 10 responses are longer than max_response_tokens=3 and are cut" in shown
    assert "Duplicates: 1 of 10 examples have the prompt" in shown
    assert "answer of 3, cut, without a stop id" in shown
    assert "<s>·1" in shown


def test_data_command_reads_a_config_as_fit_does(spin, finished, data, capsys):
    spin("data", "--config", finished / "config.yaml", "--turns", "all", "--examples", 0)
    shown = capsys.readouterr().out
    assert f"data='{data}'" in shown
    assert "120 rows read with 120 examples" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to read. Fix: give --data and --model, or --config"),
        (["--config", "{run}/none.yaml"], "cannot be read"),
        (["--data", "{run}/none.jsonl", "--model", "{model}"], "there is no such file"),
        (["--data", "x", "--model", "{model}", "--turns", "first"], "turns"),
    ],
)
def test_data_command_that_cannot_read_says_what_to_do(
    arguments, message, spin, tiny_model_dir, tmp_path, capsys
):
    places = {"run": str(tmp_path), "model": str(tiny_model_dir)}
    with pytest.raises(SystemExit) as end:
        spin("data", *(argument.format(**places) for argument in arguments))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
