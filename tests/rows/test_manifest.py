"""The manifest of rows: read as it was written, by older versions too, and refused if damaged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spin_lightning.errors import RunFolderError
from spin_lightning.rows.manifest import Manifest, read_manifest, write_manifest

MANIFEST = Manifest(
    iterate=2,
    opponent={0: 0.25, 2: 0.75},
    members=(0, 2),
    rows=70,
    units=5,
    unit_size=16,
    cap=6,
)
CONTENT: dict[str, Any] = {
    "schema_version": 1,
    "iterate": 2,
    "opponent": {"0": 0.25, "2": 0.75},
    "members": [0, 2],
    "token_alpha": None,
    "token_members": [],
    "rows": 70,
    "units": 5,
    "unit_size": 16,
    "cap": 6,
    "parts": {},
}


def write(folder: Path, content: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("manifest", "content"),
    [
        (MANIFEST, CONTENT),
        (replace(MANIFEST, opponent=None), {**CONTENT, "opponent": None}),
        (
            replace(MANIFEST, token_alpha=0.3, token_members=(0, 2)),
            {**CONTENT, "token_alpha": 0.3, "token_members": [0, 2]},
        ),
        (
            replace(
                MANIFEST,
                parts={"part-00000.parquet": "0f"},
                deviations={"1": {"batch_tokens": 320}},
                others={"fingerprint": "aa", "fingerprint_fields": {"beta": 0.1}},
            ),
            {
                **CONTENT,
                "parts": {"part-00000.parquet": "0f"},
                "deviations": {"1": {"batch_tokens": 320}},
                "fingerprint": "aa",
                "fingerprint_fields": {"beta": 0.1},
            },
        ),
    ],
    ids=["plain", "no opponent", "token mixture", "all fields"],
)
def test_manifest_that_is_written_is_read_back(manifest, content, tmp_path):
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, manifest)
    assert json.loads((tmp_path / "__about__/manifest.json").read_text()) == content
    assert read_manifest(tmp_path) == manifest


def test_manifest_of_the_first_version_has_the_values_of_what_it_lacks(tmp_path):
    later = ("token_alpha", "token_members", "parts")
    write(tmp_path, {name: value for name, value in CONTENT.items() if name not in later})
    assert read_manifest(tmp_path) == MANIFEST


def test_manifest_has_the_rows_of_a_plan_whatever_its_bytes():
    made = replace(MANIFEST, parts={"part-00000.parquet": "0f"}, others={"fingerprint": "aa"})
    assert made.has_rows_of(MANIFEST)
    for changes in ({"cap": 7}, {"members": (2,)}, {"opponent": {0: 1.0}}, {"token_alpha": 0.5}):
        assert not made.has_rows_of(replace(MANIFEST, **changes))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b"[" * 100_000], ids=lambda c: str(c[:8])
)
def test_manifest_damaged_is_one_clear_error(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"manifest.json is damaged.*Fix: delete it and start"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterate": -1}, "its 'iterate' is not the index of an iterate"),
        ({"opponent": {"one": 1.0}}, "invalid literal"),
        ({"opponent": {"1": "half"}}, "its 'opponent' is not an object of numbers or null"),
        ({"members": ["0"]}, "its 'members' is not a list of iterates"),
        ({"token_members": 3}, "its 'token_members' is not a list of iterates"),
        ({"rows": 0}, "its 'rows' is not a positive integer"),
        ({"units": "two"}, "its 'units' is not a positive integer"),
        ({"token_alpha": "x"}, "its 'token_alpha' is not a number or null"),
        ({"parts": ["part-00000.parquet"]}, "its 'parts' is not an object of hashes by file name"),
        ({"parts": {"../part": "0f"}}, "its 'parts' is not an object of hashes by file name"),
    ],
)
def test_manifest_with_an_invalid_field_is_refused_by_its_name(changes, message, tmp_path):
    write(tmp_path, {**CONTENT, **changes})
    with pytest.raises(RunFolderError, match=f"manifest.json is damaged .{message}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["iterate", "opponent", "members", "rows", "units", "cap"])
def test_manifest_without_a_field_that_every_version_wrote_is_refused(name, tmp_path):
    write(tmp_path, {key: value for key, value in CONTENT.items() if key != name})
    with pytest.raises(RunFolderError, match=f"its '{name}' is missing"):
        read_manifest(tmp_path)


def test_manifest_of_a_later_schema_is_refused(tmp_path):
    write(tmp_path, {"schema_version": 2})
    with pytest.raises(RunFolderError, match=r"schema version 2.*Fix: use the version that made"):
        read_manifest(tmp_path)
