"""`serve`: the printed command has the run's base, precision, lengths and rank."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import yaml

from tests.toys.adapters import write_adapter


@pytest.fixture
def config(tiny_model_dir, data, tmp_path):
    """Writes a config of fictitious play over 3 iterates, with these settings of its model."""

    def write(variant: str = "FictitiousSPIN", max_epochs: int = 3, **settings: object) -> Path:
        lengths = {"max_prompt_tokens": 20, "max_response_tokens": 10}
        content = {
            "trainer": {"max_epochs": max_epochs},
            "model": {
                "class_path": variant,
                "init_args": {"model": str(tiny_model_dir), "compute_dtype": "float32", **settings},
            },
            "data": {
                "class_path": "SelfPlayDataModule",
                "init_args": {"data": str(data), **lengths},
            },
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def printed(spin, capsys, *arguments: object) -> list[str]:
    """The words of the command that is printed."""
    spin("serve", *arguments)
    return shlex.split(capsys.readouterr().out.replace("\\\n", " "))


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_the_command_of_a_config(spin, capsys, config, tiny_model_dir):
    words = printed(spin, capsys, "--config", config(lora_r=12))
    assert words[:4] == [
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "vllm", "serve", str(tiny_model_dir)
    ]  # fmt: skip
    expected = {
        "--dtype": "float32",
        "--generation-config": "vllm",
        "--max-model-len": "30",  # 20 + 10
        "--max-loras": "3",  # iterates 1 and 2 beside the base, and a spare place
        "--max-lora-rank": "16",  # the next that vLLM takes
        "--host": "127.0.0.1",
        "--port": "8000",
    }
    assert {name: after(words, name) for name in expected} == expected
    assert "--enable-lora" in words
    assert not {"--quantization", "--enable-sleep-mode", "--revision"} & set(words)


def test_the_command_of_a_run(spin, capsys, finished, tiny_model_dir):
    words = printed(spin, capsys, finished)
    assert words[3] == str(tiny_model_dir)
    assert after(words, "--max-loras") == "2"  # SPIN: the last iterate alone, and a spare place
    assert after(words, "--max-model-len") == "64"  # without a cap of prompts: the context


def test_options(spin, capsys, config):
    path = config(revision="abc", trust_remote_code=True)
    more = ("--sleep", "--port", 9, "--host", "0.0.0.0", "--max_loras", 5)
    words = printed(spin, capsys, "--config", path, *more, "--options", "--swap-space 2 -x 'a b'")
    assert words[1] == "VLLM_SERVER_DEV_MODE=1"
    assert after(words, "--revision") == "abc"
    assert {"--trust-remote-code", "--enable-sleep-mode"} <= set(words)
    assert [after(words, name) for name in ("--port", "--host", "--max-loras")] == [
        "9",
        "0.0.0.0",
        "5",
    ]
    assert words[-4:] == ["--swap-space", "2", "-x", "a b"]


@pytest.mark.parametrize(("quantization", "named"), [("nf4", True), ("int8", False)])
def test_quantization_is_vllms_bitsandbytes_or_named_as_missing(
    quantization, named, spin, capsys, config
):
    spin("serve", "--config", config(quantization=quantization))
    told = capsys.readouterr()
    assert ("--quantization bitsandbytes" in told.out) == named
    assert "generation.largest_gap" in told.err


def test_the_rank_of_an_initial_adapter_counts(spin, capsys, config, tiny_model_dir, tmp_path):
    adapter = write_adapter(tiny_model_dir, tmp_path / "adapter", seed=1, r=20)
    words = printed(spin, capsys, "--config", config(initial_adapter=str(adapter)))
    assert after(words, "--max-lora-rank") == "32"
    assert after(words, "--max-loras") == "4"  # iterate 0 is an adapter, too


def test_many_iterates_wait_for_a_place(spin, capsys, config):
    words = printed(spin, capsys, "--config", config(max_epochs=40))
    assert after(words, "--max-loras") == "16"


def test_a_rank_beyond_vllms_is_refused(spin, capsys, config):
    with pytest.raises(SystemExit):
        spin("serve", "--config", config(lora_r=600))
    assert "lora_r=600: vLLM takes ranks up to 512" in capsys.readouterr().err


def test_exec_runs_it_with_its_variables(spin, capsys, config, monkeypatch, tiny_model_dir):
    called = []
    monkeypatch.setattr(os, "execvpe", lambda *given: called.append(given))
    spin("serve", "--config", config(), "--exec")
    ((file, words, variables),) = called
    assert (file, words[:3]) == ("vllm", ["vllm", "serve", str(tiny_model_dir)])
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert variables["PATH"] == os.environ["PATH"]


def test_exec_without_vllm_says_so(spin, capsys, config, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit):
        spin("serve", "--config", config(), "--exec")
    assert "there is no command vllm. Fix: install vLLM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "nothing to serve"),
        (("run", "--config", "c"), "nothing to serve"),
        (("no",), "config.yaml"),
    ],
)
def test_what_cannot_be_served_is_named(arguments, problem, spin, capsys):
    with pytest.raises(SystemExit):
        spin("serve", *arguments)
    assert problem in capsys.readouterr().err
