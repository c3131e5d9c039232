"""Files by kind, compression, separator and encoding; `test_formats.py` has the broken ones."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_lightning.data.files import read_file
from spin_lightning.data.formats import read_conversations
from spin_lightning.errors import DataError

ROWS = [{"prompt": f"q{i}\nü", "response": f"a{i}"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def separated(separator: str) -> bytes:
    cells = [["prompt", "response"], *([f'"{r["prompt"]}"', r["response"]] for r in ROWS)]
    return "".join(separator.join(record) + "\r\n" for record in cells).encode()


def read(path: Path) -> list[Any]:
    return [dict(row) for row in read_file(path, "data").rows]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", LINES),
        ("x.jsonl", LINES),
        ("x.ndjson", LINES),
        ("x.json", json.dumps(ROWS, indent=1).encode()),
        ("x.csv", separated(",")),
        ("x.csv", separated(";")),
        ("x.csv", separated("\t")),
        ("x.csv", b"sep=;\r\n" + separated(";")),
        ("x.csv", b'"sep=|"\r\n' + separated("|")),
        ("x.tsv", separated("\t")),
        ("x.tsv", separated(",")),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_any_kind_compression_and_encoding(file, name, content, packed, encoding):
    content = content.decode().encode(encoding)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zst}[packed]
    assert read(file(name + packed, pack(content))) == ROWS


def test_files_of_several_compressed_members_are_read_whole(file):
    assert read(file("x.jsonl.gz", gzip.compress(LINES) * 2)) == ROWS * 2
    assert read(file("x.jsonl.zst", zst(LINES) * 2)) == ROWS * 2


@pytest.mark.parametrize("opened", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_as_file_and_as_stream(tmp_path, opened):
    table = pa.Table.from_pylist(ROWS)
    with opened(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert read(tmp_path / "x.arrow") == ROWS


def test_parquet_is_read_in_batches(tmp_path):
    rows = [{"prompt": str(i), "response": "a"} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=700)
    assert read(tmp_path / "x.parquet") == rows


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_structs_lose_the_fields_that_their_row_left_out(tmp_path, kind):
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "x": None},
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"a": 1}}]}], "x": 1},
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"b": "2"}}]}], "x": 1},
    ]
    data = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        data.to_parquet(tmp_path / "x.parquet")
    else:
        data.save_to_disk(tmp_path)
        next(tmp_path.glob("*.arrow")).rename(tmp_path / "x.arrow")
    assert read(tmp_path / f"x.{kind}") == rows


def test_json_in_parquet_is_decoded_with_its_nulls(tmp_path):
    chat = [{"role": "user", "content": "a", "tool_calls": [{"arguments": {"limit": None}}]}]
    whole = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(chat), None]))
    each = pa.ExtensionArray.from_storage(pa.json_(), pa.array(map(json.dumps, chat * 2)))
    lists = pa.ListArray.from_arrays([0, 2, 2], each)
    pq.write_table(pa.table({"whole": whole, "each": lists}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [
        {"whole": chat, "each": chat * 2},
        {"whole": None, "each": []},
    ]


def test_what_datasets_writes_of_arguments_of_several_shapes_is_read_back(tmp_path):
    arguments = [{"a": 1}, {"a": "x", "b": [1]}, {}]
    chats = [[{"role": "user", "content": "a", "tool_calls": [{"x": x}]}] for x in arguments]
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    data = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "x.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    data.to_parquet(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [{"messages": chat} for chat in chats]


# ------------------------------------------------------------------------ what is wrong is named


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.csv", "prompt;response\ncafé;b\n".encode("cp1252"), ["UTF-8: byte 0xe9", "CSV UTF-8"]),
        ("x.jsonl", gzip.compress(LINES, mtime=0), ["it is a gzip file", ".gz"]),
        ("x.csv", zst(LINES), ["it is a zstd file", ".zst"]),
        ("x.json", b"PAR1\x15\x04\xff\xfe", ["it is a parquet file", ".parquet"]),
        ("x.csv", b"PK\x03\x04\xff", ["it is a zip file", "unpacked"]),
        (
            "x.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            ["pointer of Git LFS", "git lfs pull"],
        ),
        ("x.jsonl.gz", LINES, ["Not a gzipped file"]),
        ("x.jsonl.zst", LINES, ["cannot be read ("]),
        ("x.csv", b"prompt;response\na;b;c\n", ["record 1 has 3 cells, the header has 2", "';'"]),
        ("x.csv", b"prompt,response\na,b\nc\n", ["record 2 has 1 cells, the header has 2", "','"]),
        ("x.jsonl", b'{"a": 1}\n\n{"a": \n', ["line 3 is not valid json"]),
    ],
)
def test_broken_file_names_the_true_cause(file, name, content, parts):
    path = file(name, content)
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    said = str(caught.value)
    assert said.startswith(f"data={str(path)!r} cannot be read (")
    assert [part for part in parts if part not in said] == []


def test_comma_inside_of_quotes_and_semicolons_in_texts_stay(file):
    path = file("x.csv", b'prompt,response\n"a; b, c",d; e\n')
    assert read(path) == [{"prompt": "a; b, c", "response": "d; e"}]


def test_one_column_stays_one_column(file):
    table = read_file(file("x.csv", b"text\na; b\nc\n"), "data")
    assert table.columns == ("text",)
    assert list(table.rows) == [{"text": "a; b"}, {"text": "c"}]
