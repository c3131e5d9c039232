"""What a fresh clone relies on: the pins, the make targets, the documents, the wheel."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from spin_lightning import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spin_lightning"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "AGENTS.md")
TARGETS = [
    "help",
    "quickstart",
    "demo",
    "test",
    "test-slow",
    "check",
    "lint",
    "audit",
    "types",
    "fmt",
    "coverage",
    "mutation",
    "notebook",
    "notebooks",
    "docs",
    "bench",
    "vllm-test",
    "package",
]
# Imported where present, inside functions, and named in an error otherwise.
OPTIONAL = {"httpx", "lm_eval", "openai"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def document(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_constraints_every_requirement_is_pinned():
    extras = PROJECT["optional-dependencies"].values()
    named = required(PROJECT["dependencies"]).union(*(required(extra) for extra in extras))
    # (An extra may name others of the project's own.)
    assert named - {PROJECT["name"]} <= pins().keys()


def test_constraints_torch_has_no_local_version():
    assert pins()["torch"] == "2.13.0"


def test_constraints_pins_hold_no_more_than_versions():
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins().values())


def test_dependencies_every_import_is_declared():
    distributions = metadata.packages_distributions()
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    third_party = imported - sys.stdlib_module_names - {"spin_lightning"} - OPTIONAL
    declared = required(PROJECT["dependencies"])
    undeclared = {
        name
        for name in third_party
        if not declared & {canonical(dist) for dist in distributions.get(name, [name])}
    }
    assert undeclared == set()


def test_version_of_the_installation_is_that_of_the_package():
    assert metadata.version("spin-lightning") == __version__


def test_console_script_resolves():
    (script,) = metadata.entry_points(group="console_scripts", name="spin-lightning")
    assert callable(script.load())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target():
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(TARGETS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_every_make_command_exists(name):
    mentioned = re.findall(r"(?:^|`)make ([a-z-]+)", document(name), flags=re.MULTILINE)
    assert mentioned
    assert set(mentioned) <= set(TARGETS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_every_config_and_notebook_exists(name):
    mentioned = set(re.findall(r"(?:configs|notebooks)/[\w/]+\.\w+", document(name)))
    assert {path for path in mentioned if not (ROOT / path).exists()} == set()


def test_agents_page_is_short():
    assert len(document("AGENTS.md").splitlines()) <= 60


def test_decisions_entries_are_short_and_complete():
    entries = re.split(r"^## ", document("DECISIONS.md"), flags=re.MULTILINE)[1:]
    assert entries
    for number, entry in enumerate(entries, start=1):
        assert entry.startswith(f"{number}. ")
        assert len(entry.strip().splitlines()) - 1 <= 15
        assert all(f"*{part}.*" in entry for part in ("Context", "Decision", "Consequence"))


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in document(".ci/run")
    assert "make test" in document("README.md")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load(document(".github/workflows/ci.yml"))
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands
    assert "make package" in commands


def test_citation_names_the_paper():
    citation = yaml.safe_load(document("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    (url,) = PROJECT["urls"].values()
    assert citation["preferred-citation"]["url"] == url == "https://arxiv.org/abs/2404.04291"
    assert citation["license"] == PROJECT["license"]


def test_wheel_holds_every_module_and_the_type_marker(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("spin_lightning/")}
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / PACKAGE.name).rglob("*")
        if path.is_file()
    }
    assert held == expected
    assert "spin_lightning/py.typed" in held


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A shallow clone of the last commit, without tags."""
    pytest.importorskip("setuptools_scm")
    folder = tmp_path_factory.mktemp("clone") / "spin-lightning"
    call = ["git", "clone", "--quiet", "--depth=1", "--no-tags", ROOT.as_uri(), folder]
    if shutil.which("git") is None or subprocess.run(call, check=False).returncode:
        pytest.skip("the sources are not in a git repository that can be cloned")
    return folder


def git(clone: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    call = ["git", *identity, *arguments]
    return subprocess.run(call, cwd=clone, capture_output=True, text=True, check=True).stdout


def test_sdist_of_a_shallow_clone_holds_every_file_and_has_a_version(clone, tmp_path):
    build = "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])"
    call = [sys.executable, "-c", build, tmp_path]
    subprocess.run(call, cwd=clone, capture_output=True, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert re.fullmatch(r"spin_lightning-0\.0\.1\.dev\d+\+g\w+\.tar\.gz", sdist.name)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(git(clone, "ls-files").splitlines()) <= held


def test_version_is_that_of_the_tag(clone):
    git(clone, "tag", "v1.2.3")
    call = [sys.executable, "-m", "setuptools_scm"]
    try:
        told = subprocess.run(call, cwd=clone, capture_output=True, text=True, check=True).stdout
    finally:
        git(clone, "tag", "--delete", "v1.2.3")
    assert told.strip() == "1.2.3"


def test_import_contract_holds(tmp_path):
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint_imports, "--no-logo", "--cache-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
