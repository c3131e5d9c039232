"""Speed and memory of spin-lightning, against TRL, `generate`, and the bare matrix products.

Every benchmark alternates between both sides in one process and quotes ratios: times hold for one
machine on one day, ratios carry further. `docs/performance.md` defines what is measured.
"""

import os
import sys

# torch reads the number of threads when it is loaded. A program that has loaded it already, such as
# a test, keeps its own settings.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
