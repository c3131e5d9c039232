"""Chat templates of all kinds: nothing of theirs may tell real answers from generated ones."""

import datetime as dt
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spin_lightning.data.tokenize import DROPPED, PromptFormat
from spin_lightning.errors import SettingError
from spin_lightning.types import BadRow, Conversation, Example, Message
from tests.toys.chat_templates import (
    CHANNEL,
    DATED,
    EMPTY_THOUGHT,
    NO_GENERATION_PROMPT,
    OPENED_THOUGHT,
    PARTS,
    SHORTENING,
    TOOLS,
    VANISHING,
    byte_level,
    family_tokenizer,
    wrap,
)

QUESTION = Message(role="user", content="2+2?")
NO_THINKING = {"enable_thinking": False}


def chatml(template: str) -> PreTrainedTokenizerFast:
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template = template
    return tokenizer


def format_of(template: str, **settings: Any) -> PromptFormat:
    return PromptFormat.of(chatml(template), None, **settings)


def asked(response: str = "4", *before: Message, **more: Any) -> Conversation:
    return Conversation(7, before or (QUESTION,), response, **more)


def tokenized(text_format: PromptFormat, chat: Conversation) -> Any:
    return text_format.tokenize(
        chat, max_prompt_tokens=None, max_response_tokens=10_000, context=100_000
    )


def texts(text_format: PromptFormat, chat: Conversation) -> tuple[str, str]:
    """Prompt and response as text, with the tokens that the template writes."""
    example = tokenized(text_format, chat)
    assert isinstance(example, Example), example
    decode = text_format.tokenizer.decode
    return str(decode(example.prompt_ids)), str(decode(example.real_ids))


def error_of(text_format: PromptFormat, chat: Conversation) -> str:
    with pytest.raises(SettingError) as caught:
        tokenized(text_format, chat)
    return str(caught.value)


# ------------------------------------------------------------------------ templates that leak


@pytest.mark.parametrize(
    ("template", "asks", "writes", "fix"),
    [
        pytest.param(
            EMPTY_THOUGHT,
            r"<|im_start|>assistant\n'",
            r"'<think>\n\n</think>\n\nan answer by spin-lightning<|im_end|>\n'",
            "set data.chat_template_kwargs: {enable_thinking: false}, or set data.thoughts: keep "
            "where the answers of the data have thoughts",
            id="empty thought",
        ),
        pytest.param(
            OPENED_THOUGHT,
            r"<|im_start|>assistant\n<think>\n'",
            r"<|im_start|>assistant\nan answer by spin-lightning<|im_end|>\n'",
            r"set data.chat_template to a copy of the template without the '<think>\n' that its "
            "generation prompt ends with",
            id="opened thought",
        ),
        pytest.param(
            CHANNEL,
            "<|im_start|>assistant'",
            r"':final\nan answer by spin-lightning<|im_end|>\n'",
            "set data.chat_template to a copy of the template with {% if add_generation_prompt %}"
            r"{{ ':final\n' }}{% endif %} at its end, or set data.thoughts: keep where",
            id="channel header",
        ),
        pytest.param(
            NO_GENERATION_PROMPT,
            r"spin-lightning<|im_end|>\n'",
            r"'<|im_start|>assistant\nan answer by spin-lightning<|im_end|>\n'",
            "set data.chat_template to a copy of the template with {% if add_generation_prompt %}"
            r"{{ '<|im_start|>assistant\n' }}{% endif %} at its end",
            id="no generation prompt",
        ),
        pytest.param(
            VANISHING,
            r"<|im_start|>assistant\n'",
            r"by spin-lightning<|im_end|>\n'",
            "set data.chat_template to a file that writes nothing but the answer and a special "
            "token such as eos_token after its generation prompt",
            id="vanishing answer",
        ),
        pytest.param(
            NO_GENERATION_PROMPT.replace("<|im_end|>\\n", "END")
            + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
            r"<|im_start|>assistant\n'",
            "'an answer by spin-lightningEND'",
            "set data.chat_template to a file that writes nothing but the answer and a special",
            id="end of turn in plain letters",
        ),
    ],
)
def test_template_that_leaks_is_one_error_with_the_texts_and_the_fix(
    template: str, asks: str, writes: str, fix: str
) -> None:
    message = error_of(format_of(template), asked())
    assert message.startswith("tokenizer.chat_template=")
    assert "ends with '" in message
    assert f"{asks}, and for the answer 'an answer by spin-lightning' the template" in message
    assert f"{writes}. Fix: " in message
    assert f"Fix: {fix}" in message


