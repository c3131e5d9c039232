"""FlexAttention's masks and results against plain ones, and its trial before use."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex

from spin_lightning.packing import pack_prompts
from spin_lightning.policies import flex_attention, flex_trial
from spin_lightning.policies.flex_attention import Scores, block_mask, dense_attention, seen_keys
from spin_lightning.policies.flex_trial import Kernel
from spin_lightning.policies.heads import Heads
from spin_lightning.policies.layout import Layout
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.shared_prefix import _shared_prefix_attention
from tests.policies.test_shared_prefix import assert_same_step, build, folder_of, some_pairs
from tests.pretend_cuda.flex import seen_by

__all__ = ["folder_of"]

# torch 2.13 reads .grad of what it traces, which warns.
# https://github.com/pytorch/pytorch/tree/v2.13.0/torch/_dynamo/variables
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
CPU = torch.device("cpu")
# Prompts and responses: a single pair, several responses, tokens that fill blocks of 128 or do not.
ROWS = {
    "pair": ((5,), ((3, 4),)),
    "one block": ((128 - 30,), ((10, 20),)),
    "several": ((1, 12, 7), ((9, 4), (1,), (3, 3, 2, 1))),
    "blocks": ((300, 1, 77), ((150, 140), (1, 1), (60, 131, 40))),
}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention traced as on a GPU, forward and backward, and computed by plain operations."""
    # It refuses gradients on a CPU for lack of a kernel, which this backend does not need.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    compiled = torch.compile(torch_flex.flex_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex_attention, "_kernel", lambda: compiled)


def seen_by_loops(prompts, responses, window) -> Tensor:
    """Which token of a row sees which: those before it, of its own piece and of its prompt."""
    tokens = [
        (group, owner, position)
        for group, (prompt, lengths) in enumerate(zip(prompts, responses, strict=True))
        for owner, start, length in [
            (None, 0, prompt),
            *((i, prompt, n) for i, n in enumerate(lengths)),
        ]
        for position in range(start, start + length)
    ]
    return torch.tensor(
        [
            [
                group == other
                and of in (None, owner)
                and 0 <= position - earlier < (window or len(tokens))
                for other, of, earlier in tokens
            ]
            for group, owner, position in tokens
        ]
    )


def test_a_token_sees_its_prompt_and_its_own_response():
    """Prompt 0 to 2, responses 3 to 4 and 5 to 6; prompt 7, response 8 to 9."""
    assert seen_keys((3, 1), ((2, 2), (2,)), None).tolist() == [
        [3, 3, 3, 3, 3, 0, 0, 8, 8, 8],
        [3, 3, 3, 3, 3, 3, 3, 8, 8, 8],
        [0, 0, 0, 0, 0, 5, 5, 7, 7, 7],
    ]


def test_a_window_counts_positions_from_the_prompt_on():
    """A window of 2: of the second response, token 5 follows token 2, and token 6 sees only it."""
    assert seen_keys((3, 1), ((2, 2), (2,)), 2).tolist() == [
        [3, 3, 3, 3, 3, 2, 3, 8, 8, 8],
        [3, 3, 3, 3, 3, 3, 3, 8, 8, 8],
        [0, 0, 1, 2, 3, 5, 5, 7, 7, 8],
    ]


@pytest.mark.parametrize("window", [None, 1, 6, 130])
@pytest.mark.parametrize("row", ROWS)
def test_blocks_and_mask_show_each_token_what_it_sees(row, window):
    expected = seen_by_loops(*ROWS[row], window)
    mask = block_mask(seen_keys(*ROWS[row], window), CPU)
    index = torch.arange(len(expected))
    visible = mask.mask_mod(index, index, index[:, None], index[None])
    assert torch.equal(visible, expected)
    lists = [getattr(mask, name) for name in torch_flex.BlockMask._TENSOR_ATTRS[:8]]
    assert torch.equal(seen_by(mask, lists, visible), expected)


def test_blocks_without_a_pair_are_skipped_and_full_ones_need_no_mask():
    """Two prompts of 256 with a response of 128: blocks 0 to 2 and 3 to 5 of 128."""
    mask = block_mask(seen_keys((256, 256), ((128,), (128,)), None), CPU)
    assert mask.kv_num_blocks.flatten().tolist() == [1] * 6  # the diagonal
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert mask.q_num_blocks is not None
    assert mask.q_num_blocks.flatten().tolist() == [1] * 6
    assert mask.full_q_num_blocks is not None
    assert mask.full_q_num_blocks.flatten().tolist() == [2, 1, 0, 2, 1, 0]


def batch_of(prompts, responses):
    return pack_prompts(
        [[5] * n for n in prompts], [[[6] * n for n in group] for group in responses]
    )


CASES = [
    (row, window, softcap, key_heads, size)
    for row in ROWS
    for window, softcap, key_heads, size in [
        (None, 2.0, 4, 16),
        (6, 0.7, 2, 24),
        (140, None, 1, 16),
    ]
]


