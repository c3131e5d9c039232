"""A forward pass over prompts that are there once, whatever the number of their responses.

The tokens of a whole batch lie in one row without padding. Everything in a transformer but the
attention works token by token and does not notice; the attention is replaced by one that goes
prompt by prompt, so that nothing is computed which the mask would throw away.
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
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from spin_lightning.errors import SettingError
from spin_lightning.logps import head_logps, sum_by_response
from spin_lightning.packing import positions, predictors, split_prompts
from spin_lightning.policies.pretrained import FrozenBase, load_config
from spin_lightning.types import PromptBatch

Packing = Literal["auto", "shared", "padded"]

# Model types whose attention is softmax(q k' / s) v under a causal mask or a window, and whose
# logits are the head's, soft-capped or not. Each is compared with its padded pass in the tests.
ARCHITECTURES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"}
)
_NAME = "spin_lightning_shared_prefix"
# Tokens of a row on a CPU: what lives within a pass alone stays small, whatever the batch. From
# some 8000 tokens on the activations of even a small model exceed what glibc's allocator keeps
# (32 MiB): each is fetched anew from the system, page by page, which took a third of a step.
_CPU_TOKENS = 1024


def shares_prefixes(base: FrozenBase, packing: Packing) -> bool:
    """Whether a base is run with shared prefixes, from its config alone.

    Raises:
        SettingError: It is asked for, and the architecture is none of those it is known to be
            right for.
    """
    model_type = load_config(base).model_type
    if packing == "shared" and model_type not in ARCHITECTURES:
        raise SettingError(
            "packing",
            packing,
            f"shared prefixes are not known to be right for model type {model_type!r}, only for "
            + ", ".join(sorted(ARCHITECTURES)),
            fix="set packing: auto or padded",
        )
    return packing != "padded" and model_type in ARCHITECTURES


def prompt_logps(model: Any, batch: PromptBatch) -> Tensor:
    """log p(y|x) of every response of a batch, exact.

    Args:
        model: A causal language model of `ARCHITECTURES`, with adapters in its layers or not.
        batch: Prompts and responses on the model's device.

    Returns:
        Nats, float64, in the order of the responses, with gradient where the model has it.
    """
    on_cpu = batch.input_ids.device.type == "cpu"
    pieces = split_prompts(batch, _CPU_TOKENS) if on_cpu else [batch]
    return torch.cat([_logps_of_row(model, piece) for piece in pieces])


def _logps_of_row(model: Any, batch: PromptBatch) -> Tensor:
    """The same, all prompts in one row."""
    backbone, device = model.base_model, batch.input_ids.device
    predicting, predicted = (index.to(device) for index in predictors(batch))
    with attending(model.config, _NAME):
        hidden = backbone(
            input_ids=batch.input_ids[None],
            position_ids=positions(batch).to(device)[None],
            # A mask of four dimensions is handed through, and no other is built.
            attention_mask=batch.input_ids.new_empty(1, 1, 1, 1),
            use_cache=False,
            prompt_layout=Layout(batch),
        ).last_hidden_state[0]
    token_logps = head_logps(
        model.get_output_embeddings(),
        hidden.index_select(0, predicting),
        batch.input_ids[predicted],
        getattr(model.config, "final_logit_softcapping", None),
    )
    return sum_by_response(token_logps, batch.flat_lengths)


@contextmanager
def attending(config: PretrainedConfig, implementation: str) -> Iterator[None]:
    """Run a model's attention by the named implementation inside the block."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def recomputing_alike(
    config: PretrainedConfig,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Contexts of a checkpointed layer: recompute it with the attention it was computed with."""
    return lambda: (nullcontext(), attending(config, config._attn_implementation))


@dataclass(frozen=True)
class Varlen:
    """The pieces of a row as kernels for sequences of unequal length take them.

    Attributes:
        keys: Which tokens each piece attends to, piece by piece; a prompt comes again before each
            further response. int64, shape [keys].
        query_starts: Where each piece begins in the row, and its end; int32, shape [pieces + 1].
        key_starts: Where each piece begins in `keys`, likewise.
        most_queries: Length of the longest piece.
        most_keys: Most keys of a piece.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int


@dataclass
class Layout:
    """Where prompts and responses lie in a row, and what was made of it for the kernels.

    Attributes:
        batch: The prompts.
        masks: Mask by number of queries, number of keys and window.
    """

    batch: PromptBatch
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @property
    def pieces(self) -> list[int]:
        """Lengths of [prompt and first response], [second response], … of every prompt."""
        groups = zip(self.batch.prompt_lengths, self.batch.response_lengths, strict=True)
        return [n for prompt, (first, *others) in groups for n in (prompt + first, *others)]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """True where a query, one of the last positions, sees a key, bool, [queries, keys]."""
        name = queries, keys, window
        if name not in self.masks:
            offset = keys - queries
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
            self.masks[name] = mask if window is None else mask.triu(offset - window + 1)
        return self.masks[name]

    @cached_property
    def varlen(self) -> Varlen:
        """The same, all pieces of the batch at once, where its ids lie."""
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

    The prompt and its first response are an ordinary causal sequence; every further response
    attends to the prompt's keys and its own.

    Args:
        query: Shape [1, heads, tokens, head size].
        key: Shape [1, key heads, tokens, head size].
        value: Likewise.
        prompt_layout: Where prompts and responses lie.
        scaling: Factor of the scores.
        sliding_window: How many positions a query sees, itself included.
        softcap: Bound of the scores.

    Returns:
        Shape [1, tokens, heads, head size], and no weights.
    """
    if softcap is None and _has_varlen(query):
        return _varlen_attention(query, key, value, prompt_layout.varlen, scaling, sliding_window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = sliding_window if sliding_window and sliding_window < k.shape[2] else None
        plain = window is None and q.shape[2] == k.shape[2]
        mask = prompt_layout.mask(q.shape[2], k.shape[2], window, q.device)
        if softcap is not None:
            return _softcapped(q, k, v, mask, scaling, softcap)
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if plain else mask,
            is_causal=plain,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    # One split, whose gradient is one concatenation: slices would each cost a whole row of zeros.
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


def _has_varlen(query: Tensor) -> bool:
    """Whether torch's kernel for sequences of unequal length takes these queries."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Varlen,
    scaling: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, None]:
    """All pieces in one call; the last query of a piece is aligned with its last key."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    attended: Any = varlen_attn(
        q,
        k.index_select(0, layout.keys),
        v.index_select(0, layout.keys),
        layout.query_starts,
        layout.key_starts,
        layout.most_queries,
        layout.most_keys,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended[None], None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, cap: float
) -> Tensor:
    """Attention with bounded scores, which no fused kernel of torch has."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = cap * torch.tanh(query @ key.transpose(2, 3) * scale / cap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


AttentionInterface.register(_NAME, _shared_prefix_attention)
