"""Memory and time of an iterate by model size, on one card: the tables of docs/model_sizes.md.

Nothing is measured: the formulas are those of `benchmarks.scaling`. `--write` puts the tables into
the page.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.costs import Card
from benchmarks.page import Page
from benchmarks.published import GIB, H100, RTX_4090
from benchmarks.scaling import PAIRS, Iterate, Layout, sizes_of, table_of, value_range
from benchmarks.shapes import MODELS
from spin_lightning.generation.local import tokens_in_cache
from spin_lightning.policies.pretrained import Quantization

# Only the memory of the first one counts.
CARDS = {8: replace(RTX_4090, memory=8 * GIB), 24: RTX_4090, 80: H100}
_STORED: dict[Quantization, str] = {"none": "bf16", "nf4": "NF4"}
_FAST_AND_SLOW = (True, False)
_USABLE = 0.95  # of a card; the rest is fragmentation
# Keys and values that decoding gets on the smallest card.
_LEAST_CACHE = 2 * GIB


def needed(layout: Layout) -> float:
    """GiB that the layout's model needs on any card: the largest phase, and what stays."""
    tokens = tokens_in_cache(MODELS[layout.model], _LEAST_CACHE, element_size=2)
    decoding = layout.base.memory.decoding_batch(tokens)
    return sizes_of(layout)._replace(decoding=decoding).peak / GIB


def memory_table() -> str:
    """What a model needs, and which cards have it."""
    rows = []
    for model in MODELS:
        layouts = {kind: Layout(model, RTX_4090, 1, kind) for kind in _STORED}
        weights = [sizes_of(layout).weights / GIB for layout in layouts.values()]
        need = [needed(layout) for layout in layouts.values()]
        on = [card_of(model, CARDS[gib]) for gib in CARDS]
        numbers = [f"{value:.1f}" for pair in zip(weights, need, strict=True) for value in pair]
        rows.append([model, *numbers, *on])
    head = "model|bf16: weights|bf16: needs|NF4: weights|NF4: needs"
    return table_of("|".join([head, *(f"{gib} GB" for gib in CARDS)]), rows)


def card_of(model: str, card: Card) -> str:
    """How a model fits on a card, in bfloat16 if it can."""
    for kind, name in _STORED.items():
        if needed(Layout(model, card, 1, kind)) * GIB <= _USABLE * card.memory:
            return name
    return "no"


def time_table() -> str:
    """Minutes for a thousand prompts on one card."""
    rows = []
    for model in MODELS:
        row = [model]
        for card in (RTX_4090, H100):
            stored = card_of(model, card)
            if stored == "no":
                row += ["–", "–"]
                continue
            layout = Layout(model, card, 1, "nf4" if stored == "NF4" else "none")
            hours = [Iterate.of(layout, 1, fast=fast).hours for fast in _FAST_AND_SLOW]
            row += [stored, value_range([60 * 1000 / PAIRS * value for value in hours])]
        rows.append(row)
    return table_of("model|RTX 4090|minutes|H100|minutes", rows)


PAGE = Page(
    Path("docs/model_sizes.md"),
    "python -m benchmarks.sizes",
    {"memory": memory_table, "time": time_table},
)

if __name__ == "__main__":
    PAGE.main(__doc__)
