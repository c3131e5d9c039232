"""An iterate of self-play on paper: time and memory by phase, for 7B and 70B on several layouts.

Prints the tables of docs/scaling_on_paper.md. Nothing is measured: counts of our own passes
(`benchmarks.costs`) are divided by data sheets and by what others reached of them
(`benchmarks.published`). `--write` puts the tables into the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.costs import (
    GPU,
    Base,
    Card,
    Row,
    Time,
    decoding_step,
    reading_pass,
    training_flops,
    training_pass,
)
from benchmarks.page import Page
from benchmarks.published import (
    A100,
    GIB,
    H100,
    H100_8B,
    LLAMA_2_7B,
    REACHED,
    RTX_4090,
    RUNS,
    dpo_length,
    efficiency,
    requests_per_second,
)
from benchmarks.shapes import CONFIGS
from spin_lightning.callbacks.memory_table import LongestRow
from spin_lightning.generation.local import tokens_in_cache
from spin_lightning.packing import pass_tokens
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.memory import Adapter, ModelShape
from spin_lightning.policies.pretrained import Quantization
from spin_lightning.rows.making import SHARED_TOKENS

# A block follows its mark and ends at an empty line.
_BOTH = (True, False)  # fast and slow

# The question: 50,000 prompts, every length at its cap in configs/spin_qlora.yaml.
PAIRS = 50_000
ROW = Row(prompt=512, responses=(256, 256))
CAP = 256
_COLUMNS = ROW.prompt + CAP
_UNIT, _STEP_PAIRS = 512, 64
# Iterates of a mixture.
_MEMBERS = 4
# Bytes of CUDA's context, which is not predicted (docs/gpu.md).
_CONTEXT = GIB // 2
_REFILLED = 0.95  # slots in use while requests wait, at least (docs/performance.md)
_LORA = LoraSettings(r=64)


@dataclass(frozen=True)
class Layout:
    """Cards and what each holds.

    Attributes:
        model: Name in `CONFIGS`.
        card: The card.
        cards: Number of cards that train.
        quantization: How the base is stored.
        sharded: Whether the cards share the base's weights.
        servers: Number of vLLM servers on such cards.
        cards_of_server: Cards of a server.
    """

    model: str
    card: Card
    cards: int
    quantization: Quantization = "none"
    sharded: bool = False
    servers: int = 0
    cards_of_server: int = 1

    @property
    def name(self) -> str:
        """What a reader calls it."""
        stored = "NF4" if self.quantization == "nf4" else "bf16"
        cards = f"{self.cards} × {self.card.name}"
        name = f"{self.model} {stored}{' sharded' if self.sharded else ''}, {cards}"
        if not self.servers:
            return name
        of = f" of {self.cards_of_server}" if self.cards_of_server > 1 else ""
        return f"{name} + {self.servers} servers{of}"

    @property
    def base(self) -> Base:
        """What a card holds."""
        shape = ModelShape.of(CONFIGS[self.model])
        shards = self.cards if self.sharded else 1
        return Base(shape, Adapter.of(_LORA, shape), self.quantization, shards)

    @property
    def pairs(self) -> int:
        """Pairs of a training pass: its share of a step, or 4 on one card, as in the config."""
        return _STEP_PAIRS // self.cards if self.cards > 1 else 4

    @property
    def slots(self) -> int:
        """Rows that a card decodes at once, by the rule for `generation.batch_tokens`."""
        weights = self.base.memory.weights // self.base.shards
        memory = max(2 * GIB, self.card.memory * 3 // 4 - weights)
        return tokens_in_cache(CONFIGS[self.model], memory, element_size=2) // _COLUMNS


LAYOUTS = (
    Layout("7B", RTX_4090, 1, "nf4"),
    Layout("7B", RTX_4090, 1),
    Layout("7B", A100, 8),
    Layout("7B", A100, 8, servers=4),
    Layout("7B", H100, 8),
    Layout("7B", H100, 8, servers=4),
    Layout("70B", RTX_4090, 1, "nf4"),
    Layout("70B", A100, 8, "nf4"),
    Layout("70B", A100, 8, sharded=True),
    Layout("70B", A100, 8, sharded=True, servers=4, cards_of_server=4),
    Layout("70B", H100, 8, "nf4"),
    Layout("70B", H100, 8, sharded=True),
    Layout("70B", H100, 8, sharded=True, servers=4, cards_of_server=4),
)


class Sizes(NamedTuple):
    """Bytes on a training card."""

    weights: int
    adapter: int
    iterates: int
    training: int
    scoring: int
    decoding: int

    @property
    def peak(self) -> int:
        """The largest phase with what stays."""
        largest = max(self.training, self.scoring, self.decoding)
        return _CONTEXT + self.weights + self.adapter + self.iterates + largest


def sizes_of(layout: Layout, *, recomputed: bool = True) -> Sizes:
    """Predicted bytes of a card, with the iterates of a mixture."""
    base, row = layout.base, LongestRow(ROW.prompt, *ROW.responses)
    memory = replace(base.memory, checkpointed=recomputed)
    # Two layers are there in full, the one in use and the one that is gathered.
    gathered = 2 * 2 * base.linear // base.shape.layers if base.shards > 1 else 0
    decoded = 0 if layout.servers else layout.slots * _COLUMNS
    return Sizes(
        weights=memory.weights // base.shards + gathered,
        adapter=memory.trained("adamw_8bit"),
        iterates=_MEMBERS * 2 * base.adapter_weights,
        training=memory.training_pass(row.training_pass(layout.pairs, pass_tokens(GPU))),
        scoring=memory.scoring_pass(row.scoring_pass(GPU)),
        decoding=memory.decoding_batch(decoded),
    )


def fits(layout: Layout) -> bool:
    """Whether the prediction stays below the card's memory."""
    return sizes_of(layout).peak <= layout.card.memory


