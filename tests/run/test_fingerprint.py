"""Fingerprints of configurations and files."""

import hashlib

import pytest

from spin_lightning.run.fingerprint import differences, file_hash, fingerprint, folder_hashes

# The SHA-256 of "abc" as FIPS 180-2 gives it.
OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_is_the_hash_of_the_canonical_json():
    text = b'{"a":[1,0.5,null],"b":{"c":"\\u00e9","d":true}}'
    fields = {"b": {"d": True, "c": "é"}, "a": [1, 0.5, None]}
    assert fingerprint(fields) == hashlib.sha256(text).hexdigest()


def test_fingerprint_ignores_the_order_of_keys_at_every_depth():
    one = {"beta": 0.1, "generation": {"top_p": 1.0, "top_k": 0}}
    other = {"generation": {"top_k": 0, "top_p": 1.0}, "beta": 0.1}
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    "other", [{"beta": [0.2, 0.1]}, {"beta": [0.1]}, {"lambda": [0.1, 0.2]}, {"beta": "0.1"}]
)
def test_fingerprint_of_another_configuration_is_another(other):
    assert fingerprint({"beta": [0.1, 0.2]}) != fingerprint(other)


def test_differences_are_one_line_per_field_by_name():
    run = {"seed": 1, "loss": "logistic", "beta": [0.1], "old": "x"}
    given = {"seed": 2, "loss": "logistic", "beta": [0.1, 0.2], "new": {"a": 1}}
    assert differences(run, given) == [
        "beta: run has [0.1], you gave [0.1, 0.2]",
        "new: run has None, you gave {'a': 1}",
        "old: run has 'x', you gave None",
        "seed: run has 1, you gave 2",
    ]


def test_differences_of_what_json_writes_alike_are_none():
    assert differences({"stop_ids": [2, 3], "a": {"0": 1}}, {"stop_ids": (2, 3), "a": {0: 1}}) == []


def test_file_hash_equals_the_published_vector(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "abc") == OF_ABC


def test_file_hash_of_a_file_of_several_blocks_covers_it_whole(tmp_path):
    content = bytes(range(256)) * (3 << 12) + b"end"
    (tmp_path / "large").write_bytes(content)
    assert len(content) > 3 << 20
    assert file_hash(tmp_path / "large") == hashlib.sha256(content).hexdigest()


def test_folder_hashes_are_of_the_files_with_these_endings(tmp_path):
    for name in ("model.safetensors", "config.json", "notes.txt"):
        (tmp_path / name).write_bytes(b"abc")
    assert folder_hashes(tmp_path, (".safetensors", ".json")) == {
        "config.json": OF_ABC,
        "model.safetensors": OF_ABC,
    }
    assert folder_hashes(tmp_path, (".bin",)) == {}


def test_precision_is_compared_only_with_runs_that_recorded_it():
    given = {"seed": 1, "precision": "32-true"}
    assert differences({"seed": 1}, given) == []
    assert differences({"seed": 1, "precision": "bf16-true"}, given) == [
        "precision: run has 'bf16-true', you gave '32-true'"
    ]
