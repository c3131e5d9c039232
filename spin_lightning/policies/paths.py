"""Which ways of computing a policy takes on its device, and why, in words."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer

from spin_lightning.policies import flex_trial
from spin_lightning.policies.flex_attention import Scores
from spin_lightning.policies.heads import Heads
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.varlen import has_varlen


def attention_path(policy: LoraPolicy) -> str:
    """How a policy computes attention over prompts with several responses."""
    if not policy.shares_prefixes:
        return "padded sequences, by transformers"
    config = policy.model.config
    heads = Heads.of(config)
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is None and has_varlen(policy.device, policy.base.dtype, heads.size):
        return "one kernel for all pieces"
    if policy.device.type != "cuda":
        return "piece by piece, since the kernels for whole rows need a GPU"
    query, key = (
        torch.empty(1, count, 1, heads.size, dtype=policy.base.dtype, device=policy.device)
        for count in (heads.queries, heads.keys)
    )
    if flex_trial.tiling_of(query, key, Scores(softcap=softcap)) is not None:
        return "one kernel for the whole row, by FlexAttention"
    failed = flex_trial.deviations().get("attention")
    return failed or f"piece by piece, since no kernel has heads of {heads.size}"


def fused_layers(policy: LoraPolicy) -> tuple[int, int]:
    """Number of LoRA layers with the fused pass, and of all LoRA layers."""
    layers = [module for module in policy.model.modules() if isinstance(module, LoraLayer)]
    fused = [layer for layer in layers if type(layer).__module__.startswith("spin_lightning.")]
    return len(fused), len(layers)


def bitsandbytes_build() -> str:
    """What the library of bitsandbytes was built for."""
    from bitsandbytes import cextension  # importing it takes seconds

    specs = cextension.get_cuda_specs() if cextension.lib.compiled_with_cuda else None
    return "built for the CPU" if specs is None else f"built for CUDA {specs.cuda_version_string}"
