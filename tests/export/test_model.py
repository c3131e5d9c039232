"""Exported model folders: what passes the verification, and what does not."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from spin_lightning.data.samples import read_samples
from spin_lightning.errors import SpinError
from spin_lightning.export import checks
from spin_lightning.export.checks import ExportError
from spin_lightning.export.model import export_iterate
from spin_lightning.policies import saved
from spin_lightning.run.folder import RunFolder
from tests.export.conftest import TEMPLATE
from tests.toys.models import write_model


def exported(run: RunFolder, out: Path, *, merge: bool = False):
    lines, tables = [], []
    export_iterate(run.root, "last", out, merge, lines.append, tables.append)
    return lines, tables[0]


@pytest.mark.parametrize("merge", [False, True])
def test_export_compares_eight_held_out_rows_with_the_log_probs_of_the_run(
    merge, own_run, tmp_path
):
    lines, table = exported(own_run, tmp_path / "out", merge=merge)
    assert len(table) == 1 + 8
    assert all(row[0].startswith("held-out row") for row in table[1:])
    assert all(abs(float(row[4])) < 1e-3 for row in table[1:])
    assert "log-probs as the run stored them" in lines[-1]
    assert "The chat template writes 8 prompts with the run's ids." in lines[-1]


@pytest.mark.parametrize("merge", [False, True])
def test_card_tells_the_run_and_its_code_loads_the_folder(
    merge, own_run, tmp_path, monkeypatch, capsys
):
    exported(own_run, tmp_path / "out", merge=merge)
    card = (tmp_path / "out" / "README.md").read_text()
    library = "transformers" if merge else "peft"
    assert card.startswith(f"---\nlibrary_name: {library}\n")
    for part in (
        "| variant | SPIN |",
        "| beta | 0.1 |",
        "80 rows read",
        "`val/kl_base`",
        "peft 0.",
    ):
        assert part in card
    # A card may be published: of the machine it names the base's folder alone, in the code.
    code = card.split("```python\n")[1].split("```")[0]
    assert str(tmp_path) not in card.replace(code, "")
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(code.replace("Your prompt", "w1 w2"), "card", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (TEMPLATE.replace("w8 {% endif %}", "w7 {% endif %}"), "by the exported chat template, "),
        (TEMPLATE.replace("{% if add", "{% if false and add"), "is missing by the exported"),
        ("{{ raise_exception('no') }}", "its chat template does not accept the prompt of example"),
        (None, "has other ids than in the run"),
    ],
)
def test_export_with_a_wrong_template_is_refused(template, problem, own_run, tmp_path):
    file = own_run.tokenizer / "chat_template.jinja"
    file.unlink() if template is None else file.write_text(template)
    # As in runs of older versions, which could not notice it before.
    record = own_run.iterate(0) / "iterate.json"
    fields = json.loads(record.read_text())
    del fields["tokenizer_files"]
    record.write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=problem) as refused:
        exported(own_run, tmp_path / "out")
    assert "the export was not kept" in refused.value.problem
    assert "restore the run's tokenizer folder" in refused.value.fix
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("merge", [False, True])
def test_export_on_other_weights_of_the_base_is_refused(merge, own_run, tmp_path):
    model = tmp_path / "model"
    write_model(AutoConfig.from_pretrained(model), model, seed=1)
    with pytest.raises(ExportError, match=r"held-out row \d+ has log-prob -\d") as refused:
        exported(own_run, tmp_path / "out", merge=merge)
    assert "is not the run's: model.safetensors differs" in refused.value.problem
    assert refused.value.fix == f"put the base model of the run at {model} again"
    assert not list(tmp_path.glob("*out*"))


def test_export_that_names_another_base_is_refused(own_run, tmp_path, monkeypatch):
    other = write_model(AutoConfig.from_pretrained(tmp_path / "model"), tmp_path / "other", seed=1)
    named = {"base_model_name_or_path": str(other), "revision": None}
    monkeypatch.setattr(saved, "adapter_base", lambda base: named)
    with pytest.raises(ExportError, match="accepted difference"):
        exported(own_run, tmp_path / "out")


def test_export_that_stops_elsewhere_is_refused(own_run, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "listed", lambda ids: [5])
    with pytest.raises(ExportError, match=r"stops at \[5\], and the run's responses at \[2\]"):
        exported(own_run, tmp_path / "out")


def test_folder_that_transformers_cannot_load_is_refused(own_run, tmp_path, monkeypatch):
    named = {"base_model_name_or_path": str(tmp_path / "nothing"), "revision": None}
    monkeypatch.setattr(saved, "adapter_base", lambda base: named)
    with pytest.raises(SpinError, match="transformers cannot load it"):
        exported(own_run, tmp_path / "out")


def test_run_keeps_held_out_conversations_with_their_ids(chat_run):
    run = RunFolder(chat_run / "run")
    samples = read_samples(json.loads(run.conversations.read_text()))
    assert len(samples) == 8
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    for sample in samples:
        (turn,) = sample.turns
        # Beside the words of a prompt, the template writes w9 (id 13) and w8 (id 12).
        words = [int(word[1:]) + 4 for word in turn["content"].split()]
        assert list(sample.prompt_ids) == [13, *words, 12]
        asked = tokenizer.apply_chat_template(list(sample.turns), add_generation_prompt=True)
        assert asked["input_ids"] == list(sample.prompt_ids)


def test_run_without_conversations_or_rows_is_compared_with_its_tokenizer(own_run, tmp_path):
    own_run.conversations.unlink()
    lines, _ = exported(own_run, tmp_path / "out")
    assert "The run keeps no conversations" in lines[-1]
    shutil.rmtree(own_run.root / "rows")
    lines, table = exported(own_run, tmp_path / "again")
    assert len(table) == 1 + 8
    assert "made-up ids" in lines[-1]


def test_log_probs_are_computed_where_the_run_stored_none(own_run, tmp_path):
    shutil.rmtree(own_run.val_rows(1))
    lines, _ = exported(own_run, tmp_path / "out")
    assert "held-out rows, log-probs computed by spin-lightning" in lines[-1]
