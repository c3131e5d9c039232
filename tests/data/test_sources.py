"""Which files of a folder, pattern or clone are read, and that the others are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from spin_lightning.data.formats import read_data
from spin_lightning.data.sources import PACKAGED
from spin_lightning.errors import DataError

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Make files in a folder; the response of each one's row is its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def make(*names: str, readme: str = "") -> Path:
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {"prompt": "q", "response": name}
            if path.suffix == ".parquet":
                datasets.Dataset.from_list([row]).to_parquet(path)
            else:
                path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        if readme:
            (tmp_path / "data" / "README.md").write_text(readme, encoding="utf-8")
        return tmp_path / "data"

    return make


def read(source: Any) -> tuple[list[str], dict[str, str]]:
    conversations, report = read_data(source)
    return [c.response for c in conversations], dict(report.files_not_read)


def refusal(source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_data(source)
    assert ". Fix: " in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------ folders


def test_folder_is_read_with_the_folders_in_it_and_names_the_rest(tree):
    folder = tree("b.jsonl", "a.jsonl", "deep/er/c.ndjson", ".hidden.jsonl", ".git/x.json", "n.txt")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "link").symlink_to(folder / "deep")
    assert read(folder) == (
        ["a.jsonl", "b.jsonl", "deep/er/c.ndjson"],
        {
            ".git": "hidden",
            ".hidden.jsonl": "hidden",
            "dataset_info.json": "not a data file",
            "link": "a link",
            "n.txt": "not a data file",
        },
    )


@pytest.mark.parametrize(
    ("train", "others"),
    [
        ("train.jsonl", {"test.jsonl": "test", "validation.jsonl": "validation"}),
        ("train.jsonl", {"dev.jsonl": "validation", "eval.jsonl": "test"}),
        ("training_1.jsonl", {"valid-1.jsonl": "validation", "my_testing.jsonl": "test"}),
        ("train/a.jsonl", {"test/a.jsonl": "test", "val/train.jsonl": "validation"}),
        ("gsm8k_train.jsonl", {"gsm8k_test.jsonl": "test"}),
        ("data/train-00000-of-00001.parquet", {"data/test-00000-of-00001.parquet": "test"}),
        ("a.jsonl", {"test.jsonl": "test"}),
        ("contest.jsonl", {"Test.jsonl": "test"}),
    ],
)
def test_train_is_read_and_the_test_split_never_by_accident(tree, train, others):
    folder = tree(train, *others)
    assert read(folder) == ([train], {name: f"split {split}" for name, split in others.items()})
    for name, split in others.items():
        assert read(f"{folder}:{split}")[0] == [name]


def test_files_without_a_split_beside_train_are_named(tree):
    assert read(tree("extra.jsonl", "train.jsonl")) == (
        ["train.jsonl"],
        {"extra.jsonl": "its name has no split, those of others have"},
    )


def test_split_is_asked_for_by_any_of_its_names(tree):
    folder = tree("train.jsonl", "dev.jsonl")
    for name in ("validation", "val", "dev", "valid"):
        assert read(f"{folder}:{name}")[0] == ["dev.jsonl"]
    assert read(Path(f"{folder}:dev"))[0] == ["dev.jsonl"]


def test_folder_of_another_split_alone_says_how_to_choose_it(tree):
    folder = tree("test.jsonl")
    said = refusal(folder)
    assert "has no split 'train'; it has test" in said
    assert f"such as '{folder}:test'" in said
    assert read(folder / "test.jsonl")[0] == ["test.jsonl"]  # a file by its name is what it is


def test_hub_splits_keep_their_whole_names(tree):
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("train_sft", "test_sft")]
    folder = tree(*names)
    assert "it has test_sft, train_sft" in refusal(folder)
    assert read(f"{folder}:train_sft")[0] == names[:1]


def test_split_that_is_not_there_is_named(tree):
    assert "has no split 'dev'; it has train" in refusal(f"{tree('train.jsonl')}:dev")
    plain = tree("sub/a.jsonl") / "sub"
    assert "no file names a split" in refusal(f"{plain}:dev")
    assert "a single file has no splits" in refusal(f"{plain}/a.jsonl:dev")


def test_name_with_a_colon_in_it_is_a_name(tree):
    assert read(tree("a:test.jsonl") / "a:test.jsonl")[0] == ["a:test.jsonl"]


def test_folder_of_a_whole_disk_is_refused(tree, monkeypatch):
    monkeypatch.setattr("spin_lightning.data.splits._MOST_FILES", 2)
    assert "holds more than 2 files" in refusal(tree("a.jsonl", "b.jsonl", "c.jsonl"))


def test_home_expands(tree):
    tree("a.jsonl")
    for source in ("~/data", "~/data/a.jsonl", "~/data/*.jsonl", Path("~/data")):
        assert read(source)[0] == ["a.jsonl"]


def test_missing_path_object_is_no_hub_id(tree):
    assert "data='owner/name': there is no such file" in refusal(Path("owner/name"))


# ------------------------------------------------------------------------ patterns and lists


def test_pattern_reads_what_it_matches(tree):
    folder = tree("a1.jsonl", "a2.jsonl", "b.jsonl", "c/a3.jsonl", "a4.txt")
    assert read(f"{folder}/a*.jsonl")[0] == ["a1.jsonl", "a2.jsonl"]
    assert read("data/a[12].jsonl")[0] == ["a1.jsonl", "a2.jsonl"]
    assert read("data/**/a?.jsonl")[0] == ["a1.jsonl", "a2.jsonl", "c/a3.jsonl"]
    assert read("data/a*") == (["a1.jsonl", "a2.jsonl"], {"a4.txt": "not a data file"})
    assert read("data/*")[1]["c"] == "a folder; the pattern names files"


def test_pattern_reads_train_unless_it_names_another_split(tree):
    tree("train-1.jsonl", "train-2.jsonl", "test-1.jsonl")
    assert read("data/*.jsonl") == (
        ["train-1.jsonl", "train-2.jsonl"],
        {"test-1.jsonl": "split test"},
    )
    assert read("data/test-*.jsonl")[0] == ["test-1.jsonl"]
    assert read("data/*.jsonl:test")[0] == ["test-1.jsonl"]


def test_pattern_without_matches_is_refused(tree):
    tree("a.txt")
    assert "matches no .json" in refusal("data/*.txt")
    assert "there is no such file" in refusal("data/*.jsonl")


def test_list_of_paths_is_read_in_its_order(tree):
    folder = tree("a.jsonl", "b.jsonl", "c/train.jsonl", "c/test.jsonl")
    assert read([folder / "b.jsonl", str(folder / "a.jsonl"), folder / "c"]) == (
        ["b.jsonl", "a.jsonl", "c/train.jsonl"],
        {"test.jsonl": "split test"},
    )


# ------------------------------------------------------------------------ clones of hub data sets

README = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/one-*
  - split: test
    path: [main/two.jsonl, main/three.jsonl]
- config_name: other
  data_files: other/*.jsonl
---
# Data
"""
MAIN = ["main/one-1.jsonl", "main/one-2.jsonl", "main/three.jsonl", "main/two.jsonl"]


