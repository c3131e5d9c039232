"""Whatever hypothesis comes up with: rows and counted skips, or one error of ours."""

import csv
import inspect
import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spin_lightning import SPACE, SPIN, AlphaSPIN, MixtureSPIN, SelfPlayDataModule
from spin_lightning.cli.main import main
from spin_lightning.data.formats import read_conversations
from spin_lightning.data.read_report import describe_bad_rows
from spin_lightning.errors import RunFolderError, SpinError
from spin_lightning.evaluation.mt_bench.judge import read_verdicts
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.redaction import masked
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import ITERATE_FILE, RunFolder
from tests.toys.command_line import fit_arguments
from tests.toys.runs import write_examples

# The same examples every time, and so many that the file takes seconds.
fuzz = settings(
    derandomize=True,
    deadline=None,
    max_examples=120,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = ["messages", "prompt", "response", "completion", "real", "question", "answer", "role"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
KEYS = st.sampled_from([*NAMES, "content", "id"]) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "bot"]) | SCALARS,
            "content": st.text(max_size=9) | VALUES,
        }
    )
    | VALUES,
    max_size=5,
)
CHATS = st.fixed_dictionaries({"messages": TURNS | VALUES})
PAIRS = st.fixed_dictionaries({"prompt": TURNS | VALUES, "response": TURNS | VALUES})
ROWS = CHATS | PAIRS | st.dictionaries(KEYS, VALUES, max_size=4)


def refusal(ask: Callable[[], object]) -> str | None:
    """The one error that something ends in; None where it works."""
    try:
        ask()
    except SpinError as error:
        return str(error)
    return None


def is_told(said: str | None, *words: str) -> bool:
    """Whether it works, or the error names all of these and ends with a fix."""
    return said is None or all(word in said for word in (*words, "Fix: "))


def read(path: Path, rows: int | None) -> None:
    """Read a file: it is refused in one error, or none of its rows is lost."""
    found: list[Any] = []
    said = refusal(lambda: found.extend(read_conversations(str(path))))
    assert is_told(said, path.name)
    if said is not None:
        return
    conversations, bad = found
    assert rows is None or len(conversations) + len(bad) == rows
    ids = [row.example_id for row in [*conversations, *bad]]
    assert sorted(ids) == list(range(len(ids)))
    assert describe_bad_rows(bad, len(ids)).startswith(f"{len(bad)} of {len(ids)} rows")


@fuzz
@given(content=st.binary(max_size=300), suffix=st.sampled_from(["json", "jsonl", "csv", "parquet"]))
def test_any_bytes_are_read_or_refused(content, suffix, tmp_path):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    read(path, None)


@fuzz
@given(rows=st.lists(ROWS, min_size=1, max_size=5))
def test_any_objects_are_rows_or_counted(rows, tmp_path):
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    read(lines, len(rows))
    whole = tmp_path / "data.json"
    whole.write_text(json.dumps(rows), encoding="utf-8")
    read(whole, len(rows))


