"""Decoding in this process, against transformers' own `generate` one row at a time."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from spin_lightning.errors import SpinError
from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.local import (
    LocalGenerator,
    default_batch_tokens,
    tokens_in_cache,
)
from spin_lightning.generation.sampler import nucleus
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.keyed import position_uniforms
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import load_config
from tests.toys.adapters import plain_model
from tests.toys.chi_square import chi_square

STOPS = (2, 5)
WORDS = 24


@pytest.fixture(scope="module")
def policy(tiny_base, tiny_adapters, tmp_path_factory) -> LoraPolicy:
    policy = LoraPolicy(tiny_base, LoraSettings(r=2))
    policy.use_iterates({0: tmp_path_factory.mktemp("iterate_000"), **tiny_adapters})
    return policy


@pytest.fixture(scope="module")
def models(tiny_model_dir, tiny_adapters) -> dict[int, nn.Module]:
    """The iterates without our code."""
    return {t: plain_model(tiny_model_dir, tiny_adapters.get(t)) for t in (0, 1, 2)}


@pytest.fixture
def generate(policy):
    def run(requests: list[Request], **settings) -> list[Response]:
        generator = LocalGenerator(STOPS, pad_id=0, settings=GenerationSettings(**settings))
        return generator.generate(policy, requests)

    return run


def some_requests(count: int = 60) -> list[Request]:
    """Prompts of 1 to 9 words, opponents and caps of 1 to 12 all mixed."""
    draw = random.Random(3)
    return [
        Request(
            prompt_ids=(1, *(draw.randrange(3, WORDS) for _ in range(draw.randrange(9)))),
            opponent=draw.randrange(3),
            key=draw.getrandbits(63),
            cap=draw.randrange(1, 13),
        )
        for _ in range(count)
    ]


def next_probabilities(model: nn.Module, ids: list[int], **settings) -> Tensor:
    """Distribution of the token after `ids` as transformers would sample it, float64."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        use_cache=False,
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings},
    )
    return out.scores[0][0].double().softmax(dim=-1)


def decode_plainly(model: nn.Module, request: Request, **settings) -> tuple[list[int], list[float]]:
    """Response ids, and how far each uniform was from a boundary of the cumulative distribution."""
    ids: list[int] = []
    distances = []
    uniforms = position_uniforms(request.key, request.cap)
    while len(ids) < request.cap and not (ids and ids[-1] in STOPS):
        probabilities = next_probabilities(model, [*request.prompt_ids, *ids], **settings)
        edges = probabilities.cumsum(dim=0)
        uniform = uniforms[len(ids)]
        distances.append(float((edges - uniform).abs().min()))
        ids.append(int((edges > uniform).nonzero()[0]))
    return ids, distances


def assert_same_but_at_boundaries(
    responses: list[Response], plain: list[tuple[list[int], list[float]]]
) -> None:
    exceptions = 0
    for response, (wanted, distances) in zip(responses, plain, strict=True):
        if list(response.ids) == wanted:
            assert response.finished == (wanted[-1] in STOPS)
            continue
        exceptions += 1
        pairs = zip(response.ids, wanted, strict=False)
        assert distances[[a == b for a, b in pairs].index(False)] < 1e-5
    assert exceptions <= 1


@pytest.fixture(scope="module")
def plain(models) -> dict[Request, tuple[list[int], list[float]]]:
    return {r: decode_plainly(models[r.opponent], r) for r in some_requests()}


@pytest.mark.parametrize("batch_tokens", [1, 50, 400, None])
@pytest.mark.parametrize("seed", [0, 1])
def test_ids_are_those_of_plain_decoding_whatever_the_batches_and_the_order(
    batch_tokens, seed, generate, plain
):
    requests = some_requests()
    random.Random(seed).shuffle(requests)
    responses = generate(requests, batch_tokens=batch_tokens)
    assert len({response.ids for response in responses}) > 30
    assert_same_but_at_boundaries(responses, [plain[request] for request in requests])
    assert generate(requests, batch_tokens=batch_tokens) == responses


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.7},
    ],
)
def test_ids_under_temperature_and_truncation_are_those_of_transformers(settings, generate, models):
    requests = some_requests()
    plain = [decode_plainly(models[r.opponent], r, **settings) for r in requests]
    assert_same_but_at_boundaries(generate(requests, **settings), plain)


def test_responses_finish_exactly_at_a_stop_id_and_keep_to_their_own_cap(generate):
    requests = some_requests(300)
    responses = generate(requests)
    for request, response in zip(requests, responses, strict=True):
        stops = [place for place, token in enumerate(response.ids) if token in STOPS]
        assert stops == ([len(response.ids) - 1] if response.finished else [])
        assert len(response.ids) <= request.cap
        assert response.finished or len(response.ids) == request.cap
    assert {r.ids[-1] for r in responses if r.finished} == {*STOPS}
    assert 0.2 < sum(r.finished for r in responses) / 300 < 0.8, "both ends are met"


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_ids_of_the_most_extreme_uniforms_have_probability(uniform, generate, models, monkeypatch):
    monkeypatch.setattr(
        "spin_lightning.generation.written.position_uniforms",
        lambda key, count: np.full(count, uniform),
    )
    requests = some_requests(12)
    for request, response in zip(requests, generate(requests, top_k=1), strict=True):
        ids = [*request.prompt_ids]
        for token in response.ids:
            assert token == int(next_probabilities(models[request.opponent], ids).argmax())
            ids.append(token)