def test_fix_of_an_empty_thought_works() -> None:
    text_format = format_of(EMPTY_THOUGHT, chat_template_kwargs=NO_THINKING)
    prompt, response = texts(text_format, asked())
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert response == "4<|im_end|>"


@pytest.mark.parametrize("template", [CHANNEL, OPENED_THOUGHT, NO_GENERATION_PROMPT])
def test_fix_by_a_file_works(template: str, tmp_path: Path) -> None:
    message = error_of(format_of(template), asked())
    line = re.search(r"(\{% if add_generation_prompt %\}.*\{% endif %\}) at its end", message)
    fixed = template.replace("<think>\\n", "") if line is None else template + line[1]
    (tmp_path / "fixed.jinja").write_text(fixed)
    _, response = texts(format_of(template, chat_template=tmp_path / "fixed.jinja"), asked())
    assert response == "4<|im_end|>"


def test_example_that_the_template_shortens_is_left_out_with_the_texts() -> None:
    text_format = format_of(SHORTENING)
    assert texts(text_format, asked())[1] == "4<|im_end|>"
    row = tokenized(text_format, asked("Two and two. #### 4"))
    assert row == BadRow(
        7,
        "the chat template changes the answer: the generation prompt ends with "
        r"'…m_end|>\n<|im_start|>assistant\n', and for the answer 'Two and two. #### 4' the "
        r"template writes ' 4<|im_end|>\n'",
    )


def test_spaces_before_the_answer_are_part_of_its_first_word() -> None:
    llama2 = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' <|im_end|>' }}{% endif %}{% endfor %}"
    )
    prompt, response = texts(format_of(llama2), asked())
    assert prompt == "[INST] 2+2? [/INST]"
    assert response == " 4 <|im_end|>"


def test_template_that_takes_parts_gets_parts() -> None:
    text_format = format_of(PARTS)
    prompt, response = texts(text_format, asked())
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert response == "4<|im_end|>"
    parts: Any = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    whole = Message(role="user", content=parts)
    assert texts(text_format, asked("4", whole)) == (prompt, response)


# ------------------------------------------------------------------------ thoughts

APART = asked(reasoning="2 and 2 make 4.")
IN_TEXT = asked("<think>\n2 and 2 make 4.\n</think>\n\n4")
EARLIER = asked(
    "6",
    QUESTION,
    Message(role="assistant", content="<think>Easy.</think>4"),
    Message(role="user", content="3+3?"),
)
REFUSED = BadRow(
    7,
    "a thought, which data.thoughts=keep would make part of the answer and data.thoughts=drop "
    "would remove",
)


def earlier(**keys: Any) -> Conversation:
    said: Any = {"role": "assistant", "content": "4", **keys}
    return asked("6", QUESTION, said, Message(role="user", content="3+3?"))


@pytest.mark.parametrize(
    "chat",
    [
        APART,
        IN_TEXT,
        EARLIER,
        earlier(reasoning_content="Easy."),
        earlier(thinking="Easy."),
        asked("Easy.</think>4"),
        asked("Well, <think>easy.</think> 4"),
    ],
)
def test_thoughts_are_refused_by_count_with_the_ways_out(chat: Conversation) -> None:
    assert tokenized(format_of(EMPTY_THOUGHT, chat_template_kwargs=NO_THINKING), chat) == REFUSED
    assert tokenized(PromptFormat.of(family_tokenizer("chatml"), None), chat) == REFUSED


@pytest.mark.parametrize("empty", [None, ""])
def test_empty_keys_of_thoughts_are_no_thoughts(empty: Any) -> None:
    text_format = PromptFormat.of(family_tokenizer("chatml"), None)
    assert isinstance(tokenized(text_format, asked(reasoning=empty)), Example)
    assert isinstance(tokenized(text_format, earlier(reasoning_content=empty)), Example)


