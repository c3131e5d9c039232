"""Data files that something is wrong with: what is refused, and what is left out and counted."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class BadFile:
    """One file.

    Attributes:
        case: What is wrong with it.
        name: Its name.
        content: Its bytes.
        words: What the one error says; empty where the file is read.
        good: Rows that can be used.
        left_out: Reasons of those that cannot, in their order.
    """

    case: str
    name: str
    content: bytes
    words: tuple[str, ...] = ()
    good: int = 0
    left_out: tuple[str, ...] = ()


GOOD: dict[str, Any] = {"prompt": "w1 w2", "response": "w3"}
LINE = json.dumps(GOOD).encode() + b"\n"
NOISE = random.Random(0).randbytes(500)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def refused(case: str, name: str, content: bytes, *words: str) -> BadFile:
    return BadFile(case, name, content, words)


def row(case: str, fields: Any, reason: str) -> BadFile:
    """A line between two good ones of the same columns, which is left out for this reason."""
    chat = isinstance(fields, dict) and "messages" in fields
    good = json.dumps({"messages": [user("w1"), assistant("w2")]} if chat else GOOD)
    lines = "\n".join([good, json.dumps(fields), good])
    return BadFile(case, "data.jsonl", lines.encode(), (), 2, (reason,))


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def column(case: str, prompts: pa.Array, reason: str) -> BadFile:
    """A parquet file whose prompts are of another type."""
    table = pa.table({"prompt": prompts, "response": ["w3"] * len(prompts)})
    return BadFile(case, "data.parquet", parquet(table), (), 0, (reason,) * len(prompts))


def table(*rows: Sequence[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


WHOLE = parquet(pa.Table.from_pylist([GOOD] * 50))
HALF = len(WHOLE) // 2
ZST = zst(LINE * 99)
ARROW = arrow(pa.Table.from_pylist([GOOD] * 50))
CANNOT_READ = "cannot be read ("
NOT_JSON = "line 2 is not valid json"

REFUSED = [
    refused("no bytes", "data.jsonl", b"", "is empty, it has no rows"),
    refused("blank lines", "data.jsonl", b"\n \n\t\n", "is empty, it has no rows"),
    refused("only a byte order mark", "data.jsonl", b"\xef\xbb\xbf", "is empty, it has no rows"),
    refused("torn last line", "data.jsonl", LINE + LINE[:-9], NOT_JSON),
    refused("torn inside a text", "data.jsonl", LINE + LINE[:20], NOT_JSON),
    refused("torn inside an escape", "data.jsonl", LINE + b'{"prompt": "\\u00', NOT_JSON),
    refused("two objects in a line", "data.jsonl", LINE + LINE[:-1] + LINE, NOT_JSON),
    refused("single quotes", "data.jsonl", LINE + b"{'prompt': 'a'}\n", NOT_JSON),
    refused("python's None", "data.jsonl", LINE + b'{"prompt": None}\n', NOT_JSON),
    refused("trailing comma", "data.jsonl", LINE + b'{"prompt": "a",}\n', NOT_JSON),
    refused("control character", "data.jsonl", LINE + b'{"prompt": "a\x01"}\n', NOT_JSON),
    refused("plain text", "data.jsonl", b"hello\nworld\n", "line 1 is not valid json"),
    refused("csv by the name of json", "data.json", table(["prompt"], ["a"]), "line 1 is not"),
    refused("pretty-printed object", "data.json", b'{\n "prompt": "a"\n}', "line 1 is not valid"),
    refused("merge conflict", "data.jsonl", LINE + b"<<<<<<< HEAD\n" + LINE, NOT_JSON),
    refused("html of a login page", "data.jsonl", b"<!DOCTYPE html><html></html>", "line 1 is not"),
    refused(
        "git lfs pointer", "data.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "LFS"
    ),
    refused("zero bytes", "data.jsonl", b"\0" * 4096, "line 1 is not valid json"),
    refused("noise", "data.jsonl", NOISE, CANNOT_READ),
    refused("noise after a good line", "data.jsonl", LINE + NOISE, CANNOT_READ),
    refused("latin-1", "data.jsonl", b'{"prompt": "caf\xe9"}', "UTF-8"),
    refused("utf-16 unmarked", "data.jsonl", LINE.decode().encode("utf-16-le"), "line 1 is not"),
    refused("torn utf-16", "data.jsonl", (LINE + b"\n").decode().encode("utf-16")[:-1], "UTF-16"),
    refused("overlong utf-8", "data.jsonl", b'{"prompt": "\xc0\xaf"}', "UTF-8"),
    refused("surrogate in utf-8", "data.jsonl", b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    refused("torn utf-8", "data.jsonl", LINE + b'{"prompt": "\xe2\x82', "UTF-8"),
    refused("gzip by another name", "data.jsonl", b"\x1f\x8b\x08\x00" + NOISE, "gzip"),
    refused("a number in a line", "data.jsonl", LINE + b"7\n", "line 2 has no columns"),
    refused("a text in a line", "data.jsonl", LINE + b'"w1"\n', "line 2 has no columns"),
    refused("null in a line", "data.jsonl", LINE + b"null\n", "line 2 has no columns"),
    refused("NaN in a line", "data.jsonl", LINE + b"NaN\n", "line 2 has no columns"),
    refused("a list in a line", "data.jsonl", LINE + b'["w1", "w2"]\n', "line 2 has no columns"),
    refused("deep lists in a line", "data.jsonl", LINE + b"[" * 10**5, "line 2", "nested"),
    refused(
        "deep objects in a line", "data.jsonl", LINE + b'{"prompt":' * 10**5, "line 2", "nested"
    ),
    refused(
        "deep lists that close",
        "data.jsonl",
        LINE + b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        "line 2",
        "nested",
    ),
    refused("deep list as the file", "data.json", b"[" * 10**6, "nested"),
    refused("number of 9999 digits", "data.jsonl", LINE + b'{"prompt": ' + b"9" * 9999 + b"}", "2"),
    refused("empty list", "data.json", b"[]", "is empty, it has no rows"),
    refused("list without its end", "data.json", b'[{"prompt": "a"}', CANNOT_READ),
    refused("list and more", "data.json", b'[{"prompt": "a"}]]', CANNOT_READ),
    refused("list of texts", "data.json", b'["w1", "w2"]', "object 1 has no columns"),
    refused("list of lists", "data.json", b'[["w1", "w2"]]', "object 1 has no columns"),
    refused("list with a null", "data.json", b"[" + LINE + b", null]", "object 2 has no columns"),
    refused("rows below a key", "data.json", b'{"data": [' + LINE.strip() + b"]}", "it has data"),
    refused("other columns", "data.jsonl", b'{"text": "w1"}', "no columns", "it has text"),
    refused("no columns", "data.jsonl", b"{}\n{}\n", "has no columns"),
    refused("half of a pair", "data.jsonl", b'{"prompt": "w1"}', "it has prompt"),
    refused("upper case", "data.jsonl", b'{"Prompt": "a", "Response": "b"}', "Prompt, Response"),
    refused("generated alone", "data.jsonl", b'{"generated": []}', "it has generated"),
    refused("no bytes of csv", "data.csv", b"", "is empty, it has no rows"),
    refused("header alone", "data.csv", b"prompt,response\n", "is empty, it has no rows"),
    refused("short record", "data.csv", b"prompt,response\na,b\nc\n", "record 2 has 1 cells"),
    refused("long record", "data.csv", b"prompt,response\na,b,c\n", "record 1 has 3 cells"),
    refused("quote without its end", "data.csv", b'prompt,response\n"a,b\n', CANNOT_READ),
    refused("text after a quote", "data.csv", b'prompt,response\n"a"b,c\n', CANNOT_READ),
    refused("csv in latin-1", "data.csv", b"prompt,response\ncaf\xe9,b\n", "UTF-8"),
    refused("csv of noise", "data.csv", NOISE, CANNOT_READ),
    refused("bars", "data.csv", b"prompt|response\na|b\n", "it has prompt|response"),
    refused("semicolons torn", "data.csv", b"prompt;response\na;b;c\n", "record 1 has 3", "';'"),
    refused("no header", "data.csv", b"w1 w2,w3\nw4,w5\n", "it has w1 w2, w3"),
    refused("column twice", "data.csv", b"prompt,response,response\na,b,c\n", "'response' twice"),
    refused("no bytes of parquet", "data.parquet", b"", CANNOT_READ),
    refused("text by the name of parquet", "data.parquet", LINE * 9, CANNOT_READ),
    refused("parquet of noise", "data.parquet", NOISE, CANNOT_READ),
    refused("parquet without its end", "data.parquet", WHOLE[:-20], CANNOT_READ),
    refused("first half of parquet", "data.parquet", WHOLE[:HALF], CANNOT_READ),
    refused("second half of parquet", "data.parquet", WHOLE[HALF:], CANNOT_READ),
    refused("parquet's mark alone", "data.parquet", b"PAR1PAR1", CANNOT_READ),
    refused(
        "footer longer than the file",
        "data.parquet",
        WHOLE[:-8] + b"\xff\xff\xff\x7fPAR1",
        CANNOT_READ,
    ),
    refused(
        "hole in parquet's footer",
        "data.parquet",
        WHOLE[: len(WHOLE) - 150] + b"\0" * 100 + WHOLE[-50:],
        CANNOT_READ,
    ),
    refused("hole in parquet's pages", "data.parquet", WHOLE[:4] + b"\xff" * 60 + WHOLE[64:], "("),
    refused(
        "parquet without rows",
        "data.parquet",
        parquet(pa.Table.from_pylist([GOOD]).slice(1)),
        "is empty",
    ),
    refused(
        "parquet of other columns", "data.parquet", parquet(pa.table({"x": [1], "y": [2]})), "x, y"
    ),
    refused(
        "parquet column twice",
        "data.parquet",
        parquet(pa.Table.from_arrays([pa.array(["a"])] * 3, ["prompt", "response", "response"])),
        "'response' twice",
    ),
    refused(
        "parquet texts that are not UTF-8",
        "data.parquet",
        parquet(
            pa.table(
                {
                    "prompt": pa.array([b"caf\xe9"]).view(pa.string()),
                    "response": ["w1"],
                }
            )
        ),
        "UTF-8",
    ),
    refused(
        "parquet date out of range",
        "data.parquet",
        parquet(
            pa.table(
                {
                    "prompt": ["w1"],
                    "response": ["w2"],
                    "when": pa.array([2**62], pa.timestamp("ms")),
                }
            )
        ),
        CANNOT_READ,
    ),
    refused("plain text file", "data.txt", b"w1 w2\n", "is no .json"),
    refused("compressed file", "data.jsonl.gz", b"\x1f\x8b" + NOISE, CANNOT_READ),
    refused("gzip cut short", "data.jsonl.gz", gzip.compress(LINE * 99, mtime=0)[:-9], CANNOT_READ),
    refused(
        "gzip with a hole", "data.jsonl.gz", gzip.compress(NOISE, mtime=0)[:99] + NOISE, CANNOT_READ
    ),
    refused("zstd of noise", "data.jsonl.zst", NOISE, CANNOT_READ),
    refused("zstd cut short", "data.jsonl.zst", ZST[:-9], CANNOT_READ),
    refused("compressed parquet", "data.parquet.gz", gzip.compress(WHOLE, mtime=0), "is no .json"),
    refused("arrow of noise", "data.arrow", NOISE, CANNOT_READ),
    refused("arrow cut short", "data.arrow", ARROW[:-200], CANNOT_READ),
    refused("spreadsheet", "data.xlsx", b"PK\x03\x04" + NOISE, "is no .json"),
    refused("no suffix", "data", LINE, "is no .json"),
]

NO_ROLE = "a message without a known role"
NO_MESSAGES = "no messages"
NO_USER = "no user turn before the first answer"
LEFT_OUT = [
    row("prompt null", {**GOOD, "prompt": None}, "a prompt that is not text"),
    row("prompt a number", {**GOOD, "prompt": 7}, "a prompt that is not text"),
    row("prompt NaN", {**GOOD, "prompt": float("nan")}, "a prompt that is not text"),
    row("prompt infinite", {**GOOD, "prompt": float("inf")}, "a prompt that is not text"),
    row("prompt a bool", {**GOOD, "prompt": True}, "a prompt that is not text"),
    row("prompt an object", {**GOOD, "prompt": {"text": "w1"}}, "a prompt that is not text"),
    row("prompt empty", {**GOOD, "prompt": ""}, "an empty prompt"),
    row("prompt of blanks", {**GOOD, "prompt": " \t\n\u00a0"}, "an empty prompt"),
    row("prompt missing", {"response": "w3"}, "a prompt that is not text"),
    row("prompt a list of nothing", {**GOOD, "prompt": []}, NO_MESSAGES),
    row("prompt a list of texts", {**GOOD, "prompt": ["w1"]}, NO_ROLE),
    row("prompt half a character", {**GOOD, "prompt": "w1 \ud83d"}, "a prompt that is not valid"),
    row("response null", {**GOOD, "response": None}, "a response that is not text"),
    row("response NaN", {**GOOD, "response": float("nan")}, "a response that is not text"),
    row("response a number", {**GOOD, "response": 4.5}, "a response that is not text"),
    row("response empty", {**GOOD, "response": ""}, "an empty response"),
    row("response missing", {"prompt": "w1"}, "a response that is not text"),
    row("response no messages", {**GOOD, "response": []}, NO_MESSAGES),
    row("response of the user", {**GOOD, "response": [user("w1")]}, "a response that is more"),
    row(
        "response to another prompt",
        {**GOOD, "response": [user("w9"), assistant("w3")]},
        "a response that is more than the answer to its prompt",
    ),
    row("response half a character", {**GOOD, "response": "\udc80"}, "a response that is not va"),
    row("columns missing", {}, "a prompt that is not text"),
    row("chat null", {"messages": None}, NO_MESSAGES),
    row("chat empty", {"messages": []}, NO_MESSAGES),
    row("chat a text", {"messages": "user: w1"}, NO_MESSAGES),
    row("chat an object", {"messages": user("w1")}, NO_MESSAGES),
    row("chat in lists", {"messages": [[user("w1"), assistant("w2")]]}, NO_ROLE),
    row("chat of texts", {"messages": ["w1", "w2"]}, NO_ROLE),
    row("chat of nulls", {"messages": [None]}, NO_ROLE),
    row("ShareGPT's form unanswered", {"messages": [{"from": "human", "value": "w1"}]}, "no assi"),
    row("ShareGPT's form, unknown role", {"messages": [{"from": "w1", "value": "w1"}]}, NO_ROLE),
    row("role unknown", {"messages": [user("w1"), {"role": "bot", "content": "w2"}]}, NO_ROLE),
    row("role in capitals", {"messages": [{"role": "User", "content": "w1"}]}, NO_ROLE),
    row("role null", {"messages": [{"role": None, "content": "w1"}]}, NO_ROLE),
    row("role a number", {"messages": [{"role": 1, "content": "w1"}]}, NO_ROLE),
    row("role a list", {"messages": [{"role": ["user"], "content": "w1"}]}, NO_ROLE),
    row("role an object", {"messages": [{"role": {}, "content": "w1"}]}, NO_ROLE),
    row("role missing", {"messages": [{"content": "w1"}]}, NO_ROLE),
    row("content missing", {"messages": [{"role": "user"}]}, "a user turn that is not text"),
    row(
        "content null",
        {"messages": [user("w1"), assistant(None)]},
        "an assistant turn that is not text",
    ),
    row("content a number", {"messages": [user(3)]}, "a user turn that is not text"),
    row(
        "content with a picture",
        {"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("w2")]},
        "a user turn with a part that is not text: image_url",
    ),
    row("content empty", {"messages": [user("w1"), assistant("")]}, "an empty assistant turn"),
    row("nobody answers", {"messages": [user("w1")]}, "no assistant turn"),
    row("nobody asks", {"messages": [assistant("w1")]}, NO_USER),
    row("only a system turn", {"messages": [{"role": "system", "content": "w1"}]}, "no assistant"),
    row(
        "a system turn alone is answered",
        {"messages": [{"role": "system", "content": "w1"}, assistant("w2")]},
        NO_USER,
    ),
    row("answered before asked", {"messages": [assistant("w1"), user("w2"), assistant("w3")]}, ""),
    row(
        "a tool asks",
        {"messages": [{"role": "tool", "content": "w1"}, assistant("w2")]},
        NO_USER,
    ),
    column("integers", pa.array([1, 2]), "a prompt that is not text"),
    column("floats with NaN", pa.array([1.5, float("nan")]), "a prompt that is not text"),
    column("bools", pa.array([True]), "a prompt that is not text"),
    column("nulls", pa.array([None, None]), "a prompt that is not text"),
    column("bytes", pa.array([b"w1"]), "a prompt that is not text"),
    column("days", pa.array([dt.date(2024, 1, 1)]), "a prompt that is not text"),
    column("moments", pa.array([0], pa.timestamp("ns")), "a prompt that is not text"),
    column("durations", pa.array([7], pa.duration("s")), "a prompt that is not text"),
    column("decimals", pa.array([1]).cast(pa.decimal128(38, 2)), "a prompt that is not text"),
    column("structs", pa.array([{"role": "user"}]), "a prompt that is not text"),
    column("lists of texts", pa.array([["w1"], ["w2"]]), NO_ROLE),
    column("empty lists", pa.array([[]], pa.list_(pa.string())), NO_MESSAGES),
    column("texts, some null", pa.array([None], pa.string()), "a prompt that is not text"),
    column(
        "maps for messages",
        pa.array([[("role", "user")]], pa.map_(pa.string(), pa.string())),
        NO_ROLE,
    ),
    BadFile("csv empty cells", "data.csv", b"prompt,response\na,\n,b\nc,d\n", (), 1, ("an", "an")),
]
# What looks wrong, and is read whole.
READ = [
    BadFile(
        "ids that repeat", "data.jsonl", b'{"id": 1, "prompt": "a", "response": "b"}\n' * 3, good=3
    ),
    BadFile(
        "keys that repeat", "data.jsonl", b'{"prompt":"x","prompt":"a","response":"b"}', good=1
    ),
    BadFile("NaN beside the texts", "data.jsonl", LINE[:-2] + b', "score": NaN}\n', good=1),
    BadFile("number out of range", "data.jsonl", LINE[:-2] + b', "score": 1e999}\n', good=1),
    BadFile("last line without its end", "data.jsonl", LINE + LINE[:-1], good=2),
    BadFile("carriage returns", "data.jsonl", LINE.replace(b"\n", b"\r\n") * 2, good=2),
    BadFile(
        "columns of many kinds",
        "data.jsonl",
        LINE + b'{"question": "a", "answer": "b"}',
        (),
        1,
        ("columns of another format: question, answer",),
    ),
    BadFile("utf-16", "data.jsonl", LINE.decode().encode("utf-16"), good=1),
    BadFile("utf-32", "data.jsonl", LINE.decode().encode("utf-32"), good=1),
    BadFile("semicolons", "data.csv", b"prompt;response\na;b\n", good=1),
    BadFile("zstd in two frames", "data.jsonl.zst", ZST + ZST, good=198),
    BadFile(
        "content in parts",
        "data.jsonl",
        json.dumps({"messages": [user([{"type": "text", "text": "a"}]), assistant("b")]}).encode(),
        good=1,
    ),
    BadFile("zero byte in a cell", "data.csv", b"prompt,response\na\0b,c\n", good=1),
    BadFile("zero character", "data.jsonl", b'{"prompt": "a\\u0000", "response": "b"}', good=1),
    BadFile(
        "a text of ten million characters",
        "data.jsonl",
        json.dumps({**GOOD, "prompt": "w1 " * (10**7 // 3)}).encode(),
        good=1,
    ),
    BadFile(
        "a cell of a million characters",
        "data.csv",
        table(["prompt", "response"], ["w1" * 10**6, "w2"]),
        good=1,
    ),
    BadFile(
        "ten thousand columns",
        "data.jsonl",
        json.dumps({**GOOD, **{f"c{i}": i for i in range(10**4)}}).encode(),
        good=1,
    ),
    BadFile(
        "jinja in a text",
        "data.jsonl",
        b'{"prompt": "{{ 7 * 7 }} {% raw %}", "response": "{{ x }}"}',
        good=1,
    ),
    BadFile(
        "paths for ids", "data.jsonl", b'{"id": "../../x", "prompt": "a", "response": "b"}', good=1
    ),
    BadFile(
        "null beside the texts",
        "data.parquet",
        parquet(pa.table({"prompt": ["a"], "response": ["b"], "x": pa.nulls(1)})),
        good=1,
    ),
    BadFile(
        "texts as categories",
        "data.parquet",
        parquet(pa.table({"prompt": pa.array(["a"]).dictionary_encode(), "response": ["b"]})),
        good=1,
    ),
    BadFile(
        "large texts",
        "data.parquet",
        parquet(pa.table({"prompt": pa.array(["a"], pa.large_string()), "response": ["b"]})),
        good=1,
    ),
]
FILES = [*REFUSED, *LEFT_OUT, *READ]
