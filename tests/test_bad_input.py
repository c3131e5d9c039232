"""A user's mistakes, through the command line: one message with the fix, and nothing was spent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from spin_lightning.cli.main import main
from tests.cli.test_fit import fit_arguments
from tests.toys.adapters import save_adapter
from tests.toys.models import random_model
from tests.toys.runs import contents, write_examples

GOOD = {"prompt": "w1 w2", "response": "w3"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "empty": [],
    "columns": [{"task": "w1", "output": "w2"}],
    "questions": [{"messages": [{"role": "user", "content": "w1"}]}],
    "no_prompt": [GOOD, {"prompt": "", "response": "w3"}],
    "no_response": [GOOD, {"prompt": "w1", "response": "  "}],
    "some_bad": [*[GOOD] * 40, {"prompt": "w1", "response": ""}],
    "long": [{"prompt": " ".join(["w1"] * 64), "response": "w3"}],
    "chats": [
        {
            "messages": [
                {"role": role, "content": "w1"}
                for role in ("user", "assistant", "user", "assistant")
            ]
        }
    ],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """Data and models that each lack something, by name."""
    folder = tmp_path_factory.mktemp("bad")
    places = {"good": write_examples(folder / "good.jsonl"), "nowhere": folder / "nowhere"}
    for name, rows in ROWS.items():
        places[name] = folder / f"{name}.jsonl"
        places[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("no_eos", "no_tokenizer", "no_weights", "torn_weights", "small_head"):
        places[name] = Path(shutil.copytree(tiny_model_dir, folder / name))
    edit(places["no_eos"] / "tokenizer_config.json", eos_token=None)
    for file in places["no_tokenizer"].glob("tokenizer*"):
        file.unlink()
    (places["no_weights"] / "model.safetensors").unlink()
    (places["torn_weights"] / "model.safetensors").write_bytes(b"torn")
    vocabulary = {f"w{i}": i for i in range(1000)}
    tokenizer = places["small_head"] / "tokenizer.json"
    edit(tokenizer, model={**json.loads(tokenizer.read_text())["model"], "vocab": vocabulary})
    narrow = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    places["other_adapter"] = save_adapter(random_model(narrow), lora, folder / "other_adapter")
    places["torn_adapter"] = Path(shutil.copytree(places["other_adapter"], folder / "torn_adapter"))
    (places["torn_adapter"] / "adapter_model.safetensors").write_bytes(b"torn")
    places["prompt_tuning"] = save_adapter(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        folder / "prompt_tuning",
    )
    places["no_causal_model"] = folder / "no_causal_model"
    shutil.copytree(tiny_model_dir, places["no_causal_model"])
    (places["no_causal_model"] / "config.json").write_text('{"model_type": "t5"}')
    return places


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flags(settings: dict[str, Any], places: dict[str, Path]) -> list[str]:
    """Command line flags; `{name}` in a value stands for a place."""
    return [
        part
        for name, value in settings.items()
        for part in (f"--{name}", str(value).format_map(places))
    ]


Refusal = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What the command line says to arguments that it refuses, with exit code 2."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == 2
        return " ".join(f"{said.out} {said.err}".split())

    return run


@pytest.fixture
def refused_fit(
    refusal: Refusal, places: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> Refusal:
    """What it says to a small good run with these settings changed; no rows are made."""

    def run(settings: dict[str, Any]) -> str:
        arguments = fit_arguments(tmp_path / "run", tiny_model_dir, places["good"])
        said = refusal(*arguments, *flags(settings, places))
        assert not list((tmp_path / "run").glob("rows/**/*.parquet"))
        return said

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure of the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("spin_lightning.policies.lora.load_base", refuse)


def case(settings: dict[str, Any], *words: str) -> Any:
    name = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
    return pytest.param(settings, words, id=name)


# ------------------------------------------------------------------------ before weights are read

DATA = [
    case({"data.data": "{nowhere}.jsonl"}, "nowhere.jsonl'", "no such file", "Fix: check the path"),
    case({"data.data": "{empty}"}, "empty.jsonl'", "no rows", "Fix: give data"),
    case({"data.data": "{columns}"}, "it has task, output", "Fix: name them"),
    case(
        {
            "data.data": "{columns}",
            "data.columns": '{{"prompt": "question", "response": "output"}}',
        },
        "maps prompt to 'question'",
        "Fix: choose from its columns: task, output",
    ),
    case({"data.data": "{questions}"}, "1 of 1 rows", "no assistant turn", "Fix: correct"),
    case(
        {"data.data": "{no_prompt}", "data.bad_rows": "refuse"},
        "1 of 2 rows (an empty prompt: 1 (row 1))",
        "Fix: correct these rows, or skip them with data.bad_rows: skip",
    ),
    case(
        {"data.data": "{no_response}", "data.bad_rows": "refuse"},
        "1 of 2 rows (an empty response: 1 (row 1))",
        "Fix: correct these rows",
    ),
    case({"data.data": "{long}"}, "context of 64 tokens", "row 0: 65 tokens", "Fix: "),
    case({"data.data": "{chats}"}, "3 turns", "Fix: set a chat template"),
    case({"data.val_data": "{nowhere}.jsonl"}, "nowhere.jsonl'", "Fix: check the path"),
    case({"data.val_data": "{empty}"}, "val_data='", "empty.jsonl'", "no rows", "Fix: give data"),
    case({"data.val_examples": 120}, "data.val_examples=120", "only 120", "Fix: hold out fewer"),
]
MODEL = [
    case({"model.model": "{nowhere}"}, "model='", "nowhere'", "Fix: give a folder"),
    case({"model.model": "{no_tokenizer}"}, "tokenizer cannot be read", "Fix: save the tokenizer"),
    case({"model.model": "{no_eos}"}, "no end-of-sequence token", "Fix: set tokenizer.eos_token"),
    case({"model.model": "{no_causal_model}"}, "model='", "t5", "Fix: "),
    case({"model.model": "{small_head}"}, "small_head'", "24", "Fix: "),
    case(
        {"model.lora_target_modules": '["query"]'},
        "lora_target_modules='query'",
        "no layer",
        "Fix: choose from",
        "q_proj",
    ),
    case({"model.lora_target_modules": "query"}, "lora_target_modules='query'", "Fix: choose from"),
    case({"model.initial_adapter": "{nowhere}"}, "initial_adapter='", "nowhere'", "Fix: give"),
    case({"model.initial_adapter": "{prompt_tuning}"}, "initial_adapter='", "LoRA", "Fix: "),
    case(
        {"model.initial_adapter": "{other_adapter}", "model.lora_r": 8},
        "initial_adapter='",
        "lora_r",
        "Fix: leave the lora_* settings out",
    ),
]
RANGES = [
    case({f"{owner}.{name}": value}, f"{name}={shown}", "out of range", "Fix: give")
    for owner, name, value, shown in [
        ("model", "beta", 0, "0.0"),
        ("model", "beta", -1, "-1.0"),
        ("model", "beta", ".nan", "nan"),
        ("model", "beta", ".inf", "inf"),
        ("model", "learning_rate", 0, "0.0"),
        ("model", "warmup_ratio", 2, "2.0"),
        ("model.generation", "unit_size", 0, "0"),
        ("model.generation", "temperature", 0, "0.0"),
        ("data", "batch_size", 0, "0"),
        ("data", "max_examples", 0, "0"),
        ("data", "max_response_tokens", 0, "0"),
        ("data", "val_examples", -1, "-1"),
        ("data", "num_workers", -1, "-1"),
    ]
]
LOOP = [
    case({"model.beta": "[0.1, 0.2, 0.3]"}, "beta=[0.1, 0.2, 0.3]", "3 values for 2", "Fix: give"),
    case({"model.beta": "null"}, "beta=None", "Fix: give"),
    case({"model.loss": "null"}, "loss=None", "Fix: "),
    case(
        {"model.epochs_per_iterate": 4},
        "trainer.max_epochs=2",
        "not a multiple",
        "Fix: set it to 4",
    ),
    case({"trainer.max_epochs": "null"}, "trainer.max_epochs", "Fix: set max_epochs"),
    case({"trainer.max_steps": 10}, "trainer.max_steps=10", "Fix: leave it out"),
    case({"trainer.fast_dev_run": "true"}, "trainer.fast_dev_run=", "Fix: leave it out"),
    case({"trainer.overfit_batches": 1}, "trainer.overfit_batches=1", "Fix: leave it out"),
    case({"trainer.limit_train_batches": 0}, "trainer.limit_train_batches=0", "Fix: "),
    case({"trainer.accumulate_grad_batches": 0}, "accumulate_grad_batches=0", "Fix: "),
    case({"ckpt_path": "{nowhere}.ckpt"}, "ckpt_path", "nowhere.ckpt", "Fix: "),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.filterwarnings("ignore:.max_epochs. was not set:UserWarning")
@pytest.mark.parametrize(("settings", "words"), [*DATA, *MODEL, *RANGES, *LOOP])
def test_mistake_is_reported_with_its_fix_before_weights_are_read(settings, words, refused_fit):
    said = refused_fit(settings)
    assert [word for word in words if word not in said] == []
    assert said.count("Error: ") == 1


# ------------------------------------------------------------------------ while arguments are read


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        case({"model.betta": 0.1}, "betta"),
        case({"data.batchsize": 1}, "batchsize"),
        case({"model.generation.unitsize": 1}, "unitsize"),
        case({"trainer.epochs": 1}, "epochs"),
        case({"model.beta": "abc"}, "beta", "abc"),
        case({"data.batch_size": 1.5}, "batch_size", "1.5"),
        case({"model.optimizer": "sgd"}, "optimizer", "sgd", "adamw", "rmsprop"),
        case({"model.loss": "dpo"}, "loss", "dpo", "logistic", "hinge"),
        case({"model.quantization": "fp4"}, "quantization", "fp4", "nf4"),
        case({"data.bad_rows": "mend"}, "bad_rows", "mend", "refuse"),
        case({"model": "my_variants.Thing"}, "my_variants"),
        case({"model": "spin_lightning.Spun"}, "Spun"),
        case({"model": "torch.nn.Linear"}, "torch.nn.Linear", "SelfPlayModule"),
        case({"data": "NoData"}, "NoData"),
        case({"resume": "always"}, "resume", "always", "auto", "never"),
    ],
)
def test_setting_of_another_name_or_type_is_rejected_while_arguments_are_read(
    settings, words, refused_fit
):
    said = refused_fit(settings)
    assert [word for word in words if word not in said] == []


# ------------------------------------------------------------------------ while weights are read


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        case({"model.model": "{no_weights}"}, "model='", "no_weights'", "Fix: "),
        case({"model.model": "{torn_weights}"}, "model='", "torn_weights'", "Fix: "),
        case({"model.initial_adapter": "{other_adapter}"}, "initial_adapter='", "Fix: "),
        case({"model.initial_adapter": "{torn_adapter}"}, "initial_adapter='", "Fix: "),
    ],
)
def test_unreadable_weights_are_reported_before_rows_are_made(settings, words, refused_fit):
    said = refused_fit(settings)
    assert [word for word in words if word not in said] == []


# ------------------------------------------------------------------------ another run's folder


@pytest.fixture(scope="module")
def played(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, places: dict[str, Path]
) -> list[object]:
    """The arguments of a run that was played."""
    root = tmp_path_factory.mktemp("played") / "run"
    arguments = fit_arguments(root, tiny_model_dir, places["good"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
        main()
    return arguments


def run_folder(arguments: list[object]) -> Path:
    return Path(str(arguments[arguments.index("--trainer.default_root_dir") + 1]))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        case({"model.beta": 0.3}, "beta: run has [0.1, 0.1], you gave [0.3, 0.3]"),
        case({"model.beta": "[0.1, 0.2]"}, "beta: run has [0.1, 0.1], you gave [0.1, 0.2]"),
        case({"model.lora_r": 4}, "lora_r: run has None, you gave 4"),
        case({"seed_everything": 2}, "seed: run has 1, you gave 2"),
        case({"data.data": "{no_prompt}", "data.val_examples": 0}, "data: run has"),
        case({"data.max_response_tokens": 9}, "max_response_tokens: run has 8, you gave 9"),
        case({"model.generation.unit_size": 16}, "unit_size: run has 32, you gave 16"),
        case({"model.generation.top_k": 5}, "top_k: run has 0, you gave 5"),
        case({"trainer.accumulate_grad_batches": 2}, "batch_size: run has 32, you gave 64"),
    ],
)
def test_run_folder_of_another_configuration_names_the_field_and_both_values(
    settings, words, played, refusal, places
):
    before = contents(run_folder(played))
    said = refusal(*played, *flags(settings, places))
    assert all(word in said for word in words)
    assert "Fix: set these back, or name a new folder with --trainer.default_root_dir" in said
    assert contents(run_folder(played)) == before


def test_part_torn_by_a_crash_is_made_again(played, tmp_path, monkeypatch):
    whole = contents(run_folder(played))
    root = tmp_path / "run"
    part = root / "rows/iterate_000/part-00001.parquet"
    part.parent.mkdir(parents=True)
    part.write_bytes((run_folder(played) / part.relative_to(root)).read_bytes()[:100])
    arguments = [*played, "--trainer.default_root_dir", root]
    monkeypatch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
    main()
    assert contents(root) == whole


@pytest.mark.parametrize(
    "settings",
    [
        {"data.val_examples": 0},
        {"data.data": "{some_bad}"},
        {"data.max_response_tokens": 1},
        {"trainer.limit_val_batches": 0},
    ],
)
def test_odd_settings_that_can_work_do(settings, places, tiny_model_dir, tmp_path, monkeypatch):
    arguments = map(str, fit_arguments(tmp_path, tiny_model_dir, places["good"]))
    shorter = flags({"trainer.max_epochs": 1, **settings}, places)
    monkeypatch.setattr("sys.argv", ["spin-lightning", *arguments, *shorter])
    main()
    assert (tmp_path / "iterates/iterate_001/adapter_model.safetensors").exists()
