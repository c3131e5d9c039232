"""Greedy and sampled answers to held-out prompts, compared with the data's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spin_lightning import SFT, AnswerMatch, load_iterate, load_rows
from spin_lightning.callbacks.answer_match import normalized
from spin_lightning.errors import SettingError
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Sun.", "sun"),
        ("  an  Apple, a day! ", "apple day"),
        ("3.14", "3.14"),
        ("1,000.", "1000"),
        ("theory", "theory"),
        ("co-operate", "cooperate"),
        ("ÄTHER", "äther"),
        ("a", ""),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(answer, expected):
    assert normalized(answer) == expected


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """Every answer is one of two words, so that a small model learns some of them by heart."""
    path = tmp_path_factory.mktemp("answers") / "data.jsonl"
    lines = [
        {"prompt": f"w{i % 7} w{i % 11} w{i % 13}", "response": "w1" if i % 3 else "w2 w3"}
        for i in range(96)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_metrics_are_those_of_plain_generation(tiny_model_dir, examples, tmp_path):
    _, data, _ = play(
        tmp_path,
        tiny_model_dir,
        examples,
        callbacks=[AnswerMatch(), AnswerMatch(r"(w\d)$", max_examples=5)],
        settings={"learning_rate": 3e-2},
        data_settings={"val_examples": 12, "batch_size": 8},
    )
    run = RunFolder(tmp_path)
    for t in (0, 1, 2):
        model, tokenizer = load_iterate(tmp_path, t)
        wanted = [tokenizer.decode(e.real_ids, skip_special_tokens=True) for e in data.val]
        answers = []
        for example in data.val:
            ids = torch.tensor([example.prompt_ids])
            made = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
            answers.append(tokenizer.decode(made, skip_special_tokens=True))
        metrics = run.record(t).metrics
        assert metrics is not None
        # The second callback has overwritten what both measure: it looks at five examples.
        right = [
            a[-2:] == w[-2:] and a[-2:-1] == "w"
            for a, w in zip(answers[:5], wanted[:5], strict=True)
        ]
        assert metrics["answers/exact_match"] == pytest.approx(np.mean(right))
        in_format = [a[-2:-1] == "w" for a in answers[:5]]
        assert metrics["answers/in_format"] == pytest.approx(np.mean(in_format))


def words(text: str) -> list[str]:
    """The words of a text of the tiny model that are not special tokens."""
    return [word for word in text.split() if not word.startswith("<")]


def test_exact_match_of_a_model_that_has_learned_some(tiny_model_dir, examples, tmp_path):
    _, data, _ = play(
        tmp_path,
        tiny_model_dir,
        examples,
        variant=SFT,
        callbacks=[AnswerMatch()],
        settings={"learning_rate": 3e-2},
        data_settings={"val_examples": 12, "batch_size": 8},
    )
    shares = []
    for t in (0, 1, 2):
        metrics = RunFolder(tmp_path).record(t).metrics
        assert metrics is not None
        rows = load_rows(tmp_path, t, held_out=True)
        real, generated = ([words(text) for text in rows[c]] for c in ("real", "generated"))
        sampled = [a == b for a, b in zip(real, generated, strict=True)]
        assert metrics["answers/exact_match_sampled"] == pytest.approx(np.mean(sampled))
        model, tokenizer = load_iterate(tmp_path, t)
        right = 0
        for example in data.val:
            ids = torch.tensor([example.prompt_ids])
            made = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
            right += words(tokenizer.decode(made)) == words(tokenizer.decode(example.real_ids))
        assert metrics["answers/exact_match"] == pytest.approx(right / 12)
        shares.append(metrics["answers/exact_match"])
    assert max(shares) > 0, "the test compares something"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "####"}, r"pattern='####': it has no group"),
        ({"pattern": "("}, r"pattern='\(': .*one group"),
        ({"max_examples": 0}, r"max_examples=0: out of range"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(SettingError, match=message):
        AnswerMatch(**settings)


def test_nothing_held_out_is_refused_before_anything_is_generated(
    tiny_model_dir, examples, tmp_path
):
    with pytest.raises(SettingError, match="AnswerMatch compares answers to held-out prompts"):
        play(
            tmp_path,
            tiny_model_dir,
            examples,
            callbacks=[AnswerMatch()],
            data_settings={"val_fraction": 0.0},
        )
    assert not (tmp_path / "rows").exists()
