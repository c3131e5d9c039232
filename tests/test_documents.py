"""Every fenced block of the documents: python runs, commands and configs are parsed.

A block that needs what a test lacks has a comment above it, such as `<!-- needs a GPU -->`. Blocks
of `text` are output. `tests/test_tutorial.py` runs the tutorial from its first command to its last.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_packaging import TARGETS, canonical, pins
from tests.toys.fences import ROOT, Fence, fences, parse
from tests.toys.runs import write_examples

PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
FENCES = [fence for page in PAGES for fence in fences(page)]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Names in the documents that stand for a reader's own.
RUNS = ("mine", "other", "quickstart", "my_data", "my_sft", "my_spin", "demo", "spin_qlora")
# Their python blocks have tests that check what the blocks do.
OWN_TESTS = ("docs/extending.md", "docs/handing_over.md")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_dir, finished_run) -> Path:
    """A folder in which the names that the documents use exist."""
    folder = tmp_path_factory.mktemp("documents")
    write_examples(folder / "my_answers.jsonl", count=24)
    (folder / "path" / "or").mkdir(parents=True)
    (folder / "path" / "or" / "hub-id").symlink_to(tiny_model_dir)
    for name in RUNS:
        run = folder / "runs" / name
        run.mkdir(parents=True)
        for part in finished_run.root.iterdir():
            (run / part.name).symlink_to(part)
        shutil.copy(ROOT / "configs" / "quickstart.yaml", run / "config.yaml")
    (variant,) = (f.text for f in FENCES if f.page == "README.md" and "class Decaying" in f.text)
    (folder / "my_variants.py").write_text(variant)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my_run.yaml").symlink_to(ROOT / "configs" / "quickstart.yaml")
    return folder


def of(*languages: str) -> list[Any]:
    return [pytest.param(f, id=f.name) for f in FENCES if f.language in languages]


def test_documents_have_blocks_of_every_kind():
    assert {"bash", "python", "yaml", "text"} <= {fence.language for fence in FENCES}
    assert len(FENCES) > 40


def test_every_block_names_a_language_that_is_checked():
    known = {"bash", "python", "yaml", "json", "jsonl", "text"}
    assert [f.name for f in FENCES if f.language not in known and f.needs is None] == []


@pytest.mark.parametrize("fence", of("bash"))
def test_commands_of_a_block_are_read(fence: Fence, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    for words in fence.words:
        check(words, may_be_unknown=fence.needs is not None)


def check(words: list[str], *, may_be_unknown: bool) -> None:
    """Check one command: does what it names exist, and are its arguments accepted?"""
    named = [word for word in words if re.fullmatch(r"(configs|notebooks|tools)/[\w/]+\.\w+", word)]
    assert [path for path in named if not (ROOT / path).exists()] == []
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "python" and arguments[:2] == ["-m", "spin_lightning"]:
        program, arguments = "spin-lightning", arguments[2:]
    if program == "spin-lightning":
        parse(arguments)
    elif program == "make":
        assert set(arguments) <= set(TARGETS)
    elif program == "pip":
        check_pip(arguments)
    elif program == "python" and arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        assert may_be_unknown or (program == "python" and named), f"{words}: not checked"


def check_pip(arguments: list[str]) -> None:
    """Extras exist, and exact versions are those that the tests run on."""
    assert arguments[0] == "install"
    for word in arguments[1:]:
        if extras := re.search(r"\[([\w,]+)\]$", word):
            assert set(extras[1].split(",")) <= EXTRAS.keys()
        if exact := re.fullmatch(r"([\w-]+)==([\w.]+)", word):
            assert pins().get(canonical(exact[1]), exact[2]) == exact[2]


@pytest.mark.parametrize("fence", of("yaml"))
def test_yaml_of_a_block_is_a_config(fence: Fence, world, monkeypatch, tmp_path, capsys):
    content = yaml.safe_load(fence.text)
    if not content.keys() & {"model", "data", "trainer"}:
        return
    monkeypatch.chdir(world)
    part = tmp_path / "part.yaml"
    part.write_text(fence.text)
    parse(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(part)])


@pytest.mark.parametrize("fence", of("json", "jsonl"))
def test_json_of_a_block_is_valid(fence: Fence):
    texts = fence.text.splitlines() if fence.language == "jsonl" else [fence.text]
    for text in texts:
        json.loads(text)


def python_pages() -> list[Any]:
    """The python blocks of each page, which share a namespace."""
    pages = defaultdict(list)
    for fence in FENCES:
        if fence.language == "python" and fence.needs is None and fence.page not in OWN_TESTS:
            pages[fence.page].append(fence)
    return [pytest.param(blocks, id=page) for page, blocks in pages.items()]


# Lightning's advice for a Trainer as a reader writes it.
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training")
@pytest.mark.parametrize("blocks", python_pages())
def test_python_of_a_page_runs(blocks: list[Fence], world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block.text, block.name, "exec"), namespace)
