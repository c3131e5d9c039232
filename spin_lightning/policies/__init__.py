"""Policies: a trained model that can also act as any of its frozen iterates."""

import logging

# At import they advise installing kernels from the hub; in int8 they log a line per layer and call.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
