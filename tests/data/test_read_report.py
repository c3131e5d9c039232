import pytest

from spin_lightning.data.formats import read_data
from spin_lightning.data.read_report import FileRead, ReadReport, checked_bad_rows
from spin_lightning.errors import DataError
from spin_lightning.types import BadRow


def report(good: int, *bad: BadRow) -> ReadReport:
    rows = good + len(bad)
    return ReadReport("data='x'", (FileRead("x", "a chat", rows, good),), bad, good)


def no_answer(row: int) -> BadRow:
    return BadRow(row, "no assistant turn")


def test_everything_is_counted_and_named_once():
    turns = [
        {"role": "user", "content": "q", "id": 1},
        {"role": "assistant", "content": "bad", "weight": 0, "id": 2},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0.5},
        {"role": "user", "content": "thanks"},
    ]
    rows = [
        {"messages": turns, "source": "web", "score": None},
        {"messages": [], "source": ""},
        {"messages": turns[:2]},
        {"messages": turns[2:4], "lang": "en", "source": "web"},
    ]
    conversations, found = read_data(rows)
    assert [c.example_id for c in conversations] == [0, 3]
    assert (found.rows, found.used_rows, found.conversations) == (4, 2, 2)
    assert found.reasons == {"no messages": 1, "no answer but those of weight 0": 1}
    assert found.columns_used == {"messages": 3}
    assert found.columns_not_used == {"source": 2, "score": 0, "lang": 1}
    assert found.fields_dropped == {"id": 2, "weight": 2}
    assert found.turns_left_out == {"weight 0": 1, "after the last answer": 1}
    assert found.notes() == [
        "columns not used: source (2 rows), score (0 rows), lang (1 row)",
        "message fields not used: id (2 messages), weight (2 messages)",
        "turns not learned: weight 0 (1 turn), after the last answer (1 turn)",
    ]


def test_files_not_read_are_named_by_reason(tmp_path):
    for name in ("a.jsonl", "test.jsonl", "README.md", "LICENSE"):
        (tmp_path / name).write_text('{"prompt": "q", "response": "a"}\n')
    assert read_data(tmp_path)[1].notes() == [
        "files not read: LICENSE, README.md (not a data file), test.jsonl (split test)"
    ]


def test_notes_of_many_columns_stay_short():
    rows = [{"prompt": "q", "response": "a", **{f"c{i}": i for i in range(50)}}]
    (note,) = read_data(rows)[1].notes()
    assert note.endswith("c9 (1 row), and 40 more")


@pytest.mark.parametrize(
    ("good", "bad", "unfit", "tried", "bad_rows", "fix"),
    [
        (5, 5, 0, 5, "skip", None),
        (4, 5, 0, 4, "skip", "more than half"),
        (8, 2, 3, 8, "skip", None),  # 0.8 of the rows are read, and 5/8 of those fit: 0.5 is left
        (8, 2, 4, 8, "skip", "more than half"),
        (90, 10, 3, 10, "skip", None),  # of a sample of 10: 0.9 × 0.7 = 0.63 is left
        (90, 10, 5, 10, "skip", "more than half"),
        (1, 99, 0, 1, "skip_any", None),
        (0, 9, 0, 0, "skip_any", "correct the rows"),
        (2, 0, 2, 2, "skip_any", "raise data.max_prompt_tokens"),
        (9, 1, 0, 9, "refuse", "or skip them with data.bad_rows: skip"),
        (9, 0, 1, 9, "refuse", "or skip them with data.bad_rows: skip"),
    ],
)
def test_more_than_half_lost_is_refused(good, bad, unfit, tried, bad_rows, fix):
    found = report(good, *map(no_answer, range(bad)))
    long = [BadRow(i, "a prompt that is too long: 9 tokens", 9) for i in range(unfit)]
    if fix is None:
        said = checked_bad_rows(found, long, tried, bad_rows)
        assert said is not None
        assert said.startswith(f"{bad + unfit} of {good + bad} rows (")
    else:
        with pytest.raises(DataError, match=fix) as caught:
            checked_bad_rows(found, long, tried, bad_rows)
        assert str(caught.value).startswith(f"data='x': {bad + unfit} of {good + bad} rows (")


def test_nothing_lost_is_nothing_to_say():
    assert checked_bad_rows(report(3), [], 3, "refuse") is None
