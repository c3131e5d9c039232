"""Rows in work units: the same bytes however they are made, and scores as by hand."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from spin_lightning.errors import SpinError
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.rows.making import Synthesis, Timing, finish, is_finished
from spin_lightning.rows.manifest import Manifest, read_manifest
from spin_lightning.rows.store import read_rows
from spin_lightning.types import Example
from tests.toys.adapters import plain_model
from tests.toys.plans import PLAN, STOP, draw_row, key_by_hand, some_examples
from tests.toys.policy import EveryResponse

EXAMPLES = some_examples()


@pytest.fixture(scope="module")
def iterates(tiny_adapters, tmp_path_factory) -> dict[int, Path]:
    return {0: tmp_path_factory.mktemp("iterate_000"), **tiny_adapters}


@pytest.fixture(scope="module")
def synthesis(tiny_base, iterates) -> Synthesis:
    policy = LoraPolicy(tiny_base, LoraSettings(r=2))
    policy.use_iterates(iterates)
    generator = LocalGenerator((STOP,), 0, GenerationSettings())
    return Synthesis(policy, generator, vocabulary=24)


@pytest.fixture(scope="module")
def whole(synthesis, tmp_path_factory) -> Path:
    """All rows of `PLAN`, made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    assert list(synthesis.make(PLAN, EXAMPLES, folder, Timing())) == [0, 1, 2, 3, 4]
    return folder


