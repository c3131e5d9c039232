"""Each format from a row to its conversation, written out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from spin_lightning.data.formats import find_format, read_data
from spin_lightning.data.known_formats import FORMATS, Dialogue, Format
from spin_lightning.data.turns import text_turn
from spin_lightning.errors import DataError
from spin_lightning.types import BadRow, Conversation

CASES = Path(__file__).parents[3] / "shared" / "cases"
CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 3, "b": 4}}}
TOOL = {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def tool(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **fields}


def read(*rows: dict[str, Any], columns: dict[str, str] | None = None, **settings: Any) -> Any:
    """The conversations of rows without their ids; the reasons of the rows that have none."""
    conversations, report = read_data(rows, columns, **settings)
    assert [c.example_id for c in conversations] + [b.example_id for b in report.bad] != []
    return conversations, list(report.bad)


def one(row: dict[str, Any], **settings: Any) -> Conversation:
    conversations, bad = read(row, **settings)
    assert bad == []
    (conversation,) = conversations
    return conversation


def reason(row: dict[str, Any], **settings: Any) -> str:
    conversations, bad = read(row, **settings)
    assert conversations == []
    return bad[0].reason


def gpt(role: str, value: str) -> dict[str, Any]:
    return {"from": role, "value": value}


# ------------------------------------------------------------------------ ShareGPT


def test_sharegpt_is_a_chat_by_other_names():
    row = {
        "conversations": [
            gpt("system", "Be brief."),
            gpt("human", "What is 2 + 2?"),
            gpt("gpt", "4"),
            gpt("human", "And 3 + 3?"),
            gpt("gpt", "6"),
        ]
    }
    prompt = (system("Be brief."), user("What is 2 + 2?"), assistant("4"), user("And 3 + 3?"))
    assert one(row) == Conversation(0, prompt, "6")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(role, "user") for role in ("human", "user")]
    + [(role, "assistant") for role in ("gpt", "assistant", "chatgpt", "bing", "bard", "model")]
    + [(role, "tool") for role in ("tool", "observation", "function", "function_response")]
    + [(role, "system") for role in ("system", "developer")],
)
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_roles_by_any_name_in_any_chat_column(column, keys, theirs, ours):
    turns = [("human", "q"), (theirs, "x"), ("human", "q2"), ("gpt", "a")]
    found = one({column: [dict(zip(keys, turn, strict=True)) for turn in turns]})
    assert found.prompt == (user("q"), {"role": ours, "content": "x"}, user("q2"))
    assert found.response == "a"


def test_sharegpt_takes_system_and_tools_from_columns():
    row = {"conversations": [gpt("human", "q"), gpt("gpt", "a")], "system": "s", "tools": [TOOL]}
    assert one(row) == Conversation(0, (system("s"), user("q")), "a", tools=(TOOL,))


def test_system_column_that_repeats_the_first_turn_is_read_once():
    chat = [gpt("system", "s"), gpt("human", "q"), gpt("gpt", "a")]
    assert one({"conversations": chat, "system": "s"}).prompt == (system("s"), user("q"))
    assert one({"conversations": chat, "system": ""}).prompt == (system("s"), user("q"))
    assert one({"conversations": chat, "system": None}).prompt == (system("s"), user("q"))
    assert reason({"conversations": chat, "system": "t"}) == (
        "a system column beside another system turn"
    )


def test_sharegpt_function_call_becomes_tool_calls():
    chat = [
        gpt("human", "q"),
        gpt("function_call", '{"name": "multiply", "arguments": {"a": 3, "b": 4}}'),
        gpt("observation", "12"),
        gpt("gpt", "It is 12."),
    ]
    tools = '[{"name": "multiply", "parameters": {"type": "object"}}]'
    prompt = (user("q"), assistant("", tool_calls=[CALL]), tool("12"))
    found = one({"conversations": chat, "tools": tools})
    assert found == Conversation(0, prompt, "It is 12.", tools=(TOOL,))
    assert reason({"conversations": [gpt("human", "q"), gpt("function_call", "multiply")]}) == (
        "a function call that is not json with a name"
    )


def test_sharegpt_with_pictures_is_left_out():
    row = {"conversations": [gpt("human", "<image>\nq"), gpt("gpt", "a")], "image": "x.jpg"}
    assert reason(row) == "a conversation about image"
    assert one({**row, "image": None}).response == "a"


def test_conversations_as_json_text_are_read():
    chat = [gpt("human", "q"), gpt("gpt", "a")]
    assert one({"conversations": json.dumps(chat)}) == Conversation(0, (user("q"),), "a")


# ------------------------------------------------------------------------ Alpaca


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, (user("Do it."),)),
        ({"input": ""}, (user("Do it."),)),
        ({"input": None}, (user("Do it."),)),
        ({"input": " \n"}, (user("Do it."),)),
        ({"input": "With this."}, (user("Do it.\nWith this."),)),
        ({"system": "Be brief.", "input": ""}, (system("Be brief."), user("Do it."))),
        (
            {"history": [["q1", "a1"], ["q2", "a2"]], "system": "s"},
            (system("s"), user("q1"), assistant("a1"), user("q2"), assistant("a2"), user("Do it.")),
        ),
        ({"history": []}, (user("Do it."),)),
        ({"history": None}, (user("Do it."),)),
        ({"history": '[["q1", "a1"]]'}, (user("q1"), assistant("a1"), user("Do it."))),
    ],
)
def test_alpaca_joins_the_input_below_the_instruction(fields, prompt):
    row = {"instruction": "Do it.", "output": "Done.", **fields}
    assert one(row) == Conversation(0, prompt, "Done.")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": ""}, "an empty instruction"),
        ({"instruction": None}, "an instruction that is not text"),
        ({"output": ""}, "an empty output"),
        ({"output": 4}, "an output that is not text"),
        ({"input": 4}, "an input that is not text"),
        ({"input": "\ud83d"}, "an instruction that is not valid Unicode"),
        ({"history": [["q"]]}, "a history that is not a list of pairs"),
        ({"history": "q"}, "a history that is not a list of pairs"),
        ({"history": [["q", None]]}, "an answer in the history that is not text"),
    ],
)
def test_alpaca_row_that_is_left_out_names_the_column(fields, expected):
    assert reason({"instruction": "Do it.", "output": "Done.", **fields}) == expected


def test_alpaca_by_other_names_is_mapped():
    row = {"frage": "Do it.", "kontext": "This.", "antwort": "Done."}
    columns = {"instruction": "frage", "input": "kontext", "output": "antwort"}
    assert one(row, columns=columns) == Conversation(0, (user("Do it.\nThis."),), "Done.")


# ------------------------------------------------------------------------ preferences

CHOSEN = [user("q"), assistant("good")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good"},
        {"prompt": "q", "chosen": [assistant("good")]},
        {"prompt": "q", "chosen": CHOSEN},
        {"prompt": [user("q")], "chosen": "good"},
        {"prompt": [user("q")], "chosen": [assistant("good")]},
        {"prompt": [user("q")], "chosen": CHOSEN},
        {"chosen": CHOSEN},
        {"prompt": None, "chosen": CHOSEN},
        {"prompt": "", "chosen": CHOSEN},
        {"question": "q", "chosen": "good"},
        {"instruction": "q", "chosen": "good"},
        {"prompt": " q ", "chosen": CHOSEN},
    ],
)
def test_preference_reads_the_chosen_side(row):
    found, report = read_data([{**row, "rejected": "bad"}])
    assert found == [Conversation(0, (user("q"),), "good")]
    assert report.columns_not_used == {"rejected": 1}
    assert report.notes() == [
        "columns not used: rejected (1 row: the rejected side; opponents answer instead)"
    ]


def test_preference_keeps_the_turns_before_the_chosen_answer():
    chosen = [system("s"), user("q1"), assistant("a1"), user("q2"), assistant("good")]
    found = Conversation(0, tuple(chosen[:-1]), "good")
    assert one({"prompt": "q1", "chosen": chosen, "rejected": "x"}) == found
    assert one({"chosen": chosen}, turns="all") == found  # what was answered before is context
    assert one({"prompt": "q", "chosen": CHOSEN, "system": "s"}).prompt == (system("s"), user("q"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": "good"}, "a chosen response without a prompt"),
        ({"chosen": [assistant("good")]}, "a chosen response without a prompt"),
        ({"prompt": "q9", "chosen": CHOSEN}, "a chosen chat that does not hold its prompt"),
        (
            {"prompt": [user("q9")], "chosen": CHOSEN},
            "a response that is more than the answer to its prompt",
        ),
        ({"prompt": "q", "chosen": ""}, "an empty response"),
        ({"prompt": "q", "chosen": None}, "a response that is not text"),
        ({"chosen": []}, "a chosen response without a prompt"),
    ],
)
def test_preference_that_is_left_out(row, expected):
    assert reason(row) == expected


# ------------------------------------------------------------------------ prompt and completion


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("q", "a"),
        ([user("q")], [assistant("a")]),
        ([user("q")], "a"),
        ("q", [assistant("a")]),
    ],
)
def test_trl_prompt_and_completion_in_both_forms(prompt, completion):
    assert one({"prompt": prompt, "completion": completion}) == Conversation(0, (user("q"),), "a")


def test_trl_completion_with_tools_is_the_answer_after_them():
    completion = [assistant("", tool_calls=[CALL]), tool("12"), assistant("12.")]
    row = {"prompt": [user("q")], "completion": completion, "tools": [TOOL]}
    prompt = (user("q"), assistant("", tool_calls=[CALL]), tool("12"))
    last = Conversation(0, prompt, "12.", tools=(TOOL,))
    assert one(row) == last
    first = Conversation(2**32, (user("q"),), "", tool_calls=(CALL,), tools=(TOOL,))
    assert read(row, turns="all")[0] == [first, last]


def test_prompt_of_several_turns_is_context_and_never_learned():
    row = {"prompt": [user("q1"), assistant("a1"), user("q2")], "completion": "a2"}
    assert [c.response for c in read(row, turns="all")[0]] == ["a2"]


@pytest.mark.parametrize(
    "answer",
    [
        [assistant("a"), assistant("b")],
        [tool("12"), assistant("b")],
        [assistant("a"), user("q"), assistant("b")],
        [assistant("a"), tool("12")],
        [user("q")],
    ],
)
def test_completion_of_other_turns_is_left_out(answer):
    assert reason({"prompt": "q", "completion": answer}) == (
        "a response that is more than the answer to its prompt"
    )


# ------------------------------------------------------------------------ OpenAI and tools


def test_openai_tool_calls_go_to_the_template_whole():
    call = {"id": "c1", "type": "function"}
    wired = {**call, "function": {"name": "multiply", "arguments": '{"a": 3, "b": 4}'}}
    plain = {**call, "function": {"name": "multiply", "arguments": {"a": 3, "b": 4}}}
    row = {
        "messages": [
            user("q"),
            assistant(None, tool_calls=[wired], refusal=None),
            tool("12", tool_call_id="c1"),
            assistant("It is 12.", name="calculator"),
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    conversations, report = read_data([row], turns="all")
    call_turn = assistant("", tool_calls=[plain])
    prompt = (user("q"), call_turn, tool("12", tool_call_id="c1"))
    assert conversations == [
        Conversation(2**32, (user("q"),), "", tool_calls=(plain,), tools=(TOOL,)),
        Conversation(0, prompt, "It is 12.", tools=(TOOL,)),
    ]
    assert report.columns_not_used == {"parallel_tool_calls": 1}


def test_openai_functions_of_old_become_tools():
    function = {"name": "multiply", "parameters": {"type": "object"}}
    row = {
        "messages": [
            user("q"),
            assistant(None, function_call={"name": "multiply", "arguments": '{"a": 3, "b": 4}'}),
            {"role": "function", "name": "multiply", "content": "12"},
            assistant("12."),
        ],
        "functions": [function],
    }
    prompt = (user("q"), assistant("", tool_calls=[CALL]), tool("12", name="multiply"))
    assert one(row) == Conversation(0, prompt, "12.", tools=(TOOL,))


@pytest.mark.parametrize("tools", ["multiply", 7, ["multiply"], {"name": "multiply"}])
def test_tools_that_are_no_schemas_leave_the_row_out(tools):
    assert reason({"messages": CHOSEN, "tools": tools}) == "tools that are not a list of objects"


def test_spin_columns_are_read_without_the_generated_side():
    row = {"real": CHOSEN, "generated": [user("q"), assistant("bad")]}
    found, report = read_data([row])
    assert found == [Conversation(0, (user("q"),), "good")]
    assert report.notes() == ["columns not used: generated (1 row: opponents answer again)"]


# ------------------------------------------------------------------------ a new format


def test_new_format_is_one_entry(monkeypatch):
    def read_haiku(row: Any) -> Dialogue:
        asked = text_turn("user", row["theme"], "theme")
        return Dialogue((asked, text_turn("assistant", row["haiku"], "haiku")))

    haiku = Format("haiku", {"theme": "theme", "haiku": "haiku"}, read_haiku)
    row = {"theme": "rain", "haiku": "On the tin roof"}
    with pytest.raises(DataError, match="no columns that are recognized; it has theme, haiku"):
        read_data([row])
    monkeypatch.setattr("spin_lightning.data.formats.FORMATS", [haiku, *FORMATS])
    assert one(row) == Conversation(0, (user("rain"),), "On the tin roof")
    assert one({"x": "rain", "haiku": "h"}, columns={"theme": "x"}).prompt == (user("rain"),)


def test_every_format_is_found_by_its_own_columns():
    for layout in FORMATS:
        found = find_format([*layout.needs.values()], {})
        assert found is not None
        assert found[0] is layout, layout.name


# ------------------------------------------------------------------------ the cases


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not on this machine")
@pytest.mark.parametrize(
    ("name", "good", "bad", "not_used"),
    [
        ("alpaca.jsonl", 3, [], {}),
        ("parts.jsonl", 1, [], {}),
        ("preference.jsonl", 2, [], {"rejected": 2}),
        ("reasoning.jsonl", 2, [], {}),
        ("sharegpt.jsonl", 1, [], {}),
        ("stop_token_in_text.jsonl", 1, [], {}),
        ("tools.jsonl", 2, [], {}),
        ("unknown_columns.jsonl", 1, [], {"context": 1}),
        ("weights.jsonl", 1, [BadRow(0, "no answer but those of weight 0")], {}),
    ],
)
def test_case_is_read_right_or_counted(name, good, bad, not_used):
    conversations, report = read_data(CASES / name)
    assert len(conversations) == report.used_rows == good
    assert list(report.bad) == bad
    assert report.columns_not_used == not_used
    lines = (CASES / name).read_text(encoding="utf-8").splitlines()
    assert report.rows == report.used_rows + len(report.bad) == len(lines)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not on this machine")
def test_folder_of_all_cases_counts_every_line():
    conversations, report = read_data(CASES)
    files = sorted(CASES.glob("*.jsonl"))
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert [Path(file.name) for file in report.files] == files
    assert report.rows == len(conversations) + len(report.bad) == lines == 15
    assert report.files_not_read == {"README.md": "not a data file"}
    assert [c.example_id for c in conversations] == [i for i in range(15) if i != 13]