@pytest.mark.parametrize(
    "chat",
    [
        APART,
        IN_TEXT,
        asked("<think>2 and 2 make 4.</think>4"),
        asked(IN_TEXT.response, reasoning="2 and 2 make 4."),
    ],
)
@pytest.mark.parametrize(
    ("template", "asks", "response"),
    [
        (EMPTY_THOUGHT, "assistant\n", "<think>\n2 and 2 make 4.\n</think>\n\n4<|im_end|>"),
        (
            CHANNEL,
            "assistant",
            ":analysis\n2 and 2 make 4.\n<|im_start|>assistant:final\n4<|im_end|>",
        ),
    ],
)
def test_kept_thought_is_part_of_the_answer_once(
    chat: Conversation, template: str, asks: str, response: str
) -> None:
    text_format = format_of(template, thoughts="keep")
    prompt, written = texts(text_format, chat)
    assert prompt.endswith(asks)
    assert written == response


def test_kept_thought_goes_on_where_the_generation_prompt_opens_one() -> None:
    keeping = OPENED_THOUGHT.replace(
        "{%- for message in messages -%}",
        "{%- for message in messages -%}{#- </think> stays -#}",
    )
    text_format = format_of(keeping, thoughts="keep")
    for chat in (APART, IN_TEXT):
        prompt, response = texts(text_format, chat)
        assert prompt.endswith("assistant\n<think>\n")
        assert response == "2 and 2 make 4.\n</think>\n\n4<|im_end|>"
    # Without one, a generated answer would begin in a thought, and this one would not.
    assert tokenized(text_format, asked()) == BadRow(
        7, "an answer without a thought, where the chat template needs one and data.thoughts=keep"
    )


def test_kept_thought_of_a_template_without_thoughts_is_the_text_of_the_data() -> None:
    text_format = PromptFormat.of(family_tokenizer("chatml"), None, thoughts="keep")
    assert texts(text_format, IN_TEXT)[1] == IN_TEXT.response + "<|im_end|>"
    message = error_of(text_format, APART)
    assert "it does not write a thought as part of the answer, and data.thoughts is keep" in message
    assert "reasoning_content once" in message
    assert message.endswith("or set data.thoughts: drop.")


def test_thoughts_that_a_template_switches_off_name_the_switch() -> None:
    text_format = format_of(EMPTY_THOUGHT, thoughts="keep", chat_template_kwargs=NO_THINKING)
    assert "Fix: set data.chat_template_kwargs: {enable_thinking: true}" in error_of(
        text_format, APART
    )


@pytest.mark.parametrize("chat", [APART, IN_TEXT, EARLIER, earlier(thinking="Easy.")])
def test_dropped_thoughts_are_gone_from_answers_and_earlier_turns(chat: Conversation) -> None:
    text_format = PromptFormat.of(family_tokenizer("chatml"), None, thoughts="drop")
    prompt, response = texts(text_format, chat)
    assert text_format.counts == {DROPPED: 1}
    plain = asked(response.removesuffix("<|im_end|>"), *earlier().prompt[: len(chat.prompt)])
    assert (prompt, response) == texts(PromptFormat.of(family_tokenizer("chatml"), None), plain)
    assert "hink" not in prompt + response
    assert "Easy" not in prompt
    assert text_format.prompt_ids(chat.prompt) == tokenized(text_format, chat).prompt_ids


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (asked("4 <think>Easy.</think>"), "a <think> part that does not begin the answer"),
        (asked("<think>Easy. 4"), "a <think> part that does not begin the answer, or does not end"),
        (asked("Easy.</think>4"), "a <think> part that does not begin the answer"),
        (asked("<think>a</think><think>b</think>4"), "more than one <think> part in an answer"),
        (asked("<think>a</think>4", reasoning="b"), "two different thoughts before the answer"),
    ],
)
@pytest.mark.parametrize("thoughts", ["keep", "drop"])
def test_thought_that_cannot_be_told_from_the_answer_is_left_out(
    chat: Conversation, reason: str, thoughts: str
) -> None:
    row = tokenized(format_of(EMPTY_THOUGHT, thoughts=thoughts), chat)
    assert isinstance(row, BadRow)
    assert row.reason.startswith(reason)


