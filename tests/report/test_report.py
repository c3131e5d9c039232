"""The report: one self-contained page with the content of the runs' files."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from spin_lightning.errors import RunFolderError
from spin_lightning.evaluation.contestants import iterate_contestant
from spin_lightning.evaluation.results import Result, write_result
from spin_lightning.report.figures import curve_figure
from spin_lightning.report.measures import MEASURES
from spin_lightning.report.report import write_report
from spin_lightning.report.run_view import config_differences, read_runs
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def make_runs(finished_run: RunFolder, folder: Path) -> list[RunFolder]:
    """Two copies of the same name, each with its own configuration and scores."""
    runs = []
    for place, rate, scores in (("a", 0.003, (0.2, 0.5, 0.4)), ("b", 0.001, (0.3, 0.1, 0.2))):
        run = RunFolder(folder / place / "run")
        shutil.copytree(finished_run.root, run.root)
        (run.root / "config.yaml").write_text(
            f"seed_everything: 1\nmodel:\n  init_args:\n    learning_rate: {rate}\n"
            f"trainer:\n  default_root_dir: {run.root}\n"
        )
        for t, score in enumerate(scores):
            settings = {"harness": "lm_eval 1", "num_fewshot": 5}
            write_result(run, result_of(run, t, score, settings))
        runs.append(run)
    return runs


@pytest.fixture
def two_runs(finished_run, tmp_path) -> list[RunFolder]:
    return make_runs(finished_run, tmp_path)


@pytest.fixture(scope="module")
def page_path(finished_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(read_runs(make_runs(finished_run, folder)), folder / "out")


@pytest.fixture(scope="module")
def page(page_path) -> str:
    return page_path.read_text()


def result_of(run: RunFolder, t: int, score: float, settings: dict) -> Result:
    one = iterate_contestant(run, t)
    scores = {"acc": score, "acc_error": 0.01}
    return Result(one.name, one.identity, "lm_eval/task", settings, scores)


def test_page_needs_nothing_besides_itself(page):
    targets = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"<script|<link[^>]+stylesheet|@import|url\(", page)
    assert "http://" not in page
    assert "https://" not in page


def test_page_defines_every_metric_it_shows(page):
    shown = re.findall(r"<figcaption><code>([^<]+)</code>: ([^<]+)</figcaption>", page)
    assert {"val/real_nll_per_token", "val/kl_base", "val/kl_previous"} <= {n for n, _ in shown}
    known = {measure.name for measure in MEASURES}
    assert all(name in known and len(meaning) > 20 for name, meaning in shown)


def test_pictures_are_written_beside_the_page(page_path):
    names = {path.stem for path in (page_path.parent / "figures").glob("*.png")}
    assert {"val_kl_base", "lengths_run0_p0", "lengths_run1_p4", "rewards_run1_p4"} <= names
    assert "rewards_run0_p0" not in names, "the base has no iterate before it"


def test_curve_of_a_run_with_a_long_name_has_room(finished_run):
    """The legend would cover all of it, and matplotlib would warn."""
    view = read_runs([finished_run])[0]
    measure = next(one for one in MEASURES if one.name == "val/real_nll_per_token")
    figure = curve_figure(measure, {"a-setting=1.0-" * 16: view.records})
    figure.canvas.draw()
    assert figure.axes[0].get_position().width > 0.5


def test_best_iterate_of_each_run_is_marked(page):
    card = page.split("<h3>lm_eval/task/acc</h3>")[1].split("</section>")[0]
    assert re.findall(r'class="best">([\d.]+)', card) == ["0.3000", "0.5000"]
    assert "lm_eval 1, num_fewshot 5" in card


def test_settings_that_differ_are_listed_and_no_others(two_runs):
    differences = config_differences(read_runs(two_runs))
    assert differences == [["model.init_args.learning_rate", "0.003", "0.001"]]


def test_runs_of_one_name_are_told_apart(two_runs):
    assert [view.name for view in read_runs(two_runs)] == ["a/run", "b/run"]
    again = read_runs([two_runs[0], two_runs[0]])
    assert [view.name for view in again] == ["a/run", "a/run (2)"]


def test_samples_are_what_each_iterate_wrote_to_the_same_prompt(finished_run):
    (view,) = read_runs([finished_run])
    tokenizer = AutoTokenizer.from_pretrained(finished_run.tokenizer)
    sample = view.samples(3)[2]
    assert sorted(sample.generated) == [0, 1, 2, 3, 4]
    first = read_rows(finished_run.val_rows(0))
    i = next(
        i
        for i in range(len(first))
        if tokenizer.decode(first.prompt_ids[i].tolist(), skip_special_tokens=True) == sample.prompt
    )
    for t in range(5):
        table = read_rows(finished_run.val_rows(t))
        assert table.example_id[i] == first.example_id[i]
        assert sample.generated[t] == tokenizer.decode(table.generated_ids[i].tolist())
        assert sample.real == tokenizer.decode(table.real_ids[i].tolist())


def test_rewards_are_the_log_ratios_of_the_stored_rows(finished_run):
    (view,) = read_runs([finished_run])
    real, generated = view.rewards(2)
    table = read_rows(finished_run.val_rows(2))
    for i in range(len(table)):
        row = table.real_logps[2][i] - table.real_logps[1][i]
        assert real[i] == pytest.approx(float(row), abs=1e-12)
        row = table.generated_logps[2][i] - table.generated_logps[1][i]
        assert generated[i] == pytest.approx(float(row), abs=1e-12)
    assert view.rewards(0) is None
    real_lengths, lengths = view.lengths(2)
    assert list(lengths) == [len(table.generated_ids[i]) for i in range(len(table))]
    assert np.mean(real_lengths) == view.records[2].metrics["val/real_tokens"]


def test_response_with_markup_is_shown_as_text(page):
    assert "&lt;/s&gt;" in page
    assert "</s>" not in page


def test_run_without_held_out_rows_has_a_report(finished_run, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished_run.root, run.root)
    shutil.rmtree(run.root / "rows")
    page = write_report(read_runs([run]), tmp_path / "out").read_text()
    assert "Samples" not in page
    assert "Time and memory" in page


def test_page_says_what_tells_real_from_generated_responses(page, finished_run):
    section = page.split('id="tells"')[1].split("<h2")[0]
    assert section.count("<td>first token</td>") == 2, "one table of cues per run"
    assert section.count("<th>p3</th>") == 2
    assert "<th>p4</th>" not in section, "iterate 4 made no rows"
    (view,) = read_runs([finished_run])
    tells = view.tells(3)
    assert view.records[3].rows["rows/tells/best"] == tells.best.accuracy
    real, generated = tells.responses
    assert f"{real} real and {generated} generated responses" in section
    assert view.tells(4) is None


def test_page_has_a_card_of_verdicts_per_run(page):
    section = page.split('id="verdicts"')[1].split("<h2")[0]
    assert re.findall(r"<h3>(.*?)</h3>", section) == ["a/run", "b/run"]


def test_time_and_memory_of_every_iterate_are_shown(page):
    part = page.split('id="time"')[1]
    assert re.findall(r"<td>p(\d)</td>", part) == ["1", "2", "3", "4"] * 2
    # Three stages; four phases, of which later ones need not rise above earlier ones, and the peak.
    rows = re.findall(r"<td>p\d</td>(.*?)</tr>", part)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert {len(row) for row in cells} == {8}
    assert all(float(row[-1]) > 0 for row in cells)
    peaks = [float(cell) for cell in cells[0][3:7] if cell != "–"]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= float(cells[0][-1])


def test_cards_of_one_metric_say_which_settings_differ_between_runs(two_runs, tmp_path):
    for run, limit in zip(two_runs, (None, 20), strict=True):
        shutil.rmtree(run.evaluations)
        write_result(run, result_of(run, 0, 0.5, {"harness": "lm_eval 1", "limit": limit}))
    page = write_report(read_runs(two_runs), tmp_path / "out").read_text()
    section = page.split('id="evaluation"')[1].split("<h2")[0]
    titles = re.findall(r"<h3>(.*?)</h3>", section)
    assert titles == ["lm_eval/task/acc (no limit)", "lm_eval/task/acc (limit 20)"]
    assert 'class="best"' not in section, "there is nothing to compare"


def test_page_shows_the_data_as_they_were_read(page):
    section = page.split('id="data"')[1].split("<h2")[0]
    assert section.count("120 rows read with 120 examples, 120 used.") == 2, "one card per run"
    assert "Columns (rows with a value): prompt (120), response (120). Not used: none." in section
    assert section.count('<dd class="prompt">') == 6
    assert section.count("<tr><td>over the cap</td><td>0</td><td>0</td></tr>") == 2
    assert '<dd class="stop">&lt;/s&gt; (id 2)</dd>' in section
    assert "examples.jsonl" in section


def test_run_of_an_older_version_has_a_report_without_its_data(finished_run, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished_run.root, run.root)
    run.data.unlink()
    assert 'id="data"' not in write_report(read_runs([run]), tmp_path / "out").read_text()


def test_damaged_record_of_the_data_names_the_file_and_the_fix(finished_run, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished_run.root, run.root)
    run.data.write_text('{"sources": [{}]}')
    with pytest.raises(RunFolderError, match=r"data\.json is damaged .* Fix: delete it"):
        read_runs([run])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_the_width_of_a_real_browser(width, page_path, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="file://{page_path}" width="{width}" height="900" '
        'style="border:0"></iframe><p id="p"></p><script>f.onload = () => { p.textContent = '
        'f.contentDocument.title + " width " + f.contentDocument.documentElement.scrollWidth; }'
        "</script>"
    )
    answer = subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--allow-file-access-from-files", "--enable-logging=stderr", "--v=0"),
            f"--user-data-dir={tmp_path / 'profile'}",
            *("--virtual-time-budget=5000", "--dump-dom", f"file://{frame}"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (found,) = re.findall(r"a/run · b/run width (\d+)</p>", answer.stdout)
    assert int(found) <= width
    assert "CONSOLE" not in answer.stderr
