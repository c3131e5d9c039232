import math
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import EpochBatches, PairDataset, RowLoader
from spin_lightning.errors import RunFolderError
from spin_lightning.mixtures import Mixture, latest
from spin_lightning.rows.store import read_rows
from spin_lightning.types import PairBatch
from tests.toys.rows import REAL_ONLY, ROW, first_ids, write_rows

# Rows, batch size, world size: even and uneven ends, and ends that leave a rank empty-handed.
SIZES = [(8, 2, 1), (9, 2, 1), (8, 2, 2), (9, 2, 2), (10, 2, 2), (11, 2, 2), (3, 8, 1), (1, 4, 4)]
every_size = pytest.mark.parametrize(("rows", "batch_size", "world_size"), SIZES)


def dataset(folder: Path, rows: int, reference: Mixture | None = None) -> PairDataset:
    """Rows 0, 1, 2 …, told apart by the first id of their prompts."""
    made = [replace(ROW, example_id=i, prompt_ids=(i, 4)) for i in range(rows)]
    return PairDataset(read_rows(write_rows(folder, made)), reference or latest(2))


def loader(data: PairDataset, **settings: Any) -> RowLoader:
    batches = EpochBatches(len(data), batch_size=2, seed=3, epoch=1)
    return RowLoader(data, batches, collate_fn=collate, **settings)


def ranks(rows: int, batch_size: int, world_size: int, **settings: Any) -> list[list[list[int]]]:
    """The batches of each rank."""
    return [
        list(EpochBatches(rows, batch_size, rank=rank, world_size=world_size, **settings))
        for rank in range(world_size)
    ]


def prompts(batches: Any) -> list[list[int]]:
    """Which rows each batch holds."""
    return [first_ids(batch) for batch in batches]


# ------------------------------------------------------------------------ PairDataset


def test_pair_reference_of_a_mixture_is_the_log_of_the_weighted_probabilities(tmp_path):
    row = replace(
        ROW,
        member_real_logps=(math.log(0.2), math.log(0.4)),
        member_generated_logps=(math.log(0.5), math.log(0.1)),
    )
    data = PairDataset(read_rows(write_rows(tmp_path, [row])), Mixture({0: 0.25, 2: 0.75}))
    assert data[0].reference_real == pytest.approx(math.log(0.35), abs=1e-12)
    assert data[0].reference_generated == pytest.approx(math.log(0.2), abs=1e-12)


def test_pair_reference_of_a_long_response_keeps_float64(tmp_path):
    row = replace(ROW, member_real_logps=(-1500.0, -1501.0))
    data = PairDataset(read_rows(write_rows(tmp_path, [row])), Mixture({0: 0.5, 2: 0.5}))
    by_hand = -1500 + math.log((1 + math.exp(-1)) / 2)
    assert data[0].reference_real == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize(("member", "real", "generated"), [(0, -1.25, -3.0), (2, -2.5, -0.5)])
def test_pair_reference_of_one_iterate_is_its_own(member, real, generated, tmp_path):
    pair = dataset(tmp_path, 3, latest(member))[1]
    assert pair.prompt_ids.tolist() == [1, 4]
    assert pair.real_ids.tolist() == [6, 7, 2]
    assert pair.generated_ids.tolist() == [8, 2]
    assert (pair.reference_real, pair.reference_generated) == (real, generated)


def test_pair_without_opponent_has_no_reference(tmp_path):
    rows = [replace(ROW, **REAL_ONLY)] * 2
    data = PairDataset(read_rows(write_rows(tmp_path, rows)), latest(0))
    assert len(data) == 2
    assert math.isnan(data[1].reference_real)
    assert math.isnan(data[1].reference_generated)


def test_pair_has_its_log_probs_under_further_references_in_their_order(tmp_path):
    table = read_rows(write_rows(tmp_path, [replace(ROW, example_id=i) for i in (4, 5)]))
    data = PairDataset(table, latest(2), [latest(2), latest(0)])
    assert data[1].further_real == (-2.5, -1.25)
    assert data[1].further_generated == (-0.5, -3.0)
    batch = collate([data[0], data[1]])
    assert batch.further_real is not None
    assert batch.further_real.tolist() == [[-2.5, -1.25]] * 2
    (first, _) = batch.split([batch.pairs, batch.pairs])
    assert first.further_generated is not None
    assert first.further_generated.tolist() == [[-0.5, -3.0]] * 2


def test_pair_joins_the_response_of_iterate_0_to_its_example_and_sample(tmp_path):
    """The rows of iterate 0 in another order, and one that is not needed."""
    spoken = {(1, 0): (9,), (0, 1): (10, 2), (0, 0): (11, 12, 2), (2, 0): (13,)}
    made = [
        replace(ROW, example_id=i, sample=n, generated_ids=ids) for (i, n), ids in spoken.items()
    ]
    first = read_rows(write_rows(tmp_path / "first", made))
    wanted = [(0, 0), (0, 1), (1, 0)]
    rows = [replace(ROW, example_id=i, sample=n) for i, n in wanted]
    data = PairDataset(read_rows(write_rows(tmp_path / "rows", rows)), latest(2), first=first)
    assert [tuple(data[i].first_ids.tolist()) for i in range(3)] == [spoken[key] for key in wanted]
    batch = collate([data[i] for i in range(3)])
    assert batch.pairs.response_lengths == ((3, 2, 3), (3, 2, 2), (3, 2, 1))


