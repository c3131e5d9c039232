"""Merging an adapter into its base, and comparing the result with the iterate itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spin_lightning.errors import RunFolderError, first_line
from spin_lightning.policies.loading import load_with_adapter, quiet_peft, read_base
from spin_lightning.policies.pretrained import FrozenBase, load_config

# Accepted difference of the logits, relative to the iterate's, both as root mean squares: the
# largest of many differences depends on the processor's rounding. Merging rounds the sum of weight
# and adapter to the base's type; int8 layers also quantize activations, merged ones do not.
_BOUND = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_BOUND_OF_INT8 = 1e-1
_SEQUENCES, _TOKENS = 4, 12


@dataclass(frozen=True)
class Comparison:
    """How far a merged model is from the iterate that it was made of.

    Attributes:
        difference: Root mean square of the difference between their logits, relative to that of
            the iterate's logits.
        bound: The largest that is accepted.
    """

    difference: float
    bound: float

    def __str__(self) -> str:
        """For the user."""
        return (
            f"Difference from the iterate's own logits, relative root mean square: "
            f"{self.difference:.2g} (accepted: up to {self.bound:.2g})."
        )


def merge_adapter(base: FrozenBase, adapter: Path | None) -> tuple[PreTrainedModel, bool]:
    """Merge an adapter into the weights of its base, in full precision.

    A quantized base is de-quantized first: the adapter was trained on the rounded weights, and
    merging it into 4-bit weights would round the sum again. Tied embeddings are untied if the
    adapter changes one of them, or both differently.

    Returns:
        The merged model, and whether its embeddings had to be untied.

    Raises:
        RunFolderError: PEFT cannot merge this adapter.
    """
    model = read_base(base)
    if base.quantization != "none":
        model = model.dequantize(dtype=base.dtype)
    if adapter is None:
        return model, False
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    try:
        with quiet_peft():
            adapted = peft.PeftModel.from_pretrained(model, str(adapter))
            if is_tied:
                # Merging is in place: it would change both.
                head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            _check_mergeable(adapted)
            merged: PreTrainedModel = adapted.merge_and_unload()
    # Layers of quantization libraries, and variants of LoRA, raise errors of their own.
    except Exception as error:
        raise RunFolderError(
            f"the adapter in {adapter} cannot be merged ({first_line(error)})",
            fix="export it without --merge, as a PEFT adapter",
        ) from error
    return merged, is_tied and not _tie_again(merged)


def write_merged(
    base: FrozenBase, adapter: Path | None, folder: Path, stop_ids: list[int] | None
) -> tuple[Comparison, bool]:
    """Write a merged model, read it back, and compare it with the iterate.

    Args:
        base: The frozen base.
        adapter: The iterate's adapter; None for the bare base.
        folder: The folder to write.
        stop_ids: What the generation config is to stop at; None for what the base has.

    Returns:
        The comparison, and whether embeddings were untied.

    Raises:
        RunFolderError: The merged model has other logits than the iterate, or PEFT cannot merge it.
    """
    # One model in memory at a time.
    ids = probe_ids(base, adapter)
    own = _logits(load_with_adapter(base, adapter), ids)
    model, is_untied = merge_adapter(base, adapter)
    if stop_ids is not None:
        carry_stop_ids(model, stop_ids)
    model.save_pretrained(folder)
    del model
    merged = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype).eval(), ids)
    comparison = Comparison(
        difference=float((own - merged).square().mean().sqrt() / own.square().mean().sqrt()),
        bound=_BOUND_OF_INT8 if base.quantization == "int8" else _BOUND[base.dtype],
    )
    if not comparison.difference <= comparison.bound:
        raise RunFolderError(
            f"the merged model is not the iterate, and was not kept. {comparison}",
            fix="export without --merge, as a PEFT adapter, or merge in float32 by a run with "
            "compute_dtype: float32",
        )
    return comparison, is_untied


def carry_stop_ids(model: Any, stop_ids: list[int]) -> None:
    """Make `generate` of a model, with or without adapters, stop where the run's responses do."""
    # The object is changed: PEFT's wrapper and the model share it.
    model.generation_config.eos_token_id = stop_ids


def _check_mergeable(adapted: nn.Module) -> None:
    for layer in adapted.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base_layer: Any = layer.get_base_layer()
        if any(layer.lora_bias.values()) and getattr(base_layer, "bias", None) is None:
            raise ValueError("lora_bias on a layer without a bias")


def _tie_again(model: PreTrainedModel) -> bool:
    """Tie both embeddings again if they are still equal; otherwise record that they are not."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    is_equal = torch.equal(embedding.weight, head.weight) and getattr(head, "bias", None) is None
    if is_equal:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_equal
    return is_equal


def probe_ids(base: FrozenBase, adapter: Path | None) -> Tensor:
    """Ids spread over the vocabulary, those that an adapter trains by themselves among them."""
    config: Any = None if adapter is None else peft.PeftConfig.from_pretrained(str(adapter))
    tokens = getattr(config, "trainable_token_indices", None) or []
    listed = [*chain(*tokens.values())] if isinstance(tokens, dict) else list(tokens)
    vocabulary = int(load_config(base).get_text_config().vocab_size)
    spread = (torch.arange(_SEQUENCES * _TOKENS) * 7919 + 1) % vocabulary
    ids = torch.tensor(listed[: len(spread) // 2], dtype=torch.long)
    spread[1 : 2 * len(ids) : 2] = ids
    return spread.view(_SEQUENCES, _TOKENS)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    return logits.float()
