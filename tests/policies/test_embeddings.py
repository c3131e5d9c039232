"""Adapters on embeddings and heads: what PEFT marks as trainable is trained, saved and restored."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.export.model import export_iterate
from spin_lightning.modules.checkpointing import check_state, trained_state
from spin_lightning.packing import pack_prompts
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings, check_adapter, check_mixes_with_base
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.saved import load_iterate
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord
from spin_lightning.types import PolicyId
from tests.toys.models import family_config, write_model
from tests.toys.runs import contents, play, write_examples

# PEFT warns when the tests put an adapter on tied layers, or on transposed ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

# (embedding, a layer of attention)
NAMES = {
    "llama": ("embed_tokens", "q_proj"),
    "gemma": ("embed_tokens", "q_proj"),
    "gpt2": ("wte", "c_attn"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 128},
    "gemma": {"intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 2},
    "gpt2": {},
}

# What `lora_target_modules` may name, with {e} for the embedding and {q} for a layer of attention.
FRESH = {
    "embedding_and_layer": ["{e}", "{q}"],
    "embedding": ["{e}"],
    "head": ["lm_head"],
    "embedding_and_head": ["{e}", "lm_head"],
}
# Settings of an initial adapter beside its target modules.
INITIAL: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["{e}", "{q}"]},
    "head": {"target_modules": ["lm_head"]},
    "tokens": {"target_modules": ["{q}"], "trainable_token_indices": [5, 9]},
    "tokens_of_the_head": {"target_modules": ["{q}"], "trainable_token_indices": {"lm_head": [5]}},
    "whole_embedding": {"target_modules": ["{q}"], "modules_to_save": ["{e}"]},
    "whole_head": {"target_modules": ["{q}"], "modules_to_save": ["lm_head"]},
    "whole_norms": {"target_modules": ["{q}"], "modules_to_save": ["{n}"]},
    "dora": {"target_modules": ["{q}"], "use_dora": True},
    "dora_of_the_embedding": {"target_modules": ["{e}"], "use_dora": True},
    "bias_of_lora": {"target_modules": ["{q}"], "lora_bias": True},
}
# Adapters that PEFT cannot mix with the base row by row, with what the message names.
UNMIXED = {"dora": "DoRA", "dora_of_the_embedding": "DoRA", "whole_norms": "(norm|ln_f)"}
PROMPTS = pack_prompts([[1, 5, 9], [1, 7]], [[[14, 9, 2], [6, 2]], [[5, 5, 2]]])


@pytest.fixture(scope="module", params=[(f, tied) for f in SHAPES for tied in (True, False)])
def base(request, tmp_path_factory) -> FrozenBase:
    """A family with tied and untied embeddings; `revision` carries the family's name to tests."""
    family, tied = request.param
    config = family_config(family, 24, tie_word_embeddings=tied, **SHAPES[family])
    folder = write_model(config, tmp_path_factory.mktemp(family) / family)
    return FrozenBase(str(folder), compute_dtype="float32")


def filled(base: FrozenBase, value: Any) -> Any:
    """A setting with the family's names of layers."""
    embedding, layer = NAMES[Path(base.name).name]
    names = {"{e}": embedding, "{q}": layer, "{n}": "ln_f" if embedding == "wte" else "norm"}
    if isinstance(value, list):
        return [names.get(entry, entry) for entry in value]
    return value


def write_initial(base: FrozenBase, folder: Path, **settings: Any) -> Path:
    """An adapter as PEFT saves it, with random weights."""
    settings = {name: filled(base, value) for name, value in settings.items()}
    config = peft.LoraConfig(
        r=4, lora_alpha=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.name), config)
    moved = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def check_is_trained_saved_and_restored(policy: LoraPolicy, root: Path) -> None:
    """One step moves every trained weight; iterates and checkpoints restore all of them."""
    before = {name: p.detach().clone() for name, p in policy.trainable()}
    marked = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert marked == set(before) != set()
    policy.snapshot(root / "0")
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.02)
    for _ in range(3):  # B starts at 0, so the first step moves B alone
        optimizer.zero_grad()
        (-policy.prompt_logps(PROMPTS).mean()).backward()
        optimizer.step()
    for name, parameter in policy.trainable():
        assert not torch.equal(parameter, before[name]), name

    trained = policy.prompt_logps(PROMPTS).detach()
    files = policy.snapshot(root / "1")
    start, end = (load_file(root / t / "adapter_model.safetensors") for t in "01")
    assert [name for name in end if torch.equal(start[name], end[name])] == []
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    policy.use_iterates({1: root / "1"})
    with policy.at(1):
        torch.testing.assert_close(policy.prompt_logps(PROMPTS), trained, atol=1e-4, rtol=1e-5)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == marked
    # The adapter is also what PEFT alone makes of the folder.
    torch.testing.assert_close(
        policy.model(torch.tensor([[1, 5, 9, 14]])).logits,
        peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(policy.base.name), root / "1"
        )
        .eval()(torch.tensor([[1, 5, 9, 14]]))
        .logits,
        atol=1e-4,
        rtol=1e-5,
    )
    module = torch.nn.Module()
    module.policy = policy
    state = {n: v.clone() for n, v in trained_state(policy, module.state_dict()).items()}
    assert set(state) == {f"policy.{name}" for name in before}
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.zero_()
    check_state(policy, state, strict=True)
    module.load_state_dict(state, strict=False)
    torch.testing.assert_close(policy.prompt_logps(PROMPTS), trained, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("packing", ["auto", "padded"])
@pytest.mark.parametrize("targets", FRESH)
def test_fresh_adapter_on_embedding_or_head_is_trained_saved_and_restored(
    targets, packing, base, tmp_path
):
    lora = LoraSettings(r=4, alpha=8, target_modules=tuple(filled(base, FRESH[targets])))
    check_adapter(base, lora, None)
    policy = LoraPolicy(base, lora, packing=packing)
    check_is_trained_saved_and_restored(policy, tmp_path)


@pytest.mark.parametrize("kind", INITIAL)
def test_initial_adapter_is_trained_saved_and_restored(kind, base, tmp_path):
    folder = write_initial(base, tmp_path / "initial", **INITIAL[kind])
    check_adapter(base, LoraSettings(), str(folder))
    policy = LoraPolicy(base, LoraSettings(), str(folder))
    ids = torch.tensor([[1, 5, 9, 14]])
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), folder)
    torch.testing.assert_close(policy.model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-5)
    check_is_trained_saved_and_restored(policy, tmp_path)


