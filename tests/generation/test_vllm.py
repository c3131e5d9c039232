"""The vLLM engine against a stand-in server: the same responses, whatever fails on the way."""

import json
import logging
import os
import random
import signal
import threading
import time
from collections import Counter

import pytest

from spin_lightning import AlphaSPIN, FictitiousSPIN
from spin_lightning.errors import SettingError, SpinError
from spin_lightning.generation import vllm_fleet
from spin_lightning.generation.base import Request
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.vllm import VllmGenerator
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.rows.making import GAP, Synthesis, Timing, finish
from spin_lightning.rows.manifest import read_manifest
from tests.toys.models import write_model
from tests.toys.plans import PLAN, STOP, some_examples
from tests.toys.runs import play, write_examples
from tests.toys.vllm_stand_in import StandIn, forget, hang_up, late, next_tokens, status

pytest.importorskip("httpx", reason="needs httpx: the vllm extra")
CLOSED = "http://127.0.0.1:9"  # the port of "discard", which nothing here listens to


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(vllm_fleet, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(vllm_fleet, "_OPENING", 0.3)


@pytest.fixture
def server(tiny_model_dir):
    stand_in = StandIn(tiny_model_dir)
    yield stand_in
    stand_in.stop()


@pytest.fixture
def second(tiny_model_dir):
    stand_in = StandIn(tiny_model_dir)
    yield stand_in
    stand_in.stop()


@pytest.fixture(scope="module")
def policy(tiny_model_dir, tiny_adapters, tmp_path_factory):
    """Iterates 0, the base, to 2."""
    made = LoraPolicy(FrozenBase(str(tiny_model_dir), compute_dtype="float32"), LoraSettings(r=2))
    made.use_iterates({0: tmp_path_factory.mktemp("iterate_000"), **tiny_adapters})
    return made


def engine(*urls: str, **settings) -> VllmGenerator:
    given = {"servers": list(urls), "request_timeout": 60.0, "patience": 60.0, **settings}
    return VllmGenerator((STOP,), GenerationSettings(engine="vllm", **given))


def some_requests(count: int = 24, cap: int = 6) -> list[Request]:
    draw = random.Random(3)
    return [
        Request(
            (1, *(draw.randrange(4, 24) for _ in range(draw.randrange(1, 8)))),
            opponent=draw.randrange(3),
            key=draw.getrandbits(64) - 2**63,
            cap=cap,
        )
        for _ in range(count)
    ]


# ------------------------------------------------------------------------------- what is asked for


def test_greedy_responses_of_three_iterates_are_those_of_the_local_engine(server, policy):
    requests = some_requests()
    there = engine(server.url, top_k=1).generate(policy, requests)
    here = LocalGenerator((STOP,), 0, GenerationSettings(top_k=1)).generate(policy, requests)
    assert [response.ids for response in there] == [response.ids for response in here]
    assert [r.finished for r in there] == [r.finished for r in here]
    assert [r.logp for r in there] == pytest.approx([r.logp for r in here], abs=1e-4)
    # Both adapters, and the base by the name under which it is served.
    assert {body["model"].split("-")[0] for body in server.bodies} == {
        "1", "2", str(server.base).split("-")[0]
    }  # fmt: skip


def test_every_setting_is_sent_so_that_a_server_has_no_say(server, policy):
    request = Request((1, 5, 9), 0, key=-1, cap=6)
    engine(server.url, temperature=0.7, top_p=0.9, top_k=5).generate(policy, [request])
    (body,) = server.bodies
    sent = {
        "prompt": [1, 5, 9], "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
        "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "stop": [], "stop_token_ids": [STOP], "ignore_eos": True,
        "n": 1, "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip
    assert {name: body[name] for name in sent} == sent
    # A seed of -1 would mean none: the sign bit is dropped.
    assert body["seed"] == 2**63 - 1


def test_greedy_is_temperature_0(server, policy):
    engine(server.url, top_k=1, temperature=0.5).generate(policy, some_requests(1))
    assert [server.bodies[0][n] for n in ("temperature", "top_k", "top_p")] == [0.0, 0, 1.0]


def test_an_adapters_name_tells_contents_and_folders_apart(
    server, policy, tiny_model_dir, tiny_adapters, tmp_path_factory
):
    """A server that has served iterate 1 of another run must not answer with it."""
    engine(server.url).generate(policy, [Request((1, 5), 1, 7, 4)])
    other = LoraPolicy(FrozenBase(str(tiny_model_dir)), LoraSettings(r=2))
    swapped = {1: tiny_adapters[2], 2: tiny_adapters[1]}
    other.use_iterates({0: tmp_path_factory.mktemp("iterate_000"), **swapped})
    engine(server.url).generate(other, [Request((1, 5), 1, 7, 4)])
    assert len(set(server.loads)) == 2
    engine(server.url).generate(policy, [Request((1, 5), 1, 7, 4)])
    assert len(server.loads) == 2
    names = [body["model"] for body in server.bodies]
    assert names[0] == names[2] != names[1]


def test_two_servers_share_the_requests(server, second, policy, monkeypatch):
    monkeypatch.setattr(vllm_fleet, "_OPENING", 60.0)
    requests = some_requests(30)
    responses = engine(server.url, second.url).generate(policy, requests)
    assert responses == engine(server.url).generate(policy, requests)
    assert len(second.bodies) == 15


def test_a_request_for_a_token_level_mixture_is_refused(server, policy):
    with pytest.raises(SettingError, match=r"mixes an iterate with the base at every token.*Fix"):
        engine(server.url).generate(policy, [Request((1, 5), 1, 7, 4, token_alpha=0.3)])


# --------------------------------------------------------------------------------------- faults


BROKEN = {
    "500": status(500),
    "503": status(503),
    "busy": status(429),
    "hangs up": hang_up,
    "late": late(0.8),
    "forgot": forget,
    "not JSON": status(200, b"<html>"),
    "no choice": status(200, {"choices": []}),
    "no list": status(200, {"choices": [{"token_ids": 3, "logprobs": {"token_logprobs": [1]}}]}),
    "cut": status(200, {"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-1]}}]}),
    "odd id": status(
        200, {"choices": [{"token_ids": [99, 2], "logprobs": {"token_logprobs": [-1, -1]}}]}
    ),
    "goes on": status(
        200, {"choices": [{"token_ids": [2, 5], "logprobs": {"token_logprobs": [-1, -1]}}]}
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_costs_a_second_request_and_nothing_else(name, server, policy):
    requests = some_requests(6)
    expected = engine(server.url).generate(policy, requests)
    server.bodies.clear()
    server.served.clear()
    server.faults.extend([lambda _: False, lambda _: False, BROKEN[name]])
    assert engine(server.url, request_timeout=0.5).generate(policy, requests) == expected
    assert len(server.bodies) == 7
    assert len(server.served) == 6


def test_a_request_that_always_fails_ends_with_the_last_problem(server, policy):
    server.faults.extend([status(500, {"error": {"message": "no memory"}})] * 5)
    with pytest.raises(SpinError, match=rf"{server.url} failed 5 times.*500: no memory.*Fix"):
        engine(server.url).generate(policy, some_requests(1))


def test_a_response_that_ends_elsewhere_names_the_option(server, policy):
    cut = status(200, {"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-1]}}]})
    server.faults.extend([cut] * 5)
    with pytest.raises(
        SpinError, match=r"at id 5, which is not a stop id \(2\).*--generation-conf"
    ):
        engine(server.url).generate(policy, some_requests(1))


def test_a_server_that_restarts_loses_and_repeats_nothing(server, policy, caplog):
    requests, restarted = some_requests(20), threading.Event()

    def restart(handler) -> bool:
        server.stop()
        threading.Timer(0.3, lambda: (server.start(), restarted.set())).start()
        handler.close_connection = True
        return True

    expected = engine(server.url).generate(policy, requests)
    loads = len(server.loads)
    server.served.clear()
    server.faults.extend([lambda _: False] * 9 + [restart])
    with caplog.at_level(logging.WARNING, "spin_lightning"):
        assert engine(server.url, concurrency=1).generate(policy, requests) == expected
    assert restarted.is_set()
    assert set(server.served.values()) == {1}
    assert len(server.loads) > loads  # again, after the restart
    assert len([m for m in caplog.messages if "does not answer" in m]) == 1
    assert len([m for m in caplog.messages if "answers again" in m]) == 1


def test_a_server_that_stays_away_is_left_out_while_another_lives(server, second, policy, caplog):
    requests = some_requests(20)
    expected = engine(server.url).generate(policy, requests)

    def die(handler) -> bool:
        second.stop()
        handler.close_connection = True
        return True

    second.faults.extend([lambda _: False, die])
    slow = [late(0.02)] * 20  # so that patience ends before the requests do
    server.faults.extend(slow)
    found = engine(server.url, second.url, concurrency=1, patience=0.1)
    assert found.generate(policy, requests) == expected
    assert any("is left out" in message for message in caplog.messages)
    second.start()


def test_without_a_server_the_error_names_urls_and_the_fix(policy):
    with pytest.raises(
        SpinError, match=rf"none answers .*{CLOSED}: .*failed.*spin-lightning serve"
    ):
        engine(CLOSED, patience=0.1).generate(policy, some_requests(1))


@pytest.fixture
def heeds_ctrl_c():
    """A process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_at_once(server, policy):
    server.faults.extend([late(12)] * 8)
    start = time.monotonic()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine(server.url, request_timeout=60.0).generate(policy, some_requests(8))
    assert time.monotonic() - start < 8  # by the clock, for a busy machine


# ------------------------------------------------------------------------------ another server


@pytest.fixture(scope="module")
def other_base(tiny_model_dir, tmp_path_factory):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model_dir)
    return write_model(config, tmp_path_factory.mktemp("other_base"), seed=5)


def test_another_base_is_refused_with_the_gap_or_accepted(other_base, policy):
    server = StandIn(other_base)
    match = (
        rf"{server.url} serves .*other_base.* by [\d.]+ nats per token.*largest_gap \(0.1\).*Fix"
    )
    with pytest.raises(SpinError, match=match):
        engine(server.url).generate(policy, some_requests(4))
    assert not server.bodies
    assert len(engine(server.url, largest_gap=50.0).generate(policy, some_requests(4))) == 4
    server.stop()


def test_a_server_that_comes_back_with_another_base_is_refused(
    server, policy, other_base, tiny_model_dir
):
    def swap(handler) -> bool:
        server.models[str(tiny_model_dir)] = next_tokens(other_base)
        return forget(handler)

    server.faults.append(swap)
    with pytest.raises(SpinError, match=r"more than generation.largest_gap"):
        engine(server.url, concurrency=1).generate(policy, some_requests(4))


def test_a_smaller_context_is_refused_before_weights_are_read(tiny_model_dir):
    server = StandIn(tiny_model_dir, context=16)
    engine(server.url).check(16)
    with pytest.raises(SpinError, match=r"takes 16 tokens.*up to 17.*--max-model-len 17"):
        engine(server.url).check(17)
    server.stop()


def test_a_server_that_loads_no_adapters_is_refused_before_weights_are_read(tiny_model_dir):
    server = StandIn(tiny_model_dir, runtime=False)
    with pytest.raises(SpinError, match=r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        engine(server.url).check(16)
    server.stop()


@pytest.mark.parametrize(
    ("rank", "advice"), [(1, "larger --max-lora-rank"), (None, "start it with --enable-lora")]
)
def test_an_adapter_that_will_not_load_is_noticed_at_iterate_0(
    rank, advice, tiny_model_dir, policy, tmp_path
):
    """Nothing but the base is needed then; the first adapter would come after a whole iterate."""
    server = StandIn(tiny_model_dir, max_rank=rank)
    found = engine(server.url)
    found.scratch = tmp_path
    with pytest.raises(SpinError, match=advice):
        found.generate(policy, [Request((1, 5), 0, 7, 4)])
    server.stop()


def test_a_url_of_something_else_is_refused(server):
    with pytest.raises(SpinError, match=r"check the URL"):
        engine(f"{server.url}/elsewhere").check(8)


def test_a_closed_port_is_named_before_weights_are_read():
    with pytest.raises(SpinError, match=rf"none answers \({CLOSED}: "):
        engine(CLOSED).check(8)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"engine": "vllm"}, "engine is vllm"),
        ({"servers": ["http://a:1"]}, "engine is local"),
        ({"engine": "vllm", "servers": ["localhost:8000"]}, "a list of URLs"),
        ({"engine": "vllm", "servers": "http://a:1"}, "a list of URLs"),
        ({"engine": "sglang"}, "local or vllm"),
        ({"concurrency": 0}, "generation.concurrency"),
        ({"request_timeout": 0}, "generation.request_timeout"),
        ({"patience": -1}, "generation.patience"),
        ({"largest_gap": 0}, "generation.largest_gap"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, problem):
    with pytest.raises(SettingError, match=problem):
        GenerationSettings.of(given)


# ------------------------------------------------------------------------------ finished responses


def test_a_killed_process_finds_its_finished_responses(server, policy, tmp_path):
    requests = some_requests(20)
    expected = engine(server.url).generate(policy, requests)
    server.served.clear()
    first, seen = engine(server.url, concurrency=1), []

    def stop_in_the_middle(count: int) -> None:
        seen.append(count)
        if len(seen) == 8:
            raise RuntimeError("killed")

    first.scratch, first.on_progress = tmp_path / "unit", stop_in_the_middle
    with pytest.raises(RuntimeError, match="killed"):
        first.generate(policy, requests)
    journal = tmp_path / "unit" / "responses.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[:-5])  # the eighth is torn
    second, counts = engine(server.url, concurrency=1), []
    second.scratch, second.on_progress = tmp_path / "unit", counts.append
    assert second.generate(policy, requests) == expected
    assert counts == [7, *[1] * 13]
    # Nothing is repeated but the torn one, and the ones that were in flight.
    assert sum(server.served.values()) - 20 in (1, 2)
    third = engine(CLOSED)
    third.scratch = tmp_path / "unit"
    assert third.generate(policy, requests) == expected


def test_finished_responses_of_another_adapter_or_setting_do_not_count(
    server, policy, tiny_adapters, tmp_path
):
    request = Request((1, 5, 9), 1, 7, 4)

    def asked(policy, **settings) -> int:
        server.bodies.clear()
        found = engine(server.url, **settings)
        found.scratch = tmp_path
        found.generate(policy, [request])
        return len(server.bodies)

    assert asked(policy) == 1
    assert asked(policy) == 0
    assert asked(policy, temperature=0.5) == 1
    other = LoraPolicy(policy.base, LoraSettings(r=2))
    other.use_iterates({0: tmp_path, 1: tiny_adapters[2]})
    assert asked(other) == 1


# ------------------------------------------------------------------------------------------- rows


def test_rows_record_the_gap_and_leave_no_scratch(server, policy, tmp_path, caplog):
    synthesis = Synthesis(policy, engine(server.url), vocabulary=24)
    examples = some_examples(10)
    list(synthesis.make(PLAN, examples, tmp_path / "rows", Timing()))
    finish(PLAN, examples, tmp_path / "rows", {})
    manifest = read_manifest(tmp_path / "rows")
    assert abs(manifest.others[GAP]) < 1e-5
    assert set(Counter(d["generated by"] for d in manifest.deviations.values())) == {
        "vLLM 0.0.stand-in"
    }
    assert [p.name for p in (tmp_path / "rows" / "__about__").iterdir()] == ["manifest.json"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_gap_of_the_rows_is_warned_about_and_does_not_stop_the_run(
    other_base, policy, tmp_path, caplog
):
    server = StandIn(other_base)
    synthesis = Synthesis(policy, engine(server.url, largest_gap=50.0), vocabulary=24)
    examples = some_examples(10)
    list(synthesis.make(PLAN, examples, tmp_path, Timing()))
    finish(PLAN, examples, tmp_path, {})
    gap = json.loads((tmp_path / "__about__" / "manifest.json").read_text())[GAP]
    assert gap > 0.05  # on average a sampler finds its own samples likelier than another policy
    assert any(f"by {gap:+.3f} nats per token" in message for message in caplog.messages)
    server.stop()


@pytest.mark.slow
def test_a_run_plays_on_a_server(server, tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", 40)
    how = {"engine": "vllm", "servers": [server.url], "unit_size": 16}
    settings = {"generation": how, "lora_r": 4}
    play(tmp_path / "run", tiny_model_dir, data, variant=FictitiousSPIN, settings=settings)
    record = json.loads((tmp_path / "run/iterates/iterate_001/iterate.json").read_text())
    assert abs(record["rows"]["rows/sampler_gap"]) < 1e-4
    assert record["rows"]["rows/opponent/p1"] > 0.2
    assert set(server.served.values()) == {1}
    assert not list((tmp_path / "run").rglob("unit-*"))


def test_a_server_is_woken_for_rows_and_put_to_sleep_afterwards(server, policy):
    server.sleeps, found = True, engine(server.url, sleep=True)
    found.generate(policy, some_requests(2))
    assert server.sleeps is False
    found.rest()
    assert server.sleeps is True
    engine(server.url).rest()  # without the setting nothing is sent
    engine(CLOSED, sleep=True).rest()  # a server that is away sleeps already


def test_a_server_without_a_sleep_mode_is_refused(server, policy):
    with pytest.raises(SpinError, match=r"has no sleep mode.*--enable-sleep-mode"):
        engine(server.url, sleep=True).generate(policy, some_requests(1))


def test_a_token_level_opponent_is_refused_before_the_data_are_generated(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", 40)
    settings = {"alpha": 0.3, "mixture": "token"}
    settings["generation"] = {"engine": "vllm", "servers": [CLOSED]}
    with pytest.raises(SettingError, match=r"generation.engine='vllm'.*at every token.*local"):
        play(tmp_path / "run", tiny_model_dir, data, variant=AlphaSPIN, settings=settings)