@pytest.mark.parametrize(("row", "window", "softcap", "key_heads", "size"), CASES)
def test_results_and_gradients_are_those_piece_by_piece(
    row, window, softcap, key_heads, size, on_cpu, monkeypatch
):
    batch = batch_of(*ROWS[row])
    generator = torch.Generator().manual_seed(2)
    tokens = len(batch.input_ids)
    query, key, value, upstream = (
        torch.randn(1, heads, tokens, size, generator=generator)
        for heads in (4, key_heads, key_heads, 4)
    )
    outcomes = []
    for tiling in ({}, None):
        monkeypatch.setattr(flex_trial, "tiling_of", lambda *_, tiling=tiling: tiling)
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        attended, _ = _shared_prefix_attention(
            nn.Identity(),
            *inputs,
            None,
            prompt_layout=Layout(batch),
            scaling=0.3,
            sliding_window=window,
            softcap=softcap,
        )
        gradients = torch.autograd.grad(attended, inputs, upstream.transpose(1, 2))
        outcomes.append([attended.detach(), *gradients])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_masks_are_made_once_per_window_that_hides_something():
    layout = Layout(batch_of((5, 2), ((3, 4), (1, 1))))
    assert layout.longest == 9
    assert layout.block_mask(None) is layout.block_mask(None)
    assert layout.block_mask(6) is layout.block_mask(6)
    assert layout.block_mask(6) is not layout.block_mask(None)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gemma3_text", "gpt2"])
def test_step_through_flex_attention_is_the_padded_one(name, folder_of, on_cpu, monkeypatch):
    base = FrozenBase(folder_of(name), compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    monkeypatch.setattr(flex_trial, "tiling_of", lambda *_: {})
    assert_same_step(fast, plain, some_pairs(seed=3), within=1e-5)


def test_other_lengths_and_caps_are_not_compiled_for_one_by_one(on_cpu):
    """A second length is compiled for as any length; a new cap once, since it is a constant."""
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()

    def attend(tokens: int, cap: float) -> int:
        query = torch.randn(1, 2, tokens, 16, requires_grad=True)
        mask = block_mask(seen_keys((tokens - 20,), ((8, 12),), None), CPU)
        flex_attention.attend(query, query, query, mask, Scores(softcap=cap), {}).sum().backward()
        return graphs["unique_graphs"]

    counted = [attend(n, 2.0) for n in (200, 300, 411, 520)]
    assert counted[1] == counted[2] == counted[3]
    assert attend(333, 3.0) == attend(222, 3.0) == counted[3] + 1


# ------------------------------------------------------------------------------ the trial

SOFT_CAPPED = Kernel(CPU, torch.float32, Heads(4, 2, 16), Scores(0.2, 2.0))


@pytest.mark.parametrize(
    "kernel",
    [
        SOFT_CAPPED,
        SOFT_CAPPED._replace(dtype=torch.bfloat16),
        SOFT_CAPPED._replace(scores=Scores()),
    ],
)
def test_the_trial_finds_nothing_wrong_with_what_is_right(kernel, on_cpu):
    with torch.no_grad():
        assert flex_trial._problem(kernel, {}) is None


def with_wrong_gradient(attended: Tensor) -> Tensor:
    return attended.detach() + 2 * (attended - attended.detach())


def without_mask(query, key, value, mask, scores):
    everything = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    return dense_attention(query, key, value, everything, scores)


def right(query, key, value, mask, scores):
    index = torch.arange(query.shape[2])
    visible = mask.mask_mod(index, index, index[:, None], index[None])
    return dense_attention(query, key, value, visible, scores)


FAULTS = {
    "mask": without_mask,
    "cap": lambda *args: right(*args[:4], Scores(0.2)),
    "gradient": lambda *args: with_wrong_gradient(right(*args)),
    "nan": lambda *args: right(*args) * torch.nan,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_trial_notices_wrong_numbers(fault, monkeypatch):
    wrong = FAULTS[fault]
    monkeypatch.setattr(
        flex_trial, "attend", lambda q, k, v, mask, scores, tiling: wrong(q, k, v, mask, scores)
    )
    problem = flex_trial._problem(SOFT_CAPPED, {})
    assert problem is not None
    assert problem.startswith("its results are off by ")


def test_the_trial_reports_an_error_and_passes_on_a_lack_of_memory(monkeypatch):
    def failing(error: Exception):
        def attend(*_, **__):
            raise error

        monkeypatch.setattr(flex_trial, "attend", attend)

    failing(ValueError("no triton here\nand a long trace"))
    assert flex_trial._problem(SOFT_CAPPED, {}) == "no triton here"
    failing(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        flex_trial._problem(SOFT_CAPPED, {})


@pytest.mark.parametrize("largest", [128, 64, 32, 16])
def test_the_first_tiling_that_fits_the_card_is_taken(largest, monkeypatch):
    def attend(query, key, value, mask, scores, tiling):
        if tiling.get("fwd_BLOCK_M", 128) > largest:
            raise RuntimeError("out of resource: shared memory")
        return right(query, key, value, mask, scores)

    monkeypatch.setattr(flex_trial, "attend", attend)
    found = flex_trial._trial(SOFT_CAPPED)
    if largest == 16:
        assert found == (None, "out of resource: shared memory")
    else:
        assert found.tiling is not None
        assert found.tiling.get("fwd_BLOCK_M", 128) == largest
        assert found.problem is None


def test_tilings_divide_blocks():
    sizes = [n for t in flex_trial._TILINGS for name, n in t.items() if "BLOCK" in name]
    assert sizes
    assert all(flex_attention.BLOCK % size == 0 for size in sizes)


def test_tensors_on_a_cpu_are_not_tried(monkeypatch):
    monkeypatch.setattr(flex_trial, "_tried", {})
    query = torch.randn(1, 4, 6, 16)
    assert flex_trial.tiling_of(query, query, Scores(softcap=2.0)) is None
    assert not flex_trial._tried
    assert flex_trial.deviations() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scores", [Scores(0.06, 50.0), Scores()])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 4, 256), (4, 4, 80), (4, 2, 20)])
def test_the_compiled_kernel_works_on_a_gpu(dtype, scores, heads, key_heads, size):
    kernel = Kernel(torch.device("cuda", 0), dtype, Heads(heads, key_heads, size), scores)
    assert flex_trial._trial(kernel).problem is None
