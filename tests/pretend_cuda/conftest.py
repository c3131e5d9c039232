"""What can only be imported where the hooks are loaded is not searched for doctests."""

import os

HOOKED = ["plugin.py", "device.py", "machine.py", "on_device/conftest.py"]
collect_ignore = [] if "PRETEND_CUDA_HOOKS" in os.environ else HOOKED
