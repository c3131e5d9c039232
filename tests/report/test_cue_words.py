"""Cues and tells in words."""

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from spin_lightning.report.cue_words import (
    best_cue_line,
    clear_cues,
    cue_words,
    special_ids,
    tell_rows,
)
from spin_lightning.rows.cues import Cue
from spin_lightning.rows.tells import find_tells
from tests.toys.rows import table_with

# Ids of the tiny tokenizer: w0 is 4, so that 9 is w5.
STOP, W5, W6, W7 = 2, 9, 10, 11


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_special_tokens_are_all_added_ones_but_runs_of_blanks(tokenizer):
    assert special_ids(tokenizer) == {0, 1, 2, 3}
    # As Qwen3's: not marked as special. As Pythia's and Gemma's: blanks.
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("  "), AddedToken("▁▁\n")])
    think, *_ = tokenizer.convert_tokens_to_ids(["<think>"])
    assert special_ids(tokenizer) == {0, 1, 2, 3, think}


@pytest.mark.parametrize(
    ("cue", "words"),
    [
        (("first_token", W5, True), '"w5" starts real responses'),
        (("last_token", STOP, False), '"</s>" ends generated responses'),
        (("special_token", STOP, True), '"</s>" is in real responses'),
        (("first_token", -1, False), "nothing starts generated responses"),
        (("length", 12, True), "real responses have 12 tokens or more"),
        (("length", 12, False), "generated responses have 12 tokens or more"),
        (("finished", 1, True), "real responses end more often"),
    ],
)
def test_rule_of_a_cue_in_words(cue, words, tokenizer):
    name, value, real = cue
    assert cue_words(Cue(name, 0.9, True, value, real), tokenizer) == words


def test_best_cue_is_named_if_chance_does_not_explain_it(tokenizer):
    tells = find_tells(table_with([[W5, W7]] * 20, [[W6, W7]] * 20))
    assert best_cue_line(tells, tokenizer) == (
        'Best single cue: first token, 1.00 ("w5" starts real responses).'
    )
    assert clear_cues(tells, tokenizer) == {"first_token": '"w5" starts real responses'}
    same = find_tells(table_with([[W5, W7]] * 20, [[W5, W7]] * 20))
    assert best_cue_line(same, tokenizer) == (
        "Best single cue: none above chance (finished or not, 0.50)."
    )
    assert clear_cues(same, tokenizer) == {}


def test_tokens_and_pairs_are_rows_of_text(tokenizer):
    tells = find_tells(table_with([[W5, W7]] * 20, [[W6, W7]] * 20))
    # log(20.5 / 0.5) twice is 7.43, sqrt(40) is 6.3.
    assert tell_rows([*tells.tokens, *tells.pairs], tokenizer) == [
        ("real", '"w5"', "20", "0", "+7.43", "+6.3"),
        ("generated", '"w6"', "0", "20", "-7.43", "-6.3"),
        ("real", '"w5 w7"', "20", "0", "+7.43", "+6.3"),
        ("generated", '"w6 w7"', "0", "20", "-7.43", "-6.3"),
    ]
