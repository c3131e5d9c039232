"""The other side: TRL's DPOTrainer and transformers' `generate`, configured to be fast.

TRL: no recomputation, no mixed precision in float32 (its defaults on a CPU are many times slower),
reference log-probs computed beforehand, and the head on response tokens only. TRL does the latter
only on GPUs; elsewhere it is patched in.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.ours import BETA, LEARNING_RATE, write_adapters
from benchmarks.setup import Setup
from benchmarks.workload import PAD, PAIRS_PER_STEP, STOP, words_of
from spin_lightning.data.dataset import Pair
from spin_lightning.generation.base import Request

MISSING = "TRL is not installed, so there is nothing to compare with: pip install -e '.[bench]'"


def is_there() -> bool:
    """Whether TRL is installed."""
    return find_spec("trl") is not None


def load_model(setup: Setup, quantization: str = "none", adapters: int = 1) -> PeftModel:
    """The base with the first adapters on it, the first one trainable and named "default"."""
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=setup.dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(
        setup.base,
        dtype=setup.dtype,
        quantization_config=config,
        device_map={"": setup.device},
    )
    base.requires_grad_(False)
    _keep_layout(base)
    first, *others = write_adapters(setup)[:adapters]
    model = PeftModel.from_pretrained(base, first, is_trainable=True)
    for number, folder in enumerate(others, start=2):
        model.load_adapter(folder, adapter_name=adapter_name(number))
    return model


def adapter_name(iterate: int) -> str:
    """PEFT's name of an iterate's adapter."""
    return "default" if iterate == 1 else f"iterate_{iterate}"


class Step:
    """A training step of DPOTrainer, including its collator and the optimizer."""

    def __init__(self, setup: Setup, quantization: str = "none") -> None:
        """Build a DPOTrainer; its own data set holds one short pair and is not used."""
        pair = setup.workload("tiny").pairs(1, setup.vocabulary)
        self.trainer = make_trainer(setup, load_model(setup, quantization), pair)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1  # as `train` sets it

    def features(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """The pairs as rows of TRL's prepared data set."""
        return [
            {
                "prompt_ids": pair.prompt_ids.tolist(),
                "chosen_ids": pair.real_ids.tolist(),
                "rejected_ids": pair.generated_ids.tolist(),
                "ref_chosen_logps": pair.reference_real,
                "ref_rejected_logps": pair.reference_generated,
            }
            for pair in pairs
        ]

    def loss(self, pairs: Sequence[Pair]) -> Tensor:
        """The loss of a batch, with its graph."""
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(self.features(pairs)))
        with head_on_responses_only():
            loss: Tensor = self.trainer.compute_loss(self.trainer.model, inputs)
        return loss

    def __call__(self, pairs: Sequence[Pair]) -> None:
        """Take one step."""
        trainer = self.trainer
        inputs = trainer.data_collator(self.features(pairs))
        with head_on_responses_only():
            trainer.training_step(trainer.model, inputs)
        trainer.optimizer.step()
        trainer.model.zero_grad(set_to_none=True)


def make_trainer(
    setup: Setup,
    model: PeftModel,
    pairs: Sequence[Pair],
    out: Path | None = None,
    epochs: int = 1,
) -> Any:
    """A DPOTrainer at its best; its constructor computes the reference log-probs of the pairs.

    TRL rounds the adapter of a quantized base to bfloat16. In float32 that is undone, since it
    changes the adapter.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rows = [
        {
            "prompt": words_of(pair.prompt_ids.tolist()),
            "chosen": f" {words_of(pair.real_ids.tolist())}",
            "rejected": f" {words_of(pair.generated_ids.tolist())}",
        }
        for pair in pairs
    ]
    config = DPOConfig(
        output_dir=str(out or setup.out / "trl"),
        per_device_train_batch_size=PAIRS_PER_STEP,
        num_train_epochs=epochs,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=0,
        optim="adamw_torch",
        beta=BETA,
        precompute_ref_log_probs=True,
        max_length=None,
        bf16=setup.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        use_cpu=setup.device == "cpu",
        dataloader_pin_memory=setup.device == "cuda",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with head_on_responses_only():
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(setup.base),
        )
    for name, parameter in model.named_parameters():
        if name in adapter and setup.dtype == torch.float32:
            parameter.data = adapter[name]
    return trainer


def train(trainer: Any) -> None:
    """`Trainer.train` without its printed summary."""
    with head_on_responses_only(), redirect_stdout(io.StringIO()):
        trainer.train()


@torch.no_grad()
def padded_logps(
    model: nn.Module, prompts: Sequence[Any], responses: Sequence[Any], batch_size: int
) -> list[float]:
    """log p(response | prompt) by padded passes with the logits of all positions, batch by batch.

    Rows are sorted by length, longest first, to keep padding small.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(responses[i]))
    device = next(model.parameters()).device
    logps = [0.0] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [[*prompts[i], *responses[i]] for i in chosen]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        tokens = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        for row, i in enumerate(chosen):
            first = len(prompts[i]) - 1
            logps[i] = float(tokens[row, first : first + len(responses[i])].double().sum())
    return logps


@contextmanager
def acting_as(model: PeftModel, iterate: int) -> Iterator[None]:
    """Switch the model to an iterate, 0 being the base, in eval mode."""
    model.eval()
    if iterate == 0:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter_name(iterate))
        yield


@torch.no_grad()
def generate(
    model: PeftModel, prompts: Sequence[Sequence[int]], caps: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Responses by `generate`, unrestricted sampling, prompts sorted by length.

    Args:
        model: The model, switched to the iterate that answers.
        prompts: Ids of the prompts.
        caps: Number of tokens after which each response ends.
        batch_size: Prompts of a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    device = next(model.parameters()).device
    responses: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        padding = [longest - len(prompts[i]) for i in chosen]
        ids = [[PAD] * pad + list(prompts[i]) for i, pad in zip(chosen, padding, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        ends = torch.tensor([longest + caps[i] for i in chosen], device=device)
        written = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(caps[i] for i in chosen),
            pad_token_id=PAD,
            eos_token_id=STOP,
            stopping_criteria=StoppingCriteriaList([_Ends(ends)]),
        )
        for row, i in enumerate(chosen):
            responses[i] = written[row, longest : longest + caps[i]].tolist()
    return responses


def generate_in_turn(
    model: PeftModel, requests: Sequence[Request], batch_size: int
) -> list[list[int]]:
    """Responses to requests by `generate`, one iterate after the other, in that order.

    Args:
        model: The model.
        requests: Prompts, each with its iterate and the length of its response.
        batch_size: Prompts of a batch.
    """
    responses: list[list[int]] = []
    for opponent in dict.fromkeys(request.opponent for request in requests):
        asked = [request for request in requests if request.opponent == opponent]
        prompts, caps = [r.prompt_ids for r in asked], [r.cap for r in asked]
        with acting_as(model, opponent):
            responses += generate(model, prompts, caps, batch_size)
    return responses


class _Ends(StoppingCriteria):
    """Ends each row at its own length, as a stop id would."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        del scores, kwargs
        return input_ids.shape[1] >= self.ends


@contextmanager
def head_on_responses_only() -> Iterator[None]:
    """Restrict TRL's head to response tokens on every device."""
    from trl.trainer import utils

    before = utils._use_triton
    utils._use_triton = lambda _: True
    try:
        yield
    finally:
        utils._use_triton = before


def _keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place, after which a step trains wrongly.

    It does so in eval mode on CPUs with AVX512-BF16, for a kernel without gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
