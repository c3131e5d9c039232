"""Results of benchmarks: stored once per settings, and compared only under the same settings."""

import json
from dataclasses import replace

import pytest

from spin_lightning.errors import RunFolderError
from spin_lightning.evaluation.contestants import iterate_contestant
from spin_lightning.evaluation.results import (
    Result,
    cached_result,
    read_result,
    read_results,
    score_lines,
    score_table,
    write_result,
)
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord

SETTINGS = {"harness": "lm_eval 1", "num_fewshot": 5}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """The records of three iterates, the first two with results."""
    run = RunFolder(tmp_path / "run")
    for t in range(3):
        run.write_record(IterateRecord(t, fingerprint=f"of {t}"))
    for t, score in enumerate((0.25, 0.5)):
        write_result(run, result_of(run, t, score))
    return run


def result_of(run: RunFolder, t: int, score: float, **fields: object) -> Result:
    one = iterate_contestant(run, t)
    scores = {"acc": score, "acc_error": 0.01}
    return replace(Result(one.name, one.identity, "lm_eval/task", SETTINGS, scores), **fields)


def test_result_is_read_back_as_it_was_written(run):
    details = {"versions": {"torch": "2"}}
    written = result_of(run, 2, 1.0, lower_is_better=("acc",), details=details)
    write_result(run, written)
    (path,) = run.evaluation("iterate_002").glob("*.json")
    assert path.name.startswith("lm_eval_task-")
    assert read_result(path) == written
    assert written.metrics == {"lm_eval/task/acc": 1.0, "lm_eval/task/acc_error": 0.01}


def test_cached_result_is_that_of_the_same_weights_and_settings(run):
    one = iterate_contestant(run, 1)
    assert cached_result(run, one, "lm_eval/task", SETTINGS) == result_of(run, 1, 0.5)
    assert cached_result(run, one, "lm_eval/task", {**SETTINGS, "num_fewshot": 0}) is None
    assert cached_result(run, one, "lm_eval/other", SETTINGS) is None
    trained_again = replace(one, identity="another")
    assert cached_result(run, trained_again, "lm_eval/task", SETTINGS) is None


def test_results_of_weights_that_are_gone_are_left_out(run):
    assert [result.contestant for result in read_results(run)] == ["iterate_000", "iterate_001"]
    run.write_record(replace(run.record(0), fingerprint="of another run"))
    assert [result.contestant for result in read_results(run)] == ["iterate_001"]
    assert read_results(run, run.records()) == read_results(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contestant": 1}, "its 'contestant' is not a string"),
        ({"scores": {"acc": "high"}}, "its 'scores' is not an object of numbers"),
        ({"lower_is_better": [1]}, "its 'lower_is_better' is not a list of strings"),
        ({"color": "blue"}, "its 'color' is not a field of this version"),
    ],
)
def test_damaged_result_is_one_error_with_the_field(changes, message, run):
    (path,) = run.evaluation("iterate_001").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RunFolderError, match=rf"is damaged \({message}\). Fix: delete it"):
        read_results(run)


def test_scores_of_other_settings_are_not_put_side_by_side(run):
    write_result(run, result_of(run, 2, 0.9, settings={**SETTINGS, "harness": "lm_eval 2"}))
    lines = score_lines(read_results(run))
    assert sorted(sorted(line.scores) for line in lines) == [["p0", "p1"], ["p2"]]
    best = {tuple(sorted(line.scores)): line.best for line in lines}
    assert best == {("p0", "p1"): "p1", ("p2",): None}


def test_metric_that_should_be_small_has_its_best_at_the_small_end(run):
    results = [
        result_of(run, t, score, lower_is_better=("acc",))
        for t, score in enumerate((0.4, 0.1, 0.3))
    ]
    (line,) = score_lines(results)
    assert line.best == "p1"


def test_table_marks_the_best_and_shows_errors(run):
    write_result(run, result_of(run, 2, 3.0, benchmark="mt_bench", scores={"overall": 3.0}))
    assert score_table(read_results(run)) == [
        ["score", "p0", "p1", "p2"],
        ["lm_eval/task/acc", "0.2500 ±0.0100", "0.5000 ±0.0100*", "-"],
        ["mt_bench/overall", "-", "-", "3.0000"],
    ]


def test_table_has_iterates_in_order_and_the_mixture_last(run):
    run.write_record(IterateRecord(10))
    names = {10: 0.1, 2: 0.3}
    results = [result_of(run, t, score) for t, score in names.items()]
    mixture = replace(result_of(run, 2, 0.2), contestant="mixture")
    table = score_table([mixture, *results, *read_results(run)])
    assert table[0] == ["score", "p0", "p1", "p2", "p10", "mixture"]


def test_equal_best_scores_have_no_mark(run):
    results = [result_of(run, t, score) for t, score in enumerate((0.25, 0.5, 0.5))]
    (line,) = score_lines(results)
    assert line.best is None
    assert "*" not in "".join(score_table(results)[1])


def test_lines_of_one_metric_say_what_tells_them_apart(run):
    limited = result_of(run, 0, 0.75, settings={**SETTINGS, "limit": 20})
    other = result_of(run, 0, 0.5, benchmark="lm_eval/other")
    table = score_table([*read_results(run), limited, other])
    assert [row[0] for row in table[1:]] == [
        "lm_eval/task/acc (no limit)",
        "lm_eval/task/acc (limit 20)",
        "lm_eval/other/acc",
    ]
