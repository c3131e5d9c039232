"""Exact figures of a model on the testbed's language: every response is scored, none is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.testbed.language import Language
from spin_lightning.types import Conversation, Message


def response_log_probs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    language: Language,
    batch_size: int = 625,
) -> Tensor:
    """log p(y|x) of every response to every prompt, stop id included, over the full vocabulary.

    A prompt is computed once per forward, by the model's own key-value cache, and nothing of
    self-play's passes is used: what they compute is judged by these figures.

    Args:
        model: A causal language model of transformers, or a PEFT wrapper with whatever adapter is
            active. It is scored in eval mode; all modes are restored afterwards.
        tokenizer: The model's tokenizer.
        language: The language to enumerate.
        batch_size: Sequences per forward.

    Returns:
        Nats, float64, on the CPU, shape [X, Y].
    """
    prompts, responses = token_ids(tokenizer, language)
    pad_id = PromptFormat.of(tokenizer, None).pad_id
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(y) for y in responses], True, pad_id).to(device)
    lengths = torch.tensor([len(y) for y in responses], device=device)
    chunks = list(zip(ids.split(batch_size), lengths.split(batch_size), strict=True))
    with _eval_mode(model), torch.no_grad():
        rows = [
            torch.cat([_given(model, torch.tensor(x, device=device), *y) for y in chunks])
            for x in prompts
        ]
    return torch.stack(rows).cpu()


def _given(model: nn.Module, prompt: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """log p(y|x) of right-padded responses [n, r] to one prompt [p], nats, float64, [n]."""
    read = model(input_ids=prompt[None], use_cache=True)
    cache = read.past_key_values
    cache.batch_repeat_interleave(len(ids))
    later = model(input_ids=ids[:, :-1], past_key_values=cache).logits
    first = read.logits[:, -1:].expand(len(ids), -1, -1)
    logits = torch.cat([first, later], dim=1).float()
    token_logps = -cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return torch.where(inside, token_logps.view_as(ids).double(), 0.0).sum(dim=1)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, language: Language
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Ids of all prompts and of all responses with their stop id, as self-play makes them."""
    text_format = PromptFormat.of(tokenizer, None)
    turns = [(Message(role="user", content=prompt),) for prompt in language.prompts]
    # The ids of a response do not depend on its prompt, so any prompt will do.
    spoken = [Conversation(i, turns[0], text) for i, text in enumerate(language.responses)]
    return [text_format.prompt_ids(t) for t in turns], [text_format.response_ids(c) for c in spoken]


def exact_metrics(log_p: Tensor, language: Language) -> dict[str, float]:
    """Compare a model with the distribution that the data came from.

    With p(y|x) the model, L the language's responses, m(x) = Σ_{y∈L} p(y|x) and p_L = p / m the
    model given that it answers within the language; each figure is a mean over prompts:

        exact/kl               KL(p_data ‖ p), nats; mass outside the language raises it
        exact/reverse_kl       KL(p_L ‖ p_data), nats; finite because it ignores outside mass
        exact/total_variation  ½ (Σ_{y∈L} |p − p_data| + 1 − m), over all strings, 0 to 1
        exact/entropy          −Σ_{y∈L} p_L log p_L, nats
        exact/outside_mass     1 − m: the probability of anything that is not in the language

    Args:
        log_p: log p(y|x), nats, shape [X, Y], from `response_log_probs`.
        language: The language it was computed on.

    Returns:
        The five figures by name.
    """
    log_p, log_data = log_p.double(), language.log_probs
    log_mass = log_p.logsumexp(dim=1)
    log_within = log_p - log_mass[:, None]
    # Float32 logits can put the mass 1e-7 above 1.
    outside = (-log_mass.expm1()).clamp_min(0.0)
    distance = (log_p.exp() - log_data.exp()).abs().sum(dim=1)
    figures = {
        "kl": _expectation(log_data, log_data - log_p),
        "reverse_kl": _expectation(log_within, log_within - log_data),
        "total_variation": 0.5 * (distance + outside),
        "entropy": _expectation(log_within, -log_within),
        "outside_mass": outside,
    }
    return {f"exact/{name}": float(figure.mean()) for name, figure in figures.items()}


def _expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Σ_y p(y|x) values(x, y), shape [X]."""
    return (log_p.exp() * values).sum(dim=1)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is back in its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
