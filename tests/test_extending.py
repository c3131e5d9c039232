"""docs/extending.md: every block runs, and does what the page says of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
ROOMS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


class Page(ModuleType):
    """The blocks of the page in one namespace; those before the first section run immediately."""

    def __init__(self, folder: Path) -> None:
        super().__init__("extending")
        self.runs = folder / "runs"
        self._run_blocks(ROOMS[0])

    def run_room(self, title: str) -> RunFolder:
        """Run the blocks of a room; the run that they leave."""
        (room,) = (text for text in ROOMS[1:] if text.startswith(f"{title}\n"))
        before = set(self.runs.glob("*"))
        self._run_blocks(room)
        (run,) = set(self.runs.glob("*")) - before
        return RunFolder(run)

    def _run_blocks(self, text: str) -> None:
        for block in blocks(text):
            exec(compile(block, str(PAGE), "exec"), vars(self))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, testbed_seed_0: Any) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("extending")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        page = Page(folder)
        patch.setitem(sys.modules, page.__name__, page)
        yield page


def test_page_has_six_rooms_with_one_block_each():
    assert [len(blocks(text)) for text in ROOMS] == [1] * 7


@pytest.mark.parametrize("folder", ["losses.py", "modules", "generation", "data", "callbacks"])
def test_page_names_folders_that_exist(folder):
    assert f"Lives in `{folder}" in PAGE.read_text(encoding="utf-8")
    assert (PAGE.parents[1] / "spin_lightning" / folder).exists()


def test_loss_of_the_page_is_what_the_run_minimizes(page):
    run = page.run_room("A loss")
    margins = torch.tensor([0.0, 2.0, 20.0])
    # (1 - 0)^2, (1 - 0.2)^2 and nothing beyond a margin of 1 / beta.
    assert page.squared_hinge(margins, 0.1).tolist() == pytest.approx([1.0, 0.64, 0.0])
    assert (run.iterate(1) / "adapter_model.safetensors").is_file()


def test_variant_of_the_page_weighs_its_iterates(page):
    run = page.run_room("A variant")
    module = page.DecayingSPIN(decay=0.5, model="any")
    # 1/4, 1/2 and 1, normalized.
    assert dict(module.opponent(2).weights) == pytest.approx({0: 1 / 7, 1: 2 / 7, 2: 4 / 7})
    assert run.known_iterates() == [0, 1]


def test_generator_of_the_page_writes_every_row(page):
    run = page.run_room("A generation engine")
    for folder, count in ((run.rows(0), 48), (run.val_rows(0), 16), (run.val_rows(1), 16)):
        table = read_rows(folder)
        assert len(table) == count
        assert table.finished.all()
        stop = table.real_ids[0][-1]
        for prompt, generated in zip(table.prompt_ids, table.generated_ids, strict=True):
            # At most 8 ids, the stop id among them.
            assert generated.tolist() == [*prompt[:7], stop]


def test_data_format_of_the_page_is_read_and_its_bad_line_left_out(page):
    run = page.run_room("A data format")
    table = read_rows(run.rows(0))
    # Line 0 has no tab; 40 lines less 4 that are held out.
    assert len(table) == 36
    assert 0 not in table.example_id.tolist()
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    texts = {tokenizer.decode(ids[:-1]) for ids in table.real_ids}
    assert texts == {"sailors never walk outside", "painters often sing outside"}


def test_evaluator_of_the_page_measures_every_iterate(page):
    run = page.run_room("An evaluator")
    values = [record.metrics["probe/nll_per_token"] for record in run.records()]
    assert len(values) == 2
    assert all(0 < value < 10 for value in values)
    assert values[0] != values[1]


def test_listener_of_the_page_reads_every_record(page):
    run = page.run_room("A logger or a listener")
    lines = [line.split() for line in (run.root / "nll.txt").read_text().splitlines()]
    assert [(int(t), float(nll)) for t, nll in lines] == [
        (record.index, record.metrics["val/real_nll_per_token"]) for record in run.records()
    ]
