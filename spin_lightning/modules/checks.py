"""What self-play needs of the Trainer and of a variant's answers, checked before data is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin_lightning.errors import SettingError
from spin_lightning.mixtures import Geometric, Mixture, Reference

# What Lightning fills in when nobody says how long to train.
_LIGHTNINGS_DEFAULT_EPOCHS = 1000


def iterates_to_play(trainer: Any, epochs_per_iterate: int) -> int:
    """Number of iterates that a trainer's settings ask for.

    Raises:
        SettingError: No number of epochs, one that is no whole number of iterates, or a setting
            that cuts epochs short or repeats batches.
    """
    unwanted = {
        "fast_dev_run": (bool(trainer.fast_dev_run), "iterates would end after one batch"),
        "max_steps": (trainer.max_steps != -1, "an iterate could end unfinished"),
        "overfit_batches": (trainer.overfit_batches != 0, "every epoch would see the same rows"),
        "limit_train_batches": (trainer.limit_train_batches == 0, "nothing would be trained"),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches < 1, "no step would be taken"),
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
            "self-play has to know how many iterates to play (1000 is what Lightning fills in "
            "when nothing is said)",
            fix="set max_epochs to iterates x epochs_per_iterate, such as 4",
        )
    if epochs % epochs_per_iterate:
        raise SettingError(
            "trainer.max_epochs",
            epochs,
            f"it is no multiple of epochs_per_iterate ({epochs_per_iterate})",
            fix=f"set it to {epochs - epochs % epochs_per_iterate + epochs_per_iterate}",
        )
    return int(epochs // epochs_per_iterate)


def check_opponents(
    variant: str,
    opponents: Sequence[Mixture | None],
    references: Sequence[Reference],
    *,
    normalizer_cancels: bool,
    keeps_rows: bool,
) -> None:
    """Refuse references and opponents under which the loss would not be what it says.

    Args:
        variant: Name of the variant.
        opponents: Its opponent at each iterate.
        references: Its reference at each iterate.
        normalizer_cancels: Whether its objective is a function of the margin alone.
        keeps_rows: Whether rows of earlier iterates are kept.

    Raises:
        SettingError: An opponent that cannot be sampled, an iterate that does not exist yet, a
            reference that is known up to a factor that does not cancel, or rows would be kept that
            another token-level mixture drew.
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
            f"{variant} looks at each response by itself, and the geometric mixture {unknown[0]} "
            "of whole responses is known only up to a factor per prompt",
            fix="set mixture: token, which is normalized, or alpha: 0",
        )
    alphas = {opponent.token_alpha for opponent in opponents[1:] if opponent is not None}
    if keeps_rows and len(alphas) > 1:
        raise SettingError(
            "refresh",
            "reservoir",
            "with a token-level alpha that changes, the rows of earlier iterates are those of "
            "another opponent",
            fix="set refresh: all, or give one alpha",
        )


def _check_answer(name: str, t: int, answer: Any, kind: Any) -> None:
    """Refuse what a variant says at iterate t where it is of another kind or names the future."""
    said = f"{name}({t})"
    if kind is Mixture and isinstance(answer, Geometric):
        raise SettingError(
            said,
            str(answer),
            "a geometric mixture of whole responses cannot be sampled",
            fix="generate with the mixture itself, or with one whose token_alpha mixes the base in",
        )
    if not isinstance(answer, kind):
        raise SettingError(
            said, answer, "it says nothing of iterates", fix="return a Mixture, such as latest(t)"
        )
    newest = max(answer.members)
    if newest > t:
        raise SettingError(
            said,
            str(answer),
            f"iterate {newest} is used while iterate {t + 1} is made, and does not exist yet",
            fix=f"give weight to iterates 0 to {t} only",
        )