def test_thoughts_of_earlier_turns_go_as_the_template_has_them() -> None:
    text_format = format_of(EMPTY_THOUGHT, thoughts="keep")
    chat = asked("6", *EARLIER.prompt, reasoning="Easy, too.")
    prompt, response = texts(text_format, chat)
    assert prompt == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert response == "<think>\nEasy, too.\n</think>\n\n6<|im_end|>"


def test_thoughts_without_a_template() -> None:
    def plain(thoughts: Any) -> PromptFormat:
        tokenizer = wrap(byte_level(), ("<s>", "</s>"), bos="<s>", eos="</s>")
        return PromptFormat.of(tokenizer, None, thoughts=thoughts)

    assert tokenized(plain("refuse"), IN_TEXT) == REFUSED
    assert texts(plain("keep"), IN_TEXT)[1] == IN_TEXT.response + "</s>"
    assert texts(plain("drop"), IN_TEXT)[1] == "4</s>"
    assert tokenized(plain("keep"), APART) == BadRow(
        7, "a thought of its own, and there is no chat template to write it"
    )
    assert plain("refuse").template_hash is None
    assert plain("keep").template_hash is not None


# ------------------------------------------------------------------------ tools

CALL: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": "multiply", "arguments": {"a": 3, "b": 4}},
}
TOOL: Mapping[str, Any] = {"type": "function", "function": {"name": "multiply"}}


def test_tools_and_calls_go_to_the_template_as_they_are() -> None:
    prompt, response = texts(
        format_of(TOOLS), asked("I compute.", tool_calls=(CALL,), tools=(TOOL,))
    )
    assert prompt.startswith(f"<|im_start|>system\n[{json.dumps(TOOL)}]<|im_end|>\n")
    assert response == f"I compute.<call>{json.dumps(CALL['function'])}</call><|im_end|>"
    called: Any = {"role": "assistant", "tool_calls": [CALL]}
    result: Any = {"role": "tool", "name": "multiply", "content": "12"}
    prompt, response = texts(format_of(TOOLS), asked("12.", QUESTION, called, result))
    assert f"assistant\n<call>{json.dumps(CALL['function'])}</call><|im_end|>\n" in prompt
    assert "<|im_start|>tool\n12<|im_end|>\n" in prompt
    assert response == "12.<|im_end|>"


def test_calls_that_a_template_drops_are_left_out() -> None:
    row = tokenized(PromptFormat.of(family_tokenizer("chatml"), None), asked(tool_calls=(CALL,)))
    assert isinstance(row, BadRow)
    assert row.reason.startswith("the chat template changes the answer: the generation prompt")


def test_special_tokens_in_calls_are_text() -> None:
    call: Any = {"function": {"name": "say", "arguments": {"text": "<|im_end|>"}}}
    text_format = format_of(TOOLS)
    _, response = texts(text_format, asked("", tool_calls=(call,)))
    assert response == f"<call>{json.dumps(call['function'])}</call><|im_end|>"
    ids = tokenized(text_format, asked("", tool_calls=(call,))).real_ids
    assert ids.count(text_format.end_of_turn) == 1


# ------------------------------------------------------------------------ settings


def test_variables_are_in_the_template_that_is_saved(tmp_path: Path) -> None:
    text_format = format_of(EMPTY_THOUGHT, chat_template_kwargs=NO_THINKING)
    text_format.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    own = chatml(EMPTY_THOUGHT)
    for turns in ([QUESTION], [QUESTION, Message(role="assistant", content="4")]):
        for to_be_answered in (False, True):
            how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": to_be_answered}
            wanted = own.apply_chat_template(turns, **how, **NO_THINKING)
            assert saved.apply_chat_template(turns, **how) == wanted
    again = PromptFormat.of(saved, None)
    assert texts(again, asked()) == texts(text_format, asked())
    assert again.template_hash == text_format.template_hash
    assert own.chat_template == EMPTY_THOUGHT


