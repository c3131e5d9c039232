import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from spin_lightning.data.formats import read_conversations, read_data
from spin_lightning.data.read_report import describe_bad_rows
from spin_lightning.errors import DataError
from spin_lightning.types import BadRow, Conversation

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"

Rows = Sequence[dict[str, Any]]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(list(rows), indent=1), encoding="utf-8")


def _jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def _csv(path: Path, rows: Rows) -> None:
    pa.csv.write_csv(pa.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "json": _json,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "csv": _csv,
}

CHAT = [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("d")]
LAYOUTS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "real and generated": {"real": CHAT, "generated": [*CHAT[:-1], assistant("e")]},
    "prompt and response": {"prompt": "c", "response": "d"},
    "prompt and completion": {"prompt": "c", "completion": "d"},
    "prompt and real": {"prompt": "c", "real": "d", "generated": "e"},
    "question and answer": {"question": "c", "answer": "d"},
    "messages and text": {"prompt": CHAT[:-1], "response": "d"},
    "messages twice": {"prompt": CHAT[:-1], "completion": [assistant("d")]},
    "messages and the whole chat": {"prompt": CHAT[:-1], "response": CHAT},
    "text and the whole chat": {"prompt": "c", "response": [user("c"), assistant("d")]},
}


def is_text(layout: str) -> bool:
    return all(isinstance(value, str) for value in LAYOUTS[layout].values())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows, or a text or bytes as they are, to a file of this name."""

    def write_file(content: Rows | str | bytes, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            WRITERS[path.suffix[1:]](path, content)
        return str(path)

    return write_file


# ------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in WRITERS for layout in LAYOUTS if kind != "csv" or is_text(layout)],
)
def test_read_layout_in_each_kind_of_file(
    write: Callable[..., str], kind: str, layout: str
) -> None:
    row = LAYOUTS[layout]
    conversations, bad = read_conversations(write([row, row], f"data.{kind}"))
    has_turns = isinstance(row.get("prompt", row.get("messages", row.get("real"))), list)
    prompt = tuple(CHAT[:-1]) if has_turns else (user("c"),)
    assert bad == []
    assert conversations == [Conversation(i, prompt, "d") for i in range(2)]


def test_read_messages_first_where_there_is_more(write: Callable[..., str]) -> None:
    row = {"prompt": "p", "response": "r", "messages": [user("a"), assistant("b")]}
    assert read_conversations(write([row]))[0] == [Conversation(0, (user("a"),), "b")]


def test_read_question_with_answer_beside_a_prompt(write: Callable[..., str]) -> None:
    row = {"prompt": "template 3", "question": "q", "answer": "a"}
    assert read_conversations(write([row]))[0] == [Conversation(0, (user("q"),), "a")]


def test_read_turns_after_the_last_answer_are_left_out(write: Callable[..., str]) -> None:
    row = {"messages": [user("a"), assistant("b"), user("thanks")]}
    assert read_conversations(write([row]))[0] == [Conversation(0, (user("a"),), "b")]


def test_read_empty_system_turn_is_kept(write: Callable[..., str]) -> None:
    row = {"messages": [system(""), user("a"), assistant("b")]}
    conversations, _ = read_conversations(write([row]))
    assert conversations == [Conversation(0, (system(""), user("a")), "b")]


def test_read_other_keys_of_messages_are_left_out(write: Callable[..., str]) -> None:
    row = {"messages": [user("a") | {"id": 3}, assistant("b") | {"id": 4}]}
    assert read_conversations(write([row]))[0] == [Conversation(0, (user("a"),), "b")]


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        ({"x": "q", "y": "a"}, {"prompt": "x", "response": "y"}, "q"),
        ({"x": "q", "answer": "a", "z": "-"}, {"prompt": "x"}, "q"),
        ({"prompt": "q", "y": "a", "response": "-"}, {"response": "y"}, "q"),
        ({"chat": [user("q"), assistant("a")], "prompt": "-"}, {"messages": "chat"}, "q"),
        (
            {"messages": [user("-"), assistant("-")], "x": "q", "y": "a"},
            {"prompt": "x", "response": "y"},
            "q",
        ),
    ],
)
def test_read_columns_as_they_are_mapped(
    write: Callable[..., str], row: dict[str, Any], columns: dict[str, str], prompt: str
) -> None:
    conversations, _ = read_conversations(write([row]), columns)
    assert conversations == [Conversation(0, (user(prompt),), "a")]


def test_read_folder_takes_its_files_by_name(write: Callable[..., str], tmp_path: Path) -> None:
    for name, answer in (("b.jsonl", "2"), ("a.parquet", "1"), ("c.csv", "3"), ("d.json", "4")):
        write([{"prompt": "q", "response": answer}], f"folder/{name}")
    write("not data", "folder/README.md")
    write("not data", "folder/._a.jsonl")
    (tmp_path / "folder" / "more.jsonl").mkdir()
    conversations, bad = read_conversations(str(tmp_path / "folder"))
    assert bad == []
    assert [c.response for c in conversations] == ["1", "2", "3", "4"]
    assert [c.example_id for c in conversations] == [0, 1, 2, 3]


def test_read_json_of_lines_and_jsonl_of_a_list(write: Callable[..., str]) -> None:
    row = {"prompt": "q", "response": "a"}
    lines = "\n".join([json.dumps(row), "", json.dumps(row)])
    assert len(read_conversations(write(lines, "lines.json"))[0]) == 2
    as_list = " \n" + json.dumps([row, row])
    assert len(read_conversations(write(as_list, "list.jsonl"))[0]) == 2


def test_read_byte_order_mark_and_upper_case_suffix(write: Callable[..., str]) -> None:
    line = '{"prompt": "q", "response": "a"}\n'
    source = write(b"\xef\xbb\xbf" + line.encode(), "DATA.JSONL")
    assert len(read_conversations(source)[0]) == 1


def test_read_line_separators_inside_of_texts(write: Callable[..., str]) -> None:
    text = "one\u2028two\u0085three\x0cfour"
    line = json.dumps({"prompt": "q", "response": text}, ensure_ascii=False)
    assert read_conversations(write(line + "\r\n" + line))[0][1].response == text


def test_read_texts_are_not_taken_for_numbers_or_dates(write: Callable[..., str]) -> None:
    answers = ["72", "2024-01-01T00:00:00", "null", "true", "1,5"]
    rows = [{"question": "q", "answer": answer} for answer in answers]
    for kind in WRITERS:
        conversations, _ = read_conversations(write(rows, f"data.{kind}"))
        assert [c.response for c in conversations] == answers, kind


def test_read_csv_with_quotes_and_newlines(write: Callable[..., str]) -> None:
    source = write('prompt,response\n"a ""b"",\nc",d\n\n', "data.csv")
    assert read_conversations(source)[0] == [Conversation(0, (user('a "b",\nc'),), "d")]


def test_read_parquet_in_a_folder_like_a_partition_gets_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "response=none"
    folder.mkdir()
    _parquet(folder / "data.parquet", [{"prompt": "q", "completion": "a"}])
    assert read_conversations(str(folder))[0][0].response == "a"


@pytest.mark.parametrize("kind", WRITERS)
def test_read_file_that_changed_gives_what_is_there_now(
    write: Callable[..., str], kind: str
) -> None:
    for answer in ("old", "new"):
        source = write([{"prompt": "q", "response": answer}], f"data.{kind}")
        os.utime(source, (1, 1))  # not even the time of change tells them apart
        assert read_conversations(source)[0][0].response == answer


def test_read_says_nothing(write: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
    for kind in WRITERS:
        read_conversations(write([{"prompt": "q", "response": "a"}], f"data.{kind}"))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not on this machine")
def test_read_gsm8k_whole_and_fast() -> None:
    start = time.perf_counter()
    conversations, bad = read_conversations(str(GSM8K))
    seconds = time.perf_counter() - start
    assert (len(conversations), len(bad)) == (7473, 0)
    assert conversations[0].prompt[0]["content"].startswith("Natalia sold clips")
    assert conversations[-1].example_id == 7472
    assert seconds < 10  # 0.1 on an idle core


# ------------------------------------------------------------------------ rows without an example

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no assistant": ({"messages": [user("a")]}, "no assistant turn"),
    "no messages": ({"messages": []}, "no messages"),
    "messages None": ({"messages": None}, "no messages"),
    "messages as text": ({"messages": "a"}, "no messages"),
    "assistant first": (
        {"messages": [assistant("a"), user("b"), assistant("c")]},
        "no user turn before the first answer",
    ),
    "assistant alone": ({"messages": [assistant("a")]}, "no user turn before the first answer"),
    "system only": (
        {"messages": [system("a"), assistant("b")]},
        "no user turn before the first answer",
    ),
    "unknown role": (
        {"messages": [{"role": "narrator", "content": "a"}, assistant("b")]},
        "a message without a known role: 'narrator'",
    ),
    "no role": (
        {"messages": [{"content": "a"}]},
        "a message without a known role: it has content",
    ),
    "not a message": ({"messages": ["a", "b"]}, "a message without a known role"),
    "response blank": ({"messages": [user("a"), assistant(" \n")]}, "an empty assistant turn"),
    "older answer empty": (
        {"messages": [user("a"), assistant(""), user("b"), assistant("c")]},
        "an empty assistant turn",
    ),
    "contents None": (
        {"messages": [user("a"), assistant(None)]},
        "an assistant turn that is not text",
    ),
    "a picture among the parts": (
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "image"}]), assistant("b")]},
        "a user turn with a part that is not text: image",
    ),
    "empty prompt": ({"prompt": "", "response": "a"}, "an empty prompt"),
    "blank prompt": ({"prompt": " \t\n", "response": "a"}, "an empty prompt"),
    "prompt None": ({"prompt": None, "response": "a"}, "a prompt that is not text"),
    "prompt number": ({"prompt": 3, "response": "a"}, "a prompt that is not text"),
    "prompt no turns": ({"prompt": [], "response": "a"}, "no messages"),
    "empty response": ({"prompt": "a", "response": ""}, "an empty response"),
    "response None": ({"prompt": "a", "response": None}, "a response that is not text"),
    "response number": ({"prompt": "a", "response": 7}, "a response that is not text"),
    "response of a user": (
        {"prompt": "a", "response": [user("b")]},
        "a response that is more than the answer to its prompt",
    ),
    "response of several turns": (
        {"prompt": "a", "response": [assistant("b"), user("c"), assistant("d")]},
        "a response that is more than the answer to its prompt",
    ),
    "half a character": (
        {"prompt": "\ud83d", "response": "a"},
        "a prompt that is not valid Unicode",
    ),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD.keys())
def test_read_row_without_an_example_is_left_out_with_its_reason(
    write: Callable[..., str], row: dict[str, Any], reason: str
) -> None:
    good = (
        {"messages": [user("a"), assistant("b")]}
        if "messages" in row
        else {"prompt": "a", "response": "b"}
    )
    conversations, bad = read_conversations(write([good, row, good]))
    assert [c.example_id for c in conversations] == [0, 2]
    assert bad == [BadRow(1, reason)]


def test_read_row_without_the_column_is_bad(write: Callable[..., str]) -> None:
    conversations, bad = read_conversations(write([{"prompt": "a", "response": "b"}, {"x": "a"}]))
    assert (len(conversations), bad) == (1, [BadRow(1, "a prompt that is not text")])


def test_describe_bad_rows_groups_by_kind_and_keeps_details() -> None:
    bad = [
        BadRow(9, "no messages"),
        *(BadRow(i, f"a prompt of more than 8 tokens: {10 + i} tokens") for i in range(4)),
    ]
    assert describe_bad_rows(bad, 20) == (
        "5 of 20 rows (a prompt of more than 8 tokens: 4 (rows 0: 10 tokens, 1: 11 tokens, "
        "2: 12 tokens, …); no messages: 1 (row 9))"
    )


def test_describe_bad_rows_of_many_kinds_stays_short() -> None:
    told = describe_bad_rows([BadRow(i, f"kind {i}") for i in range(9)], 9)
    assert told.endswith("kind 4: 1 (row 4); and 4 other reasons)")


# ------------------------------------------------------------------------ errors


def message_of(source: str, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_conversations(source, columns)
    message = str(caught.value)
    assert ". Fix: " in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["data/no_such.jsonl", "/no/such/folder", "no_such", "a/b/c/d"])
def test_read_missing_file_says_so(name: str) -> None:
    message = message_of(name)
    assert f"data={name!r}: there is no such file" in message
    assert "Fix: check the path, or give a hub id" in message


@pytest.mark.parametrize(
    ("content", "name"),
    [(text, f"data.{kind}") for text in ("", "\n \n\n") for kind in ("json", "jsonl", "csv")]
    + [("[]", "data.json"), ("[]\n", "data.jsonl"), ("prompt,response\n", "data.csv")],
)
def test_read_empty_file_says_so(write: Callable[..., str], content: str, name: str) -> None:
    source = write(content, name)
    assert f"data={source!r} is empty" in message_of(source)


def test_read_parquet_without_rows_or_bytes_says_so(write: Callable[..., str]) -> None:
    source = write(b"", "data.parquet")
    assert "Parquet file size is 0 bytes" in message_of(source)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), source)
    assert "is empty" in message_of(source)


def test_read_folder_without_data_says_so(tmp_path: Path, write: Callable[..., str]) -> None:
    source = write("text", "data.txt")
    assert "is no .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow file" in message_of(source)
    assert "holds no .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow file" in message_of(
        str(tmp_path)
    )


def test_read_unknown_columns_lists_those_that_are_there(write: Callable[..., str]) -> None:
    message = message_of(write([{"task": "a", "output": "b"}]))
    assert "it has task, output" in message
    assert "--data.columns" in message


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"prompt": "x", "response": "output"}, ["maps prompt to 'x'", "task, output"]),
        ({"messages": "chat"}, ["maps messages to 'chat'", "task, output"]),
        (
            {"promt": "task"},
            ["has a key 'promt'", "use messages, tools, functions, system, prompt"],
        ),
        ({"prompt": "task"}, ["no columns that are recognized"]),
        ({"messages": "output", "response": "task"}, ["mixes the names of several formats"]),
    ],
)
def test_read_wrong_mapping_names_it(
    write: Callable[..., str], columns: dict[str, str], parts: list[str]
) -> None:
    message = message_of(write([{"task": "a", "output": "b"}]), columns)
    assert all(part in message for part in ["data", *parts])


BROKEN: dict[str, tuple[bytes, str, str]] = {
    "jsonl cut": (b'{"prompt": "a"}\n{"prompt": "b', "data.jsonl", "line 2 is not valid json"),
    "json cut": (b'[{"prompt": "a"}, {"prom', "data.json", "Unterminated string"),
    "json over lines": (b'{\n "data": []\n}', "data.json", "line 1 is not valid json"),
    "no object": (b'{"prompt": "a"}\n3\n', "data.jsonl", "line 2 has no columns"),
    "list of texts": (b'["a"]', "data.json", "object 1 has no columns"),
    "binary": (bytes(range(256)), "data.jsonl", "it is not UTF-8"),
    "zeros": (bytes(64), "data.jsonl", "line 1 is not valid json"),
    "parquet of text": (b'{"prompt": "a"}', "data.parquet", "arquet"),
    "csv cut": (b'prompt,response\na,"b', "data.csv", "unexpected end of data"),
    "csv short": (b"prompt,response\na\n", "data.csv", "record 1 has 1 cells, the header has 2"),
    "csv long": (b"prompt,response\na,b,c\n", "data.csv", "record 1 has 3 cells"),
}


@pytest.mark.parametrize(("content", "name", "cause"), BROKEN.values(), ids=BROKEN.keys())
def test_read_broken_file_names_it_and_the_cause(
    write: Callable[..., str], content: bytes, name: str, cause: str
) -> None:
    source = write(content, name)
    message = message_of(source)
    assert f"data={source!r} cannot be read (" in message
    assert cause in message
    cells = "double quotes" if "cells, the header" in cause or "3 cells" in cause else ""
    assert (cells or "check that the file is whole and of the kind its name says") in message


def test_read_parquet_cut_short_names_it(write: Callable[..., str]) -> None:
    source = write([{"prompt": "a", "response": "b"}], "data.parquet")
    Path(source).write_bytes(Path(source).read_bytes()[:-20])
    assert f"data={source!r} cannot be read (" in message_of(source)


# ------------------------------------------------------------------------ nothing is lost unsaid

ALPACA = {"instruction": "Say what it is.", "input": "oak", "output": "plant"}
PAIR = {"prompt": "instruction", "response": "output"}


@pytest.mark.parametrize(
    ("row", "columns", "lost", "read_as"),
    [
        (ALPACA, PAIR, "input (1 row)", "Alpaca, with instruction, output, input"),
        (ALPACA, {"prompt": "input", "response": "output"}, "instruction (1 row)", "Alpaca"),
        (
            {**ALPACA, "history": [["q", "a"]]},
            {**PAIR},
            "input (1 row), history (1 row)",
            "Alpaca",
        ),
        (
            {"conversations": [user("q"), assistant("a")], "system": "s"},
            {"messages": "conversations"},
            "system (1 row)",
            "ShareGPT, with conversations, system",
        ),
        (
            {"prompt": "q", "chosen": [user("other"), assistant("a")], "rejected": "b"},
            {"messages": "chosen"},
            "prompt (1 row)",
            "preferences",
        ),
    ],
)
def test_mapping_that_loses_a_column_is_refused_with_the_way_out(
    write: Callable[..., str], row: dict[str, Any], columns: dict[str, str], lost: str, read_as: str
) -> None:
    message = message_of(write([row]), columns)
    assert "would lose what is in " in message
    assert lost in message
    assert f"Fix: leave out data.columns: the file is read as {read_as}" in message


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({**ALPACA, "input": ""}, PAIR),
        ({"instruction": "Say what it is.", "output": "plant"}, PAIR),
        ({**ALPACA, "category": "trees"}, {**PAIR, "prompt": "category"}),
        ({"prompt": "q", "chosen": [user("q"), assistant("a")]}, {"messages": "chosen"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"response": "chosen"}),
        ({"x": "q", "y": "a", "context": "c"}, {"prompt": "x", "response": "y"}),
    ],
)
def test_mapping_that_loses_nothing_of_a_known_format_is_used(
    write: Callable[..., str], row: dict[str, Any], columns: dict[str, str]
) -> None:
    assert len(read_conversations(write([row]), columns)[0]) == 1


def test_any_of_our_names_is_mapped(write: Callable[..., str]) -> None:
    row = {"chat": [user("q"), assistant("a")], "persona": "s", "api": [{"name": "f"}]}
    columns = {"messages": "chat", "system": "persona", "tools": "api"}
    (found,), report = read_data(write([row]), columns)
    assert found.prompt == (system("s"), user("q"))
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)
    assert report.columns_not_used == {}


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"Prompt": "q", "Response": "a"}, "{prompt: Prompt, response: Response}"),
        ({"Instruction": "q", "Output": "a", "Input": ""}, "output: Output, input: Input}"),
        ({"Conversations": []}, "{messages: Conversations}"),
        ({"text": "q"}, "{prompt: X, response: Y}"),
    ],
)
def test_advice_for_unknown_columns_loses_nothing(
    write: Callable[..., str], row: dict[str, Any], advice: str
) -> None:
    message = message_of(write([row]))
    assert advice in message
    assert "columns that are not named are not used" in message


def test_rows_of_another_format_in_one_file_are_named_as_such(write: Callable[..., str]) -> None:
    rows = [{"messages": [user("q"), assistant("a")]}] * 2 + [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"x": "q"},
        {},
    ]
    _, bad = read_conversations(write(rows))
    assert [row.reason for row in bad] == [
        "columns of another format: conversations",
        "columns of another format: instruction, output",
        "no messages",
        "no messages",
    ]


def test_turns_all_makes_an_example_of_each_answer(write: Callable[..., str]) -> None:
    weighed = [user("q"), assistant("no") | {"weight": 0}, user("q2"), assistant("yes")]
    source = write([{"messages": CHAT}, {"messages": weighed}, {"messages": [user("q")]}])
    conversations, report = read_data(source, turns="all")
    assert conversations == [
        Conversation(2**32, (CHAT[0], CHAT[1]), "b"),
        Conversation(0, tuple(CHAT[:4]), "d"),
        Conversation(1, (user("q"), assistant("no"), user("q2")), "yes"),
    ]
    assert (report.rows, report.used_rows, report.conversations) == (3, 2, 3)
    assert report.bad == (BadRow(2, "no assistant turn"),)
    last, _ = read_data(source)
    assert last == [c for c in conversations if c.example_id < 2**32]


def test_last_answer_of_weight_1_is_read(write: Callable[..., str]) -> None:
    chat = [user("q"), assistant("good") | {"weight": 1}, user("q2"), assistant("no", weight=0)]
    assert read_conversations(write([{"messages": chat}]))[0] == [
        Conversation(0, (user("q"),), "good")
    ]


def test_thought_of_the_answer_is_kept_apart(write: Callable[..., str]) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        chat = [
            user("q"),
            assistant("a0", **{name: "h0"}),
            user("q2"),
            assistant("a", **{name: "hm"}),
        ]
        (found,), _ = read_conversations(write([{"messages": chat}]))
        assert (found.response, found.reasoning) == ("a", "hm")
        assert found.prompt[1] == assistant("a0", **{name: "h0"})


# ------------------------------------------------------------------------ the hub


def test_read_hub_id_offline_fails_fast() -> None:
    start = time.perf_counter()
    message = message_of("no-such-owner/no-such-data")
    assert "data='no-such-owner/no-such-data' is no file" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert time.perf_counter() - start < 20


def test_read_hub_id_without_a_network_fails_fast(tmp_path: Path) -> None:
    # A process of its own: whether the hub's client is offline is settled when it is imported.
    # Port 9 of this machine answers nothing, as a network that is not there.
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code = (
        "import time; from spin_lightning.data.formats import read_conversations\n"
        "start = time.perf_counter()\n"
        "try:\n    read_conversations('owner/name')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, time.perf_counter() - start, error)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kind, seconds, message = done.stdout.split(maxsplit=2)
    assert kind == "DataError"
    assert float(seconds) < 10  # `load_dataset` alone retries for 23 seconds
    assert "data='owner/name' is no file, and reading it from the hub failed" in message
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name/main:train[:10%]", ("owner/name", "main", "train[:10%]")),
    ],
)
def test_read_hub_id_asks_for_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]
) -> None:
    calls = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"messages": CHAT}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    conversations, _ = read_conversations(source)
    assert conversations == [Conversation(0, tuple(CHAT[:-1]), "d")]
    assert calls == [asked]


def test_read_folder_named_like_a_hub_id_is_the_folder(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    _jsonl(tmp_path / "owner" / "name" / "data.jsonl", [{"prompt": "a", "response": "b"}])
    monkeypatch.chdir(tmp_path)
    assert len(read_conversations("owner/name")[0]) == 1
