"""Operations, bytes and launches of an iterate's phases, and the time a card needs for them.

It is arithmetic on shapes: nothing runs. `benchmarks.scaling` applies it to whole layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spin_lightning.policies.memory import Adapter, Memory, ModelShape
from spin_lightning.policies.pretrained import Quantization

GPU = torch.device("cuda", 0)
BF16 = 2  # bytes
_FLOAT32 = 4
# Counted on the pretend device for NF4 (docs/gpu.md): launches per layer of a checkpointed training
# pass, and of a decoding step of 32 layers by the number of adapters, one or more.
_TRAINING_LAUNCHES = 166
_DECODING_LAUNCHES = {"one": 1366, "more": 1590}
_COUNTED_LAYERS = 32
# Forward passes' worth of attention in its backward pass: five products instead of two.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Card:
    """A data sheet.

    Attributes:
        name: Name.
        memory: Bytes.
        bandwidth: Bytes per second from its memory.
        flops: Dense bfloat16 operations per second, summed in float32.
        link: Bytes per second to the other cards of the machine, one direction.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float


@dataclass(frozen=True)
class Efficiency:
    """What is reached of a data sheet, in the slow or in the fast case.

    Attributes:
        flops: Share of the card's operations per second.
        bandwidth: Share of its memory's bandwidth.
        link: Share of its link.
        launch: Seconds per launch.
        replay: Seconds per launch in a decoding step, which may be a CUDA graph.
        nf4: Bytes moved per NF4 weight in a decoding step.
    """

    flops: float
    bandwidth: float
    link: float
    launch: float
    replay: float
    nf4: float


@dataclass(frozen=True)
class Base:
    """A frozen base with adapters, as one card holds it.

    Attributes:
        shape: The model.
        adapter: An adapter of it; the trained one and every iterate have this size.
        quantization: How the base is stored.
        shards: Number of cards that share the base's weights.
    """

    shape: ModelShape
    adapter: Adapter
    quantization: Quantization = "none"
    shards: int = 1

    @property
    def memory(self) -> Memory:
        """The prediction of a run's memory, with recomputed activations."""
        return Memory(self.shape, self.adapter, torch.bfloat16, GPU, self.quantization, True)

    @property
    def linear(self) -> int:
        """Weights of the linear layers, without embeddings and head."""
        return self.shape.layers * sum(n * m for n, m in self.shape.linear_layers.values())

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.shape.vocabulary * self.shape.width

    @property
    def adapter_weights(self) -> int:
        """Weights of an adapter."""
        return self.adapter.weights(self.shape)

    @property
    def gathered(self) -> float:
        """Bytes that a card receives to see the whole base once."""
        return self.memory.weights * (self.shards - 1) / self.shards


