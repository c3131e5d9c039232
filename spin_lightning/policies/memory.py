"""Predicted memory of a policy by phase, from the shapes of its model; nothing is computed.

The terms are those tensors that a pass of `shared_prefix` with `fused_lora` holds at its peaks,
counted in fake tensors (tests/policies/test_memory.py). Allocators and libraries add to that:
about half a GiB for CUDA's context, and what is lost between blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from spin_lightning.errors import SpinError
from spin_lightning.logps import head_rows
from spin_lightning.policies.heads import Heads
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.optimizers import OptimizerName
from spin_lightning.policies.pretrained import Quantization, load_config
from spin_lightning.policies.shared_prefix import shares_prefixes
from spin_lightning.policies.spec import PolicySpec

# Decoders with a gated MLP and RMS norms that `fused_norm` serves, and layers of one kind.
ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Bytes of a weight. In NF4 a block of 64 weights shares a scale of 8 bits, and 256 scales share
# one of 32.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of the state of a trained weight: two moments, one, or two of 8 bits.
_STATE_BYTES: dict[OptimizerName, int] = {"adamw": 8, "rmsprop": 4, "adamw_8bit": 2}
_FLOAT32 = 4


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        layers: Number L of layers.
        width: Numbers h of a hidden state.
        inner: Units f of the gated MLP.
        queries: Numbers q of all query heads of a token.
        keys: Numbers k of all key heads of a token, as many as of the value heads.
        heads: Number of query heads.
        vocabulary: Number V of ids.
        tied: Whether the head is the embedding's matrix.
        norms_heads: Whether queries and keys are normalized.
    """

    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    tied: bool = False
    norms_heads: bool = False

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape:
        """Read the sizes in a model's config.

        Raises:
            SpinError: The model is not one of `ARCHITECTURES`.
        """
        kind = config.model_type
        if kind not in ARCHITECTURES:
            raise SpinError(
                f"memory is not predicted for model type {kind!r}",
                fix=f"give one of {', '.join(sorted(ARCHITECTURES))}",
            )
        heads = Heads.of(config)
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.intermediate_size,
            queries=heads.queries * heads.size,
            keys=heads.keys * heads.size,
            heads=heads.queries,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            norms_heads=kind == "qwen3",
        )

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one layer of the decoder, by name."""
        h, f, q, k = self.width, self.inner, self.queries, self.keys
        return {
            "q_proj": (h, q),
            "k_proj": (h, k),
            "v_proj": (h, k),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }


@dataclass(frozen=True)
class Adapter:
    """The trained adapter.

    Attributes:
        rank: Rank r of LoRA.
        layers: Names of the linear layers that have an adapter.
    """

    rank: int
    layers: frozenset[str]

    @classmethod
    def of(cls, settings: LoraSettings, shape: ModelShape) -> Adapter:
        """A fresh adapter.

        Raises:
            SpinError: The layers are chosen by a regular expression.
        """
        targets, names = settings.target_modules, frozenset(shape.linear_layers)
        if targets == "all-linear":
            return cls(settings.r, names)
        if isinstance(targets, str):
            raise SpinError(
                "memory is not predicted for layers that a regular expression chooses",
                fix="list their names in model.lora_target_modules",
            )
        return cls(settings.r, names & {target.rsplit(".", 1)[-1] for target in targets})

    def weights(self, shape: ModelShape) -> int:
        """Number of trained weights: r (inputs + outputs) of each layer."""
        sizes = (sum(shape.linear_layers[name]) for name in self.layers)
        return shape.layers * self.rank * sum(sizes)


@dataclass(frozen=True)
class PassSize:
    """Sizes of a forward pass over prompts and responses.

    Attributes:
        tokens: All tokens T.
        responses: Response tokens R.
        repeated: Keys that attention holds twice: those of each response but a prompt's first one,
            and those of the prompt before it.
        further: Tokens of these responses.
    """

    tokens: int
    responses: int
    repeated: int = 0
    further: int = 0

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> PassSize:
        """The sizes of prompts with their responses, in tokens."""
        responses = sum(sum(lengths) for _, lengths in groups)
        return cls(
            tokens=sum(prompt for prompt, _ in groups) + responses,
            responses=responses,
            repeated=sum(prompt + n for prompt, lengths in groups for n in lengths[1:]),
            further=sum(sum(lengths[1:]) for _, lengths in groups),
        )


@dataclass(frozen=True)
class Memory:
    """Predicts bytes of a policy on a device.

    Attributes:
        shape: The model.
        adapter: The trained adapter.
        dtype: Type that the base computes in.
        device: Where it computes.
        quantization: How frozen weights are stored.
        checkpointed: Whether activations are recomputed in the backward pass.
    """

    shape: ModelShape
    adapter: Adapter
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization = "none"
    checkpointed: bool = False

    @classmethod
    def of(cls, spec: PolicySpec, device: torch.device) -> Memory:
        """The prediction for a policy as it is set.

        Raises:
            SpinError: A setting leads to passes whose memory is not predicted.
        """
        spec = spec.on(device)
        unsupported = {
            "packing: padded": not shares_prefixes(spec.base, spec.packing),
            "fused_lora: false": not spec.fused_lora,
            "torch_compile: true": spec.torch_compile,
            "shard_base: true": spec.shard_base,
            "lora_dropout": spec.lora.dropout > 0,
            "quantization: int8": spec.base.quantization == "int8",
            "initial_adapter": spec.initial_adapter is not None,
        }
        for name, is_set in unsupported.items():
            if is_set:
                raise SpinError(f"memory is not predicted with {name}", fix=f"try without {name}")
        shape = ModelShape.of(load_config(spec.base))
        return cls(
            shape,
            Adapter.of(spec.lora, shape),
            spec.base.dtype,
            device,
            spec.base.quantization,
            spec.activation_checkpointing,
        )

    @property
    def weights(self) -> int:
        """The frozen weights, in bytes; embeddings, head and norms are not quantized."""
        shape, e = self.shape, self.dtype.itemsize
        linear = shape.layers * sum(n * m for n, m in shape.linear_layers.values())
        embeddings = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        norms = (2 * shape.layers + 1) * shape.width
        stored = {"none": e, "int8": 1, "nf4": _NF4_BYTES}[self.quantization]
        return round(linear * stored + (embeddings + norms) * e)

    def trained(self, optimizer: OptimizerName) -> int:
        """The adapter with its copy in the compute dtype, gradients and optimizer, in bytes.

        Weights and gradients are float32.
        """
        copy = 0 if self.dtype == torch.float32 else self.dtype.itemsize
        of_a_weight = 2 * _FLOAT32 + copy + _STATE_BYTES[optimizer]
        return self.adapter.weights(self.shape) * of_a_weight

    def training_pass(self, size: PassSize) -> int:
        """Peak of a forward and backward pass, in bytes, with the gradients that it returns.

        The peak is at one of three moments, with e bytes a number:

        - while the head computes its last chunk: all saved activations, the R h states at the head
          and their gradient, and the chunk, see `_chunk`;
        - in the backward pass of the last layer's MLP: all saved activations but those of the head,
          2 T f e more (three gradients, for one freed input) and the T h e of the residual stream's
          gradient; with 4-bit weights, one dense weight in place of one gradient if it is larger;
        - there in the first layer: likewise for one layer's activations, with all gradients.

        Saved activations are those of every layer, see `_layer`; with checkpointing, T h e for each
        layer's input, and a single layer is recomputed.
        """
        e, h, f = self.dtype.itemsize, self.shape.width, self.shape.inner
        layer, stream = self._layer(size), size.tokens * h * e
        # The input of the last norm in place of that of the first, which needs no gradient.
        saved = self.shape.layers * layer
        kept = stream * (self.shape.layers + 1) if self.checkpointed else saved
        head = kept + 2 * size.responses * h * e + self._chunk(size)
        inner = size.tokens * f * e
        freed = inner if "down_proj" in self.adapter.layers else 0
        backward = inner + max(2 * inner - freed, self._dense_weight) + stream
        one = layer + size.responses * h * e  # the gradient of the head's states is freed last
        last = (one + kept - 2 * stream if self.checkpointed else saved) + backward
        first = one + backward + self.adapter.weights(self.shape) * _FLOAT32
        return max(head, last, first)

    def scoring_pass(self, size: PassSize) -> int:
        """Peak of a forward pass without gradients, in bytes.

        It is in a layer's MLP (its three T f e, and T h e four times: the embedding, the residual
        stream twice, and the norm's output), or at the head (R h e and a chunk).
        """
        e, h = self.dtype.itemsize, self.shape.width
        stream, inner = size.tokens * h * e, size.tokens * self.shape.inner * e
        layer = 4 * stream + max(3 * inner, 2 * inner + self._dense_weight)
        return max(layer, size.responses * h * e + self._chunk(size))

    def decoding_batch(self, tokens: int) -> int:
        """Keys and values of a batch of some tokens, prompts and responses, in bytes."""
        return 2 * self.shape.layers * self.shape.keys * self.dtype.itemsize * tokens

    @property
    def _dense_weight(self) -> int:
        """The largest weight, which is de-quantized for its product."""
        largest = self.shape.width * self.shape.inner * self.dtype.itemsize
        return 0 if self.quantization == "none" else largest

    def _layer(self, size: PassSize) -> int:
        """Activations that a layer saves for its backward pass, in bytes.

        Of each token, e bytes a number: the inputs of both norms (2 h), the inputs of layers with
        adapters (h for the attention, h for the MLP, f for its last layer) and A x (r for each);
        queries, and the output of the attention (2 q); gate, its activation and the other factor
        (3 f). Keys and values: 2 k per key that attention reads. On a CPU the pieces of the
        attention are copied into a row (q, if the next layer has an adapter), beside the first
        pieces' keys and values. The softmax's normalizers are float32, one per head.
        """
        shape, adapted, e = self.shape, self.adapter.layers, self.dtype.itemsize
        on_gpu = self.device.type == "cuda"
        numbers = 2 * shape.width + 2 * shape.queries + 3 * shape.inner
        if adapted & {"q_proj", "k_proj", "v_proj"}:
            numbers += shape.width
        if adapted & {"gate_proj", "up_proj"}:
            numbers += shape.width
        if "down_proj" in adapted:
            numbers += shape.inner
        if "o_proj" in adapted and not on_gpu:
            numbers += shape.queries
        if shape.norms_heads:
            numbers += shape.queries + shape.keys
        numbers += len(adapted) * self.adapter.rank
        keys = size.tokens + size.repeated - (size.further if on_gpu else 0)
        in_type = size.tokens * numbers + 2 * shape.keys * keys
        return in_type * e + size.tokens * shape.heads * _FLOAT32

    def _chunk(self, size: PassSize) -> int:
        """The logits of a chunk of response tokens at the head, in bytes.

        They are in the compute dtype and in float32; where there are several chunks, those of the
        chunk before are still there in float32.
        """
        most = head_rows(self.device)
        narrow = 0 if self.dtype == torch.float32 else self.dtype.itemsize
        of_a_logit = _FLOAT32 * (2 if size.responses > most else 1) + narrow
        return min(size.responses, most) * self.shape.vocabulary * of_a_logit
