"""Log-probs of responses: a batch equals a loop over single tokens without padding."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from spin_lightning.logps import (
    head_logps,
    last_logits,
    response_logps,
    response_token_logps,
    sum_by_response,
)
from spin_lightning.packing import pack_padded
from tests.toys.models import random_model

SIZES = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **LAYERS),
    "gpt2": GPT2Config(
        **SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
    ),
    "qwen2": Qwen2Config(**SIZES, **LAYERS, tie_word_embeddings=True),
    # Soft caps that bite, and a window shorter than the sequences.
    "gemma2": Gemma2Config(
        **SIZES,
        **LAYERS,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
}

# Prompt and response: both long, either of one token, both of one token.
PAIRS = [
    ((1, 5, 6, 7, 8, 9, 10), (11, 12, 2)),
    ((1,), (13, 14, 15, 16, 17, 2)),
    ((1, 20, 21, 22), (2,)),
    ((3,), (4,)),
    ((1, 9, 9), (9, 9, 9, 9, 9)),
]


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    return random_model(request.param).eval()


@pytest.fixture(scope="module")
def llama():
    return random_model(CONFIGS["llama"]).eval()


@pytest.fixture(scope="module")
def batch():
    return pack_padded(*zip(*PAIRS, strict=True), pad_id=0)


def token_by_token(model: nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]):
    """log p(y|x) by one forward per token, without padding or mask."""
    ids, total = list(prompt), torch.zeros((), dtype=torch.float64)
    for token in response:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        total = total + logits[token] - logits.logsumexp(dim=0)
        ids.append(token)
    return total


def gradients(model: nn.Module, total: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, [*model.parameters()])])


# ------------------------------------------------------------------------------ every architecture


def test_response_logps_equal_a_loop_over_single_tokens(model, batch):
    with torch.no_grad():
        logps = response_logps(model, batch)
        by_hand = torch.stack([token_by_token(model, *pair) for pair in PAIRS])
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, by_hand, atol=1e-5, rtol=0)


def test_response_logps_have_the_gradient_of_the_loop(model, batch):
    weights = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5])
    batched = gradients(model, (weights * response_logps(model, batch)).sum())
    by_hand = gradients(
        model, sum(w * token_by_token(model, *pair) for w, pair in zip(weights, PAIRS, strict=True))
    )
    torch.testing.assert_close(batched, by_hand, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pair", PAIRS)
def test_response_logps_of_a_pair_do_not_depend_on_its_company(model, batch, pair):
    prompt, response = pair
    with torch.no_grad():
        alone = response_logps(model, pack_padded([prompt], [response], pad_id=0))
        together = response_logps(model, batch)[PAIRS.index(pair)]
    assert alone.item() == pytest.approx(together.item(), abs=1e-5)


# ----------------------------------------------------------------------------------------- details


def test_response_logps_do_not_depend_on_the_pad_id(llama, batch):
    other = pack_padded(*zip(*PAIRS, strict=True), pad_id=31)
    with torch.no_grad():
        assert torch.equal(response_logps(llama, batch), response_logps(llama, other))


def test_response_token_logps_mask_the_last_columns_of_each_response(llama, batch):
    with torch.no_grad():
        token_logps, mask = response_token_logps(llama, batch)
    lengths = [len(response) for _, response in PAIRS]
    assert token_logps.shape == mask.shape == (5, 6)
    assert mask.tolist() == [[False] * (6 - n) + [True] * n for n in lengths]


def test_response_logps_ask_the_head_for_the_columns_of_responses_only(llama, batch):
    """Six columns for the longest response and the one that predicts its first token."""
    shapes = []
    hook = llama.lm_head.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    with torch.no_grad():
        response_logps(llama, batch)
    hook.remove()
    assert shapes == [(5, 7, 16)]


class Bigrams(nn.Module):
    """Logits of the next id from the last one by a table; takes what every model takes, no more."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits[input_ids])


def test_response_logps_of_a_table_equal_the_hand_values():
    """From 1 to 2 with 3/4, from 2 to 2 with 1/4; the prompt's own ids do not count."""
    table = Bigrams(
        torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.5, 0.25, 0.25]]).log()
    )
    # Five columns, of which the head's last four are needed.
    batch = pack_padded([(0, 1), (0, 0, 1)], [(2, 2, 2), (2,)], pad_id=0)
    by_hand = [math.log(3 / 4) + 2 * math.log(1 / 4), math.log(3 / 4)]
    assert response_logps(table, batch).tolist() == pytest.approx(by_hand, abs=1e-6)


class PositionsSeen(nn.Module):
    """Keeps the positions that it is given."""

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        self.seen = position_ids.tolist()
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))


