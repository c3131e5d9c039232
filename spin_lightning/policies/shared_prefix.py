"""A forward pass that computes each prompt once, whatever the number of its responses.

The tokens of a whole batch lie in one row without padding. All of a transformer except its
attention works token by token and needs no change. The attention is replaced by one that goes
prompt by prompt, so that nothing is computed that a mask would discard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from spin_lightning.errors import SettingError
from spin_lightning.logps import head_logps, sum_by_response
from spin_lightning.packing import positions, predictors, split_for
from spin_lightning.policies import flex_attention, flex_trial
from spin_lightning.policies.flex_attention import Scores, dense_attention
from spin_lightning.policies.pretrained import FrozenBase, load_config
from spin_lightning.policies.varlen import has_varlen, varlen_attention
from spin_lightning.types import PromptBatch

Packing = Literal["auto", "shared", "padded"]

# Model types whose attention is softmax(q k' / s) v under a causal mask or a sliding window, and
# whose logits are those of the head, soft-capped or not. The tests compare each with its padded
# pass.
ARCHITECTURES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"}
)
_NAME = "spin_lightning_shared_prefix"


def shares_prefixes(base: FrozenBase, packing: Packing) -> bool:
    """Whether a base runs with shared prefixes; reads its config only.

    Raises:
        SettingError: `packing` is shared, and the architecture is not a tested one.
    """
    model_type = load_config(base).model_type
    if packing == "shared" and model_type not in ARCHITECTURES:
        raise SettingError(
            "packing",
            packing,
            f"shared prefixes are not tested with model type {model_type!r}, only with "
            + ", ".join(sorted(ARCHITECTURES)),
            fix="set packing: auto or padded",
        )
    return packing != "padded" and model_type in ARCHITECTURES


def prompt_logps(model: Any, batch: PromptBatch) -> Tensor:
    """log p(y|x) of every response of a batch, exact.

    Args:
        model: A causal language model of `ARCHITECTURES`, with or without adapters in its layers.
        batch: Prompts and responses on the model's device.

    Returns:
        Nats, float64, in the order of the responses, with gradient where the model has it.
    """
    passes = split_for(batch.input_ids.device, batch)
    return torch.cat([_logps_of_row(model, one) for one in passes])


def _logps_of_row(model: Any, batch: PromptBatch) -> Tensor:
    """`prompt_logps` with all prompts in one row."""
    return logps_of_states(
        model.get_output_embeddings(),
        predicting_states(model, batch),
        batch,
        getattr(model.config, "final_logit_softcapping", None),
    )


def logps_of_states(
    head: nn.Module, states: Tensor, batch: PromptBatch, softcap: float | None
) -> Tensor:
    """log p(y|x) of every response from `predicting_states`, see `head_logps`."""
    targets = batch.input_ids[predictors(batch)[1].to(states.device)]
    return sum_by_response(head_logps(head, states, targets, softcap), batch.flat_lengths)


def predicting_states(model: Any, batch: PromptBatch) -> Tensor:
    """Hidden states that predict the response tokens, shape [response tokens, width].

    Args:
        model: As for `prompt_logps`.
        batch: Prompts and responses, in one row, on the model's device.
    """
    backbone, device = model.base_model, batch.input_ids.device
    with attending(model.config, _NAME):
        hidden = backbone(
            input_ids=batch.input_ids[None],
            position_ids=positions(batch).to(device)[None],
            # With a mask of four dimensions, transformers does not build one.
            attention_mask=batch.input_ids.new_empty(1, 1, 1, 1),
            use_cache=False,
            prompt_layout=Layout(batch),
        ).last_hidden_state[0]
    states: Tensor = hidden.index_select(0, predictors(batch)[0].to(device))
    return states


@contextmanager
def attending(config: PretrainedConfig, implementation: str) -> Iterator[None]:
    """Use the named implementation of a model's attention inside the block."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def recomputing_alike(
    config: PretrainedConfig,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Contexts of a checkpointed layer, so that the attention of both passes is the same."""
    return lambda: (nullcontext(), attending(config, config._attn_implementation))


@dataclass(frozen=True)
class Varlen:
    """The pieces of a row in the form of kernels for sequences of unequal length.

    Attributes:
        keys: Tokens that each piece attends to, piece by piece, int64, shape [keys]; a prompt is
            repeated before each further response.
        query_starts: Start of each piece in the row, and the row's end, int32, shape [pieces + 1].
        key_starts: Start of each piece in `keys`, likewise.
        most_queries: Length of the longest piece.
        most_keys: Largest number of keys of a piece.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int