def test_generate_leaves_the_global_random_state(policy, generate):
    policy.evict()  # so that tiny_adapters are loaded
    state = torch.get_rng_state()
    generate(some_requests(5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "right"),
    [({}, True), ({"temperature": 0.9}, False), ({"top_p": 0.9}, False)],
)
def test_frequencies_of_all_responses_of_two_words_fit_temperature_one_only(
    settings, right, generate, models
):
    """20,000 draws against the probabilities of every response: one stop id, or two words."""
    prompt, opponent, count = (1, 7, 12), 1, 20_000
    first = next_probabilities(models[opponent], [*prompt])
    probabilities = torch.zeros(WORDS, WORDS + 1, dtype=torch.float64)  # last column: no second
    for word in range(WORDS):
        if word in STOPS:
            probabilities[word, WORDS] = first[word]
        else:
            second = next_probabilities(models[opponent], [*prompt, word])
            probabilities[word, :WORDS] = first[word] * second
    requests = [Request(prompt, opponent, key, cap=2) for key in range(count)]
    counts = torch.zeros_like(probabilities)
    for response in generate(requests, **settings):
        counts[response.ids[0], response.ids[1] if len(response.ids) > 1 else WORDS] += 1
    p_value = chi_square(
        counts.view(1, -1), torch.zeros(1), probabilities.log().view(1, -1), min_expected=10
    )
    assert (p_value > 0.001) if right else (p_value < 1e-9)


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 99999999999 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError(),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "driver": RuntimeError("CUDA error: out of memory"),
}


@contextmanager
def memory_for(rows: int, policy: LoraPolicy, error: BaseException) -> Iterator[list[int]]:
    """A model that fails where it decodes more rows after the first column of their responses."""
    sizes: list[int] = []
    columns: list[int] = []

    def forward(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(len(args[0]))
        columns.append(args[0].shape[1])
        if len(args[0]) > rows and columns[-2:] == [1, 1]:
            raise error

    handle = policy.model.get_input_embeddings().register_forward_pre_hook(forward)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ERRORS)
def test_batches_that_memory_does_not_suffice_for_are_halved_and_the_log_says_so(
    kind, policy, plain, caplog
):
    generator = LocalGenerator(STOPS, 0, GenerationSettings())
    requests = some_requests()
    assert generator.deviations == {}
    with memory_for(20, policy, ERRORS[kind]) as sizes, caplog.at_level(logging.INFO):
        responses = generator.generate(policy, requests)
        while True:
            before, first = generator.deviations, len(sizes)
            again = generator.generate(policy, requests)
            if generator.deviations == before:
                break
    assert_same_but_at_boundaries(responses, [plain[request] for request in requests])
    assert_same_but_at_boundaries(again, [plain[request] for request in requests])
    tokens = generator.deviations["batch_tokens"]
    assert 0 < tokens < 60 * (9 + 12)
    assert f"generation.batch_tokens {tokens}" in caplog.text
    assert max(sizes[first:]) < 60, "it did not try the whole batch again"
    # A run that starts with this value makes the same bytes.
    fresh = GenerationSettings(batch_tokens=tokens)
    generator = LocalGenerator(STOPS, 0, fresh)
    assert generator.generate(policy, requests) == again
    assert generator.deviations == {}


def test_a_single_response_that_memory_does_not_suffice_for_is_an_error(policy, generate):
    with memory_for(0, policy, ERRORS["cpu"]), pytest.raises(SpinError, match=r"one response.*Fix"):
        generate([replace(request, cap=12) for request in some_requests()])


def test_other_errors_are_not_mistaken_for_a_lack_of_memory(policy, generate):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with memory_for(20, policy, error) as sizes, pytest.raises(RuntimeError, match="mat1 and mat2"):
        generate(some_requests())
    assert max(sizes) > 20


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_nucleus_is_that_of_transformers(top_p, spread):
    """Also if it has more tokens than are sorted at first."""
    logits = spread * torch.randn(7, 3000, generator=torch.Generator().manual_seed(0))
    wanted = TopPLogitsWarper(top_p)(torch.empty(0), logits).isfinite()
    probabilities = logits.softmax(-1)
    found = nucleus(probabilities, top_p)
    assert torch.equal(found[found > 0], probabilities[found > 0])
    # The last token may be in or out by the rounding of a sum.
    assert ((found > 0) != wanted).sum(-1).max() <= 1
    assert (found.sum(-1) >= top_p - 1e-5).all()


def test_default_batch_tokens_fill_two_gibibytes_with_keys_and_values(policy):
    """2 layers, keys and values of 2 heads of 8 floats: 256 bytes a token, up to 2^17 tokens."""
    assert default_batch_tokens(policy.model) == 2**17


def test_tokens_in_cache_are_those_of_mistral_on_a_card_of_24_gigabytes(tiny_base):
    """Its weights in NF4 take 3.84 GiB; 128 KiB a token in bfloat16, 512 in float32 at 2 GiB."""
    mistral = type(load_config(tiny_base))(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    memory = 24 * 2**30 * 3 // 4 - int(3.84 * 2**30)
    tokens = tokens_in_cache(mistral, memory, element_size=2)
    assert tokens == memory // 2**17
    assert tokens // 768 == 151
    assert tokens_in_cache(mistral, 2**31, element_size=4) == 2**31 // (2 * 32 * 8 * 128 * 4)
