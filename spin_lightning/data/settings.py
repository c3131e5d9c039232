"""Which values the settings of the data module may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, get_args

from spin_lightning.data.formats import Turns
from spin_lightning.data.read_report import BadRows
from spin_lightning.data.thoughts import THOUGHTS
from spin_lightning.errors import MOST, SettingError, check_settings, is_number, is_whole

if TYPE_CHECKING:
    from spin_lightning.data.datamodule import SelfPlayDataModule

# Collating is fast: more processes would only use up the machine.
_MOST_WORKERS: Final = 256
# Settings that are positive integers.
_COUNTS: Final = (
    "max_examples",
    "prompts_per_iterate",
    "samples_per_prompt",
    "max_prompt_tokens",
    "max_response_tokens",
    "batch_size",
)
_CHOICES: Final = {
    "bad_rows": get_args(BadRows),
    "thoughts": THOUGHTS,
    "turns": get_args(Turns),
}


def check_data_settings(settings: SelfPlayDataModule) -> None:
    """Check every setting that can be checked without the data or the model.

    Args:
        settings: The data module.

    Raises:
        SettingError: A value is out of range, or there is no such choice.
    """
    for name, choices in _CHOICES.items():
        value = getattr(settings, name)
        if value not in choices:
            raise SettingError(
                f"data.{name}",
                value,
                "there is no such choice",
                fix=f"{', '.join(choices[:-1])}{',' * (len(choices) > 2)} or {choices[-1]}",
            )
    values = {name: getattr(settings, name) for name in _COUNTS}
    held_out, fraction = settings.val_examples, settings.val_fraction
    checks = {
        **{
            name: (value is None or is_whole(value, 1), "a whole number, 1 or more")
            for name, value in values.items()
        },
        "val_examples": (
            held_out is None or is_whole(held_out, 0),
            f"a whole number, 0 to {MOST}",
        ),
        "num_workers": (
            is_whole(settings.num_workers, 0, _MOST_WORKERS),
            f"a whole number, 0 to {_MOST_WORKERS}",
        ),
        "val_fraction": (is_number(fraction) and 0 <= fraction < 1, "a number in [0, 1)"),
    }
    check_settings(settings, checks, prefix="data.")
