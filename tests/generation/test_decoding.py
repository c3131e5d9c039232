"""Slots that are refilled: how full they are, and that rows do not depend on their company."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from spin_lightning.generation.base import Request
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.kv_cache import ColumnCache
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.model import RoutedModel
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.slots import ColumnSlots
from spin_lightning.generation.varlen_slots import VarlenSlots
from spin_lightning.policies.base import SinglePolicy
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.types import PolicyId
from tests.generation.test_local import STOPS, WORDS, assert_same_but_at_boundaries, decode_plainly
from tests.toys.adapters import plain_model

SLOTS = 32


class Watched(ColumnSlots):
    """Slots that note how many of them are taken in every step.

    Attributes:
        seen: Slots taken, slots there are, and requests still waiting, in each step.
    """

    seen: list[tuple[int, int, int]]

    def __init__(self, model: RoutedModel, queue: Sequence[Request], count: int) -> None:
        super().__init__(model, queue, count)
        self._taken, self._waiting = 0, len(queue)
        Watched.seen = []

    def fill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        super().fill(slots, requests)
        self._taken += len(slots)
        self._waiting -= len(slots)

    def step(self, tokens: Tensor) -> Tensor:
        Watched.seen.append((self._taken, len(tokens), self._waiting))
        return super().step(tokens)

    def free(self, slots: Sequence[int]) -> None:
        super().free(slots)
        self._taken -= len(slots)


@pytest.fixture
def policy(tiny_base, tiny_adapters, tmp_path) -> LoraPolicy:
    policy = LoraPolicy(tiny_base, LoraSettings(r=2))
    policy.use_iterates({0: tmp_path, **tiny_adapters})
    return policy


def some_requests(count: int, cap: int) -> list[Request]:
    draw = random.Random(count)
    return [
        Request((1, *draw.choices(range(3, WORDS), k=draw.randrange(9))), draw.randrange(3), i, cap)
        for i in range(count)
    ]


def test_slots_are_full_as_long_as_requests_are_waiting(policy, monkeypatch):
    """Where responses end early at random, at least 95 % of the computed rows are needed."""
    monkeypatch.setattr("spin_lightning.generation.decoding.ColumnSlots", Watched)
    requests, completed = some_requests(600, cap=60), list[int]()
    decoder = Decoder(policy.model, Sampler(GenerationSettings()), STOPS, pad_id=0)
    with policy.at_rows(policy.batch_groups({r.policy for r in requests})[0]) as routing:
        responses = decoder.decode(requests, routing, SLOTS, completed.append)
    assert sum(completed) == len(requests)
    assert len(completed) > 30
    lengths = [len(response.ids) for response in responses]
    assert max(lengths) > 3 * sum(lengths) / len(lengths), "lengths vary"
    queued = [(taken, slots) for taken, slots, waiting in Watched.seen if waiting]
    taken, slots = (sum(column) for column in zip(*queued, strict=True))
    assert taken / slots >= 0.95
    assert {slots for _, slots in queued} == {SLOTS}
    tail = [slots for _, slots, waiting in Watched.seen if not waiting]
    assert tail == sorted(tail, reverse=True)
    assert tail[-1] < SLOTS / 4, "free slots are given up in the end"
    assert sum(taken for taken, _, _ in Watched.seen) == sum(lengths)


@pytest.mark.parametrize("slots", [1, 2, 5, 17])
def test_ids_are_those_of_plain_decoding_however_often_columns_are_moved_back(
    slots, policy, tiny_model_dir, tiny_adapters, monkeypatch
):
    moves = []
    move_back = ColumnCache.move_back

    def counted(cache: ColumnCache, end: int) -> None:
        moves.append(end)
        move_back(cache, end)

    monkeypatch.setattr(ColumnCache, "move_back", counted)
    requests = some_requests(60, cap=12)
    decoder = Decoder(policy.model, Sampler(GenerationSettings()), STOPS, pad_id=0)
    with policy.at_rows(policy.batch_groups({r.policy for r in requests})[0]) as routing:
        responses = decoder.decode(requests, routing, slots)
    assert len(moves) > (0 if slots > 2 else 5)
    models = {t: plain_model(tiny_model_dir, tiny_adapters.get(t)) for t in (0, 1, 2)}
    plain = [decode_plainly(models[r.opponent], r) for r in requests]
    assert_same_but_at_boundaries(responses, plain)


def test_much_shorter_requests_do_not_wait_for_room_for_long_ones(policy):
    """Of 100 tokens at once, one request of 80 leaves no room; those of 10 have ten slots."""
    generator = LocalGenerator(STOPS, 0, GenerationSettings(batch_tokens=100))
    decoder = Decoder(policy.model, Sampler(GenerationSettings()), STOPS, pad_id=0)
    requests = [Request((1,) * 6, 0, i, 4) for i in range(20)] + [Request((1,) * 40, 0, 99, 40)]
    queues = list(generator._queues(decoder, requests, range(len(requests))))
    assert [list(queue.indices) for queue in queues] == [[20], list(range(20))]
    # Twenty do not fit at once. A refilled slot has room for sixteen more columns.
    assert [queue.slots for queue in queues] == [1, 100 // 26]
    assert ColumnSlots.columns_of(requests[:3], refilled=False) == 10


def test_mixed_rows_take_room_for_two(policy):
    generator = LocalGenerator(STOPS, 0, GenerationSettings(batch_tokens=100))
    decoder = Decoder(policy.model, Sampler(GenerationSettings()), STOPS, pad_id=0)
    requests = [Request((1,) * 6, 1, i, 4, token_alpha=0.5) for i in range(5)]
    (queue,) = generator._queues(decoder, requests, range(5))
    assert requests[0].policy == PolicyId(1, 0.5)
    assert (queue.slots, queue.tokens) == (5, 5 * 2 * 10)


def test_a_model_without_rows_is_an_error(policy):
    with policy.at_rows([PolicyId(1)]), pytest.raises(RuntimeError, match="no rows are routed"):
        policy.model(input_ids=torch.tensor([[1, 2]]))


def test_a_slot_that_was_free_for_some_steps_starts_from_nothing(policy):
    """Prompts of one token are not read, so nothing is copied into their slots."""
    requests = [Request((5,), 0, key, 9) for key in range(3)]
    model = RoutedModel(policy.model, policy.model.config, SinglePolicy(), pad_id=0)
    slots = VarlenSlots(model, requests, 2)
    slots.fill([0, 1], requests[:2])
    slots._lanes.advance()
    slots.free([1])
    slots._lanes.advance()
    slots._lanes.advance()
    slots.fill([1], requests[2:])
    assert slots._lanes.lengths.tolist() == [3, 0]
