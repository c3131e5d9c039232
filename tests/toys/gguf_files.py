"""A tiny Llama as a GGUF file, written by the gguf package: no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, LAYERS, HEADS, INNER = 32, 2, 2, 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Without a default system turn; the end of a turn is the stop token.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def grid(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Weights -1, -0.875, …, 0.875 that Q4_1 holds exactly: steps of 1/8 from a minimum of -1.

    Every block of 32 has both ends of the grid, which fix its step and its minimum.
    """
    drawn = np.random.default_rng(seed).integers(0, 16, size=shape)
    blocks = drawn.reshape(-1, 32)
    blocks[:, 0], blocks[:, 1] = 0, 15
    return (drawn / 8 - 1).astype(np.float32)


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Write the file.

    Returns:
        Its tensors by their names in the file.
    """
    import gguf

    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    tensors = _tensors(len(tokens))
    for name, values in tensors.items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors(vocabulary: int) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocabulary, WIDTH),
        "output_norm": (WIDTH,),
    }
    for i in range(LAYERS):
        parts = {
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH)),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH)),
            "ffn_down": (WIDTH, INNER),
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in parts.items()}
    return {
        f"{name}.weight": np.ones(shape, np.float32) if len(shape) == 1 else grid(shape, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
