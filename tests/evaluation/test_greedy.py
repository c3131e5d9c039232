"""Greedy answers for the harness: its own tokens, from a decoder that drops finished rows."""

import copy

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, GenerationConfig

from spin_lightning.evaluation import harness_model
from spin_lightning.evaluation.greedy import StopTexts, is_greedy
from spin_lightning.evaluation.harness_model import PolicyLM
from spin_lightning.generation.decoding import Decoder
from spin_lightning.mixtures import latest
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from tests.toys.models import write_tiny_model

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1", "w2 w2", "w11 w3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lm(folder, tmp_path) -> PolicyLM:
    policy = LoraPolicy(FrozenBase(str(folder), compute_dtype="float32"), LoraSettings(r=4))
    policy.snapshot(tmp_path / "adapter")
    policy.use_iterates({0: tmp_path / "adapter"})
    return PolicyLM(policy, AutoTokenizer.from_pretrained(folder), latest(0), batch_size=5)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Rows of each batch that our decoder gets."""
    rows: list[int] = []
    own = harness_model.continue_batch

    def counted(decoder, context, mask, length):
        rows.append(len(context))
        return own(decoder, context, mask, length)

    monkeypatch.setattr(harness_model, "continue_batch", counted)
    return rows


def texts(lm: PolicyLM, tokens: torch.Tensor, columns: int, stop: list[str]) -> list[str]:
    """What the harness makes of the tokens."""
    from lm_eval.models.utils import postprocess_generated_text

    return [
        postprocess_generated_text(lm.tok_decode(row[columns:]), stop, None)
        for row in tokens.tolist()
    ]


def most_frequent(lm: PolicyLM, context: torch.Tensor, mask: torch.Tensor) -> str:
    """A word in the middle of the answers."""
    plain = HFLM._model_generate(lm, context, 20, ["</s>"], attention_mask=mask)
    words = " ".join(texts(lm, plain, context.shape[1], [])).split()
    return max(set(words), key=words.count)


def test_answers_are_those_of_generate(lm, decoded):
    context, mask = lm.tok_batch_encode(PROMPTS)
    for stop in (["</s>"], [most_frequent(lm, context, mask), "</s>"]):
        wanted = HFLM._model_generate(lm, context, 20, stop, attention_mask=mask)
        found = lm._model_generate(context, 20, stop, attention_mask=mask, do_sample=False)
        assert torch.equal(found[:, : context.shape[1]], context)
        columns = context.shape[1]
        assert texts(lm, found, columns, stop) == texts(lm, wanted, columns, stop)
    assert decoded == [5, 5]


def test_a_row_that_has_ended_takes_no_further_token(lm, monkeypatch):
    context, mask = lm.tok_batch_encode(PROMPTS)
    stop = most_frequent(lm, context, mask)
    read: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answers: list[list[str]] = []
    decode = Decoder.decode

    def kept(decoder, requests, routing):
        written = decode(decoder, requests, routing)
        answers.extend(lm.tokenizer.decode(response.ids).split() for response in written)
        return written

    monkeypatch.setattr(Decoder, "decode", kept)
    lm._model_generate(context, 20, [stop], attention_mask=mask)
    lengths = [len(words) for words in answers]
    assert len(set(lengths)) > 1
    assert not any(stop in words[:-1] for words in answers)
    # The prompts without their last tokens, then one token for each answer that goes on.
    assert read[1:] == [sum(n > step for n in lengths) for step in range(max(lengths))]


def test_sampled_and_penalized_answers_come_from_generate(lm, decoded):
    context, mask = lm.tok_batch_encode(PROMPTS)
    lm._model_generate(context, 12, ["</s>"], attention_mask=mask, do_sample=True, temperature=0.5)
    lm._model_generate(context, 12, ["</s>"], attention_mask=mask, num_beams=2)
    before = copy.deepcopy(lm.model.generation_config)
    lm.model.generation_config.repetition_penalty = 1.3
    found = lm._model_generate(context, 20, ["</s>"], attention_mask=mask)
    assert torch.equal(found, HFLM._model_generate(lm, context, 20, ["</s>"], attention_mask=mask))
    assert decoded == []
    lm.model.generation_config = before
    lm._model_generate(context, 20, ["</s>"], attention_mask=mask)
    assert decoded == [5]


@pytest.mark.parametrize(
    ("config", "options", "wanted"),
    [
        ({}, {}, True),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}, {}, True),
        (
            {"max_length": 20, "eos_token_id": [1, 2]},
            {"do_sample": False, "temperature": 0.0},
            True,
        ),
        ({}, {"temperature": 0.7}, False),
        ({}, {"do_sample": True}, False),
        ({"repetition_penalty": 1.05}, {}, False),
        ({"no_repeat_ngram_size": 3}, {}, False),
        ({}, {"num_beams": 4}, False),
    ],
)
def test_what_is_greedy(config, options, wanted):
    assert is_greedy(GenerationConfig(**config), options) is wanted


def test_a_text_ends_an_answer_across_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w1 w2 w3 w4", add_special_tokens=False).input_ids
    ends = StopTexts(tokenizer, ("w2 w3", "w9"))
    assert [ends(ids[:n]) for n in (1, 2, 3)] == [False, False, True]
    assert not StopTexts(tokenizer, ())(ids)
