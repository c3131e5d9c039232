"""Self-play fine-tuning of language models as PyTorch Lightning modules."""

__version__ = "0.1.0"
