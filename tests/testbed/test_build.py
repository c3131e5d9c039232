import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_lightning.data.formats import read_conversations
from spin_lightning.errors import DataError, SettingError
from spin_lightning.run.cache import scratch_folder
from spin_lightning.testbed import build
from spin_lightning.testbed.exact import exact_metrics, response_log_probs
from spin_lightning.testbed.language import Language
from tests.toys.chi_square import chi_square


@pytest.fixture
def quick_base(monkeypatch):
    monkeypatch.setattr(build, "_BASE_STEPS", 2)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_ensure_makes_ordinary_files_once(quick_base, tmp_path, monkeypatch):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    paths = build.ensure(seed=3, cache_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert [path.name for path in tmp_path.iterdir()] == ["testbed-v1-seed3"]
    monkeypatch.setattr(build, "_build", None)
    assert build.ensure(seed=3, cache_dir=tmp_path) == paths

    language = Language.load(paths.language)
    model = AutoModelForCausalLM.from_pretrained(paths.model)
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert response_log_probs(model, tokenizer, language).shape == (8, 625)


def test_ensure_deletes_what_a_killed_build_left_and_nothing_in_use(quick_base, tmp_path):
    killed = tmp_path / ".spin-lightning-killed"
    (killed / "testbed-v1-seed3").mkdir(parents=True)
    killed.with_name(f"{killed.name}.lock").touch()
    with scratch_folder(tmp_path) as used:
        assert not killed.exists()
        build.ensure(seed=3, cache_dir=tmp_path)
        assert used.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["testbed-v1-seed3"]


def test_ensure_data_is_readable_and_drawn_from_the_language(quick_base, tmp_path):
    paths = build.ensure(seed=4, cache_dir=tmp_path)
    language = Language.load(paths.language)
    conversations, bad = read_conversations(str(paths.data), None)
    assert (len(conversations), bad) == (12_800 + 256, [])
    seen = Counter((c.prompt[0]["content"], c.response) for c in conversations)
    counts = torch.tensor([[seen[x, y] for y in language.responses] for x in language.prompts])
    assert counts.sum() == len(conversations)
    assert chi_square(counts, torch.zeros(8), language.log_probs) > 0.001


def test_ensure_same_seed_gives_same_bytes_whatever_the_threads(quick_base, tmp_path):
    threads = torch.get_num_threads()
    first = build.ensure(seed=5, cache_dir=tmp_path / "a")
    torch.set_num_threads(2)
    try:
        build.ensure(seed=5, cache_dir=tmp_path / "b")
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (first.model / "model.safetensors").is_file()


def test_ensure_keeps_the_folder_of_a_faster_process(tmp_path, monkeypatch):
    def overtaken(folder: Path, seed: int) -> None:
        folder.mkdir()
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / "language.json").write_text("theirs")

    monkeypatch.setattr(build, "_build", overtaken)
    paths = build.ensure(seed=0, cache_dir=tmp_path)
    assert paths.language.read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_ensure_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder: Path, seed: int) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.ensure(seed=0, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ensure_in_an_unwritable_folder_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="Fix: set SPIN_LIGHTNING_CACHE"):
        build.ensure(cache_dir=tmp_path / "file")


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = (
        {"question": f"{i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(40)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SMALL = {"steps": 2, "hidden": 16, "layers": 1, "heads": 2, "vocabulary": 300, "batch_size": 4}


def test_train_base_writes_a_model_folder_and_may_write_it_again(sums, tmp_path):
    out = tmp_path / "deeper" / "base"
    assert build.train_base(sums, out, **SMALL) == out
    first = contents(out)
    (out / "notes.txt").write_text("mine")
    build.train_base(sums, out, **SMALL)
    assert contents(out) == {**first, "notes.txt": b"mine"}
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template is not None
    assert [path.name for path in out.parent.iterdir()] == ["base"]


def test_train_base_does_not_write_into_a_folder_of_something_else(sums, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingError, match="Fix: give a folder that does not exist yet"):
        build.train_base(sums, out, **SMALL)
    assert contents(out) == {"thesis.txt": b"years of work"}


def test_train_base_without_a_fitting_example_is_refused(sums, tmp_path):
    with pytest.raises(DataError, match="no example that fits into 4 tokens"):
        build.train_base(sums, tmp_path / "base", **SMALL, context=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ensure_base_is_a_known_distance_from_the_data(seed, tmp_path):
    paths = build.ensure(seed=seed, cache_dir=tmp_path)
    language = Language.load(paths.language)
    model = AutoModelForCausalLM.from_pretrained(paths.model)
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    log_p = response_log_probs(model, tokenizer, language)
    p_dialect = language.dialect_log_probs.exp()
    away_from_dialect = (p_dialect * (language.dialect_log_probs - log_p)).sum(dim=1).mean()
    metrics = exact_metrics(log_p, language)
    assert 0.45 < metrics["exact/kl"] < 0.7
    assert metrics["exact/outside_mass"] < 0.03
    assert float(away_from_dialect) < 0.12


def test_noisy_data_have_a_share_of_wrong_responses_beside_the_clean_language(quick_base, tmp_path):
    clean = build.ensure(seed=4, cache_dir=tmp_path)
    noisy = build.ensure_noisy(seed=4, cache_dir=tmp_path)
    assert noisy.model == clean.model
    assert noisy.language.parent == noisy.data.parent != clean.data.parent
    assert noisy.language.read_bytes() == clean.language.read_bytes()
    rows, spoiled = (
        [json.loads(line) for line in paths.data.read_text().splitlines()]
        for paths in (clean, noisy)
    )
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in spoiled]
    changed = sum(a != b for a, b in zip(rows, spoiled, strict=True))
    # 13,056 draws at 0.2 have a standard deviation of 0.0035; a draw may give the same response.
    assert changed / len(rows) == pytest.approx(0.2, abs=0.02)
    assert {row["response"] for row in spoiled} <= set(Language.load(clean.language).responses)
    assert build.ensure_noisy(seed=4, cache_dir=tmp_path) == noisy
