"""The benchmarks run at tiny sizes, both sides compute the same, and the table is made of them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import generation, growth, iterate, ours, scoring, slots, step, table
from benchmarks.floor import Floor
from benchmarks.generation import _operations
from benchmarks.goals import SUBJECTS, Goal, goals_of
from benchmarks.setup import Setup
from benchmarks.timing import Figure, median_ratio, peak_mb, spread
from benchmarks.workload import SIZES, WORKLOADS, batches_of, has_weights
from spin_lightning.data.dataset import Pair
from spin_lightning.generation.base import Request
from tests.pretend_cuda.hooks import compiler

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: the bench extra")
BENCHMARKS = {
    step: {"step_a", "step_b", "step_a_nf4"},
    scoring: {"scoring_first", "scoring_next", "reservoir"},
    generation: {"generation", "generation_nf4", "token_mixture", "token_mixture_nf4"},
    slots: {f"slots_{n}{suffix}" for n in (16, 64, 128) for suffix in ("", "_nf4")},
    iterate: {"iterate", "iterate_nf4"},
    growth: {"growth_pairs", "growth_prompt", "growth_memory"},
}
# Third parties warn about their own matters, such as TRL about the tokenizer's ids.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def setup(out: Path) -> Setup:
    return Setup("tiny", "cpu", "float32", out, tiny=True)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.__name__)
def test_benchmark_tiny_prints_a_line_per_figure_and_writes_json(benchmark, out, capsys):
    benchmark.main(["--tiny", "--out", str(out)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert {line.split()[0] for line in lines} == BENCHMARKS[benchmark]
    (result,) = (r for r in table.read_results(out) if r["benchmark"] in benchmark.__name__)
    assert {figure["name"] for figure in result["figures"]} == BENCHMARKS[benchmark]
    for figure in result["figures"]:
        measured = figure["fields"].keys()
        assert all(value > 0 for value in figure["fields"].values())
        # Without TRL the figures of its side are left out, and the line says why.
        assert measured >= SUBJECTS[figure["name"]].goals.keys() or "TRL" in figure["note"]


@pytest.mark.parametrize("benchmark", [step, generation], ids=lambda module: module.__name__)
def test_benchmark_tiny_runs_in_the_precision_of_gpus(benchmark, out, capsys):
    benchmark.main(["--tiny", "--dtype", "bfloat16", "--out", str(out)])
    assert len(capsys.readouterr().out.strip().splitlines()) == len(BENCHMARKS[benchmark])


@pytest.mark.skipif(not has_weights("smollm2"), reason="needs SmolLM2: the demo extra")
def test_benchmarks_of_smollm2_run_on_its_weights(out, capsys):
    for benchmark, figures in {step: {"step_a"}, growth: set()}.items():
        benchmark.main(["--tiny", "--size", "smollm2", "--out", str(out)])
        lines = capsys.readouterr().out.strip().splitlines()
        assert {line.split()[0] for line in lines} == figures
    (result,) = (r for r in table.read_results(out) if r["figures"] and r["size"] == "smollm2")
    assert result["weights"] == "trained"


def test_benchmarks_of_smollm2_are_some_of_all():
    assert goals_of("smollm2").keys() < SUBJECTS.keys()


def test_benchmarks_of_a_gpu_measure_everything_those_of_a_cpu_no_slots():
    assert goals_of("7b").keys() == SUBJECTS.keys()
    left = SUBJECTS.keys() - goals_of("22m").keys()
    assert left == {"iterate_nf4", *BENCHMARKS[slots]}


def test_benchmarks_have_a_goal_for_every_figure():
    assert set().union(*BENCHMARKS.values()) == SUBJECTS.keys()


@needs_trl
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_step_both_sides_have_the_same_loss_and_gradients(setup, quantization):
    from benchmarks import peer

    (batch,) = batches_of(setup.workload("A"), 1, setup.vocabulary)
    mine, theirs = ours.Step(setup, quantization), peer.Step(setup, quantization)
    losses = [side.loss(batch) for side in (mine, theirs)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    for loss in losses:
        loss.backward()
    gradients = [
        {
            name.split("base_model.model.")[-1].replace(adapter, ""): parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        for model, adapter in (
            (mine.module.policy.model, ".policy"),
            (theirs.trainer.model, ".default"),
        )
    ]
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 7 * SIZES["tiny"]["num_hidden_layers"]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_scoring_both_sides_have_the_same_logps(setup, tmp_path):
    from benchmarks import peer

    pairs = setup.workload("A").pairs(5, setup.vocabulary)
    made = scoring._scoring(setup, pairs)
    folder = made.make(ours.ADAPTERS, tmp_path / "rows", None)
    rows = ours.read_rows(folder)
    model = peer.load_model(setup, adapters=ours.ADAPTERS)
    for member in range(ours.ADAPTERS + 1):
        with peer.acting_as(model, member):
            logps = peer.padded_logps(
                model, [p.prompt_ids for p in pairs], [p.generated_ids for p in pairs], 2
            )
        np.testing.assert_allclose(rows.generated_logps[member], logps, atol=1e-4)


def test_generate_of_the_peer_ends_each_row_at_its_length(setup):
    from benchmarks import peer

    model = peer.load_model(setup)
    with peer.acting_as(model, 1):
        written = peer.generate(model, [[5, 6, 7], [8], [9, 10]], caps=[4, 2, 3], batch_size=2)
    assert [len(ids) for ids in written] == [4, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the pretend device with")
def test_launches_are_counted_without_a_gpu_in_a_process_of_its_own(tmp_path):
    """What the checks on the pretend device allow ours: 170 launches and no cast per layer."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.launches", "--device", "pretend", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    costs = {row[0]: [float(number.strip("| ")) for number in row[1:]] for row in rows}
    assert ("| TRL's DPOTrainer" in costs) == (find_spec("trl") is not None)
    launches, *others, _ = costs.pop("| ours")
    assert 100 < launches <= 170
    assert others == [0, 0, 0]  # casts, float32 products, waits
    for launches_of_peer, casts, *_ in costs.values():
        assert launches_of_peer > launches
        assert casts > 0