class Phase(NamedTuple):
    """Hours of a phase, and what bounds most of it."""

    hours: float
    bound: str


class Iterate(NamedTuple):
    """The phases of an iterate, one after the other."""

    generation: Phase
    scoring: Phase
    training: Phase

    @property
    def hours(self) -> float:
        """All of it."""
        return sum(phase.hours for phase in self)

    @classmethod
    def of(cls, layout: Layout, members: int, *, fast: bool) -> Iterate:
        """One response per prompt, its scores, and one epoch.

        Args:
            layout: The cards.
            members: Iterates that are opponents and that the reference consists of.
            fast: Which of the assumptions.
        """
        return cls(
            generation(layout, members, fast=fast),
            scoring(layout, members, fast=fast),
            training(layout, fast=fast),
        )


def generation(layout: Layout, opponents: int, *, fast: bool) -> Phase:
    """Writing one response of full length per prompt."""
    if layout.servers:
        rates = requests_per_second(layout.model, layout.card, ROW.prompt, CAP)
        return Phase(_hours(PAIRS / (layout.servers * rates[fast])), "servers")
    units = math.ceil(math.ceil(PAIRS / _UNIT) / layout.cards)
    # Rows that all end at the cap go round by round; else the next ones take slots that are free.
    rounds: float = math.ceil(_UNIT / layout.slots)
    if fast:
        rounds = min(rounds, _UNIT / (layout.slots * _REFILLED))
    step = step_of(layout, opponents, fast=fast)
    written = units * CAP * rounds * step.seconds
    prompts = SHARED_TOKENS // ROW.prompt
    of = efficiency(layout.card, fast=fast)
    read = reading_pass(layout.base, layout.card, of, [Row(ROW.prompt, ())] * prompts, prompts)
    reading = units * _UNIT / prompts * read.seconds
    return Phase(_hours(written + reading), step.bound if written > reading else read.bound)


def step_of(layout: Layout, opponents: int, *, fast: bool) -> Time:
    """A decoding step with all slots in use, half-way through the responses."""
    of, context = efficiency(layout.card, fast=fast), ROW.prompt + CAP / 2
    return decoding_step(layout.base, layout.card, of, layout.slots, context, opponents)


