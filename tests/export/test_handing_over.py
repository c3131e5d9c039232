"""docs/handing_over.md: its Python runs, and its commands are ours."""

import re
import shlex
from pathlib import Path

import pytest

from spin_lightning.export.model import export_iterate

PAGE = (Path(__file__).parents[2] / "docs" / "handing_over.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_python_of_the_page_loads_exported_folders(own_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export_iterate(own_run.root, "last", "exported")
    export_iterate(own_run.root, "last", "merged", merge=True)
    capsys.readouterr()
    blocks = [code for language, code in BLOCKS if language == "python" and "rows" not in code]
    assert len(blocks) == 2
    for code in blocks:
        exec(compile(code, "handing_over.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "command",
    [
        line.partition("#")[0].strip()
        for language, code in BLOCKS
        if language == "bash"
        for line in code.splitlines()
        if line.startswith("spin-lightning")
    ],
)
def test_commands_of_the_page_fail_for_want_of_the_run_alone(
    command, spin, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spin_lightning.export.hub.get_token", lambda: "hf_" + "a" * 20)
    with pytest.raises(SystemExit):
        spin(*shlex.split(command)[1:])
    message = capsys.readouterr().err
    assert "has no iterate 0; it has none" in message or "it has no config.yaml" in message
