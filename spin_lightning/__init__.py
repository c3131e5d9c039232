"""Self-play fine-tuning of language models as PyTorch Lightning modules.

Exports are imported when they are first used (PEP 562): torch alone takes more than a second.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin_lightning import losses, mixtures
    from spin_lightning.callbacks.answer_match import AnswerMatch
    from spin_lightning.callbacks.best_iterate import BestIterate
    from spin_lightning.callbacks.console import quiet
    from spin_lightning.callbacks.evaluate_iterates import EvaluateIterates
    from spin_lightning.callbacks.self_play import SelfPlay
    from spin_lightning.data.datamodule import SelfPlayDataModule
    from spin_lightning.mixtures import Geometric, Mixture, base, latest, uniform, window
    from spin_lightning.modules.alpha_spin import AlphaSPIN
    from spin_lightning.modules.base import SelfPlayModule
    from spin_lightning.modules.fictitious_spin import FictitiousSPIN
    from spin_lightning.modules.mixture_spin import MixtureSPIN
    from spin_lightning.modules.sft import SFT
    from spin_lightning.modules.space import SPACE
    from spin_lightning.modules.spin import SPIN
    from spin_lightning.modules.tpaw import TPAW
    from spin_lightning.modules.tspin import TSPIN
    from spin_lightning.policies.saved import load_iterate, load_mixture
    from spin_lightning.report.frames import load_metrics, load_tells
    from spin_lightning.rows.frame import load_rows

try:
    __version__ = version("spin-lightning")
except PackageNotFoundError:  # a copy of the sources that is not installed
    __version__ = "0.0.0"

__all__ = [
    "SFT",
    "SPACE",
    "SPIN",
    "TPAW",
    "TSPIN",
    "AlphaSPIN",
    "AnswerMatch",
    "BestIterate",
    "EvaluateIterates",
    "FictitiousSPIN",
    "Geometric",
    "Mixture",
    "MixtureSPIN",
    "SelfPlay",
    "SelfPlayDataModule",
    "SelfPlayModule",
    "base",
    "latest",
    "load_iterate",
    "load_metrics",
    "load_mixture",
    "load_rows",
    "load_tells",
    "losses",
    "mixtures",
    "quiet",
    "uniform",
    "window",
]

# Where an export is defined, below the package; `losses` and `mixtures` are modules themselves.
_DEFINED_IN = {
    "SFT": "modules.sft",
    "SPACE": "modules.space",
    "SPIN": "modules.spin",
    "TPAW": "modules.tpaw",
    "TSPIN": "modules.tspin",
    "AlphaSPIN": "modules.alpha_spin",
    "AnswerMatch": "callbacks.answer_match",
    "BestIterate": "callbacks.best_iterate",
    "EvaluateIterates": "callbacks.evaluate_iterates",
    "FictitiousSPIN": "modules.fictitious_spin",
    "Geometric": "mixtures",
    "Mixture": "mixtures",
    "MixtureSPIN": "modules.mixture_spin",
    "SelfPlay": "callbacks.self_play",
    "SelfPlayDataModule": "data.datamodule",
    "SelfPlayModule": "modules.base",
    "base": "mixtures",
    "latest": "mixtures",
    "load_iterate": "policies.saved",
    "load_metrics": "report.frames",
    "load_mixture": "policies.saved",
    "load_rows": "rows.frame",
    "load_tells": "report.frames",
    "quiet": "callbacks.console",
    "uniform": "mixtures",
    "window": "mixtures",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _DEFINED_IN:
        value = getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    else:
        value = import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