def test_workload_a_has_the_stated_lengths():
    pairs = WORKLOADS["A"].pairs(2000, vocabulary=32000)
    assert np.mean([len(pair.prompt_ids) for pair in pairs]) == pytest.approx(127, abs=3)
    assert np.mean([len(pair.real_ids) for pair in pairs]) == pytest.approx(93, abs=3)
    again = WORKLOADS["A"].pairs(1, vocabulary=32000)[0]
    assert again.real_ids.tolist() == pairs[0].real_ids.tolist()


def test_floor_multiplies_what_a_step_has_to():
    sizes = SIZES["tiny"]
    floor = Floor(sizes, "cpu", torch.float32)
    inputs = floor.prepare([_pair(5, 3, 2), _pair(4, 1, 6)])
    # 5 + 3 + 2 + 4 + 1 + 6 tokens, of which 3 + 2 + 1 + 6 are response tokens.
    assert {len(x) for x in inputs.tokens.values()} == {21}
    assert inputs.responses.shape == (12, 64)
    weights = [tuple(weight.shape) for weight in floor.layers[0]]
    assert weights == [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    floor.step(inputs)
    floor.step(inputs, own_kernels=True)


def test_operations_of_a_mixture_are_two_passes_of_the_layers_and_one_of_the_head(setup):
    """2 · (2 · 64² + 2 · 32 · 64 + 3 · 128 · 64) = 73728 weights of layers, 512 · 64 of the head.

    Of a prompt of 5 and a response of 3 tokens, 7 are read and 3 answered.
    """
    request = Request((5, 6, 7, 8, 9), opponent=1, key=0, cap=3)
    layers, head = 7 * 73728, 3 * 32768
    assert _operations(setup, [[request]]) == (2 * layers + head) / (layers + head)


def test_peak_memory_sees_an_allocation_and_its_end():
    assert 60 < peak_mb(lambda: torch.ones(2**24), "cpu") < 80  # 64 MB


def test_ratio_is_the_median_over_rounds():
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_spread_is_the_largest_over_the_smallest():
    assert spread([2.0, 3.0, 2.5]) == 1.5


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal(at_least=2.2), 2.2, True),
        (Goal(at_least=2.2), 2.18, False),
        (Goal(at_most=1.1), 1.104, True),
        (Goal(at_most=1.1), 1.11, False),
    ],
)
def test_goal_is_judged_at_the_digits_that_are_printed(goal, value, met):
    assert goal.met(value) is met


def test_figure_line_says_ratio_floor_memory_and_goals():
    figure = Figure("step_a", {"ratio": 2.31, "floor": 1.2, "peak": 0.2}, peak_mb=(680.2, 3400.0))
    assert figure.line(SUBJECTS["step_a"].goals) == (
        "step_a ratio=2.31 floor=1.20 peak_mb=680/3400 "
        "[ratio ≥ 2.2: met] [floor ≤ 1.1: MISSED] [peak ≤ 0.25: met]"
    )


def test_table_replaces_what_stood_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "performance.md"
    blocks = [f"{table.START.format(size)}\nold {size}\n{table.END}" for size in ("22m", "smollm2")]
    page.write_text("\n".join(["above", *blocks, "below\n"]))
    monkeypatch.setattr(table, "PAGE", page)
    machine = {"device": "a CPU", "threads": 2, "date": "2030-01-02", "versions": {"trl": "1"}}
    figure = {"name": "iterate", "fields": {"ratio": 2.5}, "met": {"ratio": True}, "note": ""}
    about = {"tiny": False, "machine": machine, "weights": "random"}

    def page_with(size: str, figure: dict[str, object]) -> str:
        result = {**about, "size": size, "figures": [figure]}
        (tmp_path / f"{size}.json").write_text(json.dumps(result))
        table.main(["--out", str(tmp_path)])
        return page.read_text()

    text = page_with("22m", figure)
    assert "old 22m" not in text
    assert "old smollm2" in text
    step = {"name": "step_a", "met": {"ratio": True}, "note": "", "peak_mb": [100.0, 400.0]}
    step["fields"] = {"ratio": 4.0, "floor": 1.3, "peak": 0.25}
    text = page_with("smollm2", step)
    assert "old" not in text
    assert "| 4.00× as fast | ≥ 4 | met |" in text
    assert "| the floor | 1.30× the floor's time | – |  |" in text
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "| 2.50× as fast | ≥ 2.5 | met |" in text
    assert "a CPU, 2 threads, 2030-01-02; trl 1." in text


def _pair(prompt: int, real: int, generated: int) -> Pair:
    prompt_ids, real_ids, generated_ids = (np.arange(5, 5 + n) for n in (prompt, real, generated))
    return Pair(prompt_ids, real_ids, generated_ids, 0.0, 0.0)