def scoring(layout: Layout, members: int, *, fast: bool) -> Phase:
    """Both responses under the newest iterate, and new ones under the older iterates.

    An older iterate's score of the real response is known.
    """
    of = efficiency(layout.card, fast=fast)
    passes = []
    for row, count in ((ROW, 1), (Row(ROW.prompt, (CAP,)), members - 1)):
        rows = SHARED_TOKENS // row.tokens
        scored = rows * sum(row.responses)
        time = reading_pass(layout.base, layout.card, of, [row] * rows, scored)
        passes.append((count * PAIRS / layout.cards / rows * time.seconds, time.bound))
    return Phase(_hours(sum(seconds for seconds, _ in passes)), max(passes)[1])


def training(layout: Layout, *, fast: bool) -> Phase:
    """One epoch."""
    of = efficiency(layout.card, fast=fast)
    step = training_pass(layout.base, layout.card, of, ROW, layout.pairs, layout.cards)
    return Phase(_hours(PAIRS / layout.cards / layout.pairs * step.seconds), step.bound)


def _hours(seconds: float) -> float:
    return seconds / 3600


def time_table() -> str:
    """Hours by phase."""
    rows = []
    for layout in LAYOUTS:
        if not fits(layout):
            rows.append([layout.name, "does not fit", *["–"] * 6])
            continue
        spin = [Iterate.of(layout, 1, fast=fast) for fast in _BOTH]
        four = [Iterate.of(layout, _MEMBERS, fast=fast) for fast in _BOTH]
        columns = (
            [one.generation.hours for one in spin],
            [one.generation.hours for one in four],
            [one.scoring.hours for one in spin],
            [one.scoring.hours for one in four],
            [one.training.hours for one in spin],
            [one.hours for one in spin],
            [one.hours for one in four],
        )
        rows.append([layout.name, *map(value_range, columns)])
    head = "layout|generation|of 4|scoring|of 4|training|iterate of SPIN|of a mixture of 4"
    return table_of(head, rows)


def bound_table() -> str:
    """A decoding step by its parts, and the bounds of the phases."""
    rows = []
    for layout in LAYOUTS:
        if layout.servers or not fits(layout):
            continue
        steps = [step_of(layout, 1, fast=fast) for fast in _BOTH]
        parts = [value_range([1e3 * part for part in both]) for both in zip(*steps, strict=True)]
        phases = zip(*(Iterate.of(layout, 1, fast=fast) for fast in _BOTH), strict=True)
        bounds = [" or ".join(dict.fromkeys(phase.bound for phase in both)) for both in phases]
        speed = value_range([decoded_per_second(layout, fast=fast) for fast in _BOTH])
        rows.append([layout.name, str(layout.slots), *parts, speed, *bounds])
    head = "layout|rows|launches|weights|products|keys, values|network|tokens/s"
    return table_of(f"{head}|generation|scoring|training", rows)


def decoded_per_second(layout: Layout, *, fast: bool) -> float:
    """Response tokens per second of a card, the reading of prompts included."""
    return PAIRS * CAP / (generation(layout, 1, fast=fast).hours * 3600 * layout.cards)


def memory_table() -> str:
    """GiB by phase. H100s have the memory of A100s; with servers, keys and values are there."""
    rows = []
    for layout in LAYOUTS:
        if layout.servers or layout.card == H100:
            continue
        sizes = sizes_of(layout)
        numbers = (*sizes, sizes.peak, layout.card.memory)
        name = layout.name.replace(A100.name, "80 GB")
        rows.append([name, *(f"{size / GIB:.1f}" for size in numbers)])
    head = "layout|weights|adapter, optimizer|4 iterates|training pass|scoring pass|keys, values"
    return table_of(f"{head}|peak|card", rows)


