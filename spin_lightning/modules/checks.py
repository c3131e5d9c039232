"""Checks of the Trainer's settings and of a variant's opponents, made before data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L

from spin_lightning.errors import SettingError
from spin_lightning.generation.vllm import token_mixture_refused
from spin_lightning.mixtures import Geometric, Mixture, Reference

if TYPE_CHECKING:
    from spin_lightning.modules.base import SelfPlayModule

# Lightning's max_epochs if neither epochs nor steps are given.
_LIGHTNINGS_DEFAULT_EPOCHS = 1000


def iterates_to_play(trainer: L.Trainer, epochs_per_iterate: int) -> int:
    """Number of iterates in a Trainer's `max_epochs`.

    Raises:
        SettingError: The Trainer has trained before, `max_epochs` is missing or not a multiple of
            `epochs_per_iterate`, a setting cuts epochs short or repeats batches, or the precision
            is not 32-true.
    """
    check_precision(trainer.precision)
    _check_new(trainer)
    # Connectors set these two, where mypy does not see them.
    fast_dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    repeats_batches = trainer.overfit_batches != 0  # type: ignore[attr-defined]
    unwanted = {
        "fast_dev_run": (fast_dev_run, "iterates would end after one batch"),
        "max_steps": (trainer.max_steps != -1, "an iterate could end unfinished"),
        "overfit_batches": (repeats_batches, "every epoch would use the same rows"),
        "limit_train_batches": (trainer.limit_train_batches == 0, "nothing would be trained"),
        "accumulate_grad_batches": (
            trainer.accumulate_grad_batches < 1,
            "no optimizer step would run",
        ),
    }
    for name, (is_unwanted, problem) in unwanted.items():
        if is_unwanted:
            raise SettingError(
                f"trainer.{name}",
                getattr(trainer, name),
                problem,
                fix="leave it out, and use data.max_examples or dry_run for a quick look",
            )
    epochs = trainer.max_epochs
    if epochs in (None, -1, 0, _LIGHTNINGS_DEFAULT_EPOCHS):
        raise SettingError(
            "trainer.max_epochs",
            epochs,
            "self-play needs the number of iterates to play (1000 is Lightning's default)",
            fix="set max_epochs to iterates x epochs_per_iterate, such as 4",
        )
    if epochs % epochs_per_iterate:
        raise SettingError(
            "trainer.max_epochs",
            epochs,
            f"it is not a multiple of epochs_per_iterate ({epochs_per_iterate})",
            fix=f"set it to {epochs - epochs % epochs_per_iterate + epochs_per_iterate}",
        )
    return int(epochs // epochs_per_iterate)


def _check_new(trainer: L.Trainer) -> None:
    """Refuse a Trainer that has trained before: its counts of epochs and steps would go on."""
    if trainer.fit_loop.epoch_progress.total.ready:
        raise SettingError(
            "trainer",
            type(trainer).__name__,
            f"it has run a fit before, to epoch {trainer.current_epoch} of {trainer.max_epochs}, "
            "and would go on counting from there",
            fix="build a new Trainer: with another default_root_dir for a new run, or with the "
            "same one and fit(ckpt_path='<run folder>/checkpoints/last.ckpt') to continue the run",
        )


def check_precision(precision: str | int) -> None:
    """Refuse a precision of the Trainer's own: weights compute in `compute_dtype` by themselves.

    A true precision changes the type of the adapter, which is trained in float32; a mixed one casts
    inside layers whose products are written for one type, and doubles the memory of the head.

    Raises:
        SettingError: The Trainer's precision is not 32-true.
    """
    bits = str(precision)
    if bits not in ("32", "32-true"):
        dtype = "bfloat16" if "bf16" in bits else "float16" if "16" in bits else "float32"
        raise SettingError(
            "trainer.precision",
            precision,
            "the frozen base computes in model.compute_dtype, the adapter is trained in float32",
            fix=f"leave it out (32-true), and set model.compute_dtype: {dtype}",
        )


def check_per_iterate(settings: Mapping[str, object], iterates: int) -> None:
    """Check that every list has one value per iterate.

    Raises:
        SettingError: A list has another length.
    """
    for name, values in settings.items():
        if isinstance(values, list) and len(values) != iterates:
            raise SettingError(
                name,
                values,
                f"it has {len(values)} values for {iterates} iterates (max_epochs / "
                "epochs_per_iterate)",
                fix=f"give one value, or a list of {iterates}",
            )


def check_variant(module: SelfPlayModule, iterates: int) -> None:
    """Check a variant's opponents and references, and that its policy can act as they require.

    Args:
        module: The variant.
        iterates: Number of iterates to play.

    Raises:
        SettingError: See `check_opponents`; the engine cannot sample from an opponent; or the
            initial adapter cannot be mixed with the base.
    """
    opponents = [module.opponent(t) for t in range(iterates)]
    references = [module.reference(t) for t in range(iterates)]
    for t in range(iterates):
        for further in module.further_references(t):
            _check_answer("further_references", t, further, Mixture)
            _check_plain(t, further)
    check_opponents(
        type(module).__name__,
        opponents,
        references,
        normalizer_cancels=module.normalizer_cancels,
        keeps_rows=module.refresh == "reservoir",
    )
    if module.generation.engine == "vllm" and any(o and o.token_alpha for o in opponents):
        raise token_mixture_refused()
    if _mixes_tokens(opponents, references):
        module.policy_spec.check_mixes_with_base()


def check_opponents(
    variant: str,
    opponents: Sequence[Mixture | None],
    references: Sequence[Reference],
    *,
    normalizer_cancels: bool,
    keeps_rows: bool,
) -> None:
    """Check that a variant's opponents can be sampled and that its loss is well defined.

    Args:
        variant: Name of the variant.
        opponents: Its opponent at each iterate.
        references: Its reference at each iterate.
        normalizer_cancels: Whether its objective is a function of the margin alone.
        keeps_rows: Whether rows of earlier iterates are kept.

    Raises:
        SettingError: An opponent cannot be sampled, an iterate does not exist yet, the normalizer
            of a reference does not cancel, or rows from another token-level mixture would be kept.
    """
    for t, (opponent, reference) in enumerate(zip(opponents, references, strict=True)):
        if opponent is not None:
            _check_answer("opponent", t, opponent, Mixture)
        _check_answer("reference", t, reference, Reference)
    unknown = [r for r in references if isinstance(r, Geometric) and not r.is_normalized]
    if unknown and not normalizer_cancels:
        raise SettingError(
            "mixture",
            "sequence",
            f"{variant} scores each response on its own, and the geometric mixture {unknown[0]} of "
            "whole responses is known only up to a factor per prompt",
            fix="set mixture: token, which is normalized, or alpha: 0; or, where there is one, a "
            "loss of the margin, such as logistic",
        )
    alphas = {opponent.token_alpha for opponent in opponents[1:] if opponent is not None}
    if keeps_rows and len(alphas) > 1:
        raise SettingError(
            "refresh",
            "reservoir",
            "the token-level alpha changes, so the rows of earlier iterates come from another "
            "opponent",
            fix="set refresh: all, or give one alpha",
        )


def _check_plain(t: int, further: Mixture) -> None:
    if further.token_alpha:
        raise SettingError(
            f"further_references({t})",
            str(further),
            "its members are mixed with the base, token by token, which only `reference` may be",
            fix="return mixtures of the iterates themselves, without token_alpha",
        )


def _mixes_tokens(opponents: Sequence[Mixture | None], references: Sequence[Reference]) -> bool:
    """Whether an iterate is mixed with the base at every token, to generate or to score."""
    return any(opponent is not None and opponent.token_alpha for opponent in opponents) or any(
        reference.token_members for reference in references
    )


def _check_answer(name: str, t: int, answer: Any, kind: Any) -> None:
    """Check that what a variant returned for iterate t is a `kind` of iterates up to t."""
    call = f"{name}({t})"
    if kind is Mixture and isinstance(answer, Geometric):
        raise SettingError(
            call,
            str(answer),
            "a geometric mixture of whole responses cannot be sampled",
            fix="return the arithmetic mixture, or one with a token_alpha",
        )
    if not isinstance(answer, kind):
        raise SettingError(
            call, answer, "it is not a mixture of iterates", fix="return a Mixture: latest(t)"
        )
    newest = max(answer.members)
    if newest > t:
        raise SettingError(
            call,
            str(answer),
            f"iterate {newest} does not exist yet while iterate {t + 1} is trained",
            fix=f"give weight to iterates 0 to {t} only",
        )
