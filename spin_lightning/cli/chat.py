"""A chat with iterates of a run, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from spin_lightning.callbacks.console import console
from spin_lightning.cli.chat_answers import Answer, Answers, Dialog
from spin_lightning.errors import SpinError

_COMMANDS = "/reset starts over, /quit ends the chat"
_CUT = "[cut off after {} tokens; --max_tokens sets the cap]"


def answer_prompts(answers: Answers, prompts: Sequence[str]) -> None:
    """Print the answers to prompts, each in a chat of its own, as plain text.

    One prompt for one iterate gives the answer alone. Several prompts, and several iterates, are
    labeled. What is not part of an answer goes to stderr.
    """
    chats = [answers.dialogs() for _ in prompts]
    for chat, prompt in zip(chats, prompts, strict=True):
        for dialog in chat:
            dialog.say("user", _readable(prompt))
    several = len(answers.contestants) > 1
    for number, chat in enumerate(chats):
        written = answers.answer(chat, number)
        if len(prompts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {prompts[number]}")
        if several and console.is_terminal:
            _side_by_side(chat, written)
            continue
        for dialog, answer in zip(chat, written, strict=True):
            print(f"{dialog.contestant.label}: {answer.text}" if several else answer.text)
            if not answer.finished:
                print(_CUT.format(answer.tokens), file=sys.stderr)


class Chat:
    """Reads lines and shows the answers, until the input ends.

    Args:
        answers: What the iterates answer.
    """

    def __init__(self, answers: Answers) -> None:
        """Begin with empty chats."""
        self._answers = answers
        self._dialogs = answers.dialogs()
        self._asked = 0

    def run(self) -> None:
        """Chat until /quit or the end of the input."""
        self._answers.load()
        names = " and ".join(one.label for one in self._answers.contestants)
        console.print(f"Chat with {names}. {_COMMANDS}.", markup=False)
        if not self._answers.keeps_turns:
            console.print(
                "NOTE: the model has no chat template, so every prompt is answered by itself."
            )
        if sys.stdin.isatty():
            import readline  # noqa: F401  (arrow keys and earlier lines in `input`)
        while True:
            try:
                line = _readable(input("> ")).strip()
            except EOFError:
                console.print()
                return
            if line == "/quit":
                return
            if line:
                self._take(line)

    def _take(self, line: str) -> None:
        """Answer a line, or do what it says."""
        if line == "/reset":
            self._dialogs = self._answers.dialogs()
            console.print("The chat starts over.", style="dim")
        elif line.startswith("/") and " " not in line:
            console.print(f"There is no {line}: {_COMMANDS}.", markup=False)
        else:
            before = [len(dialog.turns) for dialog in self._dialogs]
            try:
                self._answer(line)
            except SpinError as error:
                # The line was not answered, so it is not part of the chat.
                for dialog, turns in zip(self._dialogs, before, strict=True):
                    del dialog.turns[turns:]
                console.print(Text(f"Error: {error}", style="red"))

    def _answer(self, line: str) -> None:
        for dialog in self._dialogs:
            dialog.say("user", line)
        self._asked += 1
        if len(self._dialogs) == 1:
            answer = self._answers.stream(self._dialogs[0], self._asked, _write)
            console.print()
            _note_cut([answer])
            return
        with console.status("writing …"):
            written = self._answers.answer(self._dialogs, self._asked)
        _side_by_side(self._dialogs, written)


def _side_by_side(dialogs: Sequence[Dialog], answers: Sequence[Answer]) -> None:
    """Show the answers of several iterates in columns."""
    table = Table(expand=True)
    for dialog in dialogs:
        table.add_column(dialog.contestant.label, ratio=1, overflow="fold")
    table.add_row(*(Text(answer.text) for answer in answers))
    console.print(table)
    _note_cut(answers)


def _note_cut(answers: Sequence[Answer]) -> None:
    cut = [answer.tokens for answer in answers if not answer.finished]
    if cut:
        console.print(Text(_CUT.format(max(cut)), style="dim"))


def _write(text: str) -> None:
    console.out(text, end="", highlight=False)
    console.file.flush()


def _readable(text: str) -> str:
    """Input without what is not UTF-8, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
