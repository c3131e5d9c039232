"""The vLLM engine on real servers: the same policies, nothing lost and nothing repeated."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from spin_lightning.errors import SpinError
from spin_lightning.generation.base import Request
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.vllm import VllmGenerator
from spin_lightning.mixtures import Mixture
from spin_lightning.rows.making import GAP, Synthesis, Timing, finish
from spin_lightning.rows.manifest import read_manifest
from spin_lightning.rows.plan import RowPlan
from spin_lightning.rows.store import read_rows
from spin_lightning.types import Example
from tests.toys.adapters import plain_model
from tests.toys.chi_square import chi_square
from tests.toys.command_line import fit_arguments
from tests.toys.runs import write_examples
from tests.toys.vllm_process import VllmProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
STOP, VOCABULARY = 2, 24
ROOT = Path(__file__).parents[2]


def engine(*servers: VllmProcess, **settings) -> VllmGenerator:
    given = {"servers": [server.url for server in servers], **settings}
    return VllmGenerator((STOP,), GenerationSettings(engine="vllm", **given))


def some_requests(count: int, cap: int = 24) -> list[Request]:
    draw = random.Random(3)
    return [
        Request(
            (1, *(draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(1, 12)))),
            opponent=draw.randrange(3),
            key=draw.getrandbits(64) - 2**63,
            cap=cap,
        )
        for _ in range(count)
    ]


def test_greedy_ids_of_three_iterates_are_those_of_the_local_engine(servers, policy):
    requests = some_requests(300)
    there = engine(servers["first"], top_k=1).generate(policy, requests)
    here = LocalGenerator((STOP,), 0, GenerationSettings(top_k=1)).generate(policy, requests)
    pairs = list(zip(there, here, strict=True))
    same = sum(a == b for x, y in pairs for a, b in zip(x.ids, y.ids, strict=False))
    tokens = sum(max(len(x.ids), len(y.ids)) for x, y in pairs)
    print(f"greedy: {same} of {tokens} tokens")
    assert same >= 0.99 * tokens
    assert tokens > 3000
    gaps = [abs(x.logp - y.logp) for x, y in pairs if x.ids == y.ids]
    assert max(gaps) < 1e-2


def test_2000_draws_from_a_mixture_pass_the_chi_square_test(
    servers, policy, wide_head, adapters, tmp_path
):
    """Against the density of transformers and peft over all responses of up to three tokens."""
    prompts, cap = [(1, 5, 9, 14), (1, 20, 4)], 3
    words = [i for i in range(VOCABULARY) if i != STOP]
    responses = [
        *((*prefix, STOP) for n in range(cap) for prefix in itertools.product(words, repeat=n)),
        *itertools.product(words, repeat=cap),
    ]
    weights = {0: 0.5, 1: 0.3, 2: 0.2}
    densities = []
    for t, weight in weights.items():
        model = plain_model(wide_head, adapters.get(t))
        densities.append(_language(model, prompts, responses) + torch.tensor(weight).log())
    density = torch.stack(densities).logsumexp(0)
    assert density.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-4)

    examples = [Example(i, prompts[i % 2], (STOP,), True) for i in range(2_000)]
    plan = RowPlan(
        iterate=2,
        opponent=Mixture(weights),
        members=(0, 1, 2),
        seed=5,
        samples=1,
        unit_size=500,
        cap=cap,
        context=64,
    )
    synthesis = Synthesis(policy, engine(servers["first"]), vocabulary=VOCABULARY)
    list(synthesis.make(plan, examples, tmp_path, Timing()))
    finish(plan, examples, tmp_path, {})
    rows = read_rows(tmp_path)
    seen = Counter((int(rows.example_id[n]) % 2, tuple(rows.generated_ids[n].tolist()))
                   for n in range(len(rows)))  # fmt: skip
    counts = torch.tensor([[seen[x, y] for y in responses] for x in (0, 1)])
    assert counts.sum() == 2_000
    p_value = chi_square(counts, torch.zeros(2), density)
    gap = read_manifest(tmp_path).others[GAP]
    print(f"chi-square: p = {p_value:.3g}; gap {gap:.2g} nats per token")
    assert p_value > 1e-4
    assert abs(gap) < 1e-4
    # The test has power: the members' own densities fail it.
    wrong = [chi_square(counts, torch.zeros(2), _normal(d)) for d in densities]
    assert max(wrong) < 1e-4


def _language(model, prompts, responses) -> torch.Tensor:
    """log p(y|x), shape [prompts, responses], by next-token tables after each prefix."""
    prefixes = sorted({y[:n] for y in responses for n in range(len(y))}, key=lambda p: (len(p), p))
    by_prompt = []
    for x in prompts:
        table = {}
        for _, group in itertools.groupby(prefixes, len):
            same = list(group)
            with torch.no_grad():
                logits = model(torch.tensor([(*x, *p) for p in same])).logits[:, -1]
            table |= dict(zip(same, logits.double().log_softmax(-1), strict=True))
        by_prompt.append(
            torch.stack([sum(table[y[:n]][i] for n, i in enumerate(y)) for y in responses])
        )
    return torch.stack(by_prompt)


def _normal(log_density: torch.Tensor) -> torch.Tensor:
    return log_density.log_softmax(1)


def test_two_servers_share_the_work(servers, policy):
    first, second = servers["first"], servers["second"]
    requests = some_requests(120)
    before = first.answers, second.answers
    greedy = engine(first, second, top_k=1).generate(policy, requests)
    shares = first.answers - before[0], second.answers - before[1]
    print(f"two servers: {shares} answers, log-probs of prompts included")
    assert min(shares) >= 40
    here = LocalGenerator((STOP,), 0, GenerationSettings(top_k=1)).generate(policy, requests)
    equal = sum(a.ids == b.ids for a, b in zip(greedy, here, strict=True))
    assert equal >= 0.97 * len(requests)


def test_a_server_killed_in_the_middle_and_started_again_loses_and_repeats_nothing(
    servers, policy, tmp_path
):
    server, requests = servers["first"], some_requests(200)
    found, counts, killed = engine(server, concurrency=8, top_k=1), [], threading.Event()

    def kill_once(count: int) -> None:
        counts.append(count)
        if len(counts) == 80 and not killed.is_set():
            killed.set()
            server.kill()
            threading.Timer(1.0, server.start).start()

    before = server.answers
    found.scratch, found.on_progress = tmp_path, kill_once
    responses = found.generate(policy, requests)
    server.wait()
    assert killed.is_set()
    assert counts == [1] * 200
    lines = (tmp_path / "responses.jsonl").read_text().split("\n")
    kept = [json.loads(line)["key"] for line in lines if line]
    assert len(kept) == len(set(kept)) == 200
    # Each of both starts scores some prompts; of the 8 in flight the answer may have been lost.
    answers = server.answers - before
    print(f"killed: 200 responses, {answers} answers with two base checks of up to 5 prompts")
    assert 200 <= answers <= 200 + 8 + 2 * 5
    here = LocalGenerator((STOP,), 0, GenerationSettings(top_k=1)).generate(policy, requests)
    assert sum(a.ids == b.ids for a, b in zip(responses, here, strict=True)) >= 194


def test_a_server_with_another_base_is_refused(servers, policy):
    with pytest.raises(SpinError, match=r"nats per token, more than generation.largest_gap") as end:
        engine(servers["other"]).generate(policy, some_requests(4))
    print(f"refused: {end.value}")


def test_an_adapter_of_too_large_a_rank_is_refused_in_words(servers, wide_head, policy, tmp_path):
    from spin_lightning.policies.lora import LoraPolicy
    from spin_lightning.policies.lora_settings import LoraSettings

    large = LoraPolicy(policy.base, LoraSettings(r=17))
    (tmp_path / "iterate_000").mkdir()
    large.use_iterates({0: tmp_path / "iterate_000"})
    found = engine(servers["first"])
    found.scratch = tmp_path / "unit"
    with pytest.raises(
        SpinError, match=r"rank 17 is greater than max_lora_rank 16.*--max-lora-rank"
    ):
        found.generate(large, [Request((1, 5, 9), 0, 7, 4)])


# ------------------------------------------------------------------------------ the command line


def _fit(root: Path, model: Path, data: Path, server: VllmProcess) -> list[str]:
    arguments = fit_arguments(
        root, model, data,
        *("--model", "FictitiousSPIN", "--trainer.max_epochs", 3),
        *("--model.generation.engine", "vllm"),
        *("--model.generation.servers", json.dumps([server.url])),
        *("--model.generation.unit_size", 128),
    )  # fmt: skip
    return [sys.executable, "-m", "spin_lightning", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_fictitious_play_from_the_command_line_generates_three_iterates_at_once(
    servers, wide_head, tmp_path
):
    server, root = servers["first"], tmp_path / "run"
    data = write_examples(tmp_path / "examples.jsonl", 150)
    done = subprocess.run(
        _fit(root, wide_head, data, server), env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(root / "rows" / "iterate_002")
    manifest = read_manifest(root / "rows" / "iterate_002")
    shares = Counter(rows.opponent[:128].tolist())
    print(
        f"opponents in the first unit of iterate 2: {dict(shares)}; gap {manifest.others[GAP]:.2g}"
    )
    assert set(shares) == {0, 1, 2}
    assert abs(manifest.others[GAP]) < 1e-3
    record = json.loads((root / "iterates/iterate_002/iterate.json").read_text())
    assert "rows/sampler_gap" in record["rows"]
    assert "rows/sampler_gap" in (root / "metrics.csv").read_text()
    assert (root / "iterates" / "iterate_003").is_dir()


def test_a_trainer_killed_in_a_unit_finds_its_finished_responses(servers, wide_head, tmp_path):
    server, root = servers["first"], tmp_path / "run"
    data = write_examples(tmp_path / "examples.jsonl", 150)
    command = [*_fit(root, wide_head, data, server), "--model.generation.concurrency", "2"]
    before = server.answers
    with (tmp_path / "log").open("wb") as log:
        trainer = subprocess.Popen(command, env=_environment(), stdout=log, stderr=log)
    kept = 0
    while kept < 40:
        assert trainer.poll() is None, (tmp_path / "log").read_text()[-2000:]
        found = list(root.glob("rows/iterate_000/__about__/unit-*/responses.jsonl"))
        kept = sum(path.read_bytes().count(b'"key"') for path in found)
        time.sleep(0.02)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = sum(
        len(read_rows(folder))
        for t in range(4)
        for folder in (root / f"rows/iterate_{t:03d}", root / f"rows/iterate_{t:03d}/__held_out__")
        if (folder / "__about__" / "manifest.json").exists()
    )
    answers = server.answers - before
    units = len(list(root.rglob("part-*.parquet")))
    print(f"trainer killed with {kept} responses kept: {written} rows, {answers} answers")
    # Up to 5 prompts are scored for each unit, and those of the killed one twice.
    assert written <= answers <= written + 2 + 5 * (units + 1)
    assert not list(root.rglob("unit-*"))
