"""Damaged run folders."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.faults.damage import (
    DEEP,
    NO_JSON,
    NOISE,
    TRAVERSAL,
    Change,
    Malicious,
    bytes_,
    cases,
    edited,
    flipped,
    gone,
    half,
    replaced_by_a_file,
    replaced_by_a_folder,
    tensors,
)


def unchecked(rows: Callable[[pa.Table], pa.Table], **manifest: Any) -> Change:
    """A part of rows with other contents, and a manifest without checksums."""

    def change(path: Path) -> None:
        pq.write_table(rows(pq.read_table(path)), path)
        edited(parts=None, **manifest)(path.parent / "__about__/manifest.json")

    return change


def column(name: str, values: Callable[[int], Any]) -> Callable[[pa.Table], pa.Table]:
    """A table with other values in one column."""

    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        new = pa.array([values(i) for i in range(len(table))], table.schema.field(name).type)
        return table.set_column(place, table.schema.field(name), new)

    return change


def torch_file(content: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink)
    return sink.getvalue()


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Change:
    def rewrite(path: Path) -> None:
        torch.save(change(torch.load(path, weights_only=True)), path)

    return rewrite


MANIFEST = "rows/iterate_000/__about__/manifest.json"
PART = "rows/iterate_000/part-00001.parquet"
ITERATE = "iterates/iterate_001/iterate.json"
ADAPTER = "iterates/iterate_001/adapter_model.safetensors"
LAST = "checkpoints/last.ckpt"

RUNS = [
    *cases(MANIFEST, "rows", ("manifest.json is damaged", "delete it"), **NO_JSON),
    *cases(
        MANIFEST,
        "rows",
        ("damaged", "Fix: "),
        no_version=edited(schema_version=None),
        units_a_text=edited(units="two"),
        units_negative=edited(units=-1),
        no_units=edited(units=None),
        no_rows=edited(rows=None),
        no_members=edited(members=None),
        members_a_number=edited(members=3),
        members_of_texts=edited(members=["0"]),
        a_member_too_many=edited(members=[0, 1]),
        part_elsewhere=edited(parts=TRAVERSAL),
        parts_a_list=edited(parts=["part-00000.parquet"]),
        alpha_a_text=edited(token_alpha="x"),
        no_opponent=edited(opponent=None),
        opponent_a_list=edited(opponent=[0]),
        opponent_of_texts=edited(opponent={"0": "all"}),
    ),
    *cases(MANIFEST, "rows", ("schema version 99",), of_the_future=edited(schema_version=99)),
    *cases(MANIFEST, "rows", ("manifest lists 5",), other_count=edited(rows=5)),
    *cases(MANIFEST, "rows", ("part-00004.parquet is damaged",), more_units=edited(units=10**6)),
    *cases(MANIFEST, "rows", ("there is no manifest.json",), gone=gone),
    *cases(
        PART,
        "rows",
        ("part-00001.parquet is damaged",),
        gone=gone,
        empty=bytes_(b""),
        half=half,
        a_flipped_bit=flipped,
        noise=bytes_(NOISE),
        a_folder=replaced_by_a_folder,
        another_part=lambda path: shutil.copy(path.with_name("part-00000.parquet"), path) and None,
        a_column_less=unchecked(lambda table: table.drop_columns(["seed"])),
        a_column_more=unchecked(lambda table: table.append_column("x", table["seed"])),
        columns_in_another_order=unchecked(lambda table: table.select(table.column_names[::-1])),
        another_type=unchecked(
            lambda table: table.set_column(0, "example_id", table["example_id"].cast(pa.int32()))
        ),
    ),
    *cases(
        PART,
        "rows",
        ("rows/iterate_000 is damaged",),
        prompts_missing=unchecked(column("prompt_ids", lambda i: None)),
        ids_missing=unchecked(column("real_ids", lambda i: [None])),
        seeds_missing=unchecked(column("seed", lambda i: None)),
        a_score_too_many=unchecked(column("member_real_logps", lambda i: [-1.0, -2.0])),
        no_scores=unchecked(column("member_generated_logps", lambda i: [])),
    ),
    *cases(ITERATE, "load", ("iterate.json is damaged", "restore it"), **NO_JSON),
    *cases(
        ITERATE,
        "load",
        ("iterate.json", "restore it"),
        of_another_iterate=edited(index=7),
        files_a_list=edited(files=["adapter_config.json"]),
        file_elsewhere=edited(files=TRAVERSAL),
        base_a_text=edited(base="a model"),
        no_base=edited(base=None),
        base_of_the_future=edited(base={"name": "x", "sparsity": 2}),
        base_without_a_name=edited(base={}),
        no_index=edited(index=None),
        no_files=edited(files=None),
        no_step=edited(step=None),
        step_a_text=edited(step="8"),
        training_a_list=edited(training=[]),
        loss_a_text=edited(training={"loss": "low"}),
    ),
    *cases(ITERATE, "load", ("has no iterate 1; it has [0, 2]",), gone=gone),
    *cases(
        ADAPTER,
        "load",
        ("adapter_model.safetensors", "restore it"),
        gone=gone,
        empty=bytes_(b""),
        half=half,
        a_flipped_bit=flipped,
        noise=bytes_(NOISE),
        a_folder=replaced_by_a_folder,
        zeros=tensors(lambda found: {k: torch.zeros_like(v) for k, v in found.items()}),
    ),
    *cases(
        "iterates/iterate_001", "load", ("has no iterate 1",), gone=gone, a_file=replaced_by_a_file
    ),
    *cases(
        "iterates", "load", ("has no iterate 1; it has none",), gone=gone, a_file=replaced_by_a_file
    ),
    *cases(
        "iterates",
        "load",
        ("has no iterate 1; it has [0, 2]",),
        another_name=lambda path: (path / "iterate_001").rename(path / "iterate_one") and None,
    ),
    *cases("iterates/best.json", "best", ("best.json is damaged", "delete it"), **NO_JSON),
    *cases(
        "iterates/best.json",
        "best",
        ("best.json is damaged", "delete it"),
        a_text=edited(index="one"),
        no_index=edited(index=None),
        no_metric=edited(metric=None),
        value_a_text=edited(value="low"),
    ),
    *cases("iterates/best.json", "best", ("has no iterate 9",), not_there=edited(index=9)),
    *cases("tokenizer", "load", ("tokenizer",), gone=gone, a_file=replaced_by_a_file),
    *cases(
        "tokenizer/tokenizer.json",
        "load",
        ("tokenizer.json", "restore it"),
        gone=gone,
        half=half,
        another_one=edited(truncation=None, added_tokens=[]),
    ),
    *cases(
        "tokenizer/tokenizer_config.json",
        "load",
        ("has changed since the run wrote it",),
        edited=edited(eos_token="w1"),
    ),
    *cases(
        "config.yaml",
        "report",
        ("config.yaml is damaged",),
        noise=bytes_(NOISE),
        a_list=bytes_(b"- 1"),
        torn=bytes_(b"a: [1"),
        deep=bytes_(DEEP),
        latin=bytes_(b"a: caf\xe9"),
    ),
    *cases(
        ITERATE,
        "report",
        ("iterate.json is damaged",),
        half=half,
        metrics_a_list=edited(metrics=[1]),
    ),
    *cases("iterates", "report", ("holds no iterates",), gone=gone),
    *cases(
        LAST,
        "fit",
        ("last.ckpt cannot be used",),
        empty=bytes_(b""),
        half=half,
        noise=bytes_(NOISE),
        text=bytes_(b"a checkpoint"),
        a_pickle=bytes_(pickle.dumps(Malicious())),
        a_pickle_in_torch=bytes_(torch_file({"state_dict": {}, "x": Malicious()})),
        a_module=bytes_(torch_file(torch.nn.Linear(2, 2))),
        a_tensor=bytes_(torch_file(torch.zeros(2))),
        a_list=bytes_(torch_file([1, 2])),
        nothing=bytes_(torch_file({})),
        weights_alone=checkpoint(lambda found: {"state_dict": found["state_dict"]}),
        no_loops=checkpoint(lambda found: {k: v for k, v in found.items() if k != "loops"}),
        no_iterate=checkpoint(lambda found: {**found, "self_play": {}}),
        iterate_a_text=checkpoint(lambda found: {**found, "self_play": {"iterate": "2"}}),
    ),
    *cases(
        LAST,
        "fit",
        ("holds another adapter",),
        no_weights=checkpoint(lambda found: {**found, "state_dict": {}}),
        other_names=checkpoint(
            lambda f: {**f, "state_dict": {f"x{k}": v for k, v in f["state_dict"].items()}}
        ),
        other_shapes=checkpoint(
            lambda f: {**f, "state_dict": {k: v[:1] for k, v in f["state_dict"].items()}}
        ),
    ),
    *cases(
        LAST,
        "fit",
        ("another run",),
        of_a_later_iterate=checkpoint(lambda found: {**found, "self_play": {"iterate": 9}}),
        of_another_lineage=checkpoint(lambda found: {**found, "run_lineage": "0" * 64}),
    ),
    *cases(ITERATE, "fit", ("iterate.json is damaged",), half=half),
    *cases(
        "iterates/iterate_002/iterate.json",
        "fit",
        ("iterate.json is damaged (its 'fingerprint_fields' is missing)", "restore it"),
        no_fields=edited(fingerprint_fields=None),
    ),
    *cases(ADAPTER, "fit", ("has changed since it was written",), a_flipped_bit=flipped),
    *cases("tokenizer/tokenizer.json", "fit", ("tokenizer.json is missing",), gone=gone),
    *cases("checkpoints", "fit", ("already holds iterates 0 to 2",), gone=gone),
]
