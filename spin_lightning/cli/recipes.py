"""`recipes`: configs that come with the package, to read and to copy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from spin_lightning.cli.parsing import command_parser
from spin_lightning.errors import SettingError
from spin_lightning.recipes import Recipe, all_recipes, recipe


def recipes(args: list[str]) -> None:
    """List the configs that come with the package, show one, or copy one.

    `ls` lists them with what each needs, `show NAME` prints one, and `cp NAME [FILE]` copies one to
    a file, which `fit --config FILE` plays.
    """
    parser = command_parser("recipes", recipes)
    parser.add_argument(
        "action",
        nargs="?",
        type=Literal["ls", "show", "cp"],
        default="ls",
        help="What to do.",
    )
    parser.add_argument("name", nargs="?", help="With show and cp: the recipe.")
    parser.add_argument(
        "file", nargs="?", help="With cp: the file to write, or a folder; default: NAME.yaml."
    )
    given = parser.parse_args(args)
    for name, action in (("name", "ls"), ("file", "show")):
        if given.action == action and given[name] is not None:
            raise SettingError(
                name, given[name], f"{action} takes no {name}", fix="see spin-lightning recipes -h"
            )
    if given.action == "ls":
        for one in all_recipes():
            print(f"{one.name} (needs {one.needs})\n    {one.summary}")
        return
    if given.name is None:
        raise SettingError(
            "name", None, f"{given.action} needs a recipe", fix="run spin-lightning recipes ls"
        )
    chosen = recipe(given.name)
    if given.action == "show":
        print(chosen.text, end="")
    else:
        file = _copy(chosen, Path(given.file or "."))
        print(f"{file}\nPlay it: spin-lightning fit --config {file}")


def _copy(chosen: Recipe, place: Path) -> Path:
    """Copy a recipe to a file, or into a folder, and return the file.

    Raises:
        SettingError: The file exists, or its folder does not.
    """
    file = place / chosen.path.name if place.is_dir() else place
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(chosen.text)
    except FileExistsError as error:
        raise SettingError(
            "file", str(file), "it exists, and is not overwritten", fix="name another file"
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SettingError(
            "file", str(file), "its folder does not exist", fix="make the folder first"
        ) from error
    return file
