"""Tasks of lm-evaluation-harness over local files, for the tiny model of the tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

CHOICE = """\
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {folder}/choices.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""
WORDS = """\
task: toy_words
dataset_path: json
dataset_kwargs:
  data_files: {folder}/words.jsonl
test_split: train
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: answer
generation_kwargs:
  until: ["</s>"]
  max_gen_toks: 4
  do_sample: false
filter_list:
  - name: first-word
    filter:
      - function: regex
        regex_pattern: "(w[0-9])"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""


def write_tasks(folder: Path, documents: int = 30) -> Path:
    """A multiple-choice and a generation task of random words, with their data beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(3)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(10)}" for _ in range(count))

    choices = [
        {"q": words(3), "choices": [words(3) for _ in range(4)], "gold": draw.randrange(4)}
        for _ in range(documents)
    ]
    answers = [{"q": words(3), "answer": words(1)} for _ in range(documents)]
    for name, rows in (("choices", choices), ("words", answers)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "toy_choice.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "toy_words.yaml").write_text(WORDS.format(folder=folder))
    return folder