def server_table() -> str:
    """What servers add to SPIN."""
    rows = []
    for layout in LAYOUTS:
        if not layout.servers:
            continue
        own = replace(layout, servers=0)
        with_servers, alone = (
            [Iterate.of(one, 1, fast=fast) for fast in _BOTH] for one in (layout, own)
        )
        cards = layout.servers * layout.cards_of_server
        fewer = layout.cards / (layout.cards + cards)
        rates = requests_per_second(layout.model, layout.card, ROW.prompt, CAP)
        busy = sorted(round(100 * one.generation.hours / one.hours) for one in with_servers)
        all_train = "–" if layout.sharded else value_range([one.hours * fewer for one in alone])
        rows.append(
            [
                layout.name,
                str(cards),
                value_range(rates),
                f"{busy[0]}–{busy[1]} %",
                value_range([one.hours for one in with_servers]),
                value_range([one.hours for one in alone]),
                all_train,
            ]
        )
    head = "layout|cards of servers|requests per second and server|servers busy"
    return table_of(f"{head}|iterate|without servers|all cards train", rows)


def run_table() -> str:
    """Published runs as shares of the cards' operations per second."""
    rows = [
        [
            run.name,
            f"{run.seconds:g}",
            f"{run.reached:.2f}",
            "{:.2f}–{:.2f}".format(*REACHED[run.card]),
        ]
        for run in RUNS
    ]
    return table_of("published|seconds|share reached|assumed here", rows)


def notes() -> str:
    """Numbers beside published ones, as a list."""
    a100, h100 = Layout("7B", A100, 8), Layout("7B", H100, 8)
    ours = [
        value_range([decoded_per_second(layout, fast=fast) for fast in _BOTH])
        for layout in (a100, h100)
    ]
    vllm = [_rounded(LLAMA_2_7B.written), _rounded(H100_8B)]
    shard = value_range([800 / rate for rate in requests_per_second("7B", H100, ROW.prompt, CAP)])
    lengths = value_range([dpo_length(a100.base.shape, A100, fast=fast) for fast in _BOTH])
    rows, scored = [ROW] * a100.pairs, a100.pairs * sum(ROW.responses)
    kept, again = (
        training_flops(a100.base, rows, scored, recomputed=recomputed)
        for recomputed in (False, True)
    )
    peak = sizes_of(a100, recomputed=False).peak / GIB
    return f"""\
- Tokens per second that a card writes, 7B in bf16: A100 {ours[0]} here, {vllm[0]} by vLLM [5]; H100
  {ours[1]} here, {vllm[1]} by vLLM [8]; those without adapters, their prompts about half as long.
- 800 responses take one H100 server {shard} s here. SPIN's script took 90 s with vLLM, its start
  included, and 1,200 s with `generate`, on an unnamed number of H100s [9].
- TRL's DPO with QLoRA, 8.0 pairs per second on 8 unnamed cards [10], has the speed assumed for
  A100s if its padded sequences have {lengths} tokens; its limit is 1,024.
- 7B in bf16, `activation_checkpointing: false`, 8 pairs a pass: {peak:.0f} GiB,
  {kept / again:.2f} of the operations of a training pass."""


def table_of(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the names of its columns are separated by `|`."""
    names = head.split("|")
    lines = [" | ".join(row) for row in (names, *rows)]
    return "\n".join(
        [f"| {lines[0]} |", "|---" * len(names) + "|", *(f"| {x} |" for x in lines[1:])]
    )


def value_range(values: Sequence[float]) -> str:
    """The smallest to the largest value, in two significant digits."""
    shown = [_rounded(value) for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]}–{shown[-1]}"


def _rounded(value: float) -> str:
    """Two significant digits."""
    if not value:
        return "–"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


PAGE = Page(
    Path("docs/scaling_on_paper.md"),
    "python -m benchmarks.scaling",
    {
        "time": time_table,
        "bounds": bound_table,
        "memory": memory_table,
        "servers": server_table,
        "runs": run_table,
        "notes": notes,
    },
)

if __name__ == "__main__":
    PAGE.main(__doc__)
