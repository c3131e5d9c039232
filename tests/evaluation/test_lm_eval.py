"""lm-evaluation-harness on iterates: its own scores, one loaded base, no side effects."""

import logging
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from spin_lightning.errors import DataError, SettingError
from spin_lightning.evaluation.base import EvaluatedRun, evaluate_run
from spin_lightning.evaluation.contestants import contestants
from spin_lightning.evaluation.harness_model import PolicyLM
from spin_lightning.evaluation.lm_eval import Harness
from spin_lightning.evaluation.presets import OFFLINE_TASKS, PRESETS
from spin_lightning.evaluation.results import read_results
from spin_lightning.evaluation.settings import HarnessSettings
from spin_lightning.export.model import export_iterate
from spin_lightning.mixtures import Mixture, latest
from spin_lightning.policies import lora
from spin_lightning.policies.saved import load_policy, load_tokenizer
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples

# The same text, from contents as lists of parts and from plain ones.
PARTS = (
    "{% for m in messages %}{{ '[' + m.role + '] ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
TEXT = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture
def run(finished_run, tmp_path) -> RunFolder:
    """A copy that can be written to."""
    shutil.copytree(finished_run.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Names of the bases that were loaded."""
    seen = []
    load = lora.load_base

    def counted(base, device="cpu"):
        seen.append(base.name)
        return load(base, device)

    monkeypatch.setattr(lora, "load_base", counted)
    return seen


def evaluate(run: RunFolder, names: list[str], *tasks: object, **settings: object):
    harness = Harness(HarnessSettings(tasks=tuple(map(str, tasks)), **settings))
    return {one.name: results for one, results in evaluate_run(run, names, [harness])}


def by_hand(model: Path, tasks: Path) -> dict[str, dict[str, float]]:
    """The harness's own evaluation of a model folder."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    answer = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={model},dtype=float32",
        tasks=["toy_choice", "toy_words"],
        task_manager=manager,
        device="cpu",
        batch_size=4,
    )
    return answer["results"]


@pytest.mark.parametrize("t", [0, 2])
def test_scores_equal_the_harness_by_hand_on_the_exported_merged_model(t, run, toy_tasks, tmp_path):
    export_iterate(run.root, t, tmp_path / "merged", merge=True)
    wanted = by_hand(tmp_path / "merged", toy_tasks)
    choice, words = evaluate(run, [str(t)], toy_tasks)[f"iterate_00{t}"]
    for name in ("acc", "acc_norm"):
        assert choice.scores[name] == pytest.approx(wanted["toy_choice"][f"{name},none"], abs=1e-6)
        assert choice.scores[f"{name}_error"] == pytest.approx(
            wanted["toy_choice"][f"{name}_stderr,none"], abs=1e-6
        )
    assert words.scores["exact_match.first-word"] == pytest.approx(
        wanted["toy_words"]["exact_match,first-word"], abs=1e-6
    )


def test_scores_of_some_iterates_differ(run, toy_tasks):
    found = evaluate(run, [], toy_tasks)
    assert len({results[0].scores["acc"] for results in found.values()}) > 1


def test_five_iterates_and_their_mixture_load_the_base_once(run, toy_tasks, loads):
    found = evaluate(run, ["all", "mixture"], toy_tasks, limit=4)
    assert list(found) == [*(f"iterate_00{t}" for t in range(5)), "mixture"]
    assert len(loads) == 1


def test_each_task_is_announced_and_timed_unless_it_is_known(run, toy_tasks, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        evaluate(run, ["1"], toy_tasks, limit=4)
        lines = [line for line in caplog.messages if line.startswith("p1: ")]
        assert [re.sub(r"\d+\.\d min", "N min", line) for line in lines] == [
            "p1: toy_choice …",
            "p1: toy_choice took N min",
            "p1: toy_words …",
            "p1: toy_words took N min",
        ]
        caplog.clear()
        evaluate(run, ["1"], toy_tasks, limit=4)
        assert not [line for line in caplog.messages if line.startswith("p1: ")]


def test_second_evaluation_reads_what_is_known_and_loads_nothing(run, toy_tasks, loads):
    first = evaluate(run, ["1"], toy_tasks, limit=4)
    assert evaluate(run, ["1"], toy_tasks, limit=4) == first
    assert len(loads) == 1
    evaluate(run, ["1"], toy_tasks, limit=5)
    assert len(loads) == 2, "another limit is another evaluation"
    assert len(read_results(run)) == 4


def test_evaluation_cut_off_goes_on_after_the_last_finished_task(run, toy_tasks, monkeypatch):
    asked = []
    ask = lm_eval.simple_evaluate

    def dies_at_the_third(*args, **kwargs):
        asked.append(kwargs["tasks"][0])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(*args, **kwargs)

    monkeypatch.setattr(lm_eval, "simple_evaluate", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, ["0", "1"], toy_tasks, limit=4)
    evaluate(run, ["0", "1"], toy_tasks, limit=4)
    assert asked == ["toy_choice", "toy_words", "toy_choice", "toy_choice", "toy_words"]


def test_task_whose_data_changed_is_measured_again(run, toy_tasks, tmp_path, loads):
    shutil.copytree(toy_tasks, tmp_path / "tasks")
    evaluate(run, ["1"], tmp_path / "tasks", limit=4)
    with (tmp_path / "tasks" / "choices.jsonl").open("a") as file:
        file.write('{"q": "w1", "choices": ["w1", "w2", "w3", "w4"], "gold": 0}\n')
    evaluate(run, ["1"], tmp_path / "tasks", limit=4)
    assert len(loads) == 2


def test_result_of_an_iterate_that_was_trained_again_does_not_count(run, toy_tasks):
    evaluate(run, ["1"], toy_tasks, limit=4)
    run.write_record(replace(run.record(1), files={"adapter_model.safetensors": "another"}))
    assert read_results(run) == []


def test_result_keeps_what_is_needed_to_repeat_it(run, toy_tasks):
    ((choice, words),) = evaluate(run, ["2"], toy_tasks, limit=6, num_fewshot=2).values()
    assert choice.settings["harness"] == f"lm_eval {lm_eval.__version__}"
    assert choice.settings["seeds"] == [0, 1234, 1234, 1234]
    assert choice.settings["apply_chat_template"] is False
    assert choice.details["task_versions"] == {"toy_choice": 1.0}
    assert choice.details["num_fewshot"] == {"toy_choice": 2}
    assert choice.details["samples"] == {"toy_choice": {"original": 30, "effective": 6}}
    assert words.details["task_versions"] == {"toy_words": 2.0}
    assert words.details["versions"]["torch"] == torch.__version__


def test_evaluation_leaves_policy_and_random_states_bit_identical(
    tiny_model_dir, toy_tasks, tmp_path
):
    data = write_examples(tmp_path / "examples.jsonl")
    module, _, _ = play(tmp_path / "run", tiny_model_dir, data, settings={"lora_dropout": 0.1})
    run, policy = RunFolder(tmp_path / "run"), module.policy
    policy.use_iterates(run.iterate_folders())

    def state():
        return (
            {name: value.clone() for name, value in policy.state_dict().items()},
            {name: p.requires_grad for name, p in policy.named_parameters()},
            {name: m.training for name, m in policy.named_modules()},
            (torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
            (module.tokenizer.pad_token, module.tokenizer.padding_side),
        )

    before = state()
    harness = Harness(HarnessSettings(tasks=(str(toy_tasks),), limit=4))
    evaluated = EvaluatedRun(run, lambda: policy, module.tokenizer, module.make_generator)
    for one in contestants(run, ["all", "mixture"]):
        harness.evaluate(evaluated, one)
    after = state()
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:3] == after[1:3]
    assert before[4] == after[4]
    assert torch.equal(before[3][0], after[3][0])
    assert all(np.array_equal(a, b) for a, b in zip(before[3][1], after[3][1], strict=True))
    assert before[3][2] == after[3][2]


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_mixture_log_likelihood_is_the_log_of_the_weighted_mean(run):
    policy, tokenizer = load_policy(run.root), load_tokenizer(run.root)
    asked = [request("loglikelihood", "w1 w2", " w3 w4"), request("loglikelihood", "w5", " w6")]
    model = PolicyLM(policy, tokenizer, latest(1), batch_size=2)
    alone = {}
    for t in (1, 3):
        model.mixture = latest(t)
        alone[t] = model.loglikelihood(asked)
    model.mixture = Mixture({1: 0.25, 3: 0.75})
    for i, (logp, greedy) in enumerate(model.loglikelihood(asked)):
        (logp_1, greedy_1), (logp_3, greedy_3) = alone[1][i], alone[3][i]
        wanted = math.log(0.25 * math.exp(logp_1) + 0.75 * math.exp(logp_3))
        assert logp == pytest.approx(wanted, abs=1e-9)
        assert greedy == (greedy_1 and greedy_3)


def test_mixture_responses_are_each_some_members_and_the_same_every_time(run):
    policy, tokenizer = load_policy(run.root), load_tokenizer(run.root)
    options = {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}
    asked = [request("generate_until", f"w{i} w{j}", options) for i in range(6) for j in range(6)]
    model = PolicyLM(policy, tokenizer, latest(0), batch_size=8)
    alone = {}
    for t in (0, 4):
        model.mixture = latest(t)
        alone[t] = model.generate_until(asked)
    model.mixture = Mixture({0: 0.5, 4: 0.5})
    mixed = model.generate_until(asked)
    assert mixed == model.generate_until(asked)
    either = zip(alone[0], alone[4], strict=True)
    assert all(text in pair for text, pair in zip(mixed, either, strict=True))
    assert mixed not in alone.values()


def test_preset_asks_for_the_leaderboards_tasks_and_takes_their_mean(run, monkeypatch):
    values = {
        "arc_challenge": (25, "acc_norm,none", 0.60),
        "hellaswag": (10, "acc_norm,none", 0.80),
        "mmlu": (5, "acc,none", 0.55),
        "truthfulqa_mc2": (0, "acc,none", 0.40),
        "winogrande": (5, "acc,none", 0.75),
        "gsm8k": (5, "exact_match,strict-match", 0.20),
    }
    seen = {}

    def answered(model, tasks, num_fewshot, **_):
        (task,) = tasks
        seen[task] = num_fewshot
        _, metric, value = values[task]
        return {
            "results": {task: {"alias": task, metric: value, "sample_len": 10}},
            "higher_is_better": {task: {metric.partition(",")[0]: True}},
            "versions": {task: 1.0},
            "n-shot": {task: num_fewshot},
            "n-samples": {task: {"original": 10, "effective": 10}},
        }

    monkeypatch.setattr(lm_eval, "simple_evaluate", answered)
    (results,) = evaluate(run, ["1"], "open_llm_leaderboard").values()
    assert seen == {task: shots for task, (shots, _, _) in values.items()}
    assert len(results) == 7
    assert results[-1].benchmark == "lm_eval/open_llm_leaderboard"
    # (0.60 + 0.80 + 0.55 + 0.40 + 0.75 + 0.20) / 6 = 3.30 / 6
    assert results[-1].scores == {"mean": pytest.approx(0.55, abs=1e-12)}


def test_preset_tasks_are_known_to_the_harness():
    known = {*TaskManager().all_tasks, *OFFLINE_TASKS}
    assert all(one.task in known for preset in PRESETS.values() for one in preset)


@pytest.mark.parametrize(
    ("task", "message"),
    [("arc_chalenge", "no such task"), ("arc_chal", "arc_challenge"), ("{empty}", "no task")],
)
def test_task_that_is_not_there_is_refused(task, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        Harness(HarnessSettings(tasks=(task.format(empty=tmp_path),)))


def test_task_without_its_data_is_named(run, toy_tasks, tmp_path):
    shutil.copytree(toy_tasks, tmp_path / "tasks")
    yaml = tmp_path / "tasks" / "toy_choice.yaml"
    yaml.write_text(yaml.read_text().replace("choices.jsonl", "nowhere.jsonl"))
    with pytest.raises(DataError, match="toy_choice"):
        evaluate(run, ["0"], tmp_path / "tasks")


# ------------------------------------------------------------------------------ chat templates


def test_template_of_a_vision_model_gets_parts(run, tmp_path):
    """Such a template writes nothing of a content that is plain text."""
    tokenizer, policy = load_tokenizer(run.root), load_policy(run.root)
    turns = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
    ]
    written = {}
    for name, template in (("parts", PARTS), ("text", TEXT)):
        tokenizer.chat_template = template
        model = PolicyLM(policy, tokenizer, latest(1), 1)
        written[name] = (
            model.apply_chat_template(turns),
            model.apply_chat_template(turns[:2], add_generation_prompt=False),
        )
    assert (
        written["parts"]
        == written["text"]
        == (
            "[user] w1 w2 [assistant] w3 [user] w4 [assistant] ",
            "[user] w1 w2 [assistant] w3",
        )
    )
