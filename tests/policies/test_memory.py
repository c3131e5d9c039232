"""Predicted memory against peaks counted in fake tensors, and against sums by hand."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from spin_lightning.errors import SpinError
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.memory import Adapter, Memory, ModelShape, PassSize
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.spec import PolicySpec
from tests.toys.models import write_model
from tests.toys.peak import Peaks, measure

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# The widths of real models; four layers instead of 28 to 36.
CONFIGS = {
    "mistral 7B": MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
    ),
    "qwen2.5 7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=4,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "qwen3 1.7B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}
EQUAL = [(512, (256, 256))] * 4
UNEQUAL = [(300, (100, 200)), (40, (300, 10)), (120, (60, 90)), (90, (8,))]
LORA = LoraSettings(r=16)
QV = LoraSettings(r=64, target_modules=("q_proj", "v_proj"))


def assert_predicts(memory: Memory, size: PassSize, found: Peaks) -> None:
    assert memory.training_pass(size) == pytest.approx(found.training, rel=0.05)
    assert memory.scoring_pass(size) == pytest.approx(found.scoring, rel=0.05)
    assert memory.weights == pytest.approx(found.weights, rel=1e-3)
    assert memory.adapter.weights(memory.shape) == found.trained


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("name", "lora", "groups"),
    [
        ("mistral 7B", LORA, EQUAL[:2]),
        ("mistral 7B", QV, UNEQUAL),
        ("qwen3 1.7B", LORA, UNEQUAL),
        ("smollm2", LORA, EQUAL[:1]),
        ("smollm2", QV, UNEQUAL),
    ],
)
def test_peaks_on_a_cpu_are_predicted(name, lora, groups, checkpointed, tmp_path):
    config, base = CONFIGS[name], {"compute_dtype": "float32"}
    found = measure(config, tmp_path, base, lora, CPU, groups, checkpointed=checkpointed)
    shape = ModelShape.of(config)
    memory = Memory(shape, Adapter.of(lora, shape), torch.float32, CPU, checkpointed=checkpointed)
    assert_predicts(memory, PassSize.of(groups), found)


# 2 layers of width 8 with 16 inner units, 2 heads of 4 and 1 key head, 32 ids.
SHAPE = ModelShape(
    layers=2, width=8, inner=16, queries=8, keys=4, heads=2, vocabulary=32, tied=False
)
# In each layer 8 x 8 twice, 8 x 4 twice, 8 x 16 three times: 576 weights.
ALL = Adapter.of(LoraSettings(r=2), SHAPE)
# One prompt of 10 with responses of 5 and 3: the second one sees 13 keys, 3 of them its own.
SIZE = PassSize(tokens=18, responses=8, repeated=13, further=3)


def test_pass_size_counts_what_attention_holds_twice():
    assert PassSize.of([(10, (5, 3))]) == SIZE
    assert PassSize.of([(10, (5,)), (2, (1, 1, 1))]) == PassSize(20, 8, repeated=6, further=2)


def test_terms_by_hand():
    """bfloat16 on a GPU.

    Weights: 2 x 576 + 2 x 32 x 8 + 5 x 8 = 1,704, 2 bytes each. In NF4 the first 1,152 take
    1,152 x (0.5 + 1 / 64 + 1 / 4096) = 594.28 bytes, the others 1,104.

    Adapter: r = 2 times inputs and outputs, 16 + 12 + 12 + 16 + 24 + 24 + 24 = 128, times 2
    layers: 512 weights. With adamw each has 4 + 2 + 4 + 8 bytes.

    A layer saves, of 18 tokens, 4 x 8 + 2 x 8 + 4 x 16 + 7 x 2 = 126 numbers, and keys and values
    of 18 - 3 + 13 = 28 places, 8 numbers each: 2,492 numbers, 4,984 bytes; and 18 x 2 x 4 bytes of
    normalizers: 5,128. Head: 8 rows of 32 logits, 6 bytes each: 1,536.
    """
    memory = Memory(SHAPE, ALL, torch.bfloat16, GPU)
    assert memory.weights == 3408
    assert Memory(SHAPE, ALL, torch.bfloat16, GPU, "nf4").weights == 1698
    assert ALL.weights(SHAPE) == 512
    assert memory.trained("adamw") == 512 * 18
    assert memory.trained("adamw_8bit") == 512 * 12
    assert Memory(SHAPE, ALL, torch.float32, CPU).trained("rmsprop") == 512 * 12
    # Backward pass: two layers, two T f e of 576 bytes, one T h e of 288.
    assert memory.training_pass(SIZE) == max(
        2 * 5128 + 2 * 8 * 8 * 2 + 1536, 2 * 5128 + 2 * 576 + 288, 5128 + 128 + 1440 + 2048
    )
    # Checkpointed: three T h e at the head; one layer, and the input of another, at the end.
    checkpointed = Memory(SHAPE, ALL, torch.bfloat16, GPU, checkpointed=True)
    assert checkpointed.training_pass(SIZE) == 5128 + 128 + 1440 + 2048
    assert checkpointed.training_pass(SIZE) < memory.training_pass(SIZE)
    # Scoring: four T h e and three T f e, or R h e and the chunk.
    assert memory.scoring_pass(SIZE) == max(4 * 288 + 3 * 576, 128 + 1536)
    # Keys and values of 2 layers, 4 numbers of 2 bytes each: 32 bytes a token.
    assert memory.decoding_batch(1000) == 32_000


def test_what_is_not_predicted_is_named(tmp_path, tiny_base):
    with pytest.raises(SpinError, match="model type 'gpt2'"):
        ModelShape.of(GPT2Config())
    with pytest.raises(SpinError, match="regular expression"):
        Adapter.of(LoraSettings(target_modules=".*proj"), SHAPE)
    for name, settings in {
        "packing: padded": {"packing": "padded"},
        "fused_lora: false": {"fused_lora": False},
        "torch_compile: true": {"torch_compile": True},
        "lora_dropout": {"lora": LoraSettings(dropout=0.1)},
        "initial_adapter": {"initial_adapter": "somewhere"},
    }.items():
        spec = PolicySpec(tiny_base, **{"lora": LORA, **settings})
        with pytest.raises(SpinError, match=name):
            Memory.of(spec, CPU)


def test_the_prediction_of_a_policy_as_set(tmp_path):
    folder = write_model(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        tmp_path / "model",
    )
    base = FrozenBase(str(folder), compute_dtype="float32")
    spec = PolicySpec(base, LoraSettings(r=2), activation_checkpointing=True)
    wanted = Memory(SHAPE, ALL, torch.float32, CPU, checkpointed=True)
    assert Memory.of(spec, CPU) == wanted
