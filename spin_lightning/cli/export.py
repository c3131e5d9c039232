"""The command `export`: an iterate as a model folder, or its rows as a preference data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spin_lightning.cli.parsing import command_parser
from spin_lightning.errors import SettingError
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    from spin_lightning.export.preferences import Texts


def export(args: list[str]) -> None:
    """Write an iterate as a PEFT adapter, a full model, or its rows as a data set for TRL.

    Before the folder gets its name, transformers and PEFT alone load it and have to give the run's
    prompt ids and the log-probs of eight held-out rows.
    """
    parser = command_parser("export", export)
    parser.add_argument("run", help="The run folder.")
    parser.add_argument("out", help="The folder to write; it must be new or empty.")
    parser.add_argument(
        "--iterate",
        type=int | str,
        default="last",
        help="Number of the iterate, best or last; with --to trl, last is the newest with "
        "training rows.",
    )
    parser.add_argument(
        "--to",
        type=Literal["peft", "merged", "trl"],
        default="peft",
        help="peft: an adapter folder; merged: a full model, the adapter merged into the base; "
        "trl: the iterate's rows as prompt, chosen and rejected.",
    )
    parser.add_argument(
        "--merge", type=bool, default=False, help="The older spelling of --to merged."
    )
    parser.add_argument(
        "--push", help="Upload the folder to this repository of the hub, owner/name."
    )
    parser.add_argument(
        "--private", type=bool, default=True, help="Create that repository as a private one."
    )
    given = parser.parse_args(args)

    from spin_lightning.callbacks.console import console, quiet_libraries, show_table
    from spin_lightning.export.card import is_local
    from spin_lightning.export.hub import check_push, push_folder
    from spin_lightning.export.model import export_iterate
    from spin_lightning.export.preferences import export_preferences
    from spin_lightning.policies.saved import saved_iterate

    quiet_libraries()
    run = RunFolder(Path(given.run))
    form = _form(given.to, merge=given.merge)
    if given.push is not None:
        needs_base = form == "peft" and given.iterate != "mixture"
        base = saved_iterate(run, run.index_of(given.iterate)).base if needs_base else None
        check_push(given.push, base_is_local=base is not None and is_local(base))
    if form == "trl":
        folder = export_preferences(
            run.root, given.iterate, given.out, _texts(run), notify=console.print
        )
        console.print(f"Rows: {folder}")
    else:
        folder = export_iterate(
            run.root,
            given.iterate,
            given.out,
            form == "merged",
            notify=console.print,
            show_table=show_table,
        )
        console.print(f"Iterate {run.index_of(given.iterate)}: {folder}")
    if given.push is not None:
        kind = "dataset" if form == "trl" else "model"
        console.print(
            f"Uploaded: {push_folder(folder, given.push, private=given.private, kind=kind)}"
        )


def _form(to: str, *, merge: bool) -> str:
    if merge and to == "trl":
        raise SettingError("merge", merge, "rows cannot be merged", fix="leave out --merge")
    return "merged" if merge else to


def _texts(run: RunFolder) -> Texts:
    """The data of a run, read again from where its config.yaml says they are."""
    from spin_lightning.cli.reading import data_and_model
    from spin_lightning.export.preferences import Texts

    config = run.root / "config.yaml"
    if not config.exists():
        raise SettingError(
            "run",
            str(run.root),
            "it has no config.yaml, which names the data, and a run keeps ids and no texts",
            fix="export the rows of a run that was started by spin-lightning fit, or take their "
            "ids and decoded texts with spin_lightning.load_rows",
        )
    source, module = data_and_model(str(config), {}, None)
    text_format = source.make_format(module, run.first_date())

    def read(place: Any, name: str, limit: int | None) -> dict[int, Any]:
        reader = source.make_reader(module, text_format)
        reader.survey(place, name, limit)
        return reader.texts

    train = read(source.data, "data", source.max_examples)
    if source.val_data is None:
        return Texts(text_format, train, train)
    # (Without the limit on held-out examples: those of the run are looked up by number.)
    return Texts(text_format, train, read(source.val_data, "val_data", None))
