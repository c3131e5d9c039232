"""Rows of a run as a preference data set."""

import json
import shutil

import pytest
from datasets import load_dataset
from transformers import AutoTokenizer

from spin_lightning.cli.main import main
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from tests.export.conftest import TEMPLATE
from tests.toys.command_line import fit_arguments
from tests.toys.runs import write_examples


@pytest.fixture(scope="module")
def played(tiny_model_dir, tmp_path_factory):
    """A run of a chat model, and one of a model without a template, by the command line."""
    root = tmp_path_factory.mktemp("preferences")
    data = write_examples(root / "examples.jsonl", count=60)
    (root / "template.jinja").write_text(TEMPLATE)
    more = {"chat": ["--data.chat_template", root / "template.jinja"], "plain": []}
    for name, options in more.items():
        arguments = fit_arguments(root / name, tiny_model_dir, data)
        with pytest.MonkeyPatch.context() as patch:
            few = ["--trainer.max_epochs", 1, "--data.val_examples", 6]
            patch.setattr("sys.argv", ["spin-lightning", *map(str, [*arguments, *few, *options])])
            main()
    return root


def ids_of(row, side, tokenizer):
    """The ids of a prompt, or of a prompt and a response, as TRL's DPOTrainer computes them."""
    if isinstance(row["prompt"], list):
        turns = row["prompt"] + (row[side] if side else [])
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=side is None)
        return ids["input_ids"]
    text = row["prompt"] + (row[side] + tokenizer.eos_token if side else "")
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_rows_are_a_data_set_whose_ids_are_those_of_the_run(kind, played, spin, tmp_path, capsys):
    spin("export", played / kind, tmp_path / "rows", "--to", "trl")
    assert "train: 54 rows" in capsys.readouterr().out
    rows = load_dataset(str(tmp_path / "rows"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in rows.items()} == {"train": 54, "test": 6}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rows" / "tokenizer")
    run = RunFolder(played / kind)
    tables = {"train": read_rows(run.rows(0)), "test": read_rows(run.val_rows(0))}
    for split, table in tables.items():
        for i, row in enumerate(rows[split]):
            prompt = table.prompt_ids[i].tolist()
            assert ids_of(row, None, tokenizer) == prompt
            for side, ids in (("chosen", table.real_ids), ("rejected", table.generated_ids)):
                response = ids[i].tolist()
                found = ids_of(row, side, tokenizer)[: len(prompt) + len(response)]
                assert found == [*prompt, *response]
            assert row["finished"] == bool(table.finished[i])


def test_rows_of_other_data_are_refused(played, spin, tmp_path, capsys):
    run = shutil.copytree(played / "chat", tmp_path / "run")
    data = tmp_path / "examples.jsonl"
    lines = [json.loads(line) for line in (played / "examples.jsonl").read_text().splitlines()]
    data.write_text("".join(json.dumps({**x, "prompt": f"w0 {x['prompt']}"}) + "\n" for x in lines))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(played / "examples.jsonl"), str(data)))
    with pytest.raises(SystemExit):
        spin("export", run, tmp_path / "rows", "--to", "trl")
    assert "of the data is not the one of the run. Fix: restore the data" in capsys.readouterr().err
    config.unlink()
    with pytest.raises(SystemExit):
        spin("export", run, tmp_path / "rows", "--to", "trl")
    assert "it has no config.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        spin("export", run, tmp_path / "rows", "--to", "trl", "--merge", "true")
    assert "rows cannot be merged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*rows*"))