def test_clone_is_read_as_its_readme_says(tree):
    folder = tree(*MAIN, "other/x.jsonl", readme=README)
    not_in_main = "not in the configuration 'main' of README.md"
    assert "several configurations: main, other" in refusal(folder)
    assert f"such as '{folder}/main'" in refusal(folder)
    # There is a folder of this name; it is what the path says.
    assert read(f"{folder}/main")[0] == MAIN
    (folder / "main").rename(folder / "files")
    tree(readme=README.replace("main/", "files/"))
    conversations, not_read = read(f"{folder}/main")
    assert conversations == MAIN[:2]
    assert not_read == {
        "README.md": "not a data file",
        "files/three.jsonl": "split test",
        "files/two.jsonl": "split test",
        "other/x.jsonl": not_in_main,
    }
    assert read(f"{folder}/main:test")[0] == ["main/two.jsonl", "main/three.jsonl"][::-1]


@pytest.mark.parametrize("files", ["a.jsonl", "{train: a.jsonl, test: b.jsonl}", "[a.jsonl]"])
@pytest.mark.parametrize("name", ["default", "anything"])
def test_clone_with_one_configuration_or_a_default(tree, files, name):
    other = "- config_name: other\n  data_files: c.jsonl\n" * (name == "default")
    readme = f"---\nconfigs:\n- config_name: {name}\n  data_files: {files}\n{other}---\n"
    folder = tree("a.jsonl", "b.jsonl", "c.jsonl", readme=readme)
    found, not_read = read(folder)
    assert found == ["a.jsonl"]
    assert not_read.keys() == {"README.md", "b.jsonl", "c.jsonl"}


