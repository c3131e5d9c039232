"""What a run keeps of its data for people: complete, bounded, without secrets."""

import json

import pytest
from transformers import AutoTokenizer

from spin_lightning.data.data_record import DataRecord, chosen, read_data_records, shortened
from spin_lightning.data.lengths import Lengths
from spin_lightning.data.overview import Overview
from spin_lightning.data.read_report import FileRead, ReadReport
from spin_lightning.types import BadRow, Example

KEY = "hf_abcdefghijklmnopqrst"


def overview(files: int = 1, reasons: int = 1, columns: int = 1) -> Overview:
    read = tuple(FileRead(f"f{i}.jsonl", None, 10, 9) for i in range(files))
    bad = tuple(BadRow(i, f"reason {i}: row {i}") for i in range(reasons))
    report = ReadReport(
        f"data='https://me:{KEY}@host/x.jsonl'",
        read,
        bad,
        conversations=9,
        columns_used={f"used{i}": 10 for i in range(columns)},
        columns_not_used={"id": 10},
        why_not_used={"id": "not text"},
    )
    prompts, responses = Lengths.of([3, 4], 7), Lengths.of([5, 1, 2], 4)
    return Overview(report, 9, (), 9, prompts, responses, 0, 3, 2)


def test_record_holds_counts_columns_lengths_and_duplicates():
    record = DataRecord.of(overview())
    assert record.counts == "10 rows read with 9 examples, 9 used. Left out: 1 row, 0 examples."
    assert record.left_out == ["1 left out: reason 0 (row 0)"]
    assert record.files == [["f0.jsonl", "not recognized", "10", "9"]]
    assert record.columns == "Columns (rows with a value): used0 (10). Not used: id (10)."
    assert "column id is not used: not text" in record.notes
    # The median of 1, 2 and 5 is 2; only 5 is over the cap of 4.
    assert record.lengths == [
        ["prompt", "3", "4", "4", "4", "4", "7", "0"],
        ["response", "2", "5", "5", "5", "5", "4", "1"],
    ]
    assert record.duplicates.startswith("3 of 9 examples have the prompt of an earlier one, 2 of")


def test_written_record_reads_back_without_secrets():
    record = DataRecord.of(overview())
    written = json.dumps({"sources": [record.to_json()]})
    assert KEY not in written
    (read,) = read_data_records(json.loads(written))
    assert read.source == "data='https://<masked>@host/x.jsonl'"
    assert (read.counts, read.lengths, read.notes) == (record.counts, record.lengths, record.notes)


def test_examples_are_prompt_answer_and_stop(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    stop = tokenizer.eos_token_id
    ids = tokenizer.encode("w1 w2", add_special_tokens=False)
    whole = Example(4, tuple(ids), (*ids[:1], stop), real_finished=True)
    cut = Example(5, tuple(ids), tuple(ids), real_finished=False)
    first, second = DataRecord.of(overview(), [whole, cut], tokenizer).examples
    assert (first.prompt, first.answer, first.stop) == ("w1 w2", "w1", f"</s> (id {stop})")
    assert (first.prompt_tokens, first.answer_tokens) == (2, 1)
    assert (second.answer, second.answer_tokens, second.stop) == ("w1 w2", 2, "")


def test_size_is_bounded_whatever_the_source_holds():
    record = DataRecord.of(overview(files=1000, reasons=1000, columns=1000))
    assert record.files[-1] == ["and 988 more", "", "9,880", "8,892"]
    assert record.left_out[-1] == "and 988 other reasons"
    assert "and 960 more. Not used" in record.columns
    assert len(json.dumps(record.to_json())) < 10_000
    assert shortened("a" * 2000) == f"{'a' * 750}\n… 500 characters more …\n{'a' * 750}"


def test_examples_are_chosen_from_beginning_middle_and_end():
    assert chosen("abcdefg") == ["a", "d", "g"]
    assert chosen("ab") == ["a", "b"]
    assert chosen("") == []


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"sources": {}},
        {"sources": [{}]},
        {"sources": [{**DataRecord.of(overview()).to_json(), "files": [[1]]}]},
        {"sources": [{**DataRecord.of(overview()).to_json(), "lengths": [["prompt", "3"]]}]},
        {"sources": [{**DataRecord.of(overview()).to_json(), "examples": [{"title": "x"}]}]},
    ],
)
def test_damaged_content_is_refused(content):
    with pytest.raises(ValueError, match=r"its '|not a JSON object"):
        read_data_records(content)