@dataclass
class Layout:
    """Where prompts and responses lie in a row, with the derived inputs of the kernels.

    Attributes:
        batch: The prompts and responses.
        masks: Cached masks by number of queries, number of keys and window.
        block_masks: Cached masks of the whole row by window.
    """

    batch: PromptBatch
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @property
    def pieces(self) -> list[int]:
        """Lengths of [prompt and first response], [second response], … of every prompt."""
        groups = zip(self.batch.prompt_lengths, self.batch.response_lengths, strict=True)
        return [n for prompt, (first, *others) in groups for n in (prompt + first, *others)]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Whether a query, at one of the last positions, sees a key, bool, [queries, keys]."""
        shape = queries, keys, window
        if shape not in self.masks:
            offset = keys - queries
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
            self.masks[shape] = mask if window is None else mask.triu(offset - window + 1)
        return self.masks[shape]

    def block_mask(self, window: int | None) -> BlockMask:
        """Which tokens of the row see which, for FlexAttention; the same for all layers."""
        batch = self.batch
        if window not in self.block_masks:
            seen = flex_attention.seen_keys(batch.prompt_lengths, batch.response_lengths, window)
            self.block_masks[window] = flex_attention.block_mask(seen, batch.input_ids.device)
        return self.block_masks[window]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its responses."""
        groups = zip(self.batch.prompt_lengths, self.batch.response_lengths, strict=True)
        return max(prompt + max(responses) for prompt, responses in groups)

    @cached_property
    def varlen(self) -> Varlen:
        """All pieces of the batch at once, on the device of its ids."""
        lengths, keys, start = self.pieces, list[Tensor](), 0
        for prompt, (first, *others) in zip(
            self.batch.prompt_lengths, self.batch.response_lengths, strict=True
        ):
            shared, end = torch.arange(start, start + prompt), start + prompt + first
            keys.append(torch.arange(start, end))
            for n in others:
                keys.append(torch.cat([shared, torch.arange(end, end + n)]))
                end += n
            start = end
        counts = [len(piece) for piece in keys]
        device = self.batch.input_ids.device
        query_starts, key_starts = (
            torch.tensor([0, *accumulate(numbers)], dtype=torch.int32, device=device)
            for numbers in (lengths, counts)
        )
        index = torch.cat(keys).to(device)
        return Varlen(index, query_starts, key_starts, max(lengths), max(counts))


@torch.compiler.disable
def _shared_prefix_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    prompt_layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each response over its prompt and itself.

    A prompt and its first response are an ordinary causal sequence; each further response attends
    to the prompt's keys and its own.

    Args:
        query: Shape [1, heads, tokens, head size].
        key: Shape [1, key heads, tokens, head size].
        value: Likewise.
        prompt_layout: Where prompts and responses lie.
        scaling: Factor of the attention scores.
        sliding_window: Number of positions that a query sees, including its own.
        softcap: Bound of the attention scores.

    Returns:
        Shape [1, tokens, heads, head size], and None in place of attention weights.
    """
    if softcap is None and has_varlen(query.device, query.dtype, query.shape[-1]):
        return _varlen_attention(query, key, value, prompt_layout.varlen, scaling, sliding_window)
    scores = Scores(scaling, softcap)
    tiling = flex_trial.tiling_of(query, key, scores)
    if tiling is not None:
        # A window as wide as every row needs no mask of its own.
        hides = sliding_window is not None and sliding_window < prompt_layout.longest
        mask = prompt_layout.block_mask(sliding_window if hides else None)
        whole = flex_trial.attended(query, key, value, mask, scores, tiling)
        if whole is not None:
            return whole.transpose(1, 2), None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = sliding_window if sliding_window and sliding_window < k.shape[2] else None
        plain = window is None and q.shape[2] == k.shape[2]
        mask = prompt_layout.mask(q.shape[2], k.shape[2], window, q.device)
        if softcap is not None:
            return dense_attention(q, k, v, mask, scores)
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if plain else mask,
            is_causal=plain,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    # The gradient of one split is one concatenation; each slice would cost a whole row of zeros.
    parts = zip(*(x.split(prompt_layout.pieces, dim=2) for x in (query, key, value)), strict=True)
    batch, attended = prompt_layout.batch, []
    for prompt, (_first, *others) in zip(batch.prompt_lengths, batch.response_lengths, strict=True):
        q, k, v = next(parts)
        attended.append(attend(q, k, v).transpose(1, 2))
        for _other in others:
            q, own_k, own_v = next(parts)
            keys = torch.cat([k[:, :, :prompt], own_k], dim=2)
            values = torch.cat([v[:, :, :prompt], own_v], dim=2)
            attended.append(attend(q, keys, values).transpose(1, 2))
    return torch.cat(attended, dim=1), None


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Varlen,
    scaling: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, None]:
    """All pieces in one call."""
    # (The gradient of `x[0]` would be a copy.)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    attended = varlen_attention(
        q,
        k.index_select(0, layout.keys),
        v.index_select(0, layout.keys),
        (layout.query_starts, layout.key_starts),
        (layout.most_queries, layout.most_keys),
        scaling,
        sliding_window,
    )
    return attended[None], None


AttentionInterface.register(_NAME, _shared_prefix_attention)