@pytest.mark.parametrize(
    "value", [False, None, 3, 0.5, 'o\'clock "é"\n', [1, "a"], {"a": [True, None]}]
)
@pytest.mark.parametrize("start", ["", "\n", "  ", "  {% if true %}x{% endif %}\n"])
def test_variables_of_every_plain_type_change_nothing_else(value: Any, start: str) -> None:
    template = start + "{{ shown | tojson }}" + NO_GENERATION_PROMPT
    text_format = format_of(template, chat_template_kwargs={"shown": value})
    how: dict[str, Any] = {"tokenize": False, "shown": value}
    wanted = chatml(template).apply_chat_template([QUESTION], **how)
    assert text_format.tokenizer.apply_chat_template([QUESTION], tokenize=False) == wanted


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"enable_thinkin": False},
            "the chat template does not use it. Fix: choose from what it uses: enable_thinking.",
        ),
        ({"messages": []}, "data.chat_template_kwargs.messages=[]: every template gets it from"),
        ({"a-b": 1}, "data.chat_template_kwargs.a-b=1: it is not a name"),
        ({"enable_thinking": {1}}, "data.chat_template_kwargs.enable_thinking={1}: a template can"),
        ({"enable_thinking": float("inf")}, "data.chat_template_kwargs.enable_thinking=inf: a"),
    ],
)
def test_variables_that_cannot_work_are_refused(variables: Any, problem: str) -> None:
    with pytest.raises(SettingError, match=re.escape(problem)):
        format_of(EMPTY_THOUGHT, chat_template_kwargs=variables)


def test_variables_without_a_template_are_refused() -> None:
    tokenizer = wrap(byte_level(), ("</s>",), eos="</s>")
    with pytest.raises(SettingError, match="no chat template to pass them to"):
        PromptFormat.of(tokenizer, None, chat_template_kwargs=NO_THINKING)


def test_thoughts_of_another_name_are_refused() -> None:
    with pytest.raises(SettingError, match=r"data\.thoughts='hide'.*Fix: refuse, keep, or drop"):
        format_of(EMPTY_THOUGHT, thoughts="hide")


def test_template_file_replaces_that_of_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TOOLS)
    tokenizer = chatml(EMPTY_THOUGHT)
    text_format = PromptFormat.of(tokenizer, None, chat_template=file)
    assert texts(text_format, asked())[1] == "4<|im_end|>"
    assert text_format.template_hash == format_of(TOOLS).template_hash
    assert tokenizer.chat_template == EMPTY_THOUGHT


