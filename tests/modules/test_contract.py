"""The contract of every exported module, whatever its method."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import spin_lightning
from spin_lightning import SelfPlayModule
from spin_lightning.errors import SettingError
from spin_lightning.packing import pack_prompts
from spin_lightning.types import PairBatch
from tests.toys.runs import play, write_examples

EXPORTS = [getattr(spin_lightning, name) for name in spin_lightning.__all__]
MODULES = [
    value
    for value in EXPORTS
    if isinstance(value, type) and issubclass(value, SelfPlayModule) and value is not SelfPlayModule
]


# Settings without a default.
REQUIRED = {"AlphaSPIN": {"alpha": 0.3}}


@pytest.fixture(params=MODULES, ids=lambda module: module.__name__)
def variant(request: pytest.FixtureRequest) -> type[SelfPlayModule]:
    return request.param


def build(variant: type[SelfPlayModule], model: object, **settings: Any) -> SelfPlayModule:
    return variant(model=str(model), **REQUIRED.get(variant.__name__, {}), **settings)


def a_batch(module: SelfPlayModule) -> PairBatch:
    prompts, real, generated = [(1, 5), (1, 6, 7)], [(8, 9, 2), (4, 2)], [(11, 2), (12, 13, 14)]
    first = [[(5, 2), (9, 8, 2)]] if module.uses_first_responses else []
    pairs = pack_prompts(prompts, list(zip(real, generated, *first, strict=True)))
    batch = PairBatch(pairs, *torch.zeros(2, 2, dtype=torch.float64))
    with torch.no_grad():
        here = module.pair_logps(batch)
    references = here.policy_real, here.policy_generated
    further = [None if not module.further_references(0) else r[:, None] for r in references]
    return PairBatch(pairs, *references, (), *further)


def test_exported_modules_are_found():
    assert {module.__name__ for module in MODULES} == {
        "SPIN",
        "MixtureSPIN",
        "FictitiousSPIN",
        "AlphaSPIN",
        "SPACE",
        "TPAW",
        "TSPIN",
        "SFT",
    }


def test_hyper_parameters_are_plain_values(variant, tiny_model_dir):
    module = build(variant, tiny_model_dir)
    assert json.loads(json.dumps(dict(module.hparams))) == dict(module.hparams)


def test_checkpoint_round_trip_gives_the_same_policy_and_iterate(variant, tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", 60)
    module, _, trainer = play(
        tmp_path / "run",
        tiny_model_dir,
        data,
        variant=variant,
        epochs=1,
        settings=REQUIRED.get(variant.__name__),
    )
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    again = variant.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert again.iterate == module.iterate == 1
    for (name, weight), (_, other) in zip(
        module.policy.trainable(), again.policy.trainable(), strict=True
    ):
        assert torch.equal(weight, other), name
    assert dict(again.hparams) == dict(module.hparams)


def test_margin_where_policy_is_the_reference_is_zero(variant, tiny_model_dir):
    module = build(variant, tiny_model_dir)
    module.configure_model()
    margin = module.pair_logps(a_batch(module)).margin
    assert margin.abs().max() < 1e-6


def test_one_step_lowers_the_loss(variant, tiny_model_dir):
    L.seed_everything(0, verbose=False)
    module = build(variant, tiny_model_dir)
    module.configure_model()
    batch = a_batch(module)
    optimizer = torch.optim.SGD([p for _, p in module.policy.trainable()], lr=0.01)
    before = module.objective(module.pair_logps(batch))
    before.backward()
    optimizer.step()
    assert module.objective(module.pair_logps(batch)) < before


def test_gradient_reaches_the_adapter_alone(variant, tiny_model_dir):
    module = build(variant, tiny_model_dir)
    module.configure_model()
    module.objective(module.pair_logps(a_batch(module))).backward()
    with_gradient = {name for name, p in module.policy.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in module.policy.trainable()}


def test_configure_model_twice_loads_once(variant, tiny_model_dir):
    module = build(variant, tiny_model_dir)
    module.configure_model()
    policy = module.policy
    module.configure_model()
    assert module.policy is policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0: out of range. Fix: give values > 0"),
        ({"learning_rate": [1e-4, -1.0]}, "learning_rate="),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5"),
        ({"epochs_per_iterate": 0}, "epochs_per_iterate=0"),
        ({"epochs_per_iterate": 3, "schedule_epochs": 2}, "schedule_epochs=2"),
        ({"lora_r": 0}, "lora_r=0: out of range. Fix: give a whole number >= 1"),
        ({"lora_r": 8, "initial_adapter": "somewhere"}, "leave the lora_. settings out"),
        ({"generation": {"temperature": 0.0}}, "generation.temperature=0.0"),
    ],
)
def test_setting_out_of_range_is_refused_by_name_with_the_fix(settings, message, variant):
    with pytest.raises(SettingError, match=message):
        build(variant, "anything", **settings)


@pytest.mark.parametrize("beta", [0.0, -1.0, [0.1, 0.0]])
def test_beta_not_positive_is_refused(beta):
    with pytest.raises(SettingError, match=r"beta=.*give values > 0; 0\.1 is SPIN's"):
        spin_lightning.SPIN(model="anything", beta=beta)


def test_sft_takes_no_beta_and_no_loss(tiny_model_dir: Path):
    for name in ("beta", "loss"):
        with pytest.raises(TypeError, match=name):
            spin_lightning.SFT(model=str(tiny_model_dir), **{name: 0.1})
    assert not {"beta", "loss"} & set(spin_lightning.SFT(model=str(tiny_model_dir)).hparams)


def test_missing_model_is_refused_before_data_is_read(tmp_path):
    data = write_examples(tmp_path / "data.jsonl", 8)
    with pytest.raises(SettingError, match=r"model='.*nowhere'.*give a folder with a config.json"):
        play(tmp_path / "run", tmp_path / "nowhere", data)


def test_target_module_that_matches_no_layer_is_refused_with_the_choices(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", 8)
    with pytest.raises(SettingError, match=r"lora_target_modules='query'.*q_proj"):
        play(tmp_path / "run", tiny_model_dir, data, settings={"lora_target_modules": ["query"]})
