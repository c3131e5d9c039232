"""A step in several forward passes: the gradients of the whole batch, one pass's activations."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from spin_lightning import SFT, SPACE, SPIN, TPAW, TSPIN, SelfPlayModule, packing
from spin_lightning.errors import SpinError
from spin_lightning.modules import pass_by_pass
from spin_lightning.packing import pack_prompts, split_for
from spin_lightning.report.run_view import read_runs
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import PairBatch, PairLogps
from tests.toys.models import family_config, write_model
from tests.toys.runs import contents, play, write_examples

CPU = torch.device("cpu")


class CenteredSPIN(SPIN):
    """Margins relative to the mean of the batch: not a mean over pairs."""

    def objective(self, logps: PairLogps) -> Tensor:
        return -torch.nn.functional.logsigmoid(logps.margin - logps.margin.mean()).mean()


@pytest.fixture
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of about 24 tokens, two pairs of these tests."""
    monkeypatch.setitem(packing._TOKENS_OF_A_PASS, "cpu", 24)


def build(model: Path, variant: type[SelfPlayModule] = SPIN, **settings: Any) -> SelfPlayModule:
    """A module whose adapter differs from the base."""
    L.seed_everything(0, verbose=False)
    module = variant(model=str(model), **settings)
    module.configure_model()
    with torch.no_grad():
        for _, parameter in module.policy.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def a_batch(pairs: int, count: int = 2) -> PairBatch:
    """Prompts with `count` responses of random ids; references leave margins of some nats."""
    draw = random.Random(3)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 15) for _ in range(draw.randrange(1, most)))

    prompts = [ids(6) for _ in range(pairs)]
    responses = [[ids(6) for _ in range(count)] for _ in range(pairs)]
    reference = -10 * torch.rand(2, pairs, dtype=torch.float64)
    further = -10 * torch.rand(2, pairs, 3, dtype=torch.float64)
    return PairBatch(
        pack_prompts(prompts, responses),
        reference[0],
        reference[1] if count > 1 else None,
        tuple((i, 0) for i in range(pairs)),
        *further,
    )


# Responses of a pair, where they are not two.
RESPONSES = {SFT: 1, TSPIN: 3}


def gradients(module: SelfPlayModule) -> list[Tensor]:
    found = []
    for name, parameter in module.policy.trainable():
        assert parameter.grad is not None, name
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def whole(module: SelfPlayModule, batch: PairBatch) -> tuple[PairLogps, Tensor]:
    """The plain step: all passes in one graph."""
    logps = module.pair_logps(batch)
    return logps, module.anchored_objective(logps)


SETTINGS = [
    (SPIN, {}),
    (SPIN, {"loss": "hinge", "beta": 0.3}),
    (SPIN, {"loss": "ipo", "real_nll_weight": 0.2}),
    (SPIN, {"loss": "exponential", "packing": "padded"}),
    (SPIN, {"activation_checkpointing": True}),
    (SPACE, {"ratio": 2.0}),
    (SPIN, {"loss": "sppo"}),
    (TPAW, {}),
    (TSPIN, {}),
    (SFT, {}),
]


@pytest.fixture
def wide_model_dir(tmp_path: Path) -> Path:
    """A Llama whose widths are multiples of 64, as bitsandbytes' CPU kernels need."""
    return write_model(family_config("llama", 24, intermediate_size=128), tmp_path / "wide")


def test_step_by_passes_in_4_bits_has_the_gradients_of_the_plain_step(wide_model_dir, short_passes):
    module, batch = build(wide_model_dir, quantization="nf4"), a_batch(8)
    assert_same_step(module, batch)


@pytest.mark.parametrize("pairs", [8, 11])
@pytest.mark.parametrize(("variant", "settings"), SETTINGS)
def test_step_by_passes_has_the_loss_and_gradients_of_the_plain_step(
    variant, settings, pairs, tiny_model_dir, short_passes
):
    module, batch = (
        build(tiny_model_dir, variant, **settings),
        a_batch(pairs, RESPONSES.get(variant, 2)),
    )
    assert_same_step(module, batch)


def assert_same_step(module: SelfPlayModule, batch: PairBatch) -> None:
    assert len(split_for(CPU, batch.pairs)) > 1
    plain, loss = whole(module, batch)
    (0.5 * loss).backward()
    expected = gradients(module)
    logps, value = pass_by_pass.score(module, batch)
    (0.5 * value).backward()
    assert not module.needs_whole_batches
    assert_equal_step(module, (logps, value), (plain, loss), expected)