@fuzz
@given(rows=st.lists(VALUES | ROWS, min_size=1, max_size=4))
def test_any_json_is_rows_or_refused(rows, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read(path, len(rows))


@fuzz
@given(
    header=st.lists(st.sampled_from(NAMES) | st.text(max_size=5), min_size=1, max_size=4),
    rows=st.lists(st.lists(st.text(max_size=8), min_size=1, max_size=4), max_size=4),
)
def test_any_cells_are_rows_or_refused(header, rows, tmp_path):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    path = tmp_path / "data.csv"
    path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    read(path, len(rows))


@fuzz
@given(
    columns=st.dictionaries(
        st.sampled_from(NAMES),
        st.sampled_from(
            [
                st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=2),
                st.lists(st.floats(), min_size=2, max_size=2),
                st.lists(st.binary(max_size=5), min_size=2, max_size=2),
                st.lists(st.dates(), min_size=2, max_size=2),
                st.lists(st.none() | st.text(string.printable, max_size=5), min_size=2, max_size=2),
                st.lists(st.lists(st.text("ab"), max_size=2), min_size=2, max_size=2),
            ]
        ).flatmap(lambda strategy: strategy),
        min_size=1,
        max_size=4,
    )
)
def test_any_columns_are_rows_or_refused(columns, tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    read(path, 2)


# ------------------------------------------------------------------------ settings

ODD = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.lists(st.floats() | st.integers(-1, 2), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
MODULES = (SPIN, MixtureSPIN, AlphaSPIN, SPACE)


def names(kind: type) -> list[str]:
    skipped = {"self", "model", "data", "kwargs", "generation", "columns", "val_data", "revision"}
    return [name for name in inspect.signature(kind).parameters if name not in skipped]


@fuzz
@given(name=st.sampled_from(names(GenerationSettings)), value=ODD)
def test_any_value_of_a_generation_setting_works_or_is_refused(name, value):
    assert is_told(refusal(lambda: GenerationSettings.of({name: value})), f"generation.{name}=")


@fuzz
@given(data=st.data(), kind=st.sampled_from(MODULES), value=ODD)
def test_any_value_of_a_module_setting_works_or_is_refused(data, kind, value):
    own = [name for name in names(SPIN) if name not in kind.without]
    name = data.draw(st.sampled_from([*own, *names(kind)]))
    given_alpha: dict[str, Any] = {"alpha": 0.3} if kind is AlphaSPIN else {}
    given_all = {"model": "x", **given_alpha, name: value}
    assert is_told(refusal(lambda: kind(**given_all)), f"{name}=")


@fuzz
@given(name=st.sampled_from(names(SelfPlayDataModule)), value=ODD)
def test_any_value_of_a_data_setting_works_or_is_refused(name, value):
    assert is_told(refusal(lambda: SelfPlayDataModule("x", **{name: value})), f"data.{name}=")


@settings(fuzz, max_examples=40)
@given(
    name=st.sampled_from(
        [f"model.{name}" for name in names(SPIN)]
        + [f"data.{name}" for name in names(SelfPlayDataModule)]
        + ["model.generation.top_p", "seed_everything", "checkpoint_steps", "trainer.max_epochs"]
    ),
    value=ODD.map(json.dumps) | st.text(max_size=8),
)
@pytest.mark.filterwarnings("ignore:.max_epochs. was not set:UserWarning")
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_any_value_on_the_command_line_works_or_is_one_line(
    name, value, tiny_model_dir, tmp_path_factory, monkeypatch, capsys
):
    class Accepted(Exception):
        pass

    def accept(*args: Any, **kwargs: Any) -> None:
        raise Accepted

    monkeypatch.setattr("spin_lightning.policies.lora.load_base", accept)
    folder = tmp_path_factory.mktemp("fit")
    data = write_examples(folder / "data.jsonl", count=40)
    arguments = [
        *map(str, fit_arguments(folder / "run", tiny_model_dir, data)),
        f"--{name}={value}",
    ]
    capsys.readouterr()
    try:
        main(arguments)
    except Accepted:
        return
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert (code, said.count("Error: "), "Traceback" in said) == (2, 1, False)
    assert "Fix: " in said


# ------------------------------------------------------------------------ files of a run


@fuzz
@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_a_run_are_read_or_refused(content, tmp_path):
    run = RunFolder(tmp_path / "run")
    files = {
        run.iterate(1) / ITERATE_FILE: lambda: run.check_iterate(1),
        run.rows(0) / "__about__/manifest.json": lambda: read_rows(run.rows(0)),
        run.iterates / "best.json": run.best,
        tmp_path / "verdicts.jsonl": lambda: read_verdicts(tmp_path / "verdicts.jsonl"),
    }
    for path, ask in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert is_told(refusal(ask), str(path.parent))


@fuzz
@given(
    counts=st.fixed_dictionaries(
        {
            "schema_version": st.just(1) | VALUES,
            "units": st.integers(-1, 2) | VALUES,
            "rows": st.integers(-1, 2) | VALUES,
            "members": st.lists(st.integers(0, 2), max_size=2) | VALUES,
            "iterate": st.just(0),
            "opponent": st.none() | VALUES,
            "unit_size": st.just(1),
            "cap": st.just(1),
        },
        optional={"parts": VALUES, "token_members": VALUES, "token_alpha": VALUES},
    )
)
def test_any_manifest_is_read_or_refused(counts, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(counts))
    with pytest.raises(RunFolderError, match="Fix: "):
        read_rows(tmp_path)


@fuzz
@given(text=st.text(max_size=80))
def test_masking_any_text_twice_is_masking_it_once(text):
    assert masked(masked(text)) == masked(text)
