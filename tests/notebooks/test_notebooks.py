"""Every notebook runs from its first cell to its last, draws its pictures and prints little."""

import importlib.util
import os
import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# By the clock, for a busy machine.
pytestmark = pytest.mark.timeout(900)
# Smaller values of the cells tagged `parameters`, for the default tests.
REDUCED = {
    "01_quickstart": {"iterates": 2, "examples": 640},
    "02_regularisation": {"iterates": 2, "pairs": 128, "played": ["SPIN"]},
    "03_write_your_own_variant": {"iterates": 2, "pairs": 128},
    "04_read_the_rows": {"iterates": 2, "pairs": 512},
    "05_bring_your_data_and_model": {"model": "tiny", "examples": 64, "base_steps": 20},
}
# How many pictures each of them draws.
PICTURES = dict(zip(REDUCED, [1, 4, 3, 4, 1], strict=True))


def test_notebooks_shipped_are_all_seen():
    assert [path.stem for path in NOTEBOOKS] == list(REDUCED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_outputs(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize(
    "path",
    # The shortest and the longest way through the library; the others are as long together.
    [
        pytest.param(path, marks=() if path.stem[:2] in ("01", "05") else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_notebook_of_reduced_size_executes(path, tmp_path, testbed_seed_0, monkeypatch):
    notebook = execute(path, tmp_path, monkeypatch, REDUCED[path.stem])
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == PICTURES[path.stem]
    # Without ipywidgets, tqdm asks for it where it is imported; `make notebook` installs it.
    widgets = importlib.util.find_spec("ipywidgets") is not None
    warned = [
        output.text
        for output in outputs
        if output.output_type == "stream"
        and output.name == "stderr"
        and (widgets or "IProgress not found" not in output.text)
    ]
    assert warned == []
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert len(printed.splitlines()) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_executes_in_under_two_minutes(path, tmp_path, testbed_seed_0, monkeypatch):
    # On one thread; processor time, since a busy machine takes any time by the clock.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    execute(path, tmp_path, monkeypatch, {})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 1 < used < 120


def execute(path, folder, monkeypatch, parameters):
    """Run a notebook in a folder, with other values of its parameters; return it with outputs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # As for a user: neither the backend nor the warnings of the tests.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    temporary = folder / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", []))
    for name, value in parameters.items():
        assert f"{name} = " in cell.source
        cell.source += f"\n{name} = {value!r}"
    work = folder / "work"
    work.mkdir()
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}})
    client.execute(env=dict(os.environ))
    # What a notebook writes goes to temporary folders.
    assert list(work.iterdir()) == []
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