def assert_equal_step(
    module: SelfPlayModule,
    step: tuple[PairLogps, Tensor],
    wanted_step: tuple[PairLogps, Tensor],
    expected: list[Tensor],
) -> None:
    """The same log-probs, objective and, in the module, gradients, within rounding."""
    (logps, value), (plain, loss) = step, wanted_step
    torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logps.policy_real, plain.policy_real.detach(), rtol=1e-6, atol=1e-6)
    assert logps.real_lengths.tolist() == plain.real_lengths.tolist()
    for found, wanted in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_objective_over_the_whole_batch_keeps_its_gradients(
    tiny_model_dir, short_passes, monkeypatch
):
    printed: list[str] = []
    monkeypatch.setattr(CenteredSPIN, "print", lambda _, text: printed.append(text))
    module, batch = build(tiny_model_dir, CenteredSPIN), a_batch(8)
    whole(module, batch)[1].backward()
    expected = gradients(module)
    for _ in range(2):
        pass_by_pass.score(module, batch)[1].backward()
        for found, wanted in zip(gradients(module), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    (line,) = printed
    assert "CenteredSPIN is not a mean over pairs" in line


def test_activations_of_one_pass_live_at_a_time(tiny_model_dir, short_passes):
    module, live, most = build(tiny_model_dir), 0, 0

    def gone(size: int) -> None:
        nonlocal live
        live -= size

    def keep(tensor: Tensor) -> Tensor:
        nonlocal live, most
        held = tensor.detach().view_as(tensor)
        live += tensor.nbytes
        most = max(most, live)
        weakref.finalize(held, gone, tensor.nbytes)
        return held

    peaks, per_token = [], []
    for pairs in (2, 8, 32):
        batch, most = a_batch(pairs), 0
        passes = packing.split_for(torch.device("cpu"), batch.pairs)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held):
            pass_by_pass.score(module, batch)[1].backward()
        peaks.append(most)
        per_token.append(most / max(len(each.input_ids) for each in passes))
        assert live < peaks[0] / 10
    # 302 tokens of 32 pairs hold what the 33 tokens of their longest pass do.
    assert per_token == pytest.approx([per_token[0]] * 3, rel=0.05)


@contextmanager
def memory_for(tokens: int, module: SelfPlayModule, where: str) -> Iterator[list[int]]:
    """A module that runs out of memory in longer passes; the lengths of all passes.

    Both fail between the two layers; the backward pass then has the gradients of the second one.
    """
    lengths: list[int] = []
    first, _ = module.policy.model.get_base_model().base_model.layers

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def forward(_module: nn.Module, _args: object, _kwargs: object, output: Tensor) -> None:
        if torch._C._current_graph_task_id() >= 0:
            return  # recomputed in a backward pass
        lengths.append(output.shape[:2].numel())
        if lengths[-1] > tokens:
            fail(None) if where == "forward" else output.register_hook(fail)

    handle = first.register_forward_hook(forward, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("variant", "settings"), SETTINGS)
def test_a_pass_that_memory_does_not_suffice_for_is_split_with_equal_gradients(
    variant, settings, where, tiny_model_dir, caplog
):
    """8 pairs are one pass of more than 30 tokens; gradients from an earlier batch stay."""
    module = build(tiny_model_dir, variant, **settings)
    batch, earlier = (a_batch(pairs, RESPONSES.get(variant, 2)) for pairs in (8, 2))
    plain, loss = whole(module, batch)
    (0.5 * loss + whole(module, earlier)[1]).backward()
    expected = gradients(module)
    pass_by_pass.score(module, earlier)[1].backward()
    with memory_for(30, module, where) as lengths, caplog.at_level(logging.INFO):
        logps, value = pass_by_pass.score(module, batch)
        (0.5 * value).backward()
        assert lengths[0] > 30
        assert_equal_step(module, (logps, value), (plain, loss), expected)
        assert module.policy.training_limit.tokens <= 30
        assert "NOTE: memory did not suffice for a training pass of" in caplog.text
        tried = len(lengths)
        caplog.clear()
        pass_by_pass.score(module, batch)
        assert max(lengths[tried:]) <= 30, "it did not try the whole pass again"
        assert not caplog.text


def test_a_validation_pass_that_memory_does_not_suffice_for_is_a_scoring_pass(tiny_model_dir):
    module, batch = build(tiny_model_dir), a_batch(8)
    with torch.no_grad():
        plain = module.pair_logps(batch)
        with memory_for(12, module, "forward"):
            found = module.pair_logps(batch)
    torch.testing.assert_close(found.policy_real, plain.policy_real, rtol=1e-6, atol=1e-6)
    assert found.policy_generated is not None
    torch.testing.assert_close(found.policy_generated, plain.policy_generated, rtol=1e-6, atol=1e-6)
    assert module.policy.scoring_limit.tokens <= 12
    assert module.policy.training_limit.deviations == {}


