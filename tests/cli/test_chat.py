"""Chats with iterates of a run."""

import builtins
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from spin_lightning import load_iterate
from spin_lightning.cli.chat_answers import Answers, ChatSettings
from spin_lightning.run.folder import RunFolder
from tests.toys.models import write_tiny_model
from tests.toys.runs import play, write_examples

# Writes words only, so that the word-level tokenizer reads it back: w17 opens a system turn, w18 a
# user's turn, w19 an answer.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w17 ', 'user': 'w18 ', 'assistant': 'w19 '}[m.role] }}"
    "{{ m.content }}{{ ' </s> ' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w19 ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory) -> Path:
    """A run of a model with a chat template; long answers fit."""
    root = tmp_path_factory.mktemp("chat")
    model = write_tiny_model(root / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    play(root / "run", model, write_examples(root / "examples.jsonl"), epochs=2)
    return root / "run"


def greedy(run: Path, t: int, text: str, tokens: int = 8) -> str:
    """What transformers' own `generate` writes after a text with special tokens."""
    model, tokenizer = load_iterate(run, t)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
        )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def typed(monkeypatch, *lines: str) -> list[str]:
    """Make `input` return these lines, then the end of the input."""
    waiting = list(lines)

    def read(prompt: str = "") -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr(builtins, "input", read)
    return waiting


def test_prompt_of_one_iterate_prints_the_answer_alone(chat_run, spin, capsys):
    spin("chat", chat_run, "--iterates", 1, "--prompt", "w1 w2", "--temperature", 0)
    assert capsys.readouterr().out == greedy(chat_run, 1, "w18 w1 w2 w19") + "\n"


def test_prompt_without_a_template_is_plain_text(finished, spin, capsys):
    spin("chat", finished, "--prompt", "w1 w2", "--temperature", 0)
    assert capsys.readouterr().out == greedy(finished, 2, "<s> w1 w2") + "\n"


def test_prompts_of_several_iterates_are_labeled(chat_run, spin, capsys):
    spin("chat", chat_run, "--iterates", 0, 2, "--prompt", "w1", "w2 w3", "--temperature", 0)
    said = {
        (t, prompt): greedy(chat_run, t, f"w18 {prompt} w19")
        for t in (0, 2)
        for prompt in ("w1", "w2 w3")
    }
    assert capsys.readouterr().out == (
        f"> w1\np0: {said[0, 'w1']}\np2: {said[2, 'w1']}\n\n"
        f"> w2 w3\np0: {said[0, 'w2 w3']}\np2: {said[2, 'w2 w3']}\n"
    )


def test_prompt_cut_off_is_said_beside_the_answer(chat_run, spin, capsys):
    options = ("--temperature", 0, "--max_tokens", 2)
    spin("chat", chat_run, "--iterates", 0, "--prompt", "w1 w2", *options)
    told = capsys.readouterr()
    assert told.out == greedy(chat_run, 0, "w18 w1 w2 w19", tokens=2) + "\n"
    assert told.err == "[cut off after 2 tokens; --max_tokens sets the cap]\n"