def test_last_logits_give_new_columns_the_positions_behind_those_that_a_cache_holds():
    """Two of five columns are new; the second sequence has two columns of padding."""
    model, mask = PositionsSeen(), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    last_logits(model, torch.zeros(2, 2, dtype=torch.long), mask, keep=1)
    assert model.seen == [[3, 4], [1, 2]]
    last_logits(model, torch.zeros(2, 5, dtype=torch.long), mask, keep=1)
    assert model.seen == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_response_logps_of_a_model_in_half_precision_are_summed_in_double_precision(dtype):
    """2000 tokens of probability 1/4: neither type has -log 4, and sums of it get stuck."""
    table = Bigrams(torch.zeros(4, 4, dtype=dtype))
    logps = response_logps(table, pack_padded([(1,)], [(2,) * 2000], pad_id=0))
    assert logps.item() == pytest.approx(-2000 * math.log(4), abs=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_response_logps_of_a_llama_in_half_precision_are_those_of_its_own_logits(batch, dtype):
    model = random_model(CONFIGS["llama"]).eval().to(dtype)
    with torch.no_grad():
        logps = response_logps(model, batch)
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(batch.input_ids, batch.attention_mask, position_ids=positions).logits
    table = logits.double().log_softmax(-1)
    by_hand = [
        sum(table[i, -n - 1 + s, token] for s, token in enumerate(response)).item()
        for i, (_, response) in enumerate(PAIRS)
        for n in [len(response)]
    ]
    assert logits.dtype == dtype
    assert logps.tolist() == pytest.approx(by_hand, abs=1e-5)


# ----------------------------------------------------------------------------------------- heads


def plain_head_logps(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, softcap=None):
    """The whole table of log-probs, in float64."""
    logits = hidden.double() @ head.weight.double().t()
    if head.bias is not None:
        logits = logits + head.bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[range(len(targets)), targets]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 256, 600])  # one chunk and several, the last one short
def test_head_logps_and_their_gradient_are_those_of_the_whole_table(tokens, bias, softcap, frozen):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=bias).requires_grad_(not frozen)
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.7, generator=generator)
    hidden = torch.randn(tokens, 16, generator=generator).requires_grad_(True)
    targets = torch.randint(50, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    found = head_logps(head, hidden, targets, softcap)
    wanted = plain_head_logps(head, hidden, targets, softcap)
    inputs = [hidden, *head.parameters()] if not frozen else [hidden]
    gradients = torch.autograd.grad(found, inputs, upstream)
    wanted_gradients = torch.autograd.grad(wanted, inputs, upstream.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-6)
    for gradient, by_hand in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, by_hand, atol=1e-5, rtol=1e-5)


def test_head_logps_of_two_words_equal_the_hand_values():
    """Logits (h, 0): log p(0) = -log(1 + e^-h), and its slope in h is 1 - p(0)."""
    head = nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.data[:] = torch.tensor([[1.0], [0.0]])
    hidden = torch.tensor([[math.log(3)], [-200.0]], requires_grad=True)
    logps = head_logps(head, hidden, torch.tensor([0, 0]))
    assert logps.tolist() == pytest.approx([math.log(3 / 4), -200.0])
    logps.sum().backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([1 / 4, 1.0])


def test_head_logps_of_a_frozen_head_refuse_to_be_differentiated_twice():
    """Their gradient was computed with them, and has none of its own."""
    hidden = torch.ones(3, 2, requires_grad=True)
    logps = head_logps(nn.Linear(2, 4).requires_grad_(False), hidden, torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(logps.exp().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_head_logps_of_more_chunks_of_targets_than_of_hidden_states_are_refused():
    """The first chunk is whole on both sides."""
    with pytest.raises(ValueError, match=r"shorter|longer"):
        head_logps(nn.Linear(2, 3), torch.zeros(256, 2), torch.zeros(600, dtype=torch.long))


def test_head_logps_of_a_frozen_head_keep_no_logits_for_the_backward_pass():
    saved = []
    head, hidden = nn.Linear(8, 4000, bias=False).requires_grad_(False), torch.randn(300, 8)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        head_logps(head, hidden.requires_grad_(True), torch.zeros(300, dtype=torch.long))
    assert saved == [(300, 8)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_head_logps_in_half_precision_are_as_near_as_its_logits_allow(dtype):
    """Logits are rounded by the product; what comes after is float32."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(False).to(dtype)
    hidden = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_(True)
    targets = torch.randint(50, (40,), generator=generator)
    found = head_logps(head, hidden, targets)
    by_hand = (hidden @ head.weight.t()).float().log_softmax(-1)[range(40), targets]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (wanted,) = torch.autograd.grad(plain_head_logps(head, hidden, targets).sum(), hidden)
    assert gradient.dtype == dtype
    assert (gradient - wanted).norm() < 0.01 * wanted.norm()


def test_sum_by_response_adds_up_in_double_precision():
    sums = sum_by_response(torch.tensor([0.5, -1.0, 4.0, *[-1.1] * 2000]), [2, 1, 2000])
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([-0.5, 4.0, -2200.0], abs=1e-4)
