"""Two agents of torchrun on this machine, one process each, as on two machines."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from spin_lightning.run.folder import RunFolder
from tests.faults.points import RANK, VARIABLE, Point
from tests.faults.processes import SETTINGS, environment, fit
from tests.toys.command_line import fit_arguments
from tests.toys.runs import contents, write_examples

# (On a busy machine, a start of two processes takes a minute.)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = ("--data.max_examples", "107")
TWO_NODES = ("--trainer.num_nodes", "2", "--trainer.strategy", "ddp", "--trainer.devices", "1")
# Long enough for the slowest of these runs beside another one on two cores.
PATIENCE = 240
GENERATE = "spin_lightning.generation.local:LocalGenerator.generate"
STEP = "spin_lightning.modules.base:SelfPlayModule.training_step"
# Each round of torchrun has a store of its own: in one that all rounds share, torch 2.13 leaves out
# the address of rank 0 from the second one on, and finds those of processes that are gone.
EACH_ROUND = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


class Job:
    """Two agents with one command; their output is in `logs`."""

    def __init__(self, root: Path, model: Path, data: Path, logs: Path, *torchrun: str) -> None:
        self.folders = [root.parent, root.parent]
        self._root = root.name
        self.logs = logs
        self._given = (model, data)
        self._torchrun = torchrun
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(self, **harm: str) -> Job:
        for node in (0, 1):
            self.agents.append(self.start_agent(node, **harm))
        return self

    def start_agent(self, node: int, **harm: str) -> subprocess.Popen[bytes]:
        arguments = map(str, fit_arguments(Path(self._root), *self._given))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "spin"),
            *("--rdzv_endpoint", f"127.0.0.1:{self._port}", *self._torchrun),
            # (By its address, either agent on this machine could be the one.)
            *("--rdzv_conf", f"is_host={1 - node}"),
            *("-m", "tests.faults.killed_fit", *arguments, *SETTINGS, *ROWS, *TWO_NODES),
            *("--checkpoint_steps", "1"),
        ]
        with (self.logs / f"agent_{node}.log").open("ab") as log:
            return subprocess.Popen(
                command, env=environment(**harm), stdout=log, stderr=log, cwd=self.folders[node]
            )

    def log(self, node: int) -> str:
        return (self.logs / f"agent_{node}.log").read_text(errors="replace")

    def wait(self) -> list[int]:
        deadline = time.monotonic() + PATIENCE
        return [agent.wait(deadline - time.monotonic()) for agent in self.agents]

    def kill_node(self, node: int) -> None:
        """SIGKILL an agent and every process that it has started."""
        agent = psutil.Process(self.agents[node].pid)
        for process in [agent, *agent.children(recursive=True)]:
            process.kill()
        self.agents[node].wait()


@pytest.fixture
def agents(tiny_model_dir, data, tmp_path) -> Callable[..., Job]:
    """Start two agents; the test's end kills what is left of them."""
    started = []

    def start(root: Path, *torchrun: str, **harm: str) -> Job:
        started.append(Job(root, tiny_model_dir, data, tmp_path, *torchrun))
        return started[-1].start(**harm)

    yield start
    for each in started:
        for node, agent in enumerate(each.agents):
            if agent.poll() is None:
                each.kill_node(node)


@pytest.fixture(scope="module")
def two(tiny_model_dir, data, tmp_path_factory):
    """A run of two agents that nobody killed."""
    folder = tmp_path_factory.mktemp("two")
    job = Job(folder / "run", tiny_model_dir, data, folder).start()
    assert job.wait() == [0, 0], job.log(0) + job.log(1)
    return folder / "run"


def rows_and_adapters(root: Path) -> dict[str, str]:
    """The bytes of rows, adapters and manifests."""
    manifests = {
        str(path.relative_to(root)): path.read_text()
        for path in root.glob("rows/**/__about__/manifest.json")
    }
    assert len(manifests) == 5
    return contents(root) | manifests


def test_two_agents_make_the_rows_of_one_process(two, tiny_model_dir, data, tmp_path):
    fit(tmp_path, tiny_model_dir, data, *ROWS, "--data.batch_size", "64")
    of_start = [
        {n: b for n, b in rows_and_adapters(root).items() if n.startswith("rows/iterate_000/")}
        for root in (two, tmp_path)
    ]
    assert of_start[0] == of_start[1]
    assert RunFolder(two).known_iterates() == [0, 1, 2]


GENERATION, TRAINING = "rows/iterate_000/part-00001.parquet", "checkpoints/last.ckpt"


def wait_for(file: Path, job: Job) -> None:
    while not file.exists():
        assert all(agent.poll() is None for agent in job.agents), job.log(0) + job.log(1)
        time.sleep(0.02)


@pytest.mark.parametrize("reached", [GENERATION, TRAINING])
def test_a_node_is_lost_and_the_job_started_again_goes_on(reached, two, agents, tmp_path):
    """As a requeued job: the survivor ends by itself, then both agents are started again."""
    root = tmp_path / "run"
    job = agents(root)
    wait_for(root / reached, job)
    job.kill_node(1)
    lost_at = time.monotonic()
    assert job.agents[0].wait(PATIENCE) != 0
    took = time.monotonic() - lost_at
    print(f"the other agent ended after {took:.1f} s")
    assert took < 60
    assert "another process of this run failed" in job.log(0)
    again = agents(root)
    assert again.wait() == [0, 0], again.log(0) + again.log(1)
    assert rows_and_adapters(root) == rows_and_adapters(two)


def test_a_node_is_lost_and_another_joins_the_agent_that_is_left(two, agents, tmp_path):
    root = tmp_path / "run"
    job = agents(root, "--max-restarts", "3", **EACH_ROUND)
    wait_for(root / TRAINING, job)
    job.kill_node(1)
    job.agents[1] = job.start_agent(1, **EACH_ROUND)
    assert job.wait() == [0, 0], job.log(0) + job.log(1)
    assert rows_and_adapters(root) == rows_and_adapters(two)


@pytest.mark.parametrize(("target", "call"), [(GENERATE, 2), (STEP, 2)])
def test_a_process_is_killed_and_torchrun_restarts_all_of_them(target, call, two, agents, tmp_path):
    root = tmp_path / "run"
    harm = {VARIABLE: Point("", target, "before", call).value, RANK: "1"}
    job = agents(root, "--max-restarts", "3", **EACH_ROUND, **harm)
    assert job.wait() == [0, 0], job.log(0) + job.log(1)
    assert f"failed (exitcode: {-signal.SIGKILL})" in job.log(1)
    assert rows_and_adapters(root) == rows_and_adapters(two)


def test_folders_that_are_not_shared_are_refused_by_both(agents, tiny_model_dir, data, tmp_path):
    """The same relative path, in another folder on each node."""
    job = Job(tmp_path / "run", tiny_model_dir, data, tmp_path)
    job.folders[1] = tmp_path / "of_node_1"
    job.folders[1].mkdir()
    job.start()
    assert all(code != 0 for code in job.wait())
    for node in (0, 1):
        assert "is not shared: rank 0 on" in job.log(node)
    assert not list(tmp_path.rglob("*.parquet"))