def test_clone_whose_files_are_not_there_is_refused(tree):
    said = refusal(tree("x.jsonl", readme=README.partition("- config_name: other")[0] + "---\n"))
    assert "no file is there of the configuration 'main'" in said


@pytest.mark.parametrize(
    "readme", ["# Data", "---\n: [\n---\n", "---\nconfigs: 3\n---\n", "---\n", "---\n- 1\n---\n"]
)
def test_readme_without_configurations_changes_nothing(tree, readme):
    assert read(tree("a.jsonl", readme=readme))[0] == ["a.jsonl"]


# ------------------------------------------------------------------------ save_to_disk


def saved(answer: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": "q", "response": answer}] * 2)


def test_saved_data_set_is_read(tmp_path):
    saved("a").select([1]).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == (["a"], {})
    assert "is a single split" in refusal(f"{tmp_path}/one:test")


def test_saved_splits_are_chosen_by_name(tmp_path):
    splits = {"train": saved("a"), "test": saved("b")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two") == (["a", "a"], {"test": "split test"})
    assert read(f"{tmp_path}/two:test") == (["b", "b"], {"train": "split train"})
    datasets.DatasetDict({"test": saved("b")}).save_to_disk(tmp_path / "three")
    assert "has no split 'train'; it has test" in refusal(tmp_path / "three")


def test_saved_data_set_that_is_torn_is_refused(tmp_path):
    saved("a").save_to_disk(tmp_path)
    next(tmp_path.glob("*.arrow")).unlink()
    assert "cannot be read as what `save_to_disk` wrote" in refusal(tmp_path)


# ------------------------------------------------------------------------ one schema, or several


def test_files_of_several_formats_are_each_read_in_their_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "response": "1"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "2"}\n')
    (tmp_path / "c.jsonl").write_text('{"x": "q"}\n\n{"x": "q"}\n')
    (tmp_path / "d.jsonl").write_text("\n")
    conversations, report = read_data(tmp_path)
    assert [(c.example_id, c.response) for c in conversations] == [(0, "1"), (1, "2")]
    assert [(f.format, f.rows, f.used) for f in report.files] == [
        ("prompt and response", 1, 1),
        ("question and answer", 1, 1),
        (None, 2, 0),
        (None, 0, 0),
    ]
    assert report.reasons == {"columns that are not recognized": 2}
    assert report.rows == report.used_rows + len(report.bad) == 4


def test_arrow_of_the_datasets_cache_is_read_by_its_split(tmp_path):
    for split in ("train", "test"):
        table = pa.table({"prompt": ["q"], "response": [split]})
        with pa.ipc.new_stream(str(tmp_path / f"set-{split}.arrow"), table.schema) as writer:
            writer.write_table(table)
    assert read(tmp_path) == (["train"], {"set-test.arrow": "split test"})


def test_gsm8k_small_is_two_splits_beside_their_license(tmp_path, monkeypatch):
    (tmp_path / "gsm8k_small").mkdir()  # the name stands for the packaged data
    monkeypatch.chdir(tmp_path)
    train, report = read_data("gsm8k_small", None)
    test, _ = read_data("gsm8k_small:test", None)
    assert (len(train), len(test)) == (400, 100)
    assert list(report.bad) == []
    prompts = {c.prompt[0]["content"] for c in train}
    assert len(prompts) == 400
    assert prompts.isdisjoint(c.prompt[0]["content"] for c in test)
    assert train[0].prompt[0]["content"].startswith("Natalia sold clips to 48 of her friends")
    assert train[0].response.endswith("\n#### 72")
    files = {file.name: file for file in PACKAGED["gsm8k_small"].iterdir()}
    assert sorted(files) == ["LICENSE", "test.jsonl", "train.jsonl"]
    assert files["LICENSE"].read_text().startswith("MIT License")
    assert sum(file.stat().st_size for file in files.values()) <= 300_000