def test_template_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.chat_template='.*none\.jinja'.*cannot be read"):
        format_of(TOOLS, chat_template=str(tmp_path / "none.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match=r"data\.chat_template=.*cannot be read"):
        format_of(TOOLS, chat_template=tmp_path / "bytes.jinja")
    (tmp_path / "broken.jinja").write_text("{% for")
    with pytest.raises(SettingError, match=r"data\.chat_template=.*does not accept.*Fix"):
        format_of(TOOLS, chat_template=tmp_path / "broken.jinja")


def test_template_hash_tells_every_setting() -> None:
    formats = [
        format_of(EMPTY_THOUGHT),
        format_of(EMPTY_THOUGHT, chat_template_kwargs=NO_THINKING),
        format_of(EMPTY_THOUGHT, chat_template_kwargs={"enable_thinking": True}),
        format_of(EMPTY_THOUGHT, thoughts="keep"),
        format_of(EMPTY_THOUGHT, thoughts="drop"),
        format_of(TOOLS),
    ]
    assert len({text_format.template_hash for text_format in formats}) == len(formats)


# ------------------------------------------------------------------------ dates


def test_date_of_a_template_is_the_date_of_the_run() -> None:
    first, later = dt.date(2024, 2, 29), dt.date(2025, 1, 1)
    text_format = format_of(DATED, date=first)
    prompt, _ = texts(text_format, asked())
    assert prompt.startswith("<|im_start|>system\nToday is 29 Feb 2024.<|im_end|>\n")
    other = format_of(DATED, date=later)
    assert texts(other, asked())[0].startswith("<|im_start|>system\nToday is 01 Jan 2025.")
    assert other.template_hash == text_format.template_hash
    assert text_format.template is not None
    assert text_format.template.writes_date
    # Whoever loads the exported model has today's date.
    assert "strftime_now" in str(text_format.tokenizer.chat_template)


def test_tokenizer_with_a_template_for_tools_uses_both() -> None:
    tokenizer = chatml("")
    tokenizer.chat_template = {
        "default": NO_GENERATION_PROMPT
        + "{% if add_generation_prompt %}{{ '>' + hint }}{% endif %}",
        "tool_use": DATED + "{# hint #}",
    }
    text_format = PromptFormat.of(
        tokenizer, None, chat_template_kwargs={"hint": "x"}, date=dt.date(2024, 2, 29)
    )
    assert text_format.template is not None
    assert text_format.template.writes_date
    turns = (QUESTION,)
    plain = text_format.template.render(turns, to_be_answered=True)
    assert plain == "<|im_start|>user\n2+2?<|im_end|>\n>x"
    tooled = text_format.template.render(turns, to_be_answered=True, tools=(TOOL,))
    assert tooled.startswith("<|im_start|>system\nToday is 29 Feb 2024.")


def test_date_is_today_by_default() -> None:
    days = {dt.date.today()}
    text_format = format_of(DATED)
    days.add(dt.date.today())
    prompt, _ = texts(text_format, asked())
    assert any(f"Today is {day:%d %b %Y}." in prompt for day in days)


def test_date_of_a_computed_format_is_refused() -> None:
    computed = DATED.replace('"%d %b %Y"', "'%d ' + '%Y'")
    with pytest.raises(SettingError, match=r"a format that it computes.*Fix: write the format"):
        format_of(computed)


# ------------------------------------------------------------------------ real text

# SmolLM2's own: ChatML with a system turn where the data have none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS = [
    {"question": "What is 1/2 of 8?\nShow the steps.", "answer": "8/2 = <<8/2=4>>4\n#### 4"},
    {"question": "  Spaces  around \n", "answer": "\n\nA line first.\t\n"},
    {"question": "Is “é” one letter? 💡", "answer": "Yes — “é” is one: U+00E9 🙂."},
    {"question": "Strike <s>old</s>", "answer": "<|im_end|> is text here, as <|im_start|>user is."},
]


def round_trips(rows: list[dict[str, str]]) -> None:
    text_format = format_of(SMOLLM2)
    for row in rows:
        user = Message(role="user", content=row["question"])
        prompt, response = texts(text_format, asked(row["answer"], user))
        assert prompt == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            f"Face<|im_end|>\n<|im_start|>user\n{row['question']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert response == row["answer"] + "<|im_end|>"


def test_texts_come_back_character_for_character() -> None:
    round_trips(ROWS)


def test_gsm8k_comes_back_character_for_character() -> None:
    if not GSM8K.exists():
        pytest.skip(f"needs {GSM8K}")
    with GSM8K.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]
    assert len(rows) == 200
    round_trips(rows)


# ------------------------------------------------------------------------ the templates of TRL


def _trl_templates() -> Path | None:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "chat_templates"


TRL = _trl_templates()
NOTHINK = r"set data\.chat_template_kwargs: \{enable_thinking: false\}(?=, or|\.$)"
OPENED = r"set data\.chat_template to a copy of the template without the '<think>\\n'"
KEEP = r"or set data\.thoughts: keep where the answers of the data have thoughts\.$"


def missing(text: str, start: str = r"set data\.chat_template to a") -> str:
    """The fix that writes a text after the generation prompt."""
    line = "{% if add_generation_prompt %}{{ " + repr(text) + " }}{% endif %}"
    return rf"{start} copy of the template with {re.escape(line)} at its end"


