"""Scores with shared contexts: those of the harness's own pass, for fewer tokens."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import AutoTokenizer

from spin_lightning.evaluation.harness_model import PolicyLM
from spin_lightning.evaluation.shared_contexts import Continuation, SharedContexts
from spin_lightning.mixtures import latest
from spin_lightning.out_of_memory import TokenLimit
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from tests.policies.test_shared_prefix import CONFIGS
from tests.toys.models import random_model, write_tiny_model


def ids(draw: random.Random, length: int, vocabulary: int = 24) -> tuple[int, ...]:
    return tuple(draw.randrange(4, vocabulary) for _ in range(length))


def some_requests(seed: int) -> list[Continuation]:
    """Two subjects with examples, contexts within contexts, one-token and repeated choices."""
    draw = random.Random(seed)
    requests = []
    for _ in range(2):
        examples = ids(draw, 12)
        for _ in range(3):
            context = (*examples, *ids(draw, draw.randint(1, 6)))
            choices = [ids(draw, draw.randint(1, 5)) for _ in range(8)]
            requests += [Continuation(context, choice) for choice in choices]
            # The same input, another last token; and the end of a choice as part of the context.
            requests.append(Continuation(context, (*choices[0][:-1], 5)))
            requests.append(Continuation((*context, *choices[1]), ids(draw, 2)))
        requests.append(requests[-1])
    requests += [Continuation((7,), ids(draw, 3)), Continuation((7,), (9,))]
    draw.shuffle(requests)
    return requests


def alone(model: nn.Module, request: Continuation) -> tuple[float, bool]:
    """The score of one continuation, from a pass of its own without a cache."""
    row = torch.tensor([[*request.context, *request.tokens]])
    with torch.no_grad():
        logps = model(row, use_cache=False).logits[0].log_softmax(-1)
    predicted = logps[len(request.context) - 1 : -1]
    logp = sum(float(predicted[i, token]) for i, token in enumerate(request.tokens))
    return logp, predicted.argmax(-1).tolist() == list(request.tokens)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 8])
def test_scores_are_those_of_each_continuation_alone(name, rows):
    model = random_model(CONFIGS[name]).eval()
    requests = some_requests(3)
    # A continuation that is greedy, of several tokens.
    context = requests[0].context
    likeliest: tuple[int, ...] = ()
    for _ in range(3):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *likeliest]]), use_cache=False).logits
        likeliest += (int(logits[0, -1].argmax()),)
    requests.append(Continuation(context, likeliest))
    done: list[int] = []
    found = SharedContexts(requests).scores(model, rows, done.append, TokenLimit("evaluation"))
    wanted = [alone(model, request) for request in requests]
    assert [score.logp for score in found] == pytest.approx([logp for logp, _ in wanted], abs=1e-4)
    assert [score.is_greedy for score in found] == [greedy for _, greedy in wanted]
    assert found[-1].is_greedy
    assert sum(done) == len(requests)


def test_passes_that_memory_does_not_suffice_for_are_halved():
    """Eight choices of one context: 8 rows fail, then 4, and pairs of them fit."""
    model = random_model(CONFIGS["llama"]).eval()
    requests = [Continuation((5, 6, 7), (4 + i, 9)) for i in range(8)]
    wanted = [alone(model, request)[0] for request in requests]
    asked: list[int] = []

    def fails_above_two_rows(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]):
        rows, _ = kwargs.get("input_ids", *args).shape
        asked.append(rows)
        if rows > 2:
            raise RuntimeError("CUDA error: out of memory")

    model.register_forward_pre_hook(fails_above_two_rows, with_kwargs=True)
    limit = TokenLimit("evaluation")
    found = SharedContexts(requests).scores(model, 8, lambda _: None, limit)
    assert asked == [8, 4, 2, 2, 2, 2]
    assert [score.logp for score in found] == pytest.approx(wanted, abs=1e-4)
    # A row has the two cached tokens of the context, its last one and the first of the choice.
    assert limit.deviations == {"evaluation_tokens": 4 * (2 + 2) // 2}


def tokens_read(model: nn.Module) -> list[int]:
    """The number of tokens of each pass from here on, padding included."""
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("input_ids", *args).numel()),
        with_kwargs=True,
    )
    return seen


def test_each_token_of_a_context_is_read_once():
    model = random_model(CONFIGS["llama"]).eval()
    seen = tokens_read(model)
    first, second = (1, 2, 3, 4, 5, 6), (1, 2, 3, 9)
    requests = [
        Continuation(first, (7, 8)),
        Continuation(second, (7,)),
        Continuation(first, (8, 8)),
        Continuation(second, (8,)),
        Continuation(first, (7, 9)),
    ]
    SharedContexts(requests).scores(model, 8, lambda _: None, TokenLimit("evaluation"))
    # 1 2 3, then 9 once for both choices; 4 5 in addition, then 6 7 and 6 8.
    assert seen == [3, 1, 2, 4]


def test_sharing_pays_where_saved_tokens_outweigh_more_passes():
    def four(length: int) -> list[Continuation]:
        context = tuple(range(4, 4 + length))
        return [Continuation(context, (20 + choice, 30)) for choice in range(4)]

    # Alone, 4 times 5 + 1 tokens in two passes of two rows; shared, 4 and 4 times 2 in two passes.
    assert SharedContexts(four(5)).pays(rows=2, pass_cost=1000)
    # In one pass of four rows: 24 tokens against 12 and another pass.
    assert SharedContexts(four(5)).pays(rows=4, pass_cost=11)
    assert not SharedContexts(four(5)).pays(rows=4, pass_cost=12)
    # Choices of one token have the same input, which is read once in any case.
    same = [Continuation((1, 2, 3), (choice,)) for choice in range(4)]
    assert not SharedContexts(same).pays(rows=4, pass_cost=0)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))

    def build(packing: str) -> PolicyLM:
        base = FrozenBase(str(folder), compute_dtype="float32")
        policy = LoraPolicy(base, LoraSettings(r=4), packing=packing)
        policy.snapshot(folder / "adapter")
        policy.use_iterates({0: folder / "adapter"})
        return PolicyLM(policy, AutoTokenizer.from_pretrained(folder), latest(0), batch_size=4)

    return build


@pytest.fixture
def shared_calls(monkeypatch) -> list[int]:
    """How many requests each call with shared contexts had."""
    calls: list[int] = []
    scores = SharedContexts.scores

    def counted(shared, model, rows, scored, limit):
        calls.append(len(shared.requests))
        return scores(shared, model, rows, scored, limit)

    monkeypatch.setattr(SharedContexts, "scores", counted)
    return calls


def harness_requests(
    pairs: list[Continuation],
) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    return [((str(i), ""), list(c), list(t)) for i, (c, t) in enumerate(pairs)]


@pytest.mark.parametrize(("packing", "calls"), [("auto", 1), ("padded", 0)])
def test_the_harness_gets_its_own_scores(packing, calls, model_of, shared_calls):
    lm = model_of(packing)
    pairs = some_requests(5)
    requests = harness_requests(pairs)
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    wanted = HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert shared_calls == [len(pairs)] * calls


def test_requests_that_do_not_fit_are_cut_by_the_harness(model_of, shared_calls):
    lm = model_of("auto")
    draw = random.Random(1)
    # The model holds 64 tokens, and its last input is not the continuation's last token.
    long = [Continuation(ids(draw, 63), ids(draw, 3)), Continuation(ids(draw, 90), ids(draw, 2))]
    pairs = [long[0], *some_requests(5), long[1], Continuation(ids(draw, 63), ids(draw, 2))]
    requests = harness_requests(pairs)
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    wanted = HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in wanted], abs=1e-4)
    assert shared_calls == [len(pairs) - 2]
