"""What others measured, and what is assumed from it: the inputs of `benchmarks.scaling`.

docs/scaling_on_paper.md names the source of each number.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.costs import Base, Card, Efficiency, Row, forward_flops, training_flops
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.memory import Adapter, ModelShape

GIB = 1 << 30
RTX_4090 = Card("RTX 4090", 24 * GIB, 1.008e12, 165.2e12, 0.0)
A100 = Card("A100", 85_198_045_184, 2.039e12, 312e12, 300e9)
# Its memory is taken to be the A100's.
H100 = Card("H100", 85_198_045_184, 3.35e12, 989e12, 450e9)

# Pairs are the slow and the fast case. Shares of the card's operations per second: see `RUNS`.
REACHED = {RTX_4090: (0.34, 0.60), A100: (0.34, 0.54), H100: (0.25, 0.45)}
BANDWIDTH, LINK = (0.60, 0.77), (0.65, 0.84)
# Seconds per launch; in a decoding step the fast case is a CUDA graph.
LAUNCH, REPLAY = (10e-6, 5e-6), (10e-6, 2e-6)
# Bytes per NF4 weight in a decoding step: de-quantized for each product (0.52 read, 2 written,
# 2 read), or read by bitsandbytes' fused kernel.
NF4 = (4.52, 0.52)


def efficiency(card: Card, *, fast: bool) -> Efficiency:
    """What is assumed of a card in the slow or in the fast case."""
    i = int(fast)
    return Efficiency(REACHED[card][i], BANDWIDTH[i], LINK[i], LAUNCH[i], REPLAY[i], NF4[i])


class Serving(NamedTuple):
    """A throughput of vLLM.

    Attributes:
        tokens: Tokens per second of prompts and responses.
        written: Tokens per second of responses.
    """

    tokens: float
    written: float


# Llama-2-7B on an A100, 1,000 prompts of ShareGPT: without adapters, and with one. (With four
# 3,664.67 and 1,791.53.)
LLAMA_2_7B, LLAMA_2_7B_LORA = Serving(5509.93, 2693.62), Serving(3656.98, 1787.78)
# Llama-3.1-70B on 4 A100s, 200 prompts of ShareGPT: 4.78859 requests per second. A request of that
# benchmark has 427.2 tokens, of which 213.9 are written.
LLAMA_70B = Serving(4.78859 * 427.2, 4.78859 * 213.9)
# On H100s: Mistral-7B in relation to an A100; the most that was written per second by Llama-3.1-8B
# on one, and by 70B on four.
H100_OVER_A100, H100_8B, H100_70B = 3281.19 / 1591.4, 12_553.0, 3_542.88


def requests_per_second(model: str, card: Card, read: int, written: int) -> tuple[float, float]:
    """What a vLLM server on 80 GB cards answers, slow and fast.

    Slow is the rate of all tokens with an adapter, fast the best rate of written tokens without.

    Args:
        model: 7B, on one card, or 70B, on four.
        card: `A100` or `H100`.
        read: Tokens of a prompt.
        written: Tokens of a response.
    """
    lora = LLAMA_2_7B_LORA.tokens / LLAMA_2_7B.tokens
    of_a100 = {"7B": LLAMA_2_7B, "70B": LLAMA_70B}[model]
    slow, fast = of_a100.tokens * lora / (read + written), of_a100.written / written
    if card == H100:
        return slow * H100_OVER_A100, {"7B": H100_8B, "70B": H100_70B}[model] / written
    return slow, fast


class Run(NamedTuple):
    """A published time of training.

    Attributes:
        name: What was run.
        base: The model.
        sequences: Number of sequences of 2,048 tokens.
        card: The card.
        cards: Number of cards.
        seconds: The time.
    """

    name: str
    base: Base
    sequences: int
    card: Card
    cards: int
    seconds: float

    @property
    def reached(self) -> float:
        """Share of the cards' operations per second, if the head read every token."""
        flops = training_flops(self.base, [Row(2048, ())], 2048)
        return flops * self.sequences / (self.seconds * self.cards * self.card.flops)


def _base(layers: int, width: int, inner: int, keys: int, vocabulary: int) -> Base:
    shape = ModelShape(layers, width, inner, width, keys, width // 128, vocabulary)
    return Base(shape, Adapter.of(LoraSettings(r=64), shape), "nf4")


_LLAMA_7B = _base(32, 4096, 11008, 4096, 32_000)
_LLAMA_70B = _base(80, 8192, 28672, 1024, 32_000)
_QWEN_7B = _base(32, 4096, 11008, 4096, 151_936)
_QWEN_72B = _base(80, 8192, 24576, 8192, 152_064)
RUNS = (
    Run("Llama-2-7B, QLoRA, 2 × RTX 4090 [3]", _LLAMA_7B, 1024, RTX_4090, 2, 450),
    Run(
        "Llama-2-70B, QLoRA, FSDP, base on the host, 2 × RTX 4090 [3]",
        _LLAMA_70B,
        1024,
        RTX_4090,
        2,
        4399,
    ),
    Run("Qwen-7B, QLoRA, 1 × A100 [4]", _QWEN_7B, 8, A100, 1, 7.0),
    Run("Qwen-72B, QLoRA, 1 × A100 [4]", _QWEN_72B, 8, A100, 1, 59.5),
    Run("Qwen-72B, LoRA, ZeRO-3, 4 × A100 [4]", _QWEN_72B, 32, A100, 4, 45.7),
    Run("Llama-2-70B, QLoRA, FSDP, 8 × A100 [3]", _LLAMA_70B, 1024, A100, 8, 672),
    Run("Llama-2-70B, QLoRA, FSDP, 4 × H100 [3]", _LLAMA_70B, 1024, H100, 4, 667),
)

# alignment-handbook/zephyr-7b-dpo-qlora: pairs per second on 8 cards, which it does not name.
_DPO_PAIRS, _DPO_CARDS = 8.033, 8


def dpo_length(shape: ModelShape, card: Card, *, fast: bool) -> float:
    """Tokens of a padded sequence at which TRL's DPO has its published speed.

    A pair is two sequences. Each is trained on and read once more by the reference, and the head
    reads all of it. Attention is left out.
    """
    base, token = Base(shape, Adapter.of(LoraSettings(r=16), shape), "nf4"), [Row(0, (1,))]
    of_token = training_flops(base, token, 1) + forward_flops(base, token, 1)
    speed = card.flops * efficiency(card, fast=fast).flops
    return speed / (_DPO_PAIRS / _DPO_CARDS) / (2 * of_token)
