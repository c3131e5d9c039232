"""`doctor` on this machine, and on one with faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
import yaml

from spin_lightning.callbacks.memory_table import predicted_phases
from spin_lightning.cli import examination, speed_trial
from spin_lightning.cli.reading import data_and_model
from spin_lightning.policies import probes, shared_prefix
from spin_lightning.policies.probes import PROBES, Finding, Probe, probe_kernels

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_model_dir, data, tmp_path) -> Path:
    """A config of `fit` for the tiny model."""
    path = tmp_path / "config.yaml"
    settings = {
        "trainer": {"precision": "32-true"},
        "model": {"class_path": "SPIN", "init_args": {"model": str(tiny_model_dir)}},
        "data": {
            "class_path": "SelfPlayDataModule",
            "init_args": {
                "data": str(data),
                "batch_size": 32,
                "max_prompt_tokens": 20,
                "max_response_tokens": 10,
            },
        },
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def told(spin, capsys, *arguments: object) -> tuple[list[str], int]:
    """The lines that `doctor` prints, and its exit code."""
    try:
        spin("doctor", *arguments)
    except SystemExit as end:
        return capsys.readouterr().out.splitlines(), int(end.code or 0)
    return capsys.readouterr().out.splitlines(), 0


def line(lines: list[str], name: str) -> str:
    (found,) = (one for one in lines if one.startswith(name))
    return found


def test_servers_that_do_not_answer_are_to_be_started(spin, capsys, config):
    settings = yaml.safe_load(config.read_text())
    generation = {"engine": "vllm", "servers": ["http://127.0.0.1:9"]}
    settings["model"]["init_args"]["generation"] = generation
    config.write_text(yaml.safe_dump(settings))
    lines, code = told(spin, capsys, "--config", config)
    assert "none answers (http://127.0.0.1:9: " in line(lines, "generation")
    assert (lines[-1].startswith("Change: check the URLs"), code) == (True, 1)


def test_on_this_machine_all_is_well(spin, capsys):
    lines, code = told(spin, capsys)
    assert (lines[-1], code) == ("OK", 0)
    assert torch.__version__ in line(lines, "torch")
    assert "cpu" in line(lines, "device")
    assert "relative error" in line(lines, "product in 4 bits")
    assert "relative error" in line(lines, "float32 product")
    assert "float32" in line(lines, "compute dtype")
    assert "need a GPU" in line(lines, "attention")
    assert "refilled slots" in line(lines, "decoding")
    assert "14 of 14" in line(lines, "fused LoRA")
    assert "agree (log-probs differ" in line(lines, "self-check")
    assert not [one for one in lines if one.startswith(("CUDA graph", "driver"))]


def test_with_a_config_its_model_is_checked_and_its_memory_predicted(spin, capsys, config):
    """32 pairs of 20 + 10 + 10 tokens are two passes on a CPU, 640 tokens each."""
    lines, code = told(spin, capsys, "--config", config)
    assert (lines[-1], code) == ("OK", 0)
    assert line(lines, "training pass of 640 tokens").endswith("MiB")
    assert line(lines, "scoring pass of")
    assert line(lines, "decoding 131,072 tokens")
    assert "14 of 14" in line(lines, "fused LoRA")


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("no kernel image\nmore"), "fails (no kernel image)"), (None, "wrong: relative")],
)
def test_a_kernel_that_fails_or_is_wrong_is_named_with_the_change(
    error, said, spin, capsys, monkeypatch
):
    def broken(self: object, x: torch.Tensor) -> torch.Tensor:
        if error is not None:
            raise error
        return x.new_zeros(len(x), 64)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    lines, code = told(spin, capsys)
    assert said in line(lines, "product in 4 bits")
    assert code == 1
    assert lines[-1].startswith("Change: set model.quantization: none")


def test_every_probe_names_its_failure(monkeypatch):
    def fails(_: torch.device) -> float:
        raise RuntimeError("not supported")

    broken: list[Probe] = [replace(one, applies=lambda _: True, error=fails) for one in PROBES]
    monkeypatch.setattr(probes, "PROBES", tuple(broken))
    wanted = [Finding(one.name, "fails (not supported)", one.fix) for one in PROBES]
    assert probe_kernels(CPU) == wanted
    not_a_number = replace(PROBES[0], error=lambda _: float("nan"))
    assert not_a_number.run(CPU).fix == PROBES[0].fix


def test_wrong_log_probs_of_the_fast_passes_are_named(spin, capsys, config, monkeypatch):
    right = shared_prefix.prompt_logps
    monkeypatch.setattr(shared_prefix, "prompt_logps", lambda *args: right(*args) + 1.0)
    lines, code = told(spin, capsys, "--config", config)
    assert "the fast passes disagree with the plain ones" in line(lines, "self-check")
    assert code == 1
    assert lines[-1] == "Change: set model.packing: padded and model.fused_lora: false."


def test_a_precision_of_the_trainer_is_named(spin, capsys, config):
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["precision"] = "bf16-mixed"
    config.write_text(yaml.safe_dump(settings))
    lines, code = told(spin, capsys, "--config", config)
    assert "bf16-mixed" in line(lines, "precision")
    assert code == 1
    assert "model.compute_dtype: bfloat16" in lines[-1]


def test_a_run_that_does_not_fit_on_the_card_is_named(config, monkeypatch):
    """Keys and values of 131,072 tokens take 256 bytes each, 32 MiB; a card has 20 MB.

    A longest row has 20 + 10 tokens, 7,680 bytes of keys and values.
    """
    data, module = data_and_model(str(config), {}, None)
    module.configure_model()
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 20_000_000))
    row = examination._longest_row(module, data)
    found = list(examination._memory(module, row, 32, card))
    assert [finding.fix is None for finding in found] == [True, True, True, True, False, True]
    assert found[-2].text.startswith("32.0 MiB")
    assert "model.activation_checkpointing: true" in str(found[-2].fix)
    held = predicted_phases(module, row, 32, card)[1].in_all
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, held + 3 * 7680 + 7679))
    *_, last = examination._memory(module, row, 32, card)
    assert last.text.endswith("decoding 3")


def test_no_memory_is_predicted_for_decoding_where_servers_generate(config):
    settings = yaml.safe_load(config.read_text())
    servers = {"engine": "vllm", "servers": ["http://localhost:8000"]}
    settings["model"]["init_args"].setdefault("generation", {}).update(servers)
    config.write_text(yaml.safe_dump(settings))
    data, module = data_and_model(str(config), {}, None)
    module.configure_model()
    found = list(
        examination._memory(module, examination._longest_row(module, data), 32, torch.device("cpu"))
    )
    assert not [one for one in found if "decoding" in f"{one.name} {one.text}"]
    assert found[-1].text.startswith("training ")


def test_the_speed_of_each_phase_is_told(spin, capsys, config, monkeypatch):
    """Eight rows of 32 + 16 + 16 tokens, 2 s each; the longest rows have 20 + 10 + 10."""
    monkeypatch.setattr(speed_trial, "_clock", lambda work, device: work() or 2.0)
    lines, _ = told(spin, capsys, "--config", config)
    assert line(lines, "speed of decoding").split()[3:] == ["64", "tokens", "per", "second"]
    assert line(lines, "speed of scoring").split()[3:] == ["256", "tokens", "per", "second"]
    assert line(lines, "speed of training").split()[3:] == ["256", "tokens", "per", "second"]
    # 1,000 × 10 / 64 s, and 1,000 × 40 / 256 s twice.
    spans = line(lines, "1,000 of the longest rows")
    assert spans.endswith("7.8 min: decoding 2.6 min, scoring 2.6 min, training 2.6 min")


@pytest.mark.parametrize(
    ("error", "change"),
    [(RuntimeError("no kernel image"), "packing: padded"), (MemoryError("full"), "nf4")],
)
def test_a_trial_that_fails_is_told_with_the_change(error, change, spin, capsys, monkeypatch):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(examination, "measure", fails)
    lines, code = told(spin, capsys)
    assert f"cannot be measured ({error})" in line(lines, "speed")
    assert code == 1
    assert change in lines[-1]


def test_a_config_that_is_not_there_is_one_error(spin, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        spin("doctor", "--config", tmp_path / "none.yaml")
    assert end.value.code == 2
    assert "cannot be read" in capsys.readouterr().err
