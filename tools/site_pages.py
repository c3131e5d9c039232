"""Hooks of MkDocs: pages that are made from other files of the repository, and links to these.

The home page is the README and `settings.md` the table of `tools.settings_table`; the other files
that pages link to are copied. A page's links work in the repository; the site gets its own.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mkdocs.structure.files import File, Files

from tools.settings_table import table

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[1]
# Pages of the site that lie outside docs/.
_PAGES: Final = {
    "README.md": "index.md",
    **{name: name for name in ("CONTRIBUTING.md", "DECISIONS.md", "CHANGELOG.md")},
}
_COPIED: Final = ("LICENSE", "configs/**/*.yaml", "notebooks/*.ipynb")
_LINK: Final = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
_FENCE: Final = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
SETTINGS: Final = """\
# Settings

Every setting with its default and its type, made from the signatures and docstrings when this page
was built. In a config, `model.beta` is `beta` under `model.init_args`; on the command line it is
`--model.beta 0.5`. Those of a callback go under its `init_args` in `trainer.callbacks`. Others of
`trainer` are those of
[Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html).

```bash
spin-lightning fit --model.help SPIN                # the same in the terminal, for one class
spin-lightning fit --data.help SelfPlayDataModule
spin-lightning evaluate --help                      # of a command
```

<div class="settings" markdown>

{table}
</div>
"""


def settings_page() -> str:
    """The reference of all settings, in Markdown."""
    return SETTINGS.format(table=table())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that lie outside docs/."""
    for name, page in _PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for pattern in _COPIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point a page's links, which work in the repository, to their places in the site."""
    parts = _FENCE.split(markdown)
    here = page.file.src_uri
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda link: in_site(link[1], here), part)
        for part in parts
    )


def in_site(link: str, here: str) -> str:
    """A relative link of the repository as a link of the site.

    Args:
        link: The link, relative to the page's place in the repository.
        here: Path of the page in the site.
    """
    originals = {page: name for name, page in _PAGES.items()}
    source = originals.get(here, f"docs/{here}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    target = _PAGES.get(target, target.removeprefix("docs/"))
    return posixpath.relpath(target, posixpath.dirname(here) or ".")
