"""Recipes: each parses, plays at tiny scale, differs as it says, and fits the card it names."""

import difflib
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, MistralConfig, PretrainedConfig, Qwen2Config

from spin_lightning.callbacks.memory_table import LongestRow
from spin_lightning.cli.reading import data_and_model
from spin_lightning.generation.local import tokens_in_cache
from spin_lightning.packing import pass_tokens
from spin_lightning.policies.memory import Memory
from spin_lightning.recipes import all_recipes, recipe
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from tests.toys.models import write_wide_model
from tests.toys.runs import write_examples

RECIPES = {one.name: one for one in all_recipes()}
# Some are played elsewhere: test_quickstart.py, `make demo`, and the published protocol below.
PLAYED = sorted(RECIPES.keys() - {"quickstart", "quickstart_sft", "demo", "zephyr_spin"})
REGULARISED = ("zephyr_alpha_spin", "zephyr_fictitious_spin", "zephyr_mixture_spin")
GIB = 1 << 30
# The config.json of the models on the hub, as far as sizes go.
MODELS: dict[str, PretrainedConfig] = {
    "alignment-handbook/zephyr-7b-sft-full": MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-14B-Instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}


def settings(name: str) -> dict[str, dict]:
    """The arguments of a recipe's parts."""
    config = yaml.safe_load(RECIPES[name].text)
    parts = {part: config[part]["init_args"] for part in ("model", "data")}
    return {**parts, "trainer": config["trainer"], "class": config["model"]["class_path"]}


def gpu_memory(name: str) -> int | None:
    """GiB of the card that a recipe needs; None without one."""
    found = re.search(r"GPUs?, (\d+) GB", RECIPES[name].needs)
    return int(found[1]) if found else None


def test_recipes_are_all_seen():
    assert len(RECIPES) == 13
    assert all(one.text.startswith(f"# {one.summary}\n# Needs: ") for one in RECIPES.values())
    # Two spaces of margin in a terminal of 80 columns.
    assert all(len(f"    {one.summary}") <= 80 for one in RECIPES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_that_it_needs_a_gpu_if_it_does(name):
    needs_one = settings(name)["trainer"]["accelerator"] == "gpu"
    assert (gpu_memory(name) is not None) == needs_one


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_a_run_folder_of_its_own(name):
    assert settings(name)["trainer"]["default_root_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", REGULARISED)
def test_regularised_counterpart_differs_in_at_most_ten_lines(name):
    """A line that takes the place of another one is one line."""
    lines = [RECIPES[one].text.splitlines() for one in ("zephyr_spin", name)]
    blocks = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    changed = sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in blocks if kind != "equal")
    assert 1 <= changed <= 10


def test_published_protocol_has_the_published_values():
    """arXiv 2401.01335 and the configs and scripts of uclaml/SPIN."""
    spin = settings("zephyr_spin")
    assert spin["class"] == "MixtureSPIN"
    expected = {
        "history": 2,
        "reference": "previous",
        "rows": "union",
        "model": "alignment-handbook/zephyr-7b-sft-full",
        "revision": "ac6e600eefcce74f5e8bae1035d4f66019e93190",
        "beta": [0.1, 0.1, 0.1, 5.0],
        "learning_rate": [5e-7, 5e-7, 1e-7, 1e-7],
        "optimizer": "rmsprop",
        "weight_decay": 0.0,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "epochs_per_iterate": 2,
        "schedule_epochs": 6,
    }
    assert {key: spin["model"][key] for key in expected} == expected
    trainer = spin["trainer"]
    per_step = spin["data"]["batch_size"] * trainer["accumulate_grad_batches"] * trainer["devices"]
    assert per_step == 64
    assert trainer["max_epochs"] == 4 * 2


