"""Special tokens that a text spells out, tokenized as the text that they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from spin_lightning.data.templates import LeftOut

_T = TypeVar("_T")

# Characters that Unicode keeps for use inside programs: no text has them.
_DIGITS = "".join(map(chr, range(0xFDD0, 0xFDE0)))
_TEXT, _TOKEN, _END = "\ufde0", "\ufde1", "\ufde2"
_RESERVED = f"[{_DIGITS[0]}-{_END}]"
# How a template and a text alike mark a thought; see data.thoughts.
_THOUGHT_MARKS = frozenset({"<think>", "</think>"})


class SpecialText:
    """Tells the special tokens that a template writes from those that a text spells out.

    Before a template is rendered, special tokens in the data's texts are masked. Every special
    token in what it wrote is then its own. Where any was masked, the text is tokenized by a copy of
    the tokenizer whose special tokens have other names, so that the names in the data are ordinary
    text to it. Texts without special tokens go the usual way.

    Args:
        tokenizer: The model's tokenizer.
        stop_ids: Ids that end a response; they count as special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._ids = {
            str(token.content): int(i)
            for i, token in added.items()
            if (token.special or i in stop_ids) and token.content not in _THOUGHT_MARKS
        }
        self._names = sorted(self._ids, key=len, reverse=True)
        alternatives = "|".join([*map(re.escape, self._names), _RESERVED])
        self._pattern = re.compile(alternatives)

    def mask(self, value: _T) -> _T:
        """The same text, or message, with every special token in it masked.

        Raises:
            LeftOut: A text holds characters that are reserved for the mask.
        """
        masked: _T = _mapped(value, self._mask)
        return masked

    def is_masked(self, text: str) -> bool:
        """Whether a text has a masked token in it."""
        return _TEXT in text

    def unmask(self, text: str) -> str:
        """The text with its masked tokens as they were spelled."""
        return re.sub(
            f"{_TEXT}([{_DIGITS}]+){_END}", lambda found: self._names[_number(found[1])], text
        )

    def ids(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Ids of a text with masked tokens, which are read as text.

        Raises:
            LeftOut: This tokenizer cannot do it.
        """
        copy = self._renamed
        if copy is None:
            raise LeftOut("a special token in its text, which this tokenizer cannot read as text")
        own = 0

        def rename(found: re.Match[str]) -> str:
            nonlocal own
            own += 1
            return _name(_TOKEN, self._names.index(found[0]))

        names = "|".join(map(re.escape, self._names))
        renamed = self.unmask(re.sub(names, rename, text))
        special = set(self._ids.values()) - {self._tokenizer.unk_token_id}
        if sum(i in special for i in copy.encode(renamed, add_special_tokens=False).ids) != own:
            raise LeftOut("a special token in its text, which this tokenizer cannot read as text")
        return tuple(copy.encode(renamed, add_special_tokens=add_special_tokens).ids)

    def _mask(self, text: str) -> str:
        return self._pattern.sub(self._mark, text)

    def _mark(self, found: re.Match[str]) -> str:
        if found[0] not in self._ids:
            raise LeftOut("characters that Unicode reserves for programs (U+FDD0 to U+FDE2)")
        return _name(_TEXT, self._names.index(found[0]))

    @cached_property
    def _renamed(self) -> Tokenizer | None:
        """The tokenizer with other names for its special tokens; None where there is no such."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        new = {name: _name(_TOKEN, number) for number, name in enumerate(self._names)}
        state = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        _rename_model(state["model"], new)
        copy = Tokenizer.from_str(json.dumps(state))
        copy.no_truncation()
        copy.no_padding()
        same = all(copy.token_to_id(new[name]) == i for name, i in self._ids.items())
        return copy if same else None


def _rename_model(model: dict[str, Any], new: Mapping[str, str]) -> None:
    """Rename tokens in the vocabulary of a serialized model, in place."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {new.get(name, name): i for name, i in vocabulary.items()}
    else:
        model["vocab"] = [[new.get(name, name), score] for name, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])


def _name(kind: str, number: int) -> str:
    """A masked or renamed token: a number in characters of no text."""
    return kind + "".join(_DIGITS[int(digit, 16)] for digit in f"{number:x}") + _END


def _number(digits: str) -> int:
    return int("".join(f"{_DIGITS.index(digit):x}" for digit in digits), 16)


def _mapped(value: Any, change: Any) -> Any:
    """The same value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
