"""Self-play fine-tuning of language models as PyTorch Lightning modules."""

__version__ = "0.1.0"

from spin_lightning import losses, mixtures
from spin_lightning.callbacks.best_iterate import BestIterate
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
from spin_lightning.policies.saved import load_iterate, load_mixture

__all__ = [
    "SFT",
    "SPACE",
    "SPIN",
    "AlphaSPIN",
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
    "load_mixture",
    "losses",
    "mixtures",
    "uniform",
    "window",
]
