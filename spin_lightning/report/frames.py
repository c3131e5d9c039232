"""What the report shows, as tables to compute with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spin_lightning.policies.saved import load_tokenizer
from spin_lightning.report.cue_words import clear_cues, special_ids
from spin_lightning.report.run_view import read_records
from spin_lightning.rows.store import read_rows
from spin_lightning.rows.tells import find_tells
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd


def load_metrics(run_dir: str | Path) -> pd.DataFrame:
    """Load what was measured of each iterate of a run.

    Args:
        run_dir: The run folder.

    Returns:
        A row per iterate, with its index t as the index, and a column per metric (docs/metrics.md):
        held-out and benchmark metrics, and `rows/` of the rows that the iterate made for the next.
        NaN where one was not measured.

    Raises:
        RunFolderError: The folder holds no iterates.
    """
    import pandas as pd

    records = read_records(RunFolder(Path(run_dir)))
    index = pd.Index([record.index for record in records], name="iterate")
    return pd.DataFrame([dict(record.measured) for record in records], index=index)


def load_tells(run_dir: str | Path, t: int | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Load what tells real from generated responses in the rows that were made at iterate t.

    Args:
        run_dir: The run folder.
        t: Index of the iterate, "best" or "last".

    Returns:
        The single cues and the telling tokens, both empty without generated responses.
        Cues have their `accuracy` (balanced, on examples that the rule was not learned from; 0.5 is
        a coin), whether it is `clear`ly above chance, and then its `rule` in words. Tokens, and
        pairs of neighboring ones, have the `side` that has them more often, their `text`, how many
        `real` and `generated` responses contain them, the `log_odds` of real over generated in
        nats, and `z`, its significance in standard errors.

    Raises:
        SettingError: There is no such name.
        RunFolderError: The run has no such rows, or they are not finished.
    """
    import pandas as pd

    run = RunFolder(Path(run_dir))
    tokenizer = load_tokenizer(run.root)
    tells = find_tells(read_rows(run.rows(run.index_of(t))), special_ids(tokenizer))
    cues = [] if tells is None else tells.cues
    rules = {} if tells is None else clear_cues(tells, tokenizer)
    tokens = [] if tells is None else [*tells.tokens, *tells.pairs]
    return (
        pd.DataFrame(
            [(cue.name, cue.accuracy, cue.clear, rules.get(cue.name, "")) for cue in cues],
            columns=["cue", "accuracy", "clear", "rule"],
        ),
        pd.DataFrame(
            [
                (
                    "real" if tell.z > 0 else "generated",
                    str(tokenizer.decode(list(tell.ids))),
                    *tell.counts,
                    tell.log_odds,
                    tell.z,
                )
                for tell in tokens
            ],
            columns=["side", "text", "real", "generated", "log_odds", "z"],
        ),
    )
