"""The site: the table of settings is complete, pages can be reached, links lead somewhere."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
import yaml

import spin_lightning
from spin_lightning.cli.commands import COMMANDS
from spin_lightning.cli.fit_help import FIT_HELP_PAGE
from spin_lightning.evaluation.settings import HarnessSettings
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.testbed import ExactMetrics
from tests.toys.fences import ROOT
from tools.settings_table import settings, table

DOCS = ROOT / "docs"
PREFIX = {spin_lightning.SelfPlayModule: "model.", spin_lightning.SelfPlayDataModule: "data."}


@pytest.fixture(scope="module")
def rows():
    return settings()


def taken_by(cls: type) -> set[str]:
    """Names that a class takes: of its `__init__`, and of its bases' while `**kwargs` go on."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        given = inspect.signature(base.__init__).parameters.values()
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names |= {p.name for p in given if p.kind not in starred and p.name != "self"}
        if all(p.kind not in starred for p in given):
            break
    if cls is spin_lightning.EvaluateIterates:  # its **harness are those of a dataclass
        names |= {field.name for field in fields(HarnessSettings)}
    return names - getattr(cls, "without", frozenset())


def classes() -> list[type]:
    exported = (getattr(spin_lightning, name) for name in spin_lightning.__all__)
    settable = (*PREFIX, spin_lightning.SelfPlay.__mro__[1])
    found = [c for c in exported if inspect.isclass(c) and issubclass(c, settable)]
    return [*(c for c in found if not inspect.isabstract(c)), ExactMetrics]


def test_classes_of_the_table_are_all_that_a_config_names():
    names = {cls.__name__ for cls in classes()}
    assert {"SPIN", "SFT", "SPACE", "SelfPlayDataModule", "SelfPlay", "BestIterate"} <= names


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_table_has_every_argument_of_a_class(cls, rows):
    prefix = next((p for base, p in PREFIX.items() if issubclass(cls, base)), f"{cls.__name__}.")
    listed = {row.path for row in rows if row.owner == cls.__name__}
    assert listed == {f"{prefix}{name}" for name in taken_by(cls)}


def test_table_has_every_setting_of_sampling(rows):
    listed = {row.path for row in rows if row.owner == "GenerationSettings"}
    assert listed == {f"model.generation.{field.name}" for field in fields(GenerationSettings)}


def test_table_has_options_of_every_command_and_a_meaning_for_each_row(rows):
    assert {"fit", *COMMANDS} <= {row.owner for row in rows}
    assert [row.path for row in rows if not row.meaning or not row.default] == []


def test_table_shows_a_shared_setting_once_and_its_default():
    (line,) = (line for line in table().splitlines() if line.startswith("| `model.beta` |"))
    assert "| `0.1` |" in line
    assert "`SPACE`" not in line
    (line,) = (line for line in table().splitlines() if line.startswith("| `model.lora_r` |"))
    assert line.endswith("| every variant |")


def test_short_help_of_fit_names_settings_that_exist(rows):
    known = {row.path for row in rows} | {row.path.removeprefix("fit --") for row in rows}
    named = re.findall(r"^  --([a-z_.]+) ", FIT_HELP_PAGE, flags=re.MULTILINE)
    of_lightning = (
        "trainer.",
        "seed_everything",
        "print_config",
        "help",
        "model.help",
        "data.help",
    )
    own = [name for name in named if not name.startswith(of_lightning) and name != "model"]
    assert len(own) >= 10
    assert set(own) <= known
    assert max(map(len, FIT_HELP_PAGE.splitlines())) <= 100


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/]+\.md)$", text, flags=re.MULTILINE))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages <= named
    assert yaml.safe_load(text)["hooks"] == ["tools/site_pages.py"]


def test_every_link_of_the_repository_leads_to_a_file():
    missing = []
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = set(re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text))
        links -= {"settings.md"}  # made when the site is built
        missing += [f"{page}: {link}" for link in links if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize(
    ("link", "here", "expected"),
    [
        ("docs/gpu.md", "index.md", "gpu.md"),
        ("docs/study.png", "index.md", "study.png"),
        ("../configs/demo.yaml", "variants.md", "configs/demo.yaml"),
        ("../README.md", "gpu.md", "index.md"),
        ("metrics.md", "variants.md", "metrics.md"),
        ("../../tools/mutation.toml", "runs/mutation.md", "../tools/mutation.toml"),
        ("docs/extending.md", "CONTRIBUTING.md", "extending.md"),
    ],
)
def test_link_of_the_repository_becomes_one_of_the_site(link, here, expected):
    pytest.importorskip("mkdocs", reason="needs mkdocs (pip install -e '.[docs]')")
    from tools.site_pages import in_site

    assert in_site(link, here) == expected


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
