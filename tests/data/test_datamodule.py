import datetime as dt
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest

from spin_lightning import SPIN, TSPIN, SelfPlayDataModule, SelfPlayModule
from spin_lightning.data.dataset import EpochBatches
from spin_lightning.errors import DataError, RunFolderError, SettingError
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord
from spin_lightning.types import Example
from tests.toys.rows import ROW, first_ids, write_rows

CONTEXT = 64  # of the tiny model

SetUp = Callable[..., SelfPlayDataModule]
WriteData = Callable[..., str]


def word(i: int) -> str:
    return f"w{i // 10} w{i % 10}"


def pairs(count: int, prompts: int | None = None) -> list[dict[str, str]]:
    """As many different responses, to as many different prompts or to a few."""
    return [
        {"prompt": word(i % (prompts or count)), "response": f"{word(i)} w{i % 7}"}
        for i in range(count)
    ]


@pytest.fixture
def write(tmp_path: Path) -> WriteData:
    def write_data(rows: Sequence[dict[str, str]], name: str = "data.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write_data


def attached(module: SPIN, **place: Any) -> Any:
    """What a data module uses of a trainer."""
    place = {"current_epoch": 0, "global_rank": 0, "world_size": 1, **place}
    strategy = SimpleNamespace(broadcast=lambda value: value)
    given = {"lightning_module": module, "strategy": strategy, "default_root_dir": ".", **place}
    return SimpleNamespace(**given)


@pytest.fixture
def set_up(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    """A data module that has read its data, attached to a trainer with the tiny model."""

    def set_up_data(
        data: object,
        *,
        seed: int = 0,
        trainer: dict[str, Any] | None = None,
        variant: type[SelfPlayModule] = SPIN,
        **settings: Any,
    ) -> SelfPlayDataModule:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        module = SelfPlayDataModule(data, **settings)
        module.trainer = attached(variant(model=str(tiny_model_dir)), **(trainer or {}))
        module.setup("validate")  # any stage reads the same; "fit" asks for a real trainer too
        return module

    return set_up_data


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """What the data module logged."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    logger.removeHandler(caplog.handler)


def ids(examples: Sequence[Example]) -> list[int]:
    return [example.example_id for example in examples]


# ------------------------------------------------------------------------ holding out


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 5),
        ({"val_fraction": 0.2}, 20),
        ({"val_fraction": 0.0}, 0),
        ({"val_examples": 7}, 7),
        ({"val_examples": 7, "val_fraction": 0.5}, 7),
        ({"val_examples": 0}, 0),
        ({"max_examples": 80}, 4),
    ],
)
def test_held_out_number_is_the_share_or_the_number_given(settings, count, set_up, write):
    data = set_up(write(pairs(100)), **settings)
    assert len(data.val) == count
    assert len(data.train) == settings.get("max_examples", 100) - count


def test_held_out_share_is_at_most_256(set_up, write):
    rows = [{"prompt": word(i % 100), "response": word(i // 100)} for i in range(1000)]
    assert len(set_up(write(rows), val_fraction=0.9).val) == pytest.approx(256, abs=9)


@pytest.mark.parametrize("count", [100, 101])
def test_held_out_all_is_refused(count, set_up, write):
    with pytest.raises(SettingError, match=f"data.val_examples={count}.*only 100.*Fix: hold out"):
        set_up(write(pairs(100)), val_examples=count)


def test_val_data_is_held_out_and_data_is_played_whole(set_up, write, said):
    other = write(pairs(30)[::-1], "other.jsonl")
    data = set_up(write(pairs(100)), val_data=other)
    assert (len(data.train), len(data.val)) == (100, 30)
    assert data.val[0].prompt_ids == data.train[29].prompt_ids
    assert f"held out 30 examples of {other}" in said()


def test_val_data_with_val_examples_takes_as_many_of_it(set_up, write):
    other = write(pairs(30), "other.jsonl")
    data = set_up(write(pairs(100)), val_data=other, val_examples=12)
    assert (len(data.train), len(data.val)) == (100, 12)


# ------------------------------------------------------------------------ picks


def test_max_examples_picks_by_the_seed(set_up, write):
    source = write(pairs(100))

    def picked(seed: int) -> list[int]:
        data = set_up(source, seed=seed, max_examples=40)
        return sorted(ids(data.train) + ids(data.val))

    assert picked(1) == picked(1) != picked(2)
    assert len(set(picked(1))) == 40


def test_prompts_per_iterate_draws_other_prompts_per_iterate_and_the_same_in_each_run(
    set_up, write
):
    source = write(pairs(100))
    data, again = (set_up(source, prompts_per_iterate=30) for _ in range(2))
    picks = [ids(data.iterate_examples(t)) for t in range(4)]
    assert picks == [ids(again.iterate_examples(t)) for t in range(4)]
    assert len({tuple(pick) for pick in picks}) == 4
    assert all(len(set(pick)) == 30 and set(pick) <= set(ids(data.train)) for pick in picks)
    other_seed = set_up(source, seed=1, prompts_per_iterate=30)
    assert ids(other_seed.iterate_examples(0)) != picks[0]


def test_other_prompts_at_every_iterate_are_refused_where_iterate_0_has_to_answer_them(
    set_up, write
):
    with pytest.raises(SettingError, match=r"iterate 0 has not answered those that TSPIN needs"):
        set_up(write(pairs(100)), variant=TSPIN, prompts_per_iterate=30)
    set_up(write(pairs(100)), variant=TSPIN)


@pytest.mark.parametrize("count", [None, 95, 1000])
def test_prompts_per_iterate_of_all_is_all(count, set_up, write):
    data = set_up(write(pairs(100)), prompts_per_iterate=count)
    assert data.iterate_examples(0) == data.iterate_examples(3) == data.train
    assert data.rows_at(0) == 95


@pytest.mark.parametrize(
    ("settings", "rows", "batches", "batches_on_two"),
    [
        ({}, 95, 12, 6),
        ({"samples_per_prompt": 3}, 285, 36, 18),
        ({"prompts_per_iterate": 30, "batch_size": 7}, 30, 5, 3),
    ],
)
def test_rows_of_an_iterate_are_counted_before_they_are_made(
    settings, rows, batches, batches_on_two, set_up, write
):
    data = set_up(write(pairs(100)), **settings)
    assert data.rows_at(0) == rows
    assert data.batches_per_epoch(0, 1) == batches
    assert data.batches_per_epoch(0, 2) == batches_on_two


# ------------------------------------------------------------------------ bad rows

NOTEBOOK = {"data": pairs(20), "val_data": pairs(25)[20:]}
BAD = [{"prompt": " ", "response": "w1"}, {"prompt": "w1", "response": ""}]
LONG = {"prompt": " ".join(["w1"] * CONTEXT), "response": "w1"}


def test_bad_rows_skipped_are_left_out_and_counted(set_up, write, said):
    data = set_up(write([*BAD, *pairs(98)]), val_examples=0)
    assert ids(data.train) == list(range(2, 100))
    assert "skipped 2 of 100 rows" in said()
    assert "an empty prompt: 1 (row 0)" in said()
    assert "an empty response: 1 (row 1)" in said()


@pytest.mark.parametrize("rows", [BAD[:1], BAD[1:], [LONG]])
def test_bad_rows_refused_name_setting_file_and_row(rows, set_up, write):
    source = write([*pairs(9), *rows])
    with pytest.raises(
        DataError, match=r"data='.*data.jsonl': 1 of 10 .*\(row 9.*Fix: correct these"
    ):
        set_up(source, bad_rows="refuse")


def test_bad_rows_of_val_data_name_val_data(set_up, write):
    other = write(BAD, "other.jsonl")
    with pytest.raises(DataError, match=r"val_data='.*other.jsonl': 2 of 2 rows"):
        set_up(write(pairs(10)), val_data=other)


def test_more_than_half_of_the_rows_are_not_left_out_unless_asked(set_up, write, said):
    source = write([*pairs(9), *[{"question": "w1", "answer": "w2"}] * 10])
    with pytest.raises(DataError) as caught:
        set_up(source)
    assert "10 of 19 rows (columns of another format: 10 (rows 9: question, answer" in str(
        caught.value
    )
    assert "give each format a file of its own" in str(caught.value)
    assert len(set_up(source, bad_rows="skip_any", val_examples=0).train) == 9
    assert "skipped 10 of 19 rows" in said()


def test_prompts_over_the_cap_count_as_lost(set_up, write):
    source = write([*pairs(4), *[LONG] * 5])
    with pytest.raises(DataError, match=r"5 of 9 rows .*more than half"):
        set_up(source)


def test_columns_and_files_that_are_not_used_are_named_once(set_up, write, said):
    rows = [{**row, "context": "c", "id": 7} for row in pairs(20)]
    source = Path(write(rows)).parent
    write(pairs(3), "test.jsonl")
    data = set_up(source)
    assert len(data.train) + len(data.val) == 20
    once = said().count("Data: ")  # pytest's handler may see each line twice
    assert said().count("columns not used: context (20 rows), id (20 rows)") == once
    assert said().count("files not read: test.jsonl (split test)") == once


@pytest.mark.parametrize("kind", [list, Path, pd.DataFrame, datasets.Dataset.from_list])
def test_data_of_a_notebook_gives_the_examples_of_a_file(kind, set_up, write, said):
    files = {name: write(rows, f"{name}.jsonl") for name, rows in NOTEBOOK.items()}
    from_file = set_up(files["data"], val_data=files["val_data"])
    given = files if kind is Path else NOTEBOOK
    data = set_up(kind(given["data"]), val_data=kind(given["val_data"]))
    assert (data.train, data.val) == (from_file.train, from_file.val)
    assert data.fingerprint_fields() == from_file.fingerprint_fields()
    if kind is list:
        assert "held out 5 examples of a list of 5 rows." in said()


def test_bad_rows_alone_are_refused_even_where_they_are_skipped(set_up, write):
    with pytest.raises(DataError, match=r"2 of 2 rows.*Fix: correct the rows"):
        set_up(write(BAD))


def test_prompts_that_fill_the_context_are_left_out(set_up, write, said):
    data = set_up(write([LONG, *pairs(99)]), max_prompt_tokens=None, val_examples=0)
    assert len(data.train) == 99
    assert f"fills the model's context of {CONTEXT} tokens: 1 (row 0: 65 tokens)" in said()


def test_prompts_all_over_their_cap_are_refused_with_the_setting_to_raise(set_up, write):
    with pytest.raises(
        DataError, match=r"max_prompt_tokens=2.*Fix: .*raise data.max_prompt_tokens"
    ):
        set_up(write(pairs(10)), max_prompt_tokens=2)


# ------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_examples", 0),
        ("prompts_per_iterate", 0),
        ("samples_per_prompt", 0),
        ("max_prompt_tokens", 0),
        ("max_response_tokens", 0),
        ("batch_size", -1),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("val_examples", -1),
        ("num_workers", -1),
    ],
)
def test_setting_out_of_range_is_refused_by_name_with_the_fix(name, value):
    with pytest.raises(SettingError, match=f"data.{name}={value}: out of range. Fix: give"):
        SelfPlayDataModule("anything", **{name: value})


# ------------------------------------------------------------------------ loaders


def with_rows(data: SelfPlayDataModule, root: Path, rows: int = 9) -> SelfPlayDataModule:
    """Give the data module a run folder, as SelfPlay does, with rows of iterate 0."""
    run = data.run_folder = RunFolder(root)
    write_rows(run.rows(0), [replace(ROW, prompt_ids=(i, 4), members=(0, 2)) for i in range(rows)])
    write_rows(run.val_rows(0), [replace(ROW, prompt_ids=(i, 5)) for i in range(20, 23)])
    return data


def rows_of(loader: Any) -> list[list[int]]:
    return [first_ids(batch) for batch in loader]


@pytest.mark.parametrize("epoch", [0, 1])
def test_train_loader_serves_the_rows_in_the_order_of_the_epoch(epoch, set_up, write, tmp_path):
    data = set_up(write(pairs(20)), seed=5, batch_size=4, trainer={"current_epoch": epoch})
    with_rows(data, tmp_path / "run")
    assert rows_of(data.train_dataloader()) == list(EpochBatches(9, 4, seed=5, epoch=epoch))


def test_val_loader_keeps_the_order_of_the_rows(set_up, write, tmp_path):
    data = with_rows(set_up(write(pairs(20)), batch_size=2), tmp_path / "run")
    assert rows_of(data.val_dataloader()) == [[20, 21], [22]]


def test_train_loaders_of_two_ranks_share_the_rows(set_up, write, tmp_path):
    places = [{"global_rank": rank, "world_size": 2} for rank in range(2)]
    shares = [
        list(chain(*rows_of(with_rows(data, tmp_path / "run", 10).train_dataloader())))
        for data in (set_up(write(pairs(20)), batch_size=2, trainer=place) for place in places)
    ]
    assert sorted(chain(*shares)) == list(range(10))
    assert all(shares)


def test_shares_of_two_ranks_in_the_held_out_rows_count_each_row_once(set_up, write):
    """Three rows in batches of 2 x 1: the second rank has none of the last one, and repeats it."""
    places = [{"global_rank": rank, "world_size": 2} for rank in range(2)]
    for place, shares in zip(places, ([1.0, 2.0], [1.0, 0.0]), strict=True):
        data = set_up(write(pairs(20)), val_examples=3, batch_size=1, trainer=place)
        assert len(data.val) == 3
        assert [data.rank_share(0, batch, held_out=True) for batch in range(2)] == shares


def test_val_loader_without_held_out_examples_is_none(set_up, write):
    assert set_up(write(pairs(20)), val_examples=0).val_dataloader() == []


def test_train_loader_before_rows_are_made_says_who_makes_them(set_up, write, tmp_path):
    data = set_up(write(pairs(20)))
    with pytest.raises(RunFolderError, match="Fix: train with the SelfPlay callback"):
        data.train_dataloader()
    data.run_folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"not finished"):
        data.train_dataloader()


def test_other_prompts_in_every_iterate_and_rows_that_are_kept_are_refused(
    write, tiny_model_dir, monkeypatch
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    data = SelfPlayDataModule(write(pairs(20)), prompts_per_iterate=5)
    data.trainer = attached(SPIN(model=str(tiny_model_dir), refresh="reservoir"))
    with pytest.raises(SettingError, match=r"data.prompts_per_iterate=5.*refresh: all"):
        data.setup("validate")


def test_data_module_without_a_trainer_says_to_pass_it_to_fit():
    with pytest.raises(RunFolderError, match=r"Fix: pass it to Trainer.fit"):
        SelfPlayDataModule("anything").setup("fit")


# ------------------------------------------------------------------------ fingerprint


def test_fingerprint_of_other_data_with_the_same_number_of_rows_differs(set_up, write):
    rows = pairs(100)
    same, again = (set_up(write(rows)).fingerprint_fields() for _ in range(2))
    assert same == again
    rows[3]["response"] += " w1"
    changed = set_up(write(rows)).fingerprint_fields()
    assert {name for name in same if same[name] != changed[name]} == {"data"}


# ------------------------------------------------------------------------ templates and turns

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and loud %}w9 {% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %} </s>{% endif %} {% endfor %}"
)
CHAT = {
    "messages": [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
    ]
}


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return str(tmp_path / "template.jinja")


def test_chat_template_and_its_variables_reach_the_prompts_and_the_fingerprint(
    set_up, write, template
):
    source = write(pairs(20))
    plain = set_up(source, chat_template=template)
    loud = set_up(source, chat_template=template, chat_template_kwargs={"loud": True})
    nine = loud.format.tokenizer.convert_tokens_to_ids("w9")
    assert loud.train[0].prompt_ids == (nine, *plain.train[0].prompt_ids)
    assert "set loud = True" in loud.format.tokenizer.chat_template
    changed = {
        name
        for name, value in plain.fingerprint_fields().items()
        if loud.fingerprint_fields()[name] != value
    }
    assert changed == {"chat_template", "data", "val_data"}


def test_turns_all_makes_an_example_of_each_answer_and_is_in_the_fingerprint(
    set_up, write, template
):
    source = write([CHAT] * 5)
    last = set_up(source, chat_template=template, val_examples=0)
    every = set_up(source, chat_template=template, val_examples=0, turns="all")
    assert (len(last.train), len(every.train)) == (5, 10)
    assert {e.real_ids for e in every.train} > {e.real_ids for e in last.train}
    # A run folder of a version without the setting has no such field.
    assert "turns" not in last.fingerprint_fields()
    assert every.fingerprint_fields()["turns"] == "all"


def test_thoughts_are_left_out_or_dropped_as_set(set_up, write, said):
    thinking = {"prompt": "w1", "response": "<think>w7</think> w2"}
    source = write([*pairs(20), thinking])
    assert len(set_up(source, val_examples=0).train) == 20
    assert "data.thoughts=keep would make part of the answer" in said()
    assert len(set_up(source, val_examples=0, thoughts="drop").train) == 21
    assert "1 examples whose thoughts were dropped" in said()


@pytest.mark.parametrize(
    ("setting", "choices"),
    [
        ({"thoughts": "remove"}, "refuse, keep, or drop"),
        ({"turns": "first"}, "last or all"),
        ({"bad_rows": "mend"}, "skip, skip_any, or refuse"),
    ],
)
def test_choice_that_there_is_not_is_refused_with_those_that_there_are(setting, choices):
    ((name, value),) = setting.items()
    with pytest.raises(SettingError, match=f"data.{name}='{value}'.*Fix: {choices}"):
        SelfPlayDataModule("anything", **setting)


def test_responses_over_the_cap_are_counted_in_the_log(set_up, write, said):
    rows = [{**row, "response": "w1 w2 w3 w4 w5"} for row in pairs(8)]
    set_up(write([*rows, *pairs(20)[8:]]), max_response_tokens=4)
    assert (
        "8 of 20 responses are longer than max_response_tokens=4 and are cut; "
        "95 % fit in 6, all in 6" in said()
    )


# ------------------------------------------------------------------------ set up again


def test_data_in_memory_is_no_hyper_parameter():
    data = SelfPlayDataModule(pairs(20), val_data=pd.DataFrame(pairs(5)))
    assert not data.hparams


def test_second_model_reads_the_data_with_its_own_tokenizer(
    set_up, write, tiny_model_dir, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    text = (other / "tokenizer.json").read_text()
    # The other tokenizer has two words of the same vocabulary the other way round.
    swapped = text.replace('"w1":', '"w?":').replace('"w2":', '"w1":').replace('"w?":', '"w2":')
    (other / "tokenizer.json").write_text(swapped)
    data = set_up(write([{"prompt": "w1 w2", "response": "w2"}] * 5), val_examples=0)
    first = data.train
    data.setup("validate")
    assert data.train is first
    data.trainer = attached(SPIN(model=str(other)))
    data.setup("validate")
    (_, a, b) = first[0].prompt_ids
    assert data.train[0].prompt_ids[1:] == (b, a)


def test_date_of_a_template_is_that_of_the_run(set_up, write, tmp_path):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('w%d') }} " + TEMPLATE)
    settings = {"chat_template": str(tmp_path / "dated.jinja"), "val_examples": 0}
    run = RunFolder(tmp_path / "run")
    run.iterate(0).mkdir(parents=True)
    record = IterateRecord(index=0, template_date="2026-01-07")
    run.write_record(record)
    place = {"default_root_dir": str(run.root)}
    data = set_up(write(pairs(20)), trainer=place, **settings)
    assert data.format.date_written == "2026-01-07"
    again = set_up(write(pairs(20)), **settings)
    assert again.format.date_written == dt.date.today().isoformat()
    assert data.format.template_hash == again.format.template_hash