@pytest.mark.parametrize("name", [name for name in RECIPES if gpu_memory(name)])
def test_recipe_fits_the_card_that_it_names_by_the_prediction(name, tmp_path):
    """With half a GiB for CUDA's context and a tenth of the card to spare."""
    parts = settings(name)
    known = MODELS[parts["model"]["model"]]
    known.save_pretrained(tmp_path)
    config = yaml.safe_load(RECIPES[name].text)
    config["model"]["init_args"] |= {"model": str(tmp_path), "revision": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    data, module = data_and_model(str(tmp_path / "config.yaml"), {}, None)
    device = torch.device("cuda", 0)
    memory = Memory.of(module.policy_spec, device)
    cap, last = data.max_response_tokens, module.opponent(3)
    samples = data.samples_per_prompt * (len(last.members) if module.rows == "union" else 1)
    row = LongestRow(data.max_prompt_tokens, cap, cap, samples)
    card = gpu_memory(name) * GIB
    # As `default_batch_tokens` takes it on a card.
    cache = tokens_in_cache(
        AutoConfig.from_pretrained(tmp_path), max(2 * GIB, card * 3 // 4 - memory.weights), 2
    )
    peak = max(
        memory.training_pass(row.training_pass(data.batch_size, pass_tokens(device))),
        memory.scoring_pass(row.scoring_pass(device)),
        memory.decoding_batch(cache) if module.generation.engine == "local" else 0,
    )
    in_all = memory.weights + memory.trained(module.optimizer_name) + peak
    print(f"{name}: {in_all / GIB:.2f} GiB of {card / GIB:.0f}")
    assert in_all + GIB // 2 <= 0.9 * card


def played(name: str, folder: Path, model: Path, spin) -> RunFolder:
    """Play a recipe with a tiny model and tiny data on the CPU, one step per epoch."""
    parts, data = settings(name), write_examples(folder / "my_answers.jsonl", count=40)
    replaced = {
        "model.model": model,
        "model.revision": "null",
        "model.compute_dtype": "float32",
        "model.generation.unit_size": 32,
        "data.data": data,
        "data.max_examples": 24,
        "data.max_prompt_tokens": 16,
        "data.max_response_tokens": 6,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.strategy": "auto",
        "trainer.devices": 1,
        "trainer.accumulate_grad_batches": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": folder / "run",
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
    }
    if "val_data" in parts["data"]:
        replaced["data.val_data"] = data
    if "val_examples" in parts["data"]:
        replaced["data.val_examples"] = 4
    if parts["model"].get("generation", {}).get("engine") == "vllm":
        # tests/vllm generates on real servers.
        replaced |= {"model.generation.engine": "local", "model.generation.servers": "[]"}
    if parts["model"]["optimizer"] == "adamw_8bit":
        replaced["model.optimizer"] = "adamw"  # bitsandbytes' needs a GPU
    flags = [part for key, value in replaced.items() for part in (f"--{key}", value)]
    spin("fit", "--config", RECIPES[name].path, *flags)
    return RunFolder(folder / "run")


@pytest.fixture(scope="module")
def wide_model(tiny_model_dir, tmp_path_factory) -> Path:
    return write_wide_model(tiny_model_dir, tmp_path_factory.mktemp("wide"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAYED)
def test_recipe_plays_all_its_iterates_at_tiny_scale(name, tmp_path, wide_model, spin):
    run = played(name, tmp_path, wide_model, spin)
    trainer, model = settings(name)["trainer"], settings(name)["model"]
    wanted = trainer["max_epochs"] // model.get("epochs_per_iterate", 1)
    iterates = run.known_iterates()
    if "callbacks" in trainer:  # small_data may stop early, after an iterate that is no better
        assert run.best_record() is not None
        assert 1 <= iterates[-1] <= wanted
    else:
        assert iterates == list(range(wanted + 1))


def test_published_protocol_trains_on_the_answers_of_the_last_two_iterates(
    tmp_path, wide_model, spin
):
    """data_t and data_{t-1}, as in configs/config_iter*.yaml of uclaml/SPIN."""
    run = played("zephyr_spin", tmp_path, wide_model, spin)
    assert run.known_iterates() == [0, 1, 2, 3, 4]
    answers = [by_opponent(run, t) for t in range(4)]
    assert [set(by) for by in answers] == [{0}, {0, 1}, {1, 2}, {2, 3}]
    for t in (1, 2, 3):
        assert answers[t][t - 1] == answers[t - 1][t - 1], "the answers of p_{t-1} are kept"
    assert all(len(by[t]) == 24 for t, by in enumerate(answers))
    # Log-ratios are taken to the last iterate alone.
    assert [set(read_rows(run.rows(t)).generated_logps) for t in range(4)] == [{0}, {1}, {2}, {3}]


def by_opponent(run: RunFolder, t: int) -> dict[int, list[tuple[int, ...]]]:
    """The generated responses in the rows of an iterate, by who wrote them, in example order."""
    table = read_rows(run.rows(t))
    answers: dict[int, dict[int, tuple[int, ...]]] = {}
    for i in range(len(table)):
        ids = tuple(table.generated_ids[i].tolist())
        answers.setdefault(int(table.opponent[i]), {})[int(table.example_id[i])] = ids
    return {k: [ids for _, ids in sorted(one.items())] for k, one in answers.items()}


def test_recipes_ls_lists_each_with_what_it_needs(spin, capsys):
    spin("recipes", "ls")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines[::2]] == sorted(RECIPES)
    assert "gpu_8gb (needs a GPU, 8 GB)" in lines
    assert max(map(len, lines)) <= 80
    spin("recipes")
    assert capsys.readouterr().out.splitlines() == lines


def test_recipes_show_prints_the_file(spin, capsys):
    spin("recipes", "show", "gpu_24gb")
    assert capsys.readouterr().out == RECIPES["gpu_24gb"].text


@pytest.mark.parametrize("place", ["mine.yaml", "folder", None])
def test_recipes_cp_copies_once(place, spin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    arguments = ("recipes", "cp", "demo", *([] if place is None else [place]))
    file = {"mine.yaml": "mine.yaml", "folder": "folder/demo.yaml", None: "demo.yaml"}[place]
    spin(*arguments)
    assert Path(file).read_text() == recipe("demo").text
    assert f"fit --config {file}" in capsys.readouterr().out
    Path(file).write_text("mine")
    with pytest.raises(SystemExit) as end:
        spin(*arguments)
    assert end.value.code == 2
    assert f"file='{file}': it exists, and is not overwritten" in capsys.readouterr().err
    assert Path(file).read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "zephir_spin"), "there is no such recipe. Fix: give zephyr_spin."),
        (("show", "x"), "there is no such recipe. Fix: choose from demo, gpu_24gb, "),
        (("cp",), "cp needs a recipe. Fix: run spin-lightning recipes ls."),
        (("cp", "demo", "no/such/file.yaml"), "its folder does not exist"),
        (("ls", "demo"), "ls takes no name"),
    ],
)
def test_recipes_mistakes_end_with_one_message(arguments, message, spin, capsys):
    with pytest.raises(SystemExit) as end:
        spin("recipes", *arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
