"""Passes of a policy in two processes, whose base is sharded or whole.

`torchrun --nproc_per_node 2 -m tests.toys.sharded_passes MODEL QUANTIZATION SHARD_BASE` prints what
each process held and computed, as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from spin_lightning.packing import pack_prompts
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase, Quantization
from spin_lightning.policies.sharded_base import held_bytes
from spin_lightning.policies.spec import PolicySpec
from spin_lightning.types import PromptBatch


def batch(number: int) -> PromptBatch:
    """Two prompts, the first one with two responses."""
    drawn = torch.Generator().manual_seed(number)
    ids = [torch.randint(4, 24, (n,), generator=drawn).tolist() for n in (5, 3, 4, 2, 6)]
    return pack_prompts([ids[0], ids[1]], [[ids[2], ids[3]], [ids[4]]])


def gradient(policy: LoraPolicy, number: int) -> list[float]:
    """The norm of each weight's gradient of the summed log-probs."""
    weights = [weight for _, weight in policy.trainable()]
    found = torch.autograd.grad(policy.score(batch(number)).sum(), weights)
    return [float(one.norm()) for one in found]


def status(field: str) -> int:
    """A field of the kernel's record of this process, in bytes, such as its peak memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def make_policy(model: str, quantization: Quantization, *, shard_base: bool) -> LoraPolicy:
    """A policy with random adapters, in float32."""
    spec = PolicySpec(
        FrozenBase(model, quantization=quantization, compute_dtype="float32"),
        LoraSettings.of(4, 8, None, None, None),
        activation_checkpointing=True,
        shard_base=shard_base,
    )
    policy = spec.build(torch.device("cpu"), seed=0)
    for i, (_, weight) in enumerate(policy.trainable()):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        weight.data.copy_(0.05 * noise)
    return policy


def main(model: str, quantization: Quantization, *, shard_base: bool) -> None:
    """Make passes, another number in each process, and print the outcome."""
    dist.init_process_group("gloo")
    rank, before = dist.get_rank(), status("VmRSS")
    policy = make_policy(model, quantization, shard_base=shard_base)
    grew = status("VmRSS") - before
    gradients = [gradient(policy, number) for number in range(1 + 2 * rank)]
    policy.serve_others()
    # Lightning validates in inference mode, except with gloo.
    with torch.inference_mode():
        scores = [policy.score(batch(number)).tolist() for number in range(3 - 2 * rank)]
    policy.serve_others()
    gradients.append(gradient(policy, 7))
    outcome = {
        "held": held_bytes(policy),
        "grew": grew,
        "gradients": gradients,
        "scores": scores,
    }
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if rank == 0:
        print(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], cast(Quantization, sys.argv[2]), shard_base=sys.argv[3] == "true")