@pytest.mark.parametrize("kind", INITIAL)
def test_initial_adapter_mixed_with_the_base_at_every_token_is_the_mean_of_log_probs(
    kind, base, tmp_path
):
    """The logits of g are those of (1 - a) log p_1 + a log p_0, up to a constant per token."""
    folder = write_initial(base, tmp_path / "initial", **INITIAL[kind])
    if kind in UNMIXED:
        with pytest.raises(SettingError, match=rf"initial_adapter=.*{UNMIXED[kind]}.*alpha"):
            check_mixes_with_base(base, str(folder))
        return
    check_mixes_with_base(base, str(folder))
    bare = tmp_path / "0"
    bare.mkdir()
    policy = LoraPolicy(base, LoraSettings(r=2))
    policy.use_iterates({0: bare, 1: folder})
    ids = torch.tensor([[1, 5, 9, 14], [1, 7, 5, 2]])

    def log_p(iterate: int, alpha: float = 0.0) -> torch.Tensor:
        with policy.at(iterate, alpha):
            logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.log_softmax(-1)

    wanted = (0.7 * log_p(1) + 0.3 * log_p(0)).log_softmax(-1)
    torch.testing.assert_close(log_p(1, 0.3), wanted, atol=1e-4, rtol=0)
    groups = policy.batch_groups([PolicyId(1), PolicyId(0)])
    assert sorted(p for group in groups for p in group) == [PolicyId(0), PolicyId(1)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias_all": ({"bias": "all"}, r"bias='all'.*base.*Fix: .*bias: none"),
    "bias_lora_only": ({"bias": "lora_only"}, r"bias='lora_only'.*Fix: .*bias: none"),
    "pissa": ({"init_lora_weights": "pissa"}, r"'pissa'.*changes.*weights.*conversion.*model"),
    "pissa_fast": ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4'.*Fix: .*conversion"),
    "olora": ({"init_lora_weights": "olora"}, r"'olora'.*changes.*weights.*Fix: .*conversion"),
    "corda": (
        {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
        r"'corda'.*Fix: .*conversion",
    ),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        r"'loftq'.*Fix: .*conversion",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_initial_adapter_that_changes_the_base_is_refused_by_name(kind, base, tmp_path):
    settings, message = REFUSED[kind]
    folder = write_initial(base, tmp_path / "initial", target_modules=["{q}"])
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(SettingError, match=rf"initial_adapter=.*{message}"):
        check_adapter(base, LoraSettings(), str(folder))


def test_initial_adapter_with_other_embeddings_of_the_base_is_refused(base, tmp_path):
    """PEFT saves a targeted embedding with the adapter, and loads it over the base's."""
    folder = write_initial(base, tmp_path / "same", target_modules=["{e}"])
    check_adapter(base, LoraSettings(), str(folder))
    LoraPolicy(base, LoraSettings(), str(folder))

    model = AutoModelForCausalLM.from_pretrained(base.name)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 1
    config = peft.LoraConfig(target_modules=filled(base, ["{e}"]), task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(
        tmp_path / "other", save_embedding_layers=True
    )
    check_adapter(base, LoraSettings(), str(tmp_path / "other"))
    with pytest.raises(SettingError, match=r"initial_adapter=.*another.*embed.*Fix: .*merge"):
        LoraPolicy(base, LoraSettings(), str(tmp_path / "other"))


@pytest.mark.parametrize("kind", INITIAL)
def test_initial_adapter_is_trained_in_bfloat16_and_with_checkpointing(kind, base, tmp_path):
    folder = write_initial(base, tmp_path / "initial", **INITIAL[kind])
    low = replace(base, compute_dtype="bfloat16")
    policy = LoraPolicy(low, LoraSettings(), str(folder), activation_checkpointing=True)
    (-policy.prompt_logps(PROMPTS).mean()).backward()
    assert [n for n, p in policy.trainable() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "targets",
    [
        ["embed_tokens", "q_proj"],
        *(pytest.param([name], marks=pytest.mark.slow) for name in ("embed_tokens", "lm_head")),
    ],
)
def test_run_with_an_adapter_on_the_embedding_resumes_and_is_loaded(
    targets, tiny_model_dir, tmp_path
):
    data = write_examples(tmp_path / "data.jsonl")
    settings = {"lora_target_modules": targets}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    module, _, _ = play(whole, tiny_model_dir, data, settings=settings)
    play(parts, tiny_model_dir, data, settings=settings, epochs=1)
    last = RunFolder(parts).last_checkpoint
    play(parts, tiny_model_dir, data, settings=settings, ckpt_path=last)
    assert contents(parts) == contents(whole)
    model, _ = load_iterate(whole, 2)
    ids = torch.tensor([[1, 5, 9, 14]])
    torch.testing.assert_close(model(ids).logits, module.policy.model(ids).logits)
    first = load_file(RunFolder(whole).iterate(1) / "adapter_model.safetensors")
    assert [n for n, w in first.items() if n.endswith("_B") and not w.any()] == []


# ------------------------------------------------------------------------------ exported, merged


def write_run_of(base: FrozenBase, root: Path, **settings: Any) -> RunFolder:
    """A run whose iterate 1 is a random adapter."""
    run = RunFolder(root)
    for t in (0, 1):
        run.iterate(t).mkdir(parents=True)
        if t:
            write_initial(base, run.iterate(t), **settings)
        fields = {"stop_ids": [2, 7]}
        run.write_record(IterateRecord(t, base=asdict(base), fingerprint_fields=fields))
    return run


MERGED: dict[str, dict[str, Any]] = {
    **{kind: settings for kind, settings in INITIAL.items() if kind != "bias_of_lora"},
    "embedding_and_head": {"target_modules": ["{e}", "lm_head"]},
    "layer": {"target_modules": ["{q}"]},
}
# Kinds that make embedding and head differ, where they were tied.
UNTYING = {"embedding", "head", "tokens_of_the_head", "whole_embedding", "whole_head"}
UNTYING |= {"dora_of_the_embedding", "embedding_and_head"}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_export_has_the_iterates_own_logits_and_says_what_was_untied(
    kind, base, tiny_model_dir, tmp_path
):
    run = write_run_of(base, tmp_path / "run", **MERGED[kind])
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(run.tokenizer)
    lines: list[str] = []
    out = export_iterate(run.root, 1, tmp_path / "out", merge=True, notify=lines.append)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    own, _ = load_iterate(run.root, 1)
    ids = torch.tensor([[1, 5, 9, 14, 3], [9, 7, 5, 2, 21]])
    torch.testing.assert_close(merged(ids).logits, own(ids).logits, atol=1e-3, rtol=1e-4)
    was_tied = AutoModelForCausalLM.from_pretrained(base.name).config.tie_word_embeddings
    assert merged.config.tie_word_embeddings is (was_tied and kind not in UNTYING)
    untied = [line for line in lines if "tie_word_embeddings: false" in line]
    assert len(untied) == (was_tied and kind in UNTYING)
    assert any("Difference from the iterate's own logits" in line for line in lines)
    assert re.search(r"Verified with transformers and PEFT alone on 8 rows", lines[-1])
    assert merged.generation_config.eos_token_id == [2, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_lora_bias_on_layers_without_bias_is_not_merged(base, tiny_model_dir, tmp_path):
    run = write_run_of(base, tmp_path / "run", target_modules=["lm_head"], lora_bias=True)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(run.tokenizer)
    with pytest.raises(RunFolderError, match=r"cannot be merged \(lora_bias.*without --merge"):
        export_iterate(run.root, 1, tmp_path / "out", merge=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_model_beyond_the_bound_of_its_type_is_refused(
    dtype, tiny_model_dir, tmp_path, monkeypatch
):
    """A merge that loses the adapter, as an in-place merge into tied weights did in part."""
    base = FrozenBase(str(tiny_model_dir), compute_dtype=dtype)
    config = {"target_modules": ["q_proj", "down_proj"]}
    monkeypatch.setitem(NAMES, tiny_model_dir.name, ("embed_tokens", "q_proj"))
    run = write_run_of(base, tmp_path / "run", **config)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(run.tokenizer)
    export_iterate(run.root, 1, tmp_path / "right", merge=True, notify=lambda line: None)
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), False)
    with pytest.raises(RunFolderError, match=r"not the iterate, and was not kept.*accepted: up to"):
        export_iterate(run.root, 1, tmp_path / "wrong", merge=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["right", "run"]
