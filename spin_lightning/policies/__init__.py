"""Policies: a model whose past iterates can be called back."""

import logging

# Advice to install kernels from the hub, at import, and a line per layer and call that int8 rounds.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
