"""The rows of a run as a table to look at, with texts beside the ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spin_lightning.policies.saved import load_tokenizer
from spin_lightning.rows.store import read_parts
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd


def load_rows(run_dir: str | Path, t: int | str, *, held_out: bool = False) -> pd.DataFrame:
    """Load the rows that were made at iterate t, one per generated response.

    Args:
        run_dir: The run folder.
        t: Index of the iterate, "best" or "last"; its rows train iterate t + 1, and the last
            one has held-out rows alone.
        held_out: Load the held-out rows that iterate t answered instead.

    Returns:
        The texts `prompt`, `real` and `generated` as the model saw them, special tokens included,
        then the stored columns (docs/metrics.md, "Columns of the rows").

    Raises:
        SettingError: There is no such name.
        RunFolderError: The run has no such rows, or they are not finished.
    """
    run = RunFolder(Path(run_dir))
    t = run.index_of(t)
    frame = read_parts(run.val_rows(t) if held_out else run.rows(t)).to_pandas()
    tokenizer = load_tokenizer(run.root)
    for place, name in enumerate(("prompt", "real", "generated")):
        texts = [str(tokenizer.decode(ids.tolist())) for ids in frame[f"{name}_ids"]]
        frame.insert(place, name, texts)
    return frame
