"""The shapes of known models, for what is computed from shapes alone."""

from __future__ import annotations

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.workload import SIZES

# The shapes in the models' own config.json.
MODELS: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(**SIZES["smollm2"]),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": LlamaConfig(**SIZES["1b"]),
    "Llama-3.2-3B": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Mistral-7B": LlamaConfig(**SIZES["7b"]),
    "Llama-2-13B": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "Qwen2.5-32B": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    "Llama-3-70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
# By model, and by what `benchmarks.scaling` calls two of them.
CONFIGS = {**MODELS, "7B": MODELS["Mistral-7B"], "70B": MODELS["Llama-3-70B"]}
