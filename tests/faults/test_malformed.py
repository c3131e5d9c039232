"""Whatever is given: one error that names it and the fix, or rows left out and counted."""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from spin_lightning import SPIN, load_iterate
from spin_lightning.cli.main import main
from spin_lightning.data.formats import read_conversations
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import DataError, SettingError, SpinError
from spin_lightning.evaluation.mt_bench.data import read_mt_bench
from spin_lightning.evaluation.mt_bench.judge import read_verdicts
from spin_lightning.evaluation.results import read_result
from spin_lightning.policies.loading import load_base
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.report.run_view import config_differences, read_runs
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import BadRow, Conversation, Message
from tests.cli.test_fit import fit_arguments
from tests.faults.damage import Damage
from tests.faults.malformed_bench import MT_BENCH, write_bench
from tests.faults.malformed_data import FILES, BadFile
from tests.faults.malformed_models import ADAPTERS, MODELS
from tests.faults.malformed_runs import RUNS
from tests.faults.malformed_settings import CONFIGS, settings
from tests.toys.adapters import write_adapter
from tests.toys.runs import write_examples

_SECONDS = 10.0


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    """No hang: each case ends within seconds."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < _SECONDS


def test_catalog_holds_over_two_hundred_different_inputs():
    files = {(file.name, file.content) for file in FILES}
    damages = {(d.asked, d.path, d.case) for d in [*RUNS, *ADAPTERS, *MODELS, *MT_BENCH]}
    assert len(files) == len(FILES) >= 150
    assert len(damages) == len([*RUNS, *ADAPTERS, *MODELS, *MT_BENCH]) >= 150
    assert len(set(settings())) + len(CONFIGS) >= 150


# ------------------------------------------------------------------------ data


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.case} ({file.name})")
def test_data_file_is_refused_in_one_error_or_its_rows_are_counted(file: BadFile, tmp_path):
    path = tmp_path / file.name
    path.write_bytes(file.content)
    if file.words:
        with pytest.raises(DataError) as error:
            read_conversations(str(path))
        said = str(error.value)
        assert [word for word in (file.name, "Fix: ", *file.words) if word not in said] == []
        assert len(said) < 1000
    else:
        conversations, bad = read_conversations(str(path))
        assert len(conversations) == file.good
        for row, reason in zip(bad, file.left_out, strict=True):
            assert row.reason.startswith(reason)
        # None is lost: they are numbered through.
        ids = sorted(row.example_id for row in [*conversations, *bad])
        assert ids == list(range(file.good + len(file.left_out)))


TEMPLATES = {
    "no end": "{% for m in messages %}",
    "no syntax": "{{ messages[ }}",
    "unknown tag": "{% execute %}",
    "divides by zero": "{{ 1 / 0 }}",
    "adds a number to a list": "{{ messages + 1 }}",
    "a turn that is not there": "{{ messages[9].content.x }}",
    "unknown function": "{{ shout(messages) }}",
    "unknown filter": "{{ messages | shout }}",
    "endless loop": "{% for i in range(10**12) %}x{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "reaches for a class": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "refuses": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_template_that_fails_is_refused_in_one_error(case, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = TEMPLATES[case]
    with pytest.raises(SettingError, match=r"tokenizer.chat_template=.*Fix: correct the template"):
        PromptFormat.of(tokenizer, None)


@pytest.mark.parametrize("failing", ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ m + 1 }}"])
def test_turns_that_a_template_fails_at_are_left_out(failing, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}" + failing + "{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    turns = (Message(role="system", content="w1"), Message(role="user", content="w2"))
    row = PromptFormat.of(tokenizer, None).tokenize(
        Conversation(7, turns, "w3"), max_prompt_tokens=9, max_response_tokens=9, context=64
    )
    assert isinstance(row, BadRow)
    assert row.example_id == 7
    assert row.reason.startswith("the chat template refuses it (")


# ------------------------------------------------------------------------ the command line

CommandLine = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """What the command line says to arguments that it refuses before it reads any weights."""

    def no_weights(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    def run(*arguments: object, weights: bool = False) -> str:
        if not weights:
            monkeypatch.setattr("spin_lightning.policies.lora.load_base", no_weights)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".max_epochs. was not set", UserWarning)
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            with pytest.raises(SystemExit) as end:
                main(list(map(str, arguments)))
        said = capsys.readouterr()
        assert end.value.code == 2
        assert said.err.count("Error: ") == 1
        assert "Fix: " in said.err
        assert "Traceback" not in said.out + said.err
        return " ".join(said.err.split())

    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("good") / "good.jsonl")


@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [pytest.param(*case, id=f"{case[1]}={str(case[2])[:20]!r}-{case[0]}") for case in settings()],
)
def test_setting_that_cannot_work_is_refused_by_the_command_line(
    variant, name, value, refused, good, tiny_model_dir, tmp_path
):
    arguments = fit_arguments(tmp_path / "run", tiny_model_dir, good, "--model", variant)
    said = refused(*arguments, f"--{name}={value}")
    leaf = name.rpartition(".")[2]
    assert leaf in said or str(value) in said
    assert not list((tmp_path / "run").glob("rows/**/*.parquet"))


@pytest.mark.parametrize("case", CONFIGS)
def test_config_file_that_is_none_is_refused_by_the_command_line(
    case, refused, good, tiny_model_dir, tmp_path
):
    config = tmp_path / "config.yaml"
    config.write_bytes(CONFIGS[case])
    refused(*fit_arguments(tmp_path / "run", tiny_model_dir, good), "--config", config)


# ------------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, good: Path, tiny_model_dir: Path) -> Path:
    """A run of two iterates."""
    root = tmp_path_factory.mktemp("played") / "run"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        main(list(map(str, fit_arguments(root, tiny_model_dir, good))))
    return root


def _weights(model: Path) -> None:
    load_base(FrozenBase(str(model), compute_dtype="float32"))


def _check(**settings: Any) -> None:
    module = SPIN(**settings)
    module.check_model()
    assert module.tokenizer is not None


def _says_one_error(damage: Damage, ask: Callable[[], object], root: Path) -> None:
    damage.change(root / damage.path)
    with pytest.raises(SpinError) as error:
        ask()
    said = str(error.value)
    assert [word for word in ("Fix: ", *damage.words) if word not in said] == []
    assert len(said) < 2000


def _named(damage: Damage) -> str:
    return f"{damage.path}: {damage.case} ({damage.asked})"


@pytest.mark.parametrize("damage", [d for d in RUNS if d.asked != "fit"], ids=_named)
def test_damaged_run_is_told_in_one_error(damage: Damage, played, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(played, root)
    asked: dict[str, Callable[[], object]] = {
        "rows": lambda: read_rows(root / "rows/iterate_000"),
        "load": lambda: load_iterate(root, 1),
        "best": lambda: load_iterate(root, "best"),
        "report": lambda: config_differences(read_runs([RunFolder(root), RunFolder(played)])),
    }
    _says_one_error(damage, asked[damage.asked], root)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("command", ["report", "export", "evaluate"])
def test_damaged_run_is_told_by_every_command(command, played, refused, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(played, root)
    (root / "iterates/iterate_001/iterate.json").write_text("{")
    more = {"report": (root,), "export": (root, tmp_path / "out", "--iterate", 1)}
    bench = tmp_path / "bench"
    bench.mkdir()
    write_bench(bench)
    evaluate = (root, "--mt_bench", bench, "--judge.base_url", "http://localhost:9")
    said = refused(command, *more.get(command, evaluate))
    assert "iterate.json is damaged" in said


@pytest.mark.parametrize("damage", [d for d in RUNS if d.asked == "fit"], ids=_named)
def test_damaged_run_is_not_gone_on_with_by_the_command_line(
    damage: Damage, played, refused, tmp_path
):
    root = tmp_path / "run"
    shutil.copytree(played, root)
    config = yaml.safe_load((root / "config.yaml").read_text())
    config["trainer"] |= {"default_root_dir": str(root), "max_epochs": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    damage.change(root / damage.path)
    said = refused("fit", "--config", tmp_path / "config.yaml", weights=True)
    assert [word for word in damage.words if word not in said] == []
    assert not (root / "rows/iterate_002/__about__/manifest.json").exists()


@pytest.mark.parametrize("damage", ADAPTERS, ids=_named)
def test_damaged_adapter_is_told_before_weights_are_read(damage: Damage, tiny_model_dir, tmp_path):
    folder = write_adapter(tiny_model_dir, tmp_path / "adapter", seed=0)
    asked = {"model": str(tiny_model_dir), "initial_adapter": str(folder)}
    _says_one_error(damage, lambda: _check(**asked), folder)


@pytest.mark.parametrize("damage", MODELS, ids=_named)
def test_damaged_model_is_told_in_one_error(damage: Damage, tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    asked = {"model": lambda: _check(model=str(folder)), "weights": lambda: _weights(folder)}
    _says_one_error(damage, asked[damage.asked], folder)


@pytest.mark.parametrize("damage", MT_BENCH, ids=_named)
def test_damaged_file_of_an_evaluation_is_told_in_one_error(damage: Damage, tmp_path):
    write_bench(tmp_path)
    result = {"contestant": "a", "identity": "b", "benchmark": "c", "settings": {}, "scores": {}}
    (tmp_path / "result.json").write_text(json.dumps({**result, "lower_is_better": []}))
    asked: dict[str, Callable[[], object]] = {
        "questions": lambda: read_mt_bench(str(tmp_path)),
        "verdicts": lambda: read_verdicts(tmp_path / "verdicts.jsonl"),
        "results": lambda: read_result(tmp_path / "result.json"),
    }
    _says_one_error(damage, asked[damage.asked], tmp_path)


# ------------------------------------------------------------------------ folders of something else


@pytest.mark.parametrize("name", ["notes.txt", "main.py", "README.md", "model/config.json"])
def test_folder_of_something_else_is_refused_and_left_as_it_is(
    name, refused, good, tiny_model_dir, tmp_path
):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    said = refused(*fit_arguments(tmp_path / "run", tiny_model_dir, good))
    assert "holds no run, but 1 other files and folders" in said
    assert "name a new or an empty folder" in said
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file]


def test_run_folder_read_returns_what_is_whole(played):
    assert len(read_rows(played / "rows/iterate_000")) == 114
    assert RunFolder(played).known_iterates() == [0, 1, 2]