def test_response_of_iterate_0_that_is_missing_is_named(tmp_path):
    first = read_rows(write_rows(tmp_path / "first", [replace(ROW, example_id=1)]))
    rows = [replace(ROW, example_id=i) for i in (1, 2, 3)]
    table = read_rows(write_rows(tmp_path / "rows", rows))
    with pytest.raises(RunFolderError, match=r"lack 2 of 3 responses, such as example 2, sample 0"):
        PairDataset(table, latest(2), first=first)


# ------------------------------------------------------------------------ EpochBatches


@every_size
def test_epoch_visits_every_row_once(rows, batch_size, world_size):
    seen = list(chain.from_iterable(chain(*ranks(rows, batch_size, world_size, epoch=0))))
    assert set(seen) == set(range(rows))
    # A rank may repeat a row of the last batch, rather than not to step.
    assert len(seen) - rows < world_size


@every_size
def test_epoch_every_rank_steps_as_often_as_its_length_says(rows, batch_size, world_size):
    steps = -(-rows // (batch_size * world_size))
    assert [len(batches) for batches in ranks(rows, batch_size, world_size)] == [steps] * world_size
    assert len(EpochBatches(rows, batch_size, world_size=world_size)) == steps


@every_size
def test_epoch_on_many_ranks_sees_the_batches_of_one_rank_with_larger_ones(
    rows, batch_size, world_size
):
    (alone,) = ranks(rows, batch_size * world_size, 1, epoch=2)
    together = zip(*ranks(rows, batch_size, world_size, epoch=2), strict=True)
    assert [set(chain(*parts)) for parts in together] == [set(batch) for batch in alone]


def test_epoch_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int, batch_size: int = 4) -> tuple[int, ...]:
        return tuple(chain(*EpochBatches(50, batch_size, seed=seed, epoch=epoch)))

    assert order(0, 1) == order(0, 1, batch_size=7)
    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4
    assert all(o != tuple(range(50)) for o in (order(0, 0), order(1, 0)))


def test_epoch_none_keeps_the_order_of_the_rows():
    assert list(EpochBatches(5, 2, seed=4)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("start", range(4))
def test_epoch_started_later_leaves_out_the_first_batches_only(start):
    whole = list(EpochBatches(7, 2, seed=1, epoch=5))
    later = EpochBatches(7, 2, seed=1, epoch=5, start=start)
    assert list(later) == whole[start:]
    assert len(later) == 4


# ------------------------------------------------------------------------ RowLoader


@pytest.mark.parametrize("position", range(5))
def test_loader_resumed_at_a_position_goes_on_there_and_then_from_the_start(position, tmp_path):
    data = dataset(tmp_path, 9)
    whole = prompts(loader(data))
    assert sorted(chain(*whole)) == list(range(9))
    interrupted, resumed = loader(data), loader(data)
    assert prompts(islice(interrupted, position)) == whole[:position]
    resumed.load_state_dict(interrupted.state_dict())
    assert prompts(resumed) == whole[position:]
    assert prompts(resumed) == whole


def test_loader_interrupted_twice_counts_from_the_epochs_start(tmp_path):
    data = dataset(tmp_path, 9)
    whole = prompts(loader(data))
    resumed = loader(data)
    resumed.load_state_dict({"position": 2})
    list(islice(resumed, 1))
    assert resumed.state_dict() == {"position": 3}
    again = loader(data)
    again.load_state_dict(resumed.state_dict())
    assert prompts(again) == whole[3:]


def test_loader_at_the_end_of_an_epoch_stands_at_the_start_of_the_next(tmp_path):
    rows = loader(dataset(tmp_path, 9))
    list(rows)
    assert rows.state_dict() == {"position": 0}


def test_loader_resumed_and_not_yet_read_keeps_its_position(tmp_path):
    rows = loader(dataset(tmp_path, 9))
    rows.load_state_dict({"position": 3})
    assert rows.state_dict() == {"position": 3}


def test_loader_with_workers_counts_what_was_handed_out_not_what_was_fetched(tmp_path):
    data = dataset(tmp_path, 9)
    ahead = loader(data, num_workers=1)
    assert prompts(islice(ahead, 2)) == prompts(loader(data))[:2]
    assert ahead.state_dict() == {"position": 2}


def test_loader_gives_pair_batches(tmp_path):
    batches = list(loader(dataset(tmp_path, 9)))
    assert all(isinstance(batch, PairBatch) for batch in batches)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(("rows", "world_size"), [(9, 1), (9, 2), (5, 4), (8, 2), (7, 3), (1, 4)])
def test_shares_make_the_mean_over_ranks_the_mean_over_rows(rows, world_size):
    ranks = [EpochBatches(rows, 2, rank=r, world_size=world_size) for r in range(world_size)]
    by_rank = [list(batches) for batches in ranks]
    for index in range(len(ranks[0])):
        size = 2 * world_size
        whole = range(index * size, min(rows, index * size + size))
        # A rank's mean is that of its rows' numbers, squared to be no straight line.
        means = [
            mean([i**2 for i in batches[index]]) * ranks[r].share(index)
            for r, batches in enumerate(by_rank)
        ]
        assert mean(means) == pytest.approx(mean([i**2 for i in whole]))