def test_prompt_sampled_depends_on_the_seed_alone(chat_run, spin, capsys):
    texts = []
    for seed in (0, 0, 1):
        spin("chat", chat_run, "--prompt", "w1 w2", "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_system_turn_comes_first(chat_run, spin, capsys):
    options = ("--temperature", 0, "--system", "w5 w6")
    spin("chat", chat_run, "--iterates", 2, "--prompt", "w1 w2", *options)
    assert capsys.readouterr().out == greedy(chat_run, 2, "w17 w5 w6 w18 w1 w2 w19") + "\n"


def test_chat_streams_the_answers_and_keeps_the_turns_until_reset(
    chat_run, spin, monkeypatch, capsys
):
    left = typed(monkeypatch, "w1", "", "w2", "/what", "/reset", "w2", "/quit", "w3")
    spin("chat", chat_run, "--iterates", 1, "--temperature", 0)
    assert left == ["w3"]
    first = greedy(chat_run, 1, "w18 w1 w19")
    second = greedy(chat_run, 1, f"w18 w1 w19 {first} </s> w18 w2 w19")
    alone = greedy(chat_run, 1, "w18 w2 w19")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "Chat with p1. /reset starts over, /quit ends the chat."
    lines = [line for line in lines if not line.startswith("[cut off")]
    assert lines == [
        first,
        second,
        "There is no /what: /reset starts over, /quit ends the chat.",
        "The chat starts over.",
        alone,
    ]


def test_chat_with_two_iterates_shows_both_and_each_keeps_its_own_turns(
    chat_run, spin, monkeypatch, capsys
):
    typed(monkeypatch, "w1", "w2")
    spin("chat", chat_run, "--iterates", 0, 2, "--temperature", 0)
    page = " ".join(capsys.readouterr().out.split())
    assert "Chat with p0 and p2." in page
    for t in (0, 2):
        first = greedy(chat_run, t, "w18 w1 w19")
        assert first in page
        assert greedy(chat_run, t, f"w18 w1 w19 {first} </s> w18 w2 w19") in page


def test_chat_without_a_template_says_that_prompts_stand_alone(finished, spin, monkeypatch, capsys):
    typed(monkeypatch, "w1", "w2")
    spin("chat", finished, "--iterates", 2, "--temperature", 0)
    page = capsys.readouterr().out
    assert "every prompt is answered by itself" in page
    assert greedy(finished, 2, "<s> w2") in page


def test_chat_that_fills_the_context_says_so_and_goes_on(chat_run, spin, monkeypatch, capsys):
    typed(monkeypatch, " ".join(["w1"] * 64), "w2")
    spin("chat", chat_run, "--iterates", 1, "--temperature", 0)
    page = capsys.readouterr().out
    assert "Error: a prompt of 66 tokens leaves no room" in page
    assert greedy(chat_run, 1, "w18 w2 w19") in page


def test_streamed_answer_is_the_answer(chat_run):
    answers = Answers(RunFolder(chat_run), ["2"], ChatSettings(seed=3))
    texts = []
    for streams in (True, False):
        (dialog,) = answers.dialogs()
        dialog.say("user", "w1 w2")
        if streams:
            bits: list[str] = []
            texts.append(answers.stream(dialog, 1, bits.append).text)
            assert "".join(bits).rstrip() == texts[0]
        else:
            texts.append(answers.answer([dialog], 1)[0].text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mode", ["refuse", "drop"])
def test_thoughts_are_treated_as_the_run_treated_them(mode, chat_run, tmp_path):
    data, model = write_examples(tmp_path / "data.jsonl"), chat_run.parent / "model"
    play(tmp_path / "run", model, data, epochs=1, data_settings={"thoughts": mode})
    answers = Answers(RunFolder(tmp_path / "run"), ["1"], ChatSettings())
    answers.load()
    assert answers._format.thoughts == mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}"], "has no iterate 0"),
        (["{run}", "--iterates", "7"], "has no iterate 7"),
        (["{run}", "--iterates", "first"], "there is no such iterate"),
        (["{run}", "--max_tokens", "0"], "max_tokens=0: "),
        (["{run}", "--temperature", "-1"], "temperature=-1.0: "),
        (["{run}", "--system", "w1"], "no chat template to write it. Fix: leave --system out"),
        (["{run}", "--prompt", " ".join(["w1"] * 64)], "leaves no room for an answer"),
    ],
)
def test_chat_that_cannot_be_says_what_to_do(arguments, message, finished, spin, tmp_path, capsys):
    places = {"run": str(finished), "out": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as end:
        spin("chat", *(argument.format(**places) for argument in arguments))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["\x04", "\x03"], ids=["ctrl-d", "ctrl-c"])
def test_chat_typed_in_a_terminal(ending, chat_run):
    seen, process, terminal = b"", *_in_a_terminal("chat", str(chat_run), "--iterates", "2")
    try:
        for line in (b"w1 w2\r", b"w3 w4\r"):
            seen = _until(terminal, b"> ", seen)
            os.write(terminal, line)
        seen = _until(terminal, b"> ", seen)
        os.write(terminal, ending.encode())
        # A Ctrl-C between the prompt and the waiting for a key is seen with the next one.
        while not select.select([terminal], [], [], 10.0)[0]:
            os.write(terminal, ending.encode())
        seen += _rest(terminal)
        process.wait(timeout=60)
        assert process.returncode == (0 if ending == "\x04" else 130)
    finally:
        process.kill()
        os.close(terminal)
    text = seen.decode()
    assert "Chat with p2." in text
    assert "w3 w4" in text  # echoed
    assert "Traceback" not in text
    assert ("Stopped." in text) == (ending == "\x03")


def _in_a_terminal(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    ours, theirs = pty.openpty()
    call = [sys.executable, "-m", "spin_lightning", *arguments]
    process = subprocess.Popen(
        call,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    return process, ours


def _take_terminal() -> None:
    """Let the terminal send Ctrl-C to this process, also where the test's parent ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _until(terminal: int, end: bytes, seen: bytes) -> bytes:
    """Read until the terminal shows `end` once more at the end of its output."""
    before, deadline = len(seen), time.monotonic() + 120
    while not (len(seen) > before and seen.rstrip(b"\x1b[?2004h").endswith(end)):
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 4096)
    return seen


def _rest(terminal: int) -> bytes:
    """Everything until the other side closes."""
    rest = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux ends a terminal
            return rest
        if not part:
            return rest
        rest += part
