import pytest
import torch

from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import SettingError
from spin_lightning.testbed.small_model import (
    byte_tokenizer,
    small_config,
    train_small_llama,
    word_tokenizer,
)
from spin_lightning.types import Conversation, Message

TEXTS = ["the sum of 12 and 30 is 42.\n#### 42", "two  spaces, a tab\t and £5 – “quoted”"] * 20
WORDS = word_tokenizer(["say a or b", "a", "b"])
A, B, END = WORDS.convert_tokens_to_ids(["a", "b", "</s>"])
ASK = tuple(WORDS("say a or b")["input_ids"])


def train(examples, **settings):
    config = small_config(WORDS, hidden=16, layers=1, heads=2, context=16)
    return train_small_llama(config, examples, batch_size=8, **settings)


def test_word_tokenizer_adds_bos_only_and_survives_saving(tmp_path):
    WORDS.save_pretrained(tmp_path)
    loaded = type(WORDS).from_pretrained(tmp_path)
    for tokenizer in (WORDS, loaded):
        ids = tokenizer("b or a")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "b", "or", "a"]
        assert tokenizer("never")["input_ids"][1] == tokenizer.unk_token_id
        assert tokenizer.chat_template is None
        assert len({*tokenizer.all_special_ids}) == 4


def test_byte_tokenizer_gives_any_text_back_unchanged():
    tokenizer = byte_tokenizer(TEXTS, vocabulary=300)
    assert len(tokenizer) <= 300
    for text in (*TEXTS[:2], "日本語 was never seen", " leading and trailing "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("123")["input_ids"]) == 3
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_byte_tokenizer_template_ends_a_turn_with_the_stop_id(tmp_path):
    byte_tokenizer(TEXTS, vocabulary=300).save_pretrained(tmp_path)
    tokenizer = type(WORDS).from_pretrained(tmp_path)
    text_format = PromptFormat.of(tokenizer, None)
    prompt = (Message(role="user", content="how much?"),)
    asked = tokenizer.decode(text_format.prompt_ids(prompt))
    assert asked == "<|im_start|>user\nhow much?<|im_end|>\n<|im_start|>assistant\n"
    answer = text_format.response_ids(Conversation(0, prompt, "42"))
    assert tokenizer.decode(answer) == "42<|im_end|>"
    assert text_format.stop_ids == (tokenizer.eos_token_id,)


def test_train_small_llama_learns_the_frequencies_of_responses():
    """Three of four responses are "a": p(a) should come near 3/4, the stop id near 1."""
    model = train([(ASK, (A, END))] * 30 + [(ASK, (B, END))] * 10, steps=60, learning_rate=1e-2)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[*ASK, A]])).logits[0].softmax(dim=-1)
    assert float(p[-2, A]) == pytest.approx(0.75, abs=0.1)
    assert float(p[-1, END]) > 0.95
    assert not model.training


def test_train_small_llama_same_seed_same_weights_and_global_random_state_kept():
    examples = [(ASK, (A, END)), (ASK, (B, A, END))] * 8
    state = torch.get_rng_state()
    first, again, other = (train(examples, steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_train_small_llama_stops_after_its_minutes():
    model = train([(ASK, (A, END))] * 8, minutes=0.3 / 60)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "budget", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}]
)
def test_train_small_llama_needs_one_budget(budget):
    with pytest.raises(SettingError, match="give a positive number of steps"):
        train([(ASK, (A, END))], **budget)


def test_small_config_refuses_heads_of_odd_width():
    with pytest.raises(SettingError, match="give a multiple of 8"):
        small_config(WORDS, hidden=20, layers=1, heads=4, context=16)