class Row(NamedTuple):
    """Lengths of a prompt with its responses, in tokens."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.prompt + sum(self.responses)

    @property
    def seen(self) -> float:
        """Pairs of a token and one that it attends to."""
        own = self.prompt**2 / 2
        return own + sum(n * (self.prompt + n / 2) for n in self.responses)


class Time(NamedTuple):
    """Seconds that parts of a pass or a step need; they add up as `seconds` says.

    Attributes:
        launches: Launches, by the host.
        weights: Reading weights, while `products` go on.
        products: Operations.
        keys: Reading keys and values.
        network: Receiving from other cards.
    """

    launches: float
    weights: float
    products: float
    keys: float = 0.0
    network: float = 0.0

    @property
    def seconds(self) -> float:
        """The longest of the host, the network and the card."""
        return max(self.launches, self.network, max(self.weights, self.products) + self.keys)

    @property
    def bound(self) -> str:
        """What to speed up first."""
        if self.seconds == self.launches:
            return "launches"
        if self.seconds == self.network:
            return "network"
        read = self.keys + (self.weights if self.weights > self.products else 0.0)
        return "memory bandwidth" if read > self.seconds / 2 else "compute"


def forward_flops(base: Base, rows: Sequence[Row], scored: int) -> float:
    """Operations of a forward pass.

    Args:
        base: The base, with one adapter.
        rows: Prompts with their responses.
        scored: Tokens that the head reads.
    """
    tokens = sum(row.tokens for row in rows)
    products = 2 * (base.linear + base.adapter_weights) * tokens + 2 * base.head * scored
    return products + _attention_flops(base, rows)


def training_flops(
    base: Base, rows: Sequence[Row], scored: int, *, recomputed: bool = True
) -> float:
    """Operations of a training pass.

    Frozen layers multiply in the forward pass, in the recomputation if there is one, and for the
    gradient of their input; adapters once more for the gradient of their weights. The head
    multiplies twice.
    """
    tokens, forward = sum(row.tokens for row in rows), 2 if recomputed else 1
    frozen = (forward + 1) * 2 * base.linear * tokens
    adapters = (forward + 2) * 2 * base.adapter_weights * tokens
    attention = (forward + _ATTENTION_BACKWARD) * _attention_flops(base, rows)
    return frozen + adapters + 2 * 2 * base.head * scored + attention


def _attention_flops(base: Base, rows: Sequence[Row]) -> float:
    return 4 * base.shape.layers * base.shape.queries * sum(row.seen for row in rows)


def training_pass(base: Base, card: Card, of: Efficiency, row: Row, pairs: int, cards: int) -> Time:
    """One optimizer step of some pairs per card, in one pass.

    Adapters' gradients are summed over the cards. A sharded base is gathered twice, before the
    forward and before the backward pass.
    """
    flops = training_flops(base, [row] * pairs, sum(row.responses) * pairs)
    summed = 2 * (cards - 1) / cards * base.adapter_weights * _FLOAT32
    received = 2 * base.gathered + summed
    return _pass(base, card, of, flops, reads=3, received=received)


def reading_pass(base: Base, card: Card, of: Efficiency, rows: Sequence[Row], scored: int) -> Time:
    """A forward pass without gradients: scoring, or reading prompts.

    Its launches were not counted; it is charged with those of a training pass, which has more.
    """
    flops = forward_flops(base, rows, scored)
    return _pass(base, card, of, flops, reads=1, received=base.gathered)


def _pass(
    base: Base, card: Card, of: Efficiency, flops: float, *, reads: int, received: float
) -> Time:
    # Weights in NF4 are de-quantized for every product: read, written, read again.
    stored = base.memory.weights + (2 * BF16 * base.linear if base.quantization == "nf4" else 0)
    return Time(
        launches=_TRAINING_LAUNCHES * base.shape.layers * of.launch,
        weights=reads * stored / (card.bandwidth * of.bandwidth),
        products=flops / (card.flops * of.flops),
        network=received / (card.link * of.link) if received else 0.0,
    )


def decoding_step(
    base: Base, card: Card, of: Efficiency, slots: int, context: float, adapters: int
) -> Time:
    """One token in each slot.

    Args:
        base: The base.
        card: The card.
        of: What is reached of it.
        slots: Rows that are decoded at once.
        context: Tokens that a row attends to, on average.
        adapters: Different opponents in the batch. Each row multiplies with all of them, as it
            does below 64 rows an adapter.
    """
    counted = _DECODING_LAUNCHES["one" if adapters == 1 else "more"]
    # A graph cannot hold the gathering of a sharded base.
    launch = of.launch if base.shards > 1 else of.replay
    of_weight = of.nf4 if base.quantization == "nf4" else BF16
    adapted = adapters * base.adapter_weights
    read = of_weight * base.linear + BF16 * (base.head + adapted)
    attended = 4 * base.shape.layers * base.shape.queries * context
    flops = slots * (2 * (base.linear + base.head + adapted) + attended)
    speed = card.bandwidth * of.bandwidth
    return Time(
        launches=counted * base.shape.layers / _COUNTED_LAYERS * launch,
        weights=read / speed,
        products=flops / (card.flops * of.flops),
        keys=base.memory.decoding_batch(round(slots * context)) / speed,
        network=base.gathered / (card.link * of.link) if base.shards > 1 else 0.0,
    )
