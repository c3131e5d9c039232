"""What mends a chat template that breaks the invariant, found by trying."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateError

from spin_lightning.data.invariant import Breach, Frame, Invariant
from spin_lightning.data.templates import ANSWER, ChatTemplate
from spin_lightning.errors import SettingError

# Variables by which templates switch thoughts off or on, in the order in which they are tried.
_SWITCHES: tuple[Mapping[str, Any], ...] = (
    {"enable_thinking": False},
    {"thinking": False},
    {"enable_thinking": True},
    {"thinking": True},
)
_SHOWN = 60
_ANOTHER_FILE = (
    "set data.chat_template to a file that writes nothing but the answer and a special token such "
    "as eos_token after its generation prompt"
)
_ANOTHER_FILE_WITH_THOUGHTS = (
    "set data.chat_template to a file that writes an assistant's reasoning_content once, between "
    "the generation prompt and the answer"
)


def answer_error(template: ChatTemplate, breach: Breach) -> SettingError:
    """The error for a template that breaks the invariant for answers without a thought."""
    if breach.header is None and ANSWER not in breach.written:
        difference = "it does not write the answer"
    else:
        difference = "real answers would differ from generated ones by the template's own text"
    ways = [next(_answer_fixes(template, breach), None)]
    if isinstance(Invariant(template).thinking(in_text=False), Frame):
        ways.append("set data.thoughts: keep where the answers of the data have thoughts")
    found = [way for way in ways if way] or [_ANOTHER_FILE]
    return _error(template, difference, breach, found)


def thought_error(template: ChatTemplate, breach: Breach) -> SettingError:
    """The error for a template that does not write thoughts, where they are to be kept."""
    ways = [
        f"set data.chat_template_kwargs: {_yaml(switch)}"
        for switch, variant in _switched(template)
        if isinstance(Invariant(variant).thinking(in_text=False), Frame)
    ] or [_ANOTHER_FILE_WITH_THOUGHTS]
    difference = "it does not write a thought as part of the answer, and data.thoughts is keep"
    return _error(template, difference, breach, [ways[0], "set data.thoughts: drop"])


def _error(
    template: ChatTemplate, difference: str, breach: Breach, fixes: list[str]
) -> SettingError:
    return SettingError(
        "tokenizer.chat_template",
        template.text[:_SHOWN],
        f"{difference}: {breach.problem}",
        fix=", or ".join(fixes),
    )


def _answer_fixes(template: ChatTemplate, breach: Breach) -> Iterator[str]:
    """Ways that work, best first: the model's own way to leave out a thought before ours."""
    for switch, variant in _switched(template):
        if _holds(variant):
            yield f"set data.chat_template_kwargs: {_yaml(switch)}"
    for switch, variant in _switched(template):
        line = _missing_line(variant, only_space=True)
        if line is not None:
            yield (
                f"set data.chat_template_kwargs: {_yaml(switch)} and data.chat_template to a copy "
                f"of the template with {line} at its end"
            )
    line = _missing_line(template, only_space=False)
    if line is not None:
        yield f"set data.chat_template to a copy of the template with {line} at its end"
    # In the source, a newline is often written as an escape.
    for extra in (breach.extra, breach.extra.replace("\n", "\\n")):
        head, found, rest = template.text.rpartition(extra) if extra else ("", "", "")
        if found and _holds(_reading(template, head + rest)):
            yield (
                f"set data.chat_template to a copy of the template without the {breach.extra!r} "
                "that its generation prompt ends with"
            )


def _switched(template: ChatTemplate) -> Iterator[tuple[Mapping[str, Any], ChatTemplate]]:
    """The template with each of the switches that it has."""
    for switch in _SWITCHES:
        if all(re.search(rf"\b{name}\b", template.text) for name in switch):
            try:
                yield switch, template.having(switch)
            except TemplateError:
                continue


def _missing_line(template: ChatTemplate, *, only_space: bool) -> str | None:
    """What to write after the generation prompt, so that an answer follows it at once."""
    found = Invariant(template).plain()
    header = found.header if isinstance(found, Breach) else None
    if header is None or (only_space and header.strip()):
        return None
    line = f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
    return line if _holds(_reading(template, template.text.removesuffix("\n") + line)) else None


def _reading(template: ChatTemplate, text: str) -> ChatTemplate | None:
    try:
        return template.reading(text)
    except TemplateError:
        return None


def _holds(template: ChatTemplate | None) -> bool:
    try:
        return template is not None and isinstance(Invariant(template).plain(), Frame)
    except TemplateError:
        return False


def _yaml(switch: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {str(v).lower()}" for k, v in switch.items()) + "}"