def rows_in(folder: Path) -> list[dict]:
    parts = sorted(folder.glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_make_rows_say_where_they_come_from(whole):
    rows = rows_in(whole)
    assert len(rows) == 70
    for row, (example, sample) in zip(
        rows, ((e, s) for e in EXAMPLES for s in (0, 1)), strict=True
    ):
        assert (row["example_id"], row["sample"]) == (example.example_id, sample)
        assert row["seed"] == key_by_hand(PLAN, example.example_id, sample)
        assert row["prompt_ids"] == list(example.prompt_ids)
        assert row["real_ids"] == list(example.real_ids)
        assert row["opponent"] == draw_row(PLAN, example, sample).opponent
        assert row["members"] == [1, 2]
        assert row["real_finished"]
        assert row["finished"] == (row["generated_ids"][-1] == STOP)
        assert 1 <= len(row["generated_ids"]) <= 6
    assert {row["opponent"] for row in rows} == {0, 1, 2}
    assert len({tuple(row["generated_ids"]) for row in rows}) > 50


def test_make_scores_are_those_of_transformers_and_peft_alone(whole, tiny_model_dir, tiny_adapters):
    models = {t: plain_model(tiny_model_dir, tiny_adapters[t]) for t in PLAN.members}
    for row in rows_in(whole):
        for side in ("real", "generated"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            for member, found in zip(PLAN.members, row[f"member_{side}_logps"], strict=True):
                with torch.no_grad():
                    log_p = models[member](torch.tensor([ids])).logits[0].double().log_softmax(-1)
                places = range(len(row["prompt_ids"]), len(ids))
                wanted = sum(float(log_p[s - 1, ids[s]]) for s in places)
                assert found == pytest.approx(wanted, abs=1e-4)


def test_make_scores_every_prompt_once_per_member(synthesis, tmp_path, monkeypatch):
    """35 prompts with a real response and two samples each, under two members."""
    batches = []
    prompt_logps = synthesis.policy.prompt_logps
    monkeypatch.setattr(
        synthesis.policy, "prompt_logps", lambda batch: batches.append(batch) or prompt_logps(batch)
    )
    list(synthesis.make(PLAN, EXAMPLES, tmp_path, Timing()))
    assert sum(len(batch.prompt_lengths) for batch in batches) == 2 * len(EXAMPLES)
    assert {len(lengths) for batch in batches for lengths in batch.response_lengths} == {3}


def test_make_scores_of_padded_sequences_are_the_same(
    tiny_base, synthesis, iterates, whole, tmp_path
):
    policy = LoraPolicy(tiny_base, LoraSettings(r=2), packing="padded", fused=False)
    policy.use_iterates(iterates)
    list(replace(synthesis, policy=policy).make(PLAN, EXAMPLES, tmp_path, Timing()))
    for row, other in zip(rows_in(tmp_path), rows_in(whole), strict=True):
        for name in ("member_real_logps", "member_generated_logps"):
            assert row[name] == pytest.approx(other[name], abs=1e-4)


def test_make_again_elsewhere_writes_the_same_bytes(synthesis, whole, tmp_path):
    torch.manual_seed(99)
    synthesis.policy.evict()
    list(synthesis.make(PLAN, EXAMPLES, tmp_path, Timing()))
    assert bytes_in(tmp_path) == bytes_in(whole)


def test_make_ranks_share_the_units_and_together_write_the_same_bytes(synthesis, whole, tmp_path):
    ranks = {"rank": 1, "world_size": 2}, {"rank": 0, "world_size": 2}
    made = [list(synthesis.make(PLAN, EXAMPLES, tmp_path, Timing(), **rank)) for rank in ranks]
    assert made == [[1, 3], [0, 2, 4]]
    assert bytes_in(tmp_path) == bytes_in(whole)


def test_make_after_a_crash_makes_only_what_is_missing_or_of_other_rows(synthesis, whole, tmp_path):
    later = synthesis.make(replace(PLAN, iterate=3), EXAMPLES, tmp_path, Timing())
    next(later)  # another iterate's rows stand in part 0
    crashed = synthesis.make(PLAN, EXAMPLES, tmp_path, Timing(), rank=1, world_size=2)
    list(crashed)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-0000[13]*")}
    assert len(kept) == 2
    timing = Timing()
    list(synthesis.make(PLAN, EXAMPLES, tmp_path, timing))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert timing.rows == 16 + 16 + 6
    assert bytes_in(tmp_path) == bytes_in(whole)


def test_make_counts_response_tokens_generated_and_scored_here(synthesis, tmp_path):
    timing, plan = Timing(), replace(PLAN, unit_size=32)
    list(synthesis.make(plan, EXAMPLES, tmp_path, timing))
    rows = rows_in(tmp_path)
    generated = sum(len(row["generated_ids"]) for row in rows)
    # An example's real response is scored once in each unit that has rows of it.
    ids = [[row["example_id"] for row in rows[i : i + 32]] for i in range(0, len(rows), 32)]
    length = {row["example_id"]: len(row["real_ids"]) for row in rows}
    real = sum(length[i] for unit in ids for i in set(unit))
    assert timing.generated_tokens == generated
    assert timing.scored_tokens == len(PLAN.members) * (generated + real)


def test_make_in_other_units_changes_almost_no_ids(synthesis, tmp_path):
    """Only where rounding moves a boundary of the cumulative distribution past a uniform."""
    examples = some_examples(150)
    found = []
    for unit_size in (64, 7):
        folder = tmp_path / str(unit_size)
        list(synthesis.make(replace(PLAN, unit_size=unit_size), examples, folder, Timing()))
        found.append({row["seed"]: row["generated_ids"] for row in rows_in(folder)})
    assert found[0].keys() == found[1].keys()
    assert sum(found[0][key] != found[1][key] for key in found[0]) <= 0.02 * 300


def test_make_caps_a_response_to_what_the_context_leaves(synthesis, tmp_path):
    prompts = [(1, *[7] * n) for n in (4, 58, 61, 62)]
    examples = [Example(i, prompt, (STOP,), True) for i, prompt in enumerate(prompts)]
    list(synthesis.make(replace(PLAN, samples=8), examples, tmp_path, Timing()))
    longest = Counter()
    for row in rows_in(tmp_path):
        longest[row["example_id"]] = max(longest[row["example_id"]], len(row["generated_ids"]))
    assert longest == {0: 6, 1: 5, 2: 2, 3: 1}


def test_make_without_an_opponent_scores_real_responses_alone(synthesis, whole, tmp_path):
    plan = replace(PLAN, opponent=None)
    list(synthesis.make(plan, EXAMPLES, tmp_path, Timing()))
    for row, other in zip(rows_in(tmp_path), rows_in(whole), strict=True):
        assert row["generated_ids"] == []
        assert row["opponent"] is None
        assert not row["finished"]
        assert row["member_generated_logps"] == [0.0, 0.0]
        assert row["member_real_logps"] == pytest.approx(other["member_real_logps"], abs=1e-4)


def test_finish_makes_the_rows_readable_and_says_what_they_are(synthesis, tmp_path):
    list(synthesis.make(PLAN, EXAMPLES, tmp_path, Timing()))
    assert read_manifest(tmp_path) is None
    finish(PLAN, EXAMPLES, tmp_path, {"variant": "Mine"})
    parts = {p.name: sha256(p.read_bytes()).hexdigest() for p in tmp_path.glob("part-*")}
    assert read_manifest(tmp_path) == Manifest(
        iterate=2,
        opponent={0: 0.5, 1: 0.25, 2: 0.25},
        members=(1, 2),
        rows=70,
        units=5,
        unit_size=16,
        cap=6,
        parts=parts,
        others={"variant": "Mine"},
    )
    table = read_rows(tmp_path)
    assert table.example_id.tolist() == [e.example_id for e in EXAMPLES for _ in (0, 1)]
    assert table.members == (1, 2)


def test_settings_overridden_at_run_time_are_named_in_the_manifest_by_unit(synthesis, tmp_path):
    """Also after a crash, since deviations are stored with the part."""

    class Deviating(EveryResponse):
        deviations: ClassVar[dict[str, int]] = {}

    making = replace(synthesis, generator=Deviating())
    parts = making.make(PLAN, EXAMPLES, tmp_path, Timing())
    next(parts)
    Deviating.deviations = {"batch_tokens": 320}
    next(parts)
    parts.close()
    Deviating.deviations = {}
    list(making.make(PLAN, EXAMPLES, tmp_path, Timing()))
    finish(PLAN, EXAMPLES, tmp_path, {})
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.deviations == {"1": {"batch_tokens": 320}}
    assert len(read_rows(tmp_path)) == 70


@contextmanager
def memory_for(tokens: int, policy: LoraPolicy) -> Iterator[list[int]]:
    """A policy that runs out of memory in the second layer of longer passes; lengths of passes."""
    lengths: list[int] = []

    def forward(_module: nn.Module, args: tuple[Tensor, ...], _kwargs: dict[str, object]) -> None:
        lengths.append(args[0].shape[:2].numel())
        if lengths[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    layer = policy.model.get_base_model().base_model.layers[1]
    handle = layer.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


@pytest.mark.parametrize("packing", ["shared", "padded"])
@pytest.mark.parametrize("tokens", [40, 16])
def test_scoring_passes_that_memory_does_not_suffice_for_are_halved_and_recorded(
    packing, tokens, tiny_base, iterates, tmp_path
):
    """16 tokens do not hold a prompt of 9 with three responses of up to 6."""
    policy = LoraPolicy(tiny_base, LoraSettings(r=2), packing=packing)
    policy.use_iterates(iterates)
    making = Synthesis(policy, EveryResponse(), vocabulary=24)
    list(making.make(PLAN, EXAMPLES, tmp_path / "plain", Timing()))
    with memory_for(tokens, policy) as lengths:
        list(making.make(PLAN, EXAMPLES, tmp_path / "short", Timing()))
    for row, other in zip(rows_in(tmp_path / "short"), rows_in(tmp_path / "plain"), strict=True):
        for name, value in row.items():
            assert value == (
                pytest.approx(other[name], abs=1e-4) if "logp" in name else other[name]
            )
    limit = policy.scoring_limit.tokens
    assert tokens / 2 - 1 <= limit <= tokens
    failed = [i for i, length in enumerate(lengths) if length > tokens]
    # It does not try again what is too long, whichever iterate scores.
    assert len(failed) <= 5
    assert max(failed) < 8
    finish(PLAN, EXAMPLES, tmp_path / "short", {})
    manifest = read_manifest(tmp_path / "short")
    assert manifest is not None
    assert manifest.deviations == {str(unit): {"scoring_tokens": limit} for unit in range(5)}


def test_a_single_response_that_memory_does_not_suffice_for_is_an_error(
    tiny_base, iterates, tmp_path
):
    policy = LoraPolicy(tiny_base, LoraSettings(r=2))
    policy.use_iterates(iterates)
    making = Synthesis(policy, EveryResponse(), vocabulary=24)
    with (
        memory_for(1, policy),
        pytest.raises(SpinError, match=r"scoring pass of .* Fix: set a sma"),
    ):
        list(making.make(PLAN, EXAMPLES, tmp_path, Timing()))
    assert policy.training, "the block of the scorer was left"


def test_finish_without_examples_is_an_error_and_leaves_no_manifest(tmp_path):
    with pytest.raises(SpinError, match=r"no examples to make rows of.*Fix: give more data"):
        finish(PLAN, [], tmp_path, {})
    assert read_manifest(tmp_path) is None


def test_part_damaged_after_the_manifest_is_named_and_made_again_alone(synthesis, tmp_path, caplog):
    list(synthesis.make(PLAN, EXAMPLES, tmp_path, Timing()))
    finish(PLAN, EXAMPLES, tmp_path, {})
    assert is_finished(PLAN, EXAMPLES, tmp_path)
    parts = sorted(tmp_path.glob("part-*"))
    before = {part: (part.read_bytes(), part.stat().st_mtime_ns) for part in parts}
    parts[3].write_bytes(parts[2].read_bytes())  # a whole part, of another unit
    assert not is_finished(PLAN, EXAMPLES, tmp_path)
    assert f"{parts[3]} is damaged" in caplog.text
    list(synthesis.make(PLAN, EXAMPLES, tmp_path, Timing()))
    assert {part: part.read_bytes() for part in parts} == {p: b for p, (b, _) in before.items()}
    untouched = [part for part in parts if part.stat().st_mtime_ns == before[part][1]]
    assert untouched == [part for part in parts if part != parts[3]]
