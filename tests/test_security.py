"""Nothing that comes from data, a checkpoint or a judge runs, leaks or lands elsewhere."""

import ast
import inspect
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from transformers import AutoTokenizer

import spin_lightning
from spin_lightning import SPIN, SelfPlayModule
from spin_lightning.cli.main import main
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import RunFolderError, SpinError
from spin_lightning.evaluation.mt_bench.data import Query
from spin_lightning.evaluation.mt_bench.judge import Judge, JudgeError, JudgeSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.redaction import masked
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import Message
from tests.cli.test_fit import fit_arguments
from tests.toys.runs import play, write_examples

PACKAGE = Path(spin_lightning.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Modules that run what they read.
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
# Calls that do, by their last two names.
RUNNERS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.full_load",
    ),
    *("yaml.unsafe_load", "subprocess.run", "subprocess.Popen", "subprocess.call"),
    *("jinja2.Template", "jinja2.Environment", "pd.read_pickle", "torch.package"),
}
SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ".".join(ast.unparse(node.func).split(".")[-2:]), node


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


# ------------------------------------------------------------------------ the code itself


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_loads_no_pickle_and_runs_no_text(path: Path):
    tree = ast.parse(path.read_text())
    imported = {
        name.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert not imported & LOADERS
    for name, call in calls(tree):
        assert name not in RUNNERS, f"{path}:{call.lineno}"
        given = keywords(call)
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"{path}:{call.lineno}"
        assert given.get("weights_only") != "False" or name == "trainer.save_checkpoint"
        assert given.get("allow_pickle") in (None, "False")
        assert given.get("shell") in (None, "False")
        assert given.get("trust_remote_code") != "True"


def test_sources_are_all_seen():
    assert len(SOURCES) > 60


def test_code_that_comes_with_a_model_does_not_run_unless_asked_for():
    assert inspect.signature(SelfPlayModule).parameters["trust_remote_code"].default is False
    assert FrozenBase("x").trust_remote_code is False
    assert FrozenBase("x").source["trust_remote_code"] is False


def test_code_of_a_model_folder_is_refused_and_not_run(tiny_model_dir, tmp_path):
    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with pytest.raises(SpinError, match="model="):
        SPIN(model=str(model)).check_model()
    assert not mark.exists()


# ------------------------------------------------------------------------ checkpoints


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self._path,))


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_checkpoint_with_a_malicious_pickle_is_refused_and_not_run(form, tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", count=40)
    play(tmp_path / "run", tiny_model_dir, data, epochs=1)
    last, mark = RunFolder(tmp_path / "run").last_checkpoint, tmp_path / "ran"
    if form == "torch":
        content = torch.load(last, weights_only=True)
        torch.save({**content, "epoch": Touch(mark)}, last)
    else:
        last.write_bytes(pickle.dumps(Touch(mark)))
    # (The name of a file is all that it takes to run it otherwise.)
    with pytest.raises(RunFolderError, match="which is never loaded since it could run code"):
        play(tmp_path / "run", tiny_model_dir, data, epochs=2, ckpt_path=last)
    assert not mark.exists()
    assert RunFolder(tmp_path / "run").known_iterates() == [0, 1]


# ------------------------------------------------------------------------ data


def test_template_in_a_text_is_text(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    text = "w1 {{ 7 * 7 }} {% for x in y %} {{ ''.__class__ }} w2"
    ids = PromptFormat.of(tokenizer, None).prompt_ids((Message(role="user", content=text),))
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_names_in_data_lead_nowhere(tiny_model_dir, tmp_path):
    data = tmp_path / "data" / "examples.jsonl"
    data.parent.mkdir()
    rows = [json.loads(line) for line in write_examples(data, count=40).read_text().splitlines()]
    bad = {"id": "../../escaped", "prompt_id": "/tmp/escaped", "path": "~/escaped", "name": "a\0b"}
    text = {"prompt": "../../escaped {{ 7 * 7 }}", "response": "../../../escaped"}
    rows = [{**bad, **row} for row in rows] + [{**bad, **text}]
    data.write_text("\n".join(map(json.dumps, rows)))
    play(tmp_path / "a" / "b" / "run", tiny_model_dir, data, epochs=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    outside = [path for path in files if "run" not in path.relative_to(tmp_path).parts]
    assert outside == [data]
    assert not any("escaped" in path.name for path in tmp_path.rglob("*"))


# ------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {SECRET} end", "token <masked> end"),
        (f"https://user:{SECRET}@huggingface.co/x", "https://<masked>@huggingface.co/x"),
        ("api_key: abc123", "api_key: <masked>"),
        ("api_key: 'abc 123'", "api_key: '<masked>'"),
        ('{"api_key": "abc123", "n": 1}', '{"api_key": "<masked>", "n": 1}'),
        ("wandb_api_key=abc123", "wandb_api_key=<masked>"),
        ("hub_token: abc", "hub_token: <masked>"),
        ("password: x", "password: <masked>"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: <masked>"),
        ("key sk-abcdefghijklmnopqrstuv", "key <masked>"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=<masked>&y=1"),
        ("api_key: null", "api_key: null"),
        ("batch_tokens: 512", "batch_tokens: 512"),
        ("max_prompt_tokens: 512", "max_prompt_tokens: 512"),
        ("max_tokens: 2048", "max_tokens: 2048"),
        ("mixture: token", "mixture: token"),
        ("key_variable: OPENAI_API_KEY", "key_variable: OPENAI_API_KEY"),
        ("tokenizer: x", "tokenizer: x"),
    ],
)
def test_masked_hides_secrets_and_nothing_else(text, shown):
    assert masked(text) == shown
    assert masked(shown) == shown


def test_error_hides_secrets_of_what_it_names():
    error = SpinError(f"data='https://me:{SECRET}@host/x' is not there", fix="check it")
    assert SECRET not in str(error)
    assert "host/x" in str(error)


class Notifier(Callback):
    """A user's callback that takes a key.

    Args:
        api_key: Secret.
        address: Holds a token.
    """

    def __init__(self, api_key: str, address: str) -> None:
        self.api_key = api_key
        self.address = address


def test_run_folder_and_log_hold_no_secret_of_the_configuration(
    tiny_model_dir, tmp_path, capsys, monkeypatch
):
    data = write_examples(tmp_path / "data.jsonl", count=40)
    settings = {"api_key": "plain-secret-1", "address": f"https://me:{SECRET}@host/hook"}
    callback = {"class_path": "tests.test_security.Notifier", "init_args": settings}
    root = tmp_path / "run"
    arguments = fit_arguments(root, tiny_model_dir, data)
    monkeypatch.setattr(
        "sys.argv",
        [
            *("spin-lightning", *map(str, arguments), "--trainer.max_epochs=1"),
            f"--trainer.callbacks={json.dumps([callback])}",
        ],
    )
    main()
    config = (root / "config.yaml").read_text()
    assert "api_key: <masked>" in config
    assert yaml.safe_load(config)["trainer"]["callbacks"][0]["init_args"]["api_key"] == "<masked>"
    assert "https://<masked>@host/hook" in config
    said = capsys.readouterr()
    everything = [path.read_bytes() for path in root.rglob("*") if path.is_file()]
    for secret in ("plain-secret-1", SECRET):
        assert secret not in said.out + said.err
        assert not any(secret.encode() in content for content in everything)


def test_judge_that_repeats_its_key_does_not_show_it(tmp_path, monkeypatch):
    from openai import OpenAIError

    def fail(*args: Any) -> None:
        raise OpenAIError("no account for 'local-key-of-mine'")

    monkeypatch.setenv("OPENAI_API_KEY", "local-key-of-mine")
    judge = Judge(JudgeSettings(base_url="http://localhost:9/v1"))
    monkeypatch.setattr(judge, "_ask", fail)
    with pytest.raises(JudgeError) as error:
        judge.verdicts([Query(1, 1, "single-v1", "", "w1")], tmp_path / "verdicts.jsonl")
    assert "local-key-of-mine" not in str(error.value)
    assert "no account for '<masked>'" in str(error.value)
