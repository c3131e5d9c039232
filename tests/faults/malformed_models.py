"""Adapters and models that something has happened to."""

from __future__ import annotations

import pickle

import torch

from tests.faults.damage import (
    DEEP,
    NO_JSON,
    NOISE,
    Malicious,
    bytes_,
    cases,
    edited,
    gone,
    half,
    replaced_by_a_folder,
    tensors,
)

WEIGHTS = "adapter_model.safetensors"
ADAPTERS = [
    *cases("adapter_config.json", "adapter", ("initial_adapter=", "Fix: "), **NO_JSON),
    *cases(
        "adapter_config.json",
        "adapter",
        ("initial_adapter=", "Fix: "),
        gone=gone,
        no_type=edited(peft_type=None),
        unknown_type=edited(peft_type="MAGIC"),
        type_a_number=edited(peft_type=7),
        another_method=edited(peft_type="IA3"),
        rank_zero=edited(r=0),
        rank_negative=edited(r=-2),
        rank_a_text=edited(r="four"),
        another_rank=edited(r=3),
        targets_of_another_model=edited(target_modules=["c_attn"]),
        targets_a_number=edited(target_modules=7),
        targets_no_pattern=edited(target_modules="("),
        no_targets=edited(target_modules=[]),
    ),
    *cases(
        WEIGHTS,
        "adapter",
        ("initial_adapter=", "Fix: "),
        gone=gone,
        empty=bytes_(b""),
        half=half,
        noise=bytes_(NOISE),
        a_pickle=bytes_(pickle.dumps(Malicious())),
        header_too_long=bytes_(b"\xff" * 8 + b"{}"),
        header_no_json=bytes_((7).to_bytes(8, "little") + b"nothing"),
        header_deep=bytes_(len(DEEP).to_bytes(8, "little") + DEEP),
        a_folder=replaced_by_a_folder,
        no_tensors=tensors(lambda found: {}),
        a_tensor_less=tensors(lambda found: dict(list(found.items())[1:])),
        a_tensor_more=tensors(lambda found: {**found, "x": torch.zeros(1)}),
        other_names=tensors(lambda found: {f"x.{k}": v for k, v in found.items()}),
        other_shapes=tensors(lambda found: {k: v[:, :1].clone() for k, v in found.items()}),
        turned=tensors(lambda found: {k: v.t().contiguous() for k, v in found.items()}),
        not_numbers=tensors(lambda found: {k: v * float("nan") for k, v in found.items()}),
        whole_numbers=tensors(lambda found: {k: v.int() for k, v in found.items()}),
    ),
]

MODELS = [
    *cases("config.json", "model", ("model=", "Fix: "), **NO_JSON),
    *cases(
        "config.json",
        "model",
        ("model=", "Fix: "),
        gone=gone,
        unknown_type=edited(model_type="nothing-yet"),
        no_type=edited(model_type=None),
        no_language_model=edited(model_type="clip"),
        width_a_text=edited(hidden_size="wide"),
        width_negative=edited(hidden_size=-32),
        no_heads=edited(num_attention_heads=0),
        heads_a_text=edited(num_attention_heads="four"),
        layers_a_list=edited(num_hidden_layers=[2]),
        unknown_activation=edited(hidden_act="magic"),
        code_of_its_own=edited(model_type="own", auto_map={"AutoConfig": "own.Own"}),
    ),
    *cases(
        "tokenizer.json",
        "model",
        ("model=", "tokenizer", "Fix: "),
        empty=bytes_(b""),
        half=half,
        noise=bytes_(NOISE),
        null=bytes_(b"null"),
        nothing=bytes_(b"{}"),
        model_a_number=edited(model=7),
    ),
    *cases(
        "model.safetensors",
        "weights",
        ("model=", "weights", "Fix: "),
        gone=gone,
        empty=bytes_(b""),
        half=half,
        noise=bytes_(NOISE),
        a_tensor_less=tensors(lambda found: dict(list(found.items())[1:])),
        other_shapes=tensors(lambda found: {k: v[:1].clone() for k, v in found.items()}),
    ),
]
