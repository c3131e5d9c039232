import math

import pytest
import torch
from transformers import LlamaForCausalLM

from spin_lightning.testbed.exact import exact_metrics, response_log_probs, token_ids
from spin_lightning.testbed.language import Language
from spin_lightning.testbed.small_model import small_config, word_tokenizer

LANGUAGE = Language.make(seed=0)
TOKENIZER = word_tokenizer([*LANGUAGE.prompts, *LANGUAGE.responses])


@pytest.fixture(scope="module")
def model():

    config = small_config(TOKENIZER, hidden=16, layers=1, heads=2, context=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def log_p(model):
    return response_log_probs(model, TOKENIZER, LANGUAGE)


def test_response_log_probs_equal_a_loop_over_single_tokens(model, log_p):
    model.eval()
    for x, y in [(0, 0), (3, 444), (7, 624), (5, 130)]:
        ids = TOKENIZER(LANGUAGE.prompts[x])["input_ids"]
        words = [TOKENIZER.convert_tokens_to_ids(w) for w in LANGUAGE.responses[y].split()]
        total = 0.0
        for token in [*words, TOKENIZER.eos_token_id]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            total += float(logits[token] - logits.logsumexp(dim=0))
            ids = [*ids, token]
        assert float(log_p[x, y]) == pytest.approx(total, abs=1e-5)


def test_response_log_probs_do_not_depend_on_the_batch_size(model, log_p):
    assert log_p.shape == (8, 625)
    assert log_p.dtype == torch.float64
    assert not log_p.requires_grad
    again = response_log_probs(model, TOKENIZER, LANGUAGE, batch_size=200)
    torch.testing.assert_close(again, log_p, atol=1e-5, rtol=0)


def test_response_log_probs_leave_every_mode_and_the_random_state(model):
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    response_log_probs(model, TOKENIZER, LANGUAGE)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert torch.equal(torch.get_rng_state(), state)


def test_response_log_probs_restore_modes_after_an_error(model):
    model.train()
    hook = model.register_forward_pre_hook(_fail)
    try:
        with pytest.raises(RuntimeError, match="stop here"):
            response_log_probs(model, TOKENIZER, LANGUAGE)
    finally:
        hook.remove()
    assert model.training


def _fail(*_):
    raise RuntimeError("stop here")


def test_token_ids_decode_to_the_same_english():
    prompts, responses = token_ids(TOKENIZER, LANGUAGE)
    for text, ids in zip(LANGUAGE.prompts, prompts, strict=True):
        assert ids[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.eos_token_id not in ids
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    for text, ids in zip(LANGUAGE.responses, responses, strict=True):
        assert ids[-1] == TOKENIZER.eos_token_id
        assert len(ids) == len(text.split()) + 1
        assert TOKENIZER.bos_token_id not in ids
        assert TOKENIZER.decode(ids[:-1]) == text


def test_exact_metrics_of_the_data_itself_are_zero():
    metrics = exact_metrics(LANGUAGE.log_probs, LANGUAGE)
    for name in ("kl", "reverse_kl", "total_variation", "outside_mass"):
        assert metrics[f"exact/{name}"] == pytest.approx(0.0, abs=1e-12)
    p = LANGUAGE.log_probs.exp()
    assert metrics["exact/entropy"] == pytest.approx(float(-(p * p.log()).sum() / 8))


def tiny(*rows):
    return Language(
        prompts=tuple("ab"[: len(rows)]),
        responses=("u", "v"),
        log_probs=torch.tensor(rows, dtype=torch.float64).log(),
        dialect_log_probs=torch.tensor(rows, dtype=torch.float64).log(),
    )


def test_exact_metrics_by_hand():
    """p_data = (3/4, 1/4), p = (1/4, 1/4) and 1/2 outside; given the language p_L = (1/2, 1/2).

    KL(p_data‖p) = 3/4 ln 3 + 1/4 ln 1; KL(p_L‖p_data) = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3);
    total variation = 1/2 (1/2 + 0 + 1/2) = 1/2; entropy = ln 2.
    """
    metrics = exact_metrics(torch.tensor([[0.25, 0.25]]).log(), tiny([0.75, 0.25]))
    assert metrics == pytest.approx(
        {
            "exact/kl": 0.75 * math.log(3),
            "exact/reverse_kl": 0.5 * math.log(4 / 3),
            "exact/total_variation": 0.5,
            "exact/entropy": math.log(2),
            "exact/outside_mass": 0.5,
        },
        rel=1e-6,
    )


def test_exact_metrics_are_means_over_prompts():
    """The first prompt is right; on the second KL = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3)."""
    log_p = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    metrics = exact_metrics(log_p, tiny([0.5, 0.5], [0.5, 0.5]))
    assert metrics["exact/kl"] == pytest.approx(0.25 * math.log(4 / 3), rel=1e-6)
    assert metrics["exact/total_variation"] == pytest.approx(0.125, rel=1e-6)
