"""Tokens of a training pass, by hand."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from spin_lightning.policies.pass_size import training_tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def llama(layers: int, width: int, inner: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=1
    )


@pytest.mark.parametrize(
    ("config", "dtype", "wanted"),
    [
        # SmolLM2-135M: 30 layers of 8 x 576 + 4 x 1,536 numbers of 4 bytes in 512 MiB.
        (llama(30, 576, 1536), torch.float32, 416),
        (llama(30, 576, 1536), torch.bfloat16, 832),
        # A small model gets what suits the device: 6 x (8 x 384 + 4 x 1,024) x 4 would be 3,120.
        (llama(6, 384, 1024), torch.float32, 1024),
        # A large one the fewest: 32 x (8 x 4,096 + 4 x 14,336) x 4 would be 46.
        (llama(32, 4096, 14336), torch.float32, 256),
        # GPT-2, whose MLP has 4 x 768 units: 12 x (8 + 16) x 768 x 4.
        (GPT2Config(), torch.float32, 606),
    ],
)
def test_a_training_pass_on_a_cpu_keeps_half_a_gib_of_activations(config, dtype, wanted):
    assert training_tokens(config, dtype, CPU, is_checkpointed=False) == wanted


def test_elsewhere_and_with_checkpointing_the_device_alone_decides():
    config = llama(30, 576, 1536)
    assert training_tokens(config, torch.float32, CPU, is_checkpointed=True) == 1024
    assert training_tokens(config, torch.bfloat16, GPU, is_checkpointed=False) == 8192
