"""The user's turn of a prompt, under the chat templates that models carry."""

import pytest

from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.report.user_turn import PromptReader
from spin_lightning.testbed.small_model import byte_tokenizer, word_tokenizer
from spin_lightning.types import Message
from tests.toys.chat_templates import FAMILIES, OPENED_THOUGHT, byte_level, family_tokenizer, wrap

TEXT = "What is the boat called?\n\nTell me."

# SmolLM2's: the system turn is written unless the chat has one.
SMOLLM = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral 7B Instruct's.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# Takes a question and an answer, and no second question.
ONE_EXCHANGE = (
    "{% if messages | length > 2 %}{{ raise_exception('one exchange only') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
)
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def with_template(template: str):
    tokenizer = wrap(byte_level(), CHAT_TOKENS, eos="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def mistral(family: str):
    """Mistral's template on a tokenizer of SentencePiece's kind, or on one of GPT-2's."""
    if family == "pieces":
        tokenizer = family_tokenizer("zephyr")
    else:
        tokenizer = wrap(byte_level(), ("<s>", "</s>"), bos="<s>", eos="</s>")
    tokenizer.chat_template = MISTRAL
    return tokenizer


TOKENIZERS = {
    **{name: family_tokenizer(name) for name in FAMILIES},
    "smollm": with_template(SMOLLM),
    "thinking": with_template(OPENED_THOUGHT),
    "mistral": mistral("bytes"),
    "mistral pieces": mistral("pieces"),
    "testbed": byte_tokenizer([TEXT] * 4, vocabulary=300),
}


def turns(*contents: str, first: str = "user") -> tuple[Message, ...]:
    """A chat in which user and assistant take turns, after a system turn if it begins with one."""
    roles = ["system"] if first == "system" else []
    roles += ["user" if i % 2 == 0 else "assistant" for i in range(len(contents) - len(roles))]
    return tuple(Message(role=r, content=c) for r, c in zip(roles, contents, strict=True))


def read(tokenizer, prompt: tuple[Message, ...]) -> str:
    ids = PromptFormat.of(tokenizer, None).prompt_ids(prompt)
    return PromptReader.of(tokenizer).read(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_of_one_turn_shows_the_users_text_alone(name):
    assert read(TOKENIZERS[name], turns(TEXT)).strip() == TEXT


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_of_several_turns_shows_the_last_one(name):
    assert read(TOKENIZERS[name], turns("Hello.", "Hello!", TEXT)).strip() == TEXT


@pytest.mark.parametrize(
    "name", [n for n in TOKENIZERS if n != "gemma" and not n.startswith("mistral")]
)
def test_prompt_with_a_system_turn_of_its_own_shows_the_users_text_alone(name):
    assert read(TOKENIZERS[name], turns("Be brief.", TEXT, first="system")).strip() == TEXT


def test_prompt_without_a_template_is_shown_whole():
    tokenizer = word_tokenizer(["tell me about the farm"])
    assert read(tokenizer, turns("tell me about the farm")) == "tell me about the farm"


def test_prompt_is_shown_whole_where_the_template_takes_one_exchange_only():
    assert read(with_template(ONE_EXCHANGE), turns("Hello.")) == "Hello."


def test_prompt_is_shown_whole_where_it_does_not_end_as_the_template_does():
    tokenizer = TOKENIZERS["smollm"]
    ids = tokenizer("<|im_start|>user\nHello.<|im_end|>\n")["input_ids"]
    assert PromptReader.of(tokenizer).read(ids) == "user\nHello.\n"