GLM = r"set data\.chat_template_kwargs: \{enable_thinking: false\} and data\.chat_template to a"
RIGHT = None
# What each template of TRL 1.16 is: right as it is, or refused with a fix that works.
EXPECTED: dict[str, str | None] = {
    "cohere": RIGHT,
    "cohere2": RIGHT,
    "cohere2_training": RIGHT,
    "cohere_training": RIGHT,
    "deepseek_r1_distill": OPENED,
    "deepseek_r1_distill_training": f"{OPENED}.*{KEEP}",
    "deepseekv3": OPENED,
    "deepseekv3_training": OPENED,
    "diffusion_gemma": RIGHT,
    "diffusion_gemma_training": RIGHT,
    "gemma": RIGHT,
    "gemma3": RIGHT,
    "gemma3_training": RIGHT,
    "gemma4": RIGHT,
    "gemma4_v2": RIGHT,
    "gemma4_v3": RIGHT,
    "gemma4_v4": RIGHT,
    "gemma4_v5": RIGHT,
    "gemma_training": RIGHT,
    "glm4moe": f"{missing(chr(10), GLM)}.*{KEEP}",
    "glm4moe_training": f"{missing(chr(10), GLM)}.*{KEEP}",
    "gptoss": f"{missing('<|channel|>final<|message|>')}.*{KEEP}",
    "gptoss_training": f"{missing('<|channel|>final<|message|>')}.*{KEEP}",
    "idefics3": RIGHT,
    "idefics3_training": RIGHT,
    "lfm2": RIGHT,
    "lfm2_2_5": RIGHT,
    "lfm2_2_5_v2": RIGHT,
    "lfm2_2_5_vl": RIGHT,
    "lfm2_training": RIGHT,
    "lfm2_v2": RIGHT,
    "lfm2_v2_training": RIGHT,
    "llama3": RIGHT,
    "llama3_1": RIGHT,
    "llama3_2": RIGHT,
    "llama3_training": RIGHT,
    "llava_next": RIGHT,
    "llava_next_training": RIGHT,
    "muse_glimmer": f"{missing(' to=user<|message|>')}.*{KEEP}",
    "muse_glimmer_training": f"{missing(' to=user<|message|>')}.*{KEEP}",
    "nemotron_3_5_lightning": f"{NOTHINK}.*{KEEP}",
    "nemotron_3_5_lightning_training": f"{NOTHINK}.*{KEEP}",
    "nemotron_3_nano": f"{NOTHINK}.*{KEEP}",
    "nemotron_3_nano_training": f"{NOTHINK}.*{KEEP}",
    "nemotron_3_super": f"{NOTHINK}.*{KEEP}",
    "nemotron_3_super_training": f"{NOTHINK}.*{KEEP}",
    "nemotron_3_ultra": f"{NOTHINK}.*{KEEP}",
    "nemotron_3_ultra_training": f"{NOTHINK}.*{KEEP}",
    "phi3": RIGHT,
    "phi3_5": RIGHT,
    "phi3_5_training": RIGHT,
    "phi3_training": RIGHT,
    "qwen2_5": RIGHT,
    "qwen2_5_training": RIGHT,
    "qwen2_5_vl": RIGHT,
    "qwen2_5_vl_training": RIGHT,
    "qwen3": f"{NOTHINK}.*{KEEP}",
    "qwen3_5_nothink": RIGHT,
    "qwen3_5_nothink_training": RIGHT,
    "qwen3_5_think": f"{NOTHINK}.*{KEEP}",
    "qwen3_5_think_training": f"{NOTHINK}.*{KEEP}",
    "qwen3_6": f"{NOTHINK}.*{KEEP}",
    "qwen3_6_training": f"{NOTHINK}.*{KEEP}",
    "qwen3_8": f"{NOTHINK}.*{KEEP}",
    "qwen3_8_training": f"{NOTHINK}.*{KEEP}",
    "qwen3_instruct_2507": RIGHT,
    "qwen3_instruct_2507_training": RIGHT,
    "qwen3_training": f"{NOTHINK}.*{KEEP}",
    "qwen3_vl": RIGHT,
    "qwen3_vl_training": RIGHT,
    "smolvlm": RIGHT,
    "smolvlm_training": RIGHT,
}
# Templates that also write a thought of the data, given apart, into the last answer.
WRITE_THOUGHTS = {name for name, fix in EXPECTED.items() if fix is not None and KEEP in fix} | {
    "diffusion_gemma",
    "diffusion_gemma_training",
    "gemma4_v5",
    "lfm2_2_5",
    "lfm2_2_5_v2",
    "lfm2_2_5_vl",
}
ANSWERS = ["4", "2 + 2 = 4.\n\nSo it is 4.", "<|im_end|> and </s> are text."]
CHATS = [
    asked(),
    asked("4", Message(role="user", content="What?\n\n2+2?")),
    asked(
        "6", QUESTION, Message(role="assistant", content="4"), Message(role="user", content="3+3?")
    ),
    *(asked(answer) for answer in ANSWERS),
]


