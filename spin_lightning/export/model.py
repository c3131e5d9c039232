"""An iterate as a folder that does not depend on the run, verified before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spin_lightning.errors import SettingError
from spin_lightning.export.card import model_card
from spin_lightning.export.checks import verify
from spin_lightning.export.expected import expected_of
from spin_lightning.policies.pretrained import content_hashes
from spin_lightning.policies.saved import SavedIterate, saved_iterate, write_iterate
from spin_lightning.run.folder import RunFolder

CARD = "README.md"


def export_iterate(
    run_dir: str | Path,
    t: int | str,
    out: str | Path,
    merge: bool = False,
    notify: Callable[[str], None] = print,
    show_table: Callable[[list[list[str]]], None] | None = None,
) -> Path:
    """Write iterate t as a folder that does not depend on the run.

    The folder has the run's tokenizer with the chat template as used, a generation config with its
    stop ids, and a model card. It is written beside `out`, loaded by transformers and PEFT alone,
    and compared with the run: ids of prompts, stop ids, and log-probs of eight held-out rows. Only
    then it gets its name.

    Args:
        run_dir: The run folder.
        t: Index of the iterate, "best" or "last".
        out: The folder to write; it must be empty or not exist.
        merge: Write a full model with the adapter merged into (de-quantized) base weights, instead
            of a PEFT adapter folder.
        notify: Receives what the user should know, line by line.
        show_table: Receives the rows that were compared, as text below a head.

    Returns:
        The folder.

    Raises:
        SettingError: `out` is not empty, or iterate t has no adapter to write.
        RunFolderError: The run has no iterate t, or the merged model is not the iterate.
        ExportError: What was written is not the iterate.
    """
    run = RunFolder(Path(run_dir))
    if t == "mixture":
        raise SettingError(
            "iterate",
            t,
            "the mixture has an adapter for each iterate and cannot be one model",
            fix="name one iterate, or use spin_lightning.load_mixture in Python",
        )
    t = run.index_of(t)
    with new_folder(Path(out)) as staged:
        saved = saved_iterate(run, t)
        if saved.adapter is None and not merge:
            raise SettingError(
                "iterate",
                t,
                f"it is the base model {saved.base.name} itself, without an adapter",
                fix="use the base model as it is, or export with --merge",
            )
        expected = expected_of(run, saved)
        write_iterate(saved, staged, merge, notify)
        found = verify(staged, expected, _changed(run, saved))
        if show_table is not None:
            show_table(found.table())
        notify(str(found))
        (staged / CARD).write_text(model_card(run, saved, merge, found), encoding="utf-8")
    return Path(out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name when the block ends, and is deleted if it fails.

    Raises:
        SettingError: `out` is there and not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError("out", str(out), "the folder is not empty", fix="name a new folder")
    staged = out.with_name(f".{out.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if out.exists():
            out.rmdir()
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _changed(run: RunFolder, saved: SavedIterate) -> list[str]:
    """Files of the base whose contents are not those of the run; empty if that is not known."""
    known = run.record(saved.index).fingerprint_fields.get("base_files")
    if not isinstance(known, dict) or not known:
        return []
    now = content_hashes(saved.base)
    return [name for name, digest in known.items() if now.get(name, digest) != digest]
