"""The quickstart, end to end: the model improves, and against the opponent it is said to."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_lightning.cli.main import main
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.testbed import Language, ensure, response_log_probs
from spin_lightning.testbed.exact import token_ids
from tests.toys.chi_square import chi_square

CONFIGS = Path(__file__).parents[1] / "configs"


def fit(config: str, root: Path, seed: int, *more: str) -> RunFolder:
    """Run the command line on a shipped config with the testbed of `seed`."""
    paths = ensure(seed)
    arguments = [
        *("spin-lightning", "fit", "--config", str(CONFIGS / config)),
        *("--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"),
        *("--model.model", str(paths.model), "--data.data", str(paths.data)),
        *more,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)
        main()
    return RunFolder(root)


def exact_kl(run: RunFolder) -> list[float]:
    return [record.measured["exact/kl"] for record in run.records()]


def p_value(run: RunFolder, rows_of: int, policy: int, language: Language) -> float:
    """Chi-square of the rows drawn at an iterate against the enumerated policy of a SAVED one."""
    base = run.record(0).base["name"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if policy:
        model = PeftModel.from_pretrained(model, run.iterate(policy))
    log_probs = response_log_probs(model, tokenizer, language)
    prompts, responses = token_ids(tokenizer, language)
    table = read_rows(run.rows(rows_of))
    seen = Counter(
        (tuple(table.prompt_ids[i].tolist()), tuple(table.generated_ids[i].tolist()))
        for i in range(len(table))
    )
    counts = np.array([[seen[prompt, response] for response in responses] for prompt in prompts])
    per_prompt = [sum(n for (p, _), n in seen.items() if p == prompt) for prompt in prompts]
    outside = np.array(per_prompt) - counts.sum(axis=1)
    return chi_square(torch.tensor(counts), torch.tensor(outside), log_probs)


def check(run: RunFolder, control: RunFolder, language: Language, factor: float) -> None:
    kl, control_kl = exact_kl(run), exact_kl(control)
    assert kl[-1] < kl[0] / factor, kl
    assert all(later <= 2 * min(kl) for later in kl[kl.index(min(kl)) :]), kl
    assert len(control_kl) == len(kl)
    steps = [r.record(len(kl) - 1).step for r in (run, control)]
    assert steps[0] == steps[1], "the control takes as many steps"
    for t in range(len(kl) - 1):
        assert p_value(run, t, t, language) > 1e-4, f"rows of iterate {t} are not drawn from it"
    assert p_value(run, 1, 0, language) < 1e-6, "rows of iterate 1 pass for those of iterate 0"


def test_quickstart_cut_short_improves_with_rows_of_the_right_iterate(testbed_seed_0, tmp_path):
    short = ("--data.max_examples", "6656", "--trainer.max_epochs", "2")
    run = fit("quickstart.yaml", tmp_path / "spin", 0, *short)
    control = fit("quickstart_sft.yaml", tmp_path / "sft", 0, *short)
    check(run, control, Language.load(testbed_seed_0.language), factor=2.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_whole_brings_the_exact_kl_down_four_times(seed, tmp_path):
    seeded = ("--seed_everything", str(seed))
    run = fit("quickstart.yaml", tmp_path / "spin", seed, *seeded)
    control = fit("quickstart_sft.yaml", tmp_path / "sft", seed, *seeded)
    print(f"seed {seed}: SPIN {exact_kl(run)}, SFT {exact_kl(control)}")
    check(run, control, Language.load(ensure(seed).language), factor=4.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_in_nf4_brings_the_exact_kl_down_three_times(tmp_path):
    run = fit("quickstart.yaml", tmp_path / "nf4", 0, "--model.quantization", "nf4")
    kl = exact_kl(run)
    print(f"nf4: {kl}")
    assert kl[-1] < kl[0] / 3
    config = yaml.safe_load((run.root / "config.yaml").read_text())
    assert config["model"]["init_args"]["quantization"] == "nf4"