# DeepSeek's tokens have a wide bar, U+FF5C.
SPECIAL = "<[|\uff5c][^\\s<>{}'\"]+?[|\uff5c]>|<\\|?[a-z_]+\\|?>|\\[gMASK\\]"


def trl_source(name: str) -> str:
    if TRL is None:
        pytest.skip("TRL is not installed: its templates come with the extra 'bench'")
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


def trl_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens that a template writes."""
    written = re.findall(SPECIAL, source)
    tags = re.compile(r"</?(?!start_of|end_of|sop|image|video)[a-z_]+>")
    special = [token for token in dict.fromkeys(written) if not tags.fullmatch(token)]
    tokenizer = wrap(byte_level(), ("<s>", "</s>", *special), bos="<s>", eos="</s>")
    tokenizer.chat_template = source
    return tokenizer


def holds(text_format: PromptFormat, chat: Conversation) -> None:
    """The ids are those of the whole conversation, and the response is the answer."""
    prompt, response = texts(text_format, chat)
    assert text_format.template is not None
    answer = Message(role="assistant", content=chat.response)
    if chat.reasoning:
        answer["reasoning_content"] = chat.reasoning
    whole = text_format.template.render((*chat.prompt, answer), to_be_answered=False)
    if chat.reasoning and chat.reasoning not in whole:
        answer["content"] = f"<think>\n{chat.reasoning}\n</think>\n\n{chat.response}"
        whole = text_format.template.render((*chat.prompt, answer), to_be_answered=False)
    end = str(text_format.tokenizer.decode([text_format.end_of_turn]))
    ours = prompt + response
    assert ours.endswith(chat.response + end)
    # A template without an end of turn leaves it to us.
    assert whole.startswith(ours) or whole == ours.removesuffix(end)
    if chat.reasoning is None:
        assert response.lstrip(" ") == chat.response + end
    else:
        assert response.count(chat.reasoning) == 1


def test_table_has_every_template_of_trl() -> None:
    trl_source("qwen3")
    assert TRL is not None
    assert {path.stem for path in TRL.glob("*.jinja")} == set(EXPECTED)
    assert len(EXPECTED) == 72


@pytest.mark.parametrize("name", EXPECTED)
def test_template_of_trl_is_right_or_refused_with_the_fix(name: str, tmp_path: Path) -> None:
    source, fix = trl_source(name), EXPECTED[name]
    settings: dict[str, Any] = {}
    if fix is not None:
        message = error_of(PromptFormat.of(trl_tokenizer(source), None), asked())
        assert re.search(f"Fix: {fix}", message), message
        settings = as_the_fix_says(message, source, tmp_path / "fixed.jinja")
    for chat in CHATS:
        holds(PromptFormat.of(trl_tokenizer(source), None, **settings), chat)


@pytest.mark.parametrize("name", EXPECTED)
def test_template_of_trl_writes_a_thought_once_or_is_refused(name: str) -> None:
    text_format = PromptFormat.of(trl_tokenizer(trl_source(name)), None, thoughts="keep")
    if name in WRITE_THOUGHTS:
        holds(text_format, asked(reasoning="Two and two."))
    else:
        message = error_of(text_format, asked(reasoning="Two and two."))
        assert "it does not write a thought as part of the answer" in message


def as_the_fix_says(message: str, source: str, file: Path) -> dict[str, Any]:
    """The settings that an error names, in a user's place."""
    fix = message.partition("Fix: ")[2].partition(", or set data.thoughts")[0]
    settings: dict[str, Any] = {}
    if "enable_thinking: false" in fix:
        settings["chat_template_kwargs"] = NO_THINKING
    line = re.search(r"(\{% if add_generation_prompt %\}.*\{% endif %\}) at its end", fix)
    if line is not None:
        file.write_text(source.removesuffix("\n") + line[1], encoding="utf-8")
        settings["chat_template"] = file
    elif "without the" in fix:
        head, _, rest = source.rpartition("<think>\\n")
        file.write_text(head + rest, encoding="utf-8")
        settings["chat_template"] = file
    return settings
