"""Benchmarks inside a run: flat arguments, no effect on training, scores in the records."""

import lightning as L
import pytest
from jsonargparse import ArgumentError, ArgumentParser

from spin_lightning.callbacks.evaluate_iterates import EvaluateIterates
from spin_lightning.errors import SettingError
from spin_lightning.evaluation.results import read_results
from spin_lightning.evaluation.settings import Answering, HarnessSettings, JudgeSettings
from spin_lightning.run.folder import RunFolder
from tests.evaluation.mt_bench.bench import write_chat_model, write_small_bench
from tests.evaluation.scripted_judge import scripted_judge
from tests.toys.runs import contents, play, write_examples
from tests.toys.tasks import write_tasks


def parsed(**arguments: object) -> EvaluateIterates:
    """The callback of a config with these arguments, read as the command line reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False)
    callback = {"class_path": "spin_lightning.EvaluateIterates", "init_args": arguments}
    config = parser.parse_object({"trainer": {"callbacks": [callback]}})
    (made,) = parser.instantiate(config).trainer.callbacks
    return made


def test_flat_arguments_of_a_config_reach_their_settings():
    made = parsed(
        tasks=["arc_challenge", "gsm8k"],
        num_fewshot=3,
        limit=16,
        batch_size=4,
        apply_chat_template=True,
        include_path="more",
        seed=7,
        mt_bench="bench",
        judge={"model": "m", "base_url": "http://localhost:1/v1"},
        max_new_tokens=12,
    )
    tasks = ("arc_challenge", "gsm8k")
    assert made._harness == HarnessSettings(tasks, 3, 16, 4, True, "more", 7)
    assert made._mt_bench == "bench"
    assert made._judge == JudgeSettings(model="m", base_url="http://localhost:1/v1")
    assert made._answering == Answering(max_new_tokens=12)


def test_arguments_that_a_config_leaves_out_have_the_defaults_of_their_settings():
    made = parsed(tasks=["gsm8k"])
    assert made._harness == HarnessSettings(("gsm8k",))
    assert made._judge == JudgeSettings()
    assert made._answering == Answering()


@pytest.mark.parametrize(
    "arguments", [{"limt": 4}, {"limit": "few"}, {"batch_size": "big"}, {"seed": 0.5}]
)
def test_argument_of_a_config_with_a_wrong_name_or_type_is_refused(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        parsed(tasks=["gsm8k"], **arguments)


def test_training_with_an_evaluation_after_every_iterate_is_the_same_training(
    tiny_model_dir, tmp_path
):
    toy_tasks = write_tasks(tmp_path / "tasks")
    data = write_examples(tmp_path / "examples.jsonl")
    evaluator = EvaluateIterates([str(toy_tasks)], limit=4)
    play(tmp_path / "plain", tiny_model_dir, data)
    play(tmp_path / "evaluated", tiny_model_dir, data, callbacks=[evaluator])
    assert contents(tmp_path / "evaluated") == contents(tmp_path / "plain")
    run = RunFolder(tmp_path / "evaluated")
    for metrics in (record.metrics for record in run.records()):
        assert 0 <= metrics["lm_eval/toy_choice/acc"] <= 1
        assert "lm_eval/toy_words/exact_match.first-word" in metrics
    assert len(read_results(run)) == 6


def test_harness_that_is_not_installed_is_one_error_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'spin-lightning\[eval\]'"):
        EvaluateIterates(["arc_challenge"])


def test_judge_inside_a_run_rates_every_iterate_and_its_outage_does_not_end_the_run(
    tiny_model_dir, tmp_path
):
    model = write_chat_model(tiny_model_dir, tmp_path / "model")
    bench = write_small_bench(tmp_path / "bench")
    data = write_examples(tmp_path / "examples.jsonl")

    def play_judged(name, reply):
        with scripted_judge(reply) as judge:
            settings = {"base_url": judge.base_url, "model": "scripted", "retries": 0}
            evaluator = EvaluateIterates(mt_bench=str(bench), judge=settings, max_new_tokens=12)
            play(tmp_path / name, model, data, epochs=1, callbacks=[evaluator])
        return [record.metrics for record in RunFolder(tmp_path / name).records()]

    judged = play_judged("judged", lambda *_: (200, "[[7]]"))
    assert [metrics["mt_bench/overall"] for metrics in judged] == [7.0, 7.0]
    without = play_judged("without", lambda *_: (500, "down"))
    assert not any("mt_bench/overall" in metrics for metrics in without)
    assert contents(tmp_path / "judged") == contents(tmp_path / "without")
    play(tmp_path / "plain", model, data, epochs=1)
    assert contents(tmp_path / "judged") == contents(tmp_path / "plain")


def test_judge_setting_with_a_typo_is_refused():
    with pytest.raises(SettingError, match=r"judge\.modle.*choose from base_url, model"):
        EvaluateIterates(mt_bench="bench", judge={"modle": "x"})


def test_evaluation_of_nothing_is_refused():
    with pytest.raises(SettingError, match=r"nothing to evaluate.*name a task, or mt_bench"):
        EvaluateIterates()
