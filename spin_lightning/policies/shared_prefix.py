"""A forward pass that computes each prompt once, whatever the number of its responses.

The tokens of a whole batch lie in one row without padding. All of a transformer except its
attention works token by token and needs no change. The attention is replaced by one that goes
prompt by prompt, so that nothing is computed that a mask would discard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from spin_lightning.errors import SettingError
from spin_lightning.logps import head_logps, sum_by_response
from spin_lightning.packing import positions, predictors, split_for
from spin_lightning.policies import flex_trial
from spin_lightning.policies.flex_attention import Scores, dense_attention
from spin_lightning.policies.layout import Alike, Layout, Varlen
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

    alike = prompt_layout.alike
    if alike is not None:
        return _by_shape(query, key, value, alike, attend), None
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


def _by_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alike: Alike,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention of all pieces, those of one shape as a batch, shape [1, tokens, heads, size]."""
    # (The gradient of `x[0]` would be a copy.)
    q, k, v = (
        x.squeeze(0).transpose(0, 1).index_select(0, index)
        for x, index in ((query, alike.queries), (key, alike.keys), (value, alike.keys))
    )
    queries = [pieces * length for pieces, length, _ in alike.shapes]
    keys = [pieces * length for pieces, _, length in alike.shapes]
    groups = zip(q.split(queries), k.split(keys), v.split(keys), alike.shapes, strict=True)
    attended = [
        attend(*(x.unflatten(0, (pieces, -1)).transpose(1, 2) for x in parts))
        .transpose(1, 2)
        .flatten(0, 1)
        for *parts, (pieces, _, _) in groups
    ]
    return torch.cat(attended).index_select(0, alike.back)[None]


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
