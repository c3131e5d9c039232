"""Self-play fine-tuning of language models as PyTorch Lightning modules."""

__version__ = "0.1.0"

from spin_lightning import losses, mixtures
from spin_lightning.callbacks.self_play import SelfPlay
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.mixtures import Mixture, base, latest, uniform, window
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.modules.sft import SFT
from spin_lightning.modules.spin import SPIN
from spin_lightning.policies.saved import load_iterate

__all__ = [
    "SFT",
    "SPIN",
    "Mixture",
    "SelfPlay",
    "SelfPlayDataModule",
    "SelfPlayModule",
    "base",
    "latest",
    "load_iterate",
    "losses",
    "mixtures",
    "uniform",
    "window",
]