def test_a_single_pair_that_memory_does_not_suffice_for_is_an_error(tiny_model_dir):
    module = build(tiny_model_dir)
    wanted = r"training pass of \d+ tokens, which cannot be split.*Fix: .*activation_checkpointing"
    with memory_for(2, module, "backward"), pytest.raises(SpinError, match=wanted):
        pass_by_pass.score(module, a_batch(8))
    assert all(parameter.grad is None for _, parameter in module.policy.trainable())


def test_an_objective_over_the_whole_batch_that_does_not_fit_is_an_error(
    tiny_model_dir, monkeypatch
):
    """It is split first, since whether it is a mean over pairs is not known before."""
    monkeypatch.setattr(CenteredSPIN, "print", lambda *_: None)
    module = build(tiny_model_dir, CenteredSPIN)
    with memory_for(30, module, "forward"), pytest.raises(SpinError, match=r"data\.batch_size"):
        pass_by_pass.score(module, a_batch(8))


def test_a_run_records_the_passes_that_were_split(tiny_model_dir, tmp_path):
    """Batches of 8 pairs with passes of at most 60 tokens from the second iterate's training on."""
    data = write_examples(tmp_path / "data.jsonl", 60)

    class Shrinks(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                stack.enter_context(memory_for(60, pl_module, "backward"))

    settings: dict[str, Any] = {"data_settings": {"batch_size": 8}}
    with ExitStack() as stack:
        found, *_ = play(
            tmp_path / "short", tiny_model_dir, data, callbacks=[Shrinks()], **settings
        )
    plain, *_ = play(tmp_path / "plain", tiny_model_dir, data, **settings)
    for (name, weight), (_, wanted) in zip(
        found.policy.trainable(), plain.policy.trainable(), strict=True
    ):
        torch.testing.assert_close(weight, wanted, rtol=1e-3, atol=1e-4, msg=name)
    tokens = found.policy.training_limit.tokens
    first, second = (RunFolder(tmp_path / "short").record(t).training for t in (1, 2))
    assert first is not None
    assert second is not None
    assert first.deviations == {}
    assert second.deviations == {"training_tokens": tokens}
    (view,) = read_runs([RunFolder(tmp_path / "short")])
    assert f"training_tokens: {tokens} (training of p2)" in view.deviations


def test_run_by_passes_has_the_bytes_of_the_plain_run(
    tiny_model_dir, tmp_path, monkeypatch, short_passes
):
    """Batches of 8 pairs, several passes each, two iterates: equal adapters and rows."""
    data = write_examples(tmp_path / "data.jsonl", 60)
    settings = {"data_settings": {"batch_size": 8}}
    play(tmp_path / "passes", tiny_model_dir, data, **settings)
    monkeypatch.setattr(pass_by_pass, "score", whole)
    play(tmp_path / "plain", tiny_model_dir, data, **settings)
    found = contents(tmp_path / "passes")
    assert any(name.endswith(".safetensors") for name in found)
    assert found == contents(tmp_path / "plain")


def test_accumulated_gradients_are_those_of_the_plain_run_within_rounding(
    tiny_model_dir, tmp_path, monkeypatch, short_passes
):
    """The weight of a batch within its step is applied to the sum of the passes' gradients."""
    data = write_examples(tmp_path / "data.jsonl", 60)
    settings: dict[str, Any] = {"epochs": 1, "data_settings": {"batch_size": 8}}
    settings["trainer_settings"] = {"accumulate_grad_batches": 3}
    first, *_ = play(tmp_path / "passes", tiny_model_dir, data, **settings)
    monkeypatch.setattr(pass_by_pass, "score", whole)
    plain, *_ = play(tmp_path / "plain", tiny_model_dir, data, **settings)
    for (name, found), (_, wanted) in zip(
        first.policy.trainable(), plain.policy.trainable(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_an_optimizer_that_memory_does_not_suffice_for_is_an_error_with_the_fix(
    tiny_model_dir, tmp_path, monkeypatch
):
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    data = write_examples(tmp_path / "data.jsonl", 40)
    wanted = r"not enough memory for the optimizer's step.*Fix: set model.optimizer: adamw_8bit"
    with pytest.raises(SpinError, match=wanted):
        play(tmp_path / "run", tiny_model_dir, data, epochs=1)
