"""A pytest plugin that registers the pretend device before anything imports torch."""

import os
from pathlib import Path

from tests.pretend_cuda.hooks import load_hooks

load_hooks(Path(os.environ["PRETEND_CUDA_HOOKS"]))
