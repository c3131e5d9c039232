"""Small files in the form of MT-Bench's, and the ratings of a run on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spin_lightning.evaluation.base import evaluate_run
from spin_lightning.evaluation.contestants import contestants
from spin_lightning.evaluation.mt_bench.benchmark import MTBench
from spin_lightning.evaluation.mt_bench.data import TURNS, Query, read_mt_bench
from spin_lightning.evaluation.results import Result
from spin_lightning.evaluation.settings import Answering, JudgeSettings
from spin_lightning.run.folder import RunFolder

CATEGORIES = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)
# Joins two turns, so that a model of words is a chat model.
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' if m.role == 'user' else ' w1 ' }}{{ m.content }}"
    "{{ ' </s> ' if m.role == 'assistant' }}{% endfor %}"
    "{{ ' w1 ' if add_generation_prompt }}"
)
SINGLE = "Rate this.\n{question}\n---\n{answer}"
SINGLE_2 = "Rate the second.\n{question_1}\n{answer_1}\n{question_2}\n---\n{answer_2}"


def write_small_bench(folder: Path) -> Path:
    """Eight categories with two questions each, in the form of FastChat's files."""
    folder.mkdir(parents=True)
    questions, references, number = [], [], 0
    for k, category in enumerate(CATEGORIES):
        for i in range(2):
            turns = [f"w{k} w{i} w2", f"w{i} w{k} w9"]
            questions.append({"question_id": number, "category": category, "turns": turns})
            if category in ("math", "reasoning", "coding"):
                choice = {"index": 0, "turns": [f"reference {number}", f"second {number}"]}
                references.append({"question_id": number, "choices": [choice]})
            number += 1
    reference = "\n<ref>{ref_answer_1}</ref>"
    texts = {
        "single-v1": SINGLE,
        "single-math-v1": SINGLE + reference,
        "single-v1-multi-turn": SINGLE_2,
        "single-math-v1-multi-turn": SINGLE_2 + reference + "<ref>{ref_answer_2}</ref>",
        "pair-v2": "{question}\nA: {answer_a}\nB: {answer_b}",
        "pair-math-v1": "{question}\nA: {answer_a}\nB: {answer_b}" + reference,
        "pair-v2-multi-turn": "{question_2}\nA: {answer_a_2}\nB: {answer_b_2}",
        "pair-math-v1-multi-turn": "{question_2}\nA: {answer_a_2}\nB: {answer_b_2}" + reference,
    }
    prompts = [
        {"name": name, "system_prompt": f"system of {name}", "prompt_template": text}
        for name, text in texts.items()
    ]
    for name, rows in (
        ("question.jsonl", questions),
        ("judge_prompts.jsonl", prompts),
        ("reference_answer_gpt-4.jsonl", references),
    ):
        (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def write_chat_model(tiny: Path, folder: Path) -> Path:
    """The tiny model with a chat template, and a context for two turns."""
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.max_position_embeddings = 512
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rate(
    run: RunFolder,
    source: Path,
    base_url: str,
    names: tuple[str, ...] = ("1",),
    versus: str | None = None,
) -> list[Result]:
    """The results of some iterates, judged by the server at `base_url`."""
    settings = JudgeSettings(base_url=base_url, model="scripted")
    rival = contestants(run, [versus])[0] if versus else None
    benchmark = MTBench(str(source), settings, Answering(max_new_tokens=12), rival)
    return [r for _, results in evaluate_run(run, names, [benchmark]) for r in results]


def queries(source: Path) -> list[Query]:
    """A query on each turn of each question."""
    data = read_mt_bench(str(source))
    return [data.single(q, turn, ("one", "two")) for q in data.questions for turn in TURNS]
