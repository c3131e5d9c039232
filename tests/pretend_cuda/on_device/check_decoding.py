"""Decoding on the pretend device: what a step asks of it, and what stays where it is."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig

from spin_lightning.generation import decoding, lanes_trial, step_graph
from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.varlen_slots import VarlenSlots, fits
from spin_lightning.policies import varlen
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.types import PolicyId
from tests.policies.test_shared_prefix import LAYERS, SIZES
from tests.pretend_cuda.counts import Counts
from tests.pretend_cuda.device import DEVICE, to_host
from tests.pretend_cuda.on_device.check_policies import iterates
from tests.toys.models import write_model

# Never drawn, so that all responses are as long as their caps.
STOP, PAD = 999, 0
SLOTS = 8


@dataclass
class Seen:
    """What the device had been asked for when a step began.

    Attributes:
        launches: Number of launches.
        waits: Number of host synchronizations.
        addresses: Of tokens, lengths, keys and values.
    """

    launches: int
    waits: int
    addresses: list[int]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Counts], list[Seen]]:
    """Resets the counts and watches the steps that follow."""
    seen: list[Seen] = []
    counted: list[Counts] = []
    step = VarlenSlots.step

    def watched(slots: VarlenSlots, tokens: Tensor) -> Tensor:
        if counted:
            lanes = slots._lanes
            parts = [tokens, lanes.lengths, lanes.ends, *itertools.chain(*lanes.memory.values())]
            addresses = [to_host(part).data_ptr() for part in parts]
            (counts,) = counted
            seen.append(Seen(len(counts.kernels.order), sum(counts.syncs.values()), addresses))
        return step(slots, tokens)

    def start(counts: Counts) -> list[Seen]:
        counts.reset()
        counted[:] = [counts]
        seen.clear()
        return seen

    monkeypatch.setattr(VarlenSlots, "step", watched)
    return start


def loaded(root: Path, layers: int, quantization: str) -> LoraPolicy:
    config = LlamaConfig(**SIZES, **{**LAYERS, "num_hidden_layers": layers})
    folder = write_model(config, root / f"layers-{layers}")
    base = FrozenBase(str(folder), compute_dtype="bfloat16", quantization=quantization)
    policy = LoraPolicy(base, LoraSettings(r=4), device=DEVICE)
    policy.use_iterates(iterates(base, root / f"iterates-{layers}"))
    # The kernel is tried before its first use, which is not part of the counts.
    assert fits(policy.model)
    return policy


def asked(policies: list[PolicyId], count: int, cap: int = 40) -> list[Request]:
    return [
        Request((5, 6, 7 + i % 9, 8)[: 1 + i % 4], iterate, i, cap, alpha)
        for i, (iterate, alpha) in zip(range(count), itertools.cycle(policies), strict=False)
    ]


@pytest.mark.parametrize(
    ("policies", "most"),
    [([PolicyId(1)], 1400), ([PolicyId(0)], 950), ([PolicyId(1), PolicyId(2)], 1600)],
    ids=["one adapter", "base", "two adapters"],
)
def test_launches_of_a_step_with_32_layers(machine, steps, policies, most, tmp_path):
    launches = []
    for layers in (2, 3):
        with machine() as counts:
            policy = loaded(tmp_path, layers, "nf4")
            seen = steps(counts)
            settings = GenerationSettings(cuda_graphs=False)
            LocalGenerator((STOP,), PAD, settings).generate(policy, asked(policies, 4))
            launches.append(seen[5].launches - seen[4].launches)
            assert not counts.float32_products
    per_layer = launches[1] - launches[0]
    assert launches[0] + 30 * per_layer <= most


@pytest.mark.parametrize("policies", [[PolicyId(1)], [PolicyId(1, 0.3), PolicyId(2, 0.7)]])
def test_steps_have_the_same_kernels_and_addresses_and_the_host_waits_once_in_16(
    machine, steps, policies, tmp_path
):
    with machine() as counts:
        policy = loaded(tmp_path, 2, "nf4")
        seen = steps(counts)
        requests = asked(policies, 3 * SLOTS)
        columns = max(request.total for request in requests)
        tokens = SLOTS * columns * (2 if requests[0].token_alpha else 1)
        settings = GenerationSettings(batch_tokens=tokens, cuda_graphs=False)
        LocalGenerator((STOP,), PAD, settings).generate(policy, requests)
        order = list(counts.kernels.order)
    assert decoding._STEPS_UNWATCHED == 16
    # 40 tokens end in the third of 16 steps each, and then the next requests come.
    assert len(seen) == 3 * 48
    assert len({tuple(s.addresses) for s in seen[1:]}) == 1, "also after slots are refilled"
    parts = [order[a.launches : b.launches] for a, b in itertools.pairwise(seen)]
    unwatched = [i for i in range(len(parts)) if i % 16 != 15]
    assert all(parts[i] == parts[0] for i in unwatched)
    # The first step sends the adapters' mask.
    assert not any(seen[i + 1].waits - seen[i].waits for i in unwatched[1:])
    without_refill = [i for i in range(15, len(parts), 16) if i % 48 != 47]
    assert [seen[i + 1].waits - seen[i].waits for i in without_refill] == [1] * 6


def raising(*_: object, **__: object) -> Tensor:
    raise RuntimeError("no kernel image is available")


def ignoring_lengths(*args: object, seqused_k: Tensor, **options: object) -> Tensor:
    return varlen_attn(*args, seqused_k=torch.full_like(seqused_k, 300), **options)


@pytest.mark.parametrize(
    ("fault", "named"),
    [(raising, "no kernel image is available"), (ignoring_lengths, "off by")],
)
def test_a_kernel_that_fails_or_errs_is_not_used_with_one_line(
    machine, steps, fault, named, tmp_path, monkeypatch
):
    requests = asked([PolicyId(1), PolicyId(2)], 6)
    with machine() as counts:
        policy = loaded(tmp_path, 2, "none")
        seen = steps(counts)
        monkeypatch.setattr(lanes_trial, "_tried", {})
        monkeypatch.setattr(varlen, "varlen_attn", fault)
        generator = LocalGenerator((STOP,), PAD, GenerationSettings())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            responses = generator.generate(policy, requests)
            assert generator.generate(policy, requests) == responses
    assert not seen
    assert [named in str(w.message) for w in caught if w.category is UserWarning] == [True]
    assert named in generator.deviations["decoding"]
    assert [len(response.ids) for response in responses] == [40] * 6


def refusing(_work: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


def forgetting(_work: Callable[[], None]) -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize(
    ("capture", "named"),
    [(None, None), (refusing, "not permitted"), (forgetting, "off by")],
    ids=["works", "refuses", "does nothing"],
)
def test_a_step_becomes_a_graph_that_is_checked_and_given_up_with_one_line(
    machine, capture, named, tmp_path, monkeypatch
):
    """Two iterates, then one: a graph for each form of the step and number of slots."""
    requests = asked([PolicyId(1), PolicyId(2)], 12) + asked([PolicyId(1)], 4, cap=70)
    captures: list[int] = []

    def counted(work: Callable[[], None]) -> Callable[[], None]:
        captures.append(1)
        return (capture or pretended)(work)

    with machine():
        pretended = step_graph.capture
        policy = loaded(tmp_path, 2, "none")
        tokens = SLOTS * max(request.total for request in requests)

        def generate(*, graphs: bool) -> tuple[list[Response], LocalGenerator]:
            settings = GenerationSettings(batch_tokens=tokens, cuda_graphs=graphs)
            generator = LocalGenerator((STOP,), PAD, settings)
            return generator.generate(policy, requests), generator

        plain, _ = generate(graphs=False)
        monkeypatch.setattr(step_graph, "_problems", [])
        monkeypatch.setattr(step_graph, "capture", counted)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, generator = generate(graphs=True)
            assert generate(graphs=True)[0] == found
    assert found == plain
    warned = [str(w.message) for w in caught if w.category is UserWarning]
    if named is None:
        assert not warned
        assert len(captures) > 2
    else:
        assert [named in line for line in warned] == [True]
        assert len(captures) == 1
        assert named in generator.deviations["cuda_graphs"]
