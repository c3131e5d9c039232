from typing import Any

import pytest

from spin_lightning.data.turns import UnusableError, chat_turns, plain_calls, tool_schemas


def turn(**fields: Any) -> Any:
    return chat_turns([fields])[0]


def reason(**fields: Any) -> str:
    with pytest.raises(UnusableError) as caught:
        chat_turns([fields])
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "2+2?"}], "2+2?"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        ([{"type": "input_text", "text": "a"}], "a"),
        ([{"type": "output_text", "text": "a", "annotations": []}], "a"),
        ([{"text": "a"}], "a"),
        (["a", "b"], "ab"),
        (({"type": "text", "text": "a"},), "a"),
    ],
)
def test_parts_of_text_are_joined(content, text):
    assert turn(role="user", content=content).message == {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "image"}, "image"),
        ({"image": "x.png"}, "image"),
        ({"type": "input_audio"}, "input_audio"),
        ({"type": "tool_use", "id": "x"}, "tool_use"),
        ({"type": "refusal", "refusal": "no"}, "refusal"),
        ({"type": "text", "text": 4}, "text"),
        ({}, "None"),
        (None, "None"),
        (4, "None"),
    ],
)
def test_other_part_makes_the_row_unusable_and_is_named(part, kind):
    said = reason(role="user", content=[{"type": "text", "text": "a"}, part])
    assert said == f"a user turn with a part that is not text: {kind}"


@pytest.mark.parametrize("thought", ["hm", [{"type": "text", "text": "hm"}]])
def test_thought_among_the_parts_is_kept_apart(thought):
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "4"}]
    found = turn(role="assistant", content=parts)
    assert found.message == {"role": "assistant", "content": "4", "thinking": "hm"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thought_in_a_field_of_its_own_stays(name):
    found = turn(role="assistant", content="4", **{name: "hm"})
    assert found.message == {"role": "assistant", "content": "4", name: "hm"}
    assert turn(role="assistant", content="4", **{name: ""}).message.keys() == {"role", "content"}
    assert turn(role="assistant", content="4", **{name: None}).message.keys() == {"role", "content"}
    assert reason(role="assistant", content="4", **{name: ["hm"]}) == (
        f"a thought that is not text: {name}"
    )


def test_thought_in_two_fields_is_kept_once():
    found = turn(role="assistant", content="4", reasoning="hm", reasoning_content="hm")
    assert found.message == {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    assert reason(role="assistant", content="4", reasoning="hm", thinking="oh") == (
        "two different thoughts: reasoning and thinking"
    )


def test_fields_that_no_template_reads_are_dropped_and_named():
    found = turn(role="user", content="a", name="Ann", id=3, timestamp=None, likes=0)
    assert found.message == {"role": "user", "content": "a", "name": "Ann"}
    assert found.dropped == ("id", "likes")


@pytest.mark.parametrize(
    ("fields", "is_answer", "dropped"),
    [
        ({}, True, ()),
        ({"weight": 1}, True, ()),
        ({"weight": 1.0}, True, ()),
        ({"weight": None}, True, ()),
        ({"weight": 0}, False, ()),
        ({"weight": 0.0}, False, ()),
        ({"weight": False}, False, ()),
        ({"weight": 0.5}, True, ("weight",)),
        ({"train": True}, True, ()),
        ({"train": False}, False, ()),
        ({"train": "no"}, True, ("train",)),
    ],
)
def test_turn_of_weight_0_is_never_an_answer(fields, is_answer, dropped):
    found = turn(role="assistant", content="a", **fields)
    assert (found.is_answer, found.dropped) == (is_answer, dropped)
    assert not turn(role="user", content="a", **fields).is_answer


def test_content_may_be_missing_beside_tool_calls_alone():
    calls = [{"function": {"name": "f", "arguments": {}}}]
    for content in (None, ""):
        found = turn(role="assistant", content=content, tool_calls=calls)
        assert found.message == {"role": "assistant", "content": "", "tool_calls": calls}
    assert turn(role="assistant", tool_calls=calls).message["content"] == ""
    assert reason(role="assistant", content=None, tool_calls=[]) == (
        "an assistant turn that is not text"
    )
    assert turn(role="tool", content="").message["content"] == ""
    assert reason(role="user", content="") == "an empty user turn"


def test_arguments_as_json_become_objects():
    wired = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1, null]}'}}
    assert plain_calls([wired]) == [
        {"id": "1", "function": {"name": "f", "arguments": {"a": [1, None]}}}
    ]
    assert plain_calls('[{"name": "f", "arguments": "{}"}]') == [{"name": "f", "arguments": {}}]
    assert plain_calls([{"function": {"name": "f", "arguments": "x"}}]) == [
        {"function": {"name": "f", "arguments": "x"}}
    ]


@pytest.mark.parametrize("calls", ["f", 4, {"name": "f"}, ["f"], [None]])
def test_calls_that_are_no_objects_are_unusable(calls):
    assert reason(role="assistant", content="a", tool_calls=calls) == (
        "tool calls that are not a list of objects"
    )


@pytest.mark.parametrize("value", [None, "", [], "[]"])
def test_no_tools(value):
    assert tool_schemas(value) == ()


def test_tools_are_wrapped_as_templates_expect_them():
    bare = {"name": "f", "parameters": {}}
    wrapped = {"type": "function", "function": bare}
    assert tool_schemas([bare, wrapped]) == (wrapped, wrapped)
    assert tool_schemas('[{"name": "f", "parameters": {}}]') == (wrapped,)


@pytest.mark.parametrize("field", ["name", "reasoning", "tool_calls"])
def test_half_a_character_anywhere_is_unusable(field):
    value = [{"name": "\ud83d"}] if field == "tool_calls" else "\ud83d"
    said = reason(role="assistant", content="a", **{field: value})
    assert said == "an assistant turn that is not valid Unicode or json"
