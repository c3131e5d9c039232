"""The mixture of a run's iterates as one model."""

from pathlib import Path

import pytest
import torch
from scipy import stats

from spin_lightning import load_iterate, load_mixture
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.logps import response_logps
from spin_lightning.mixtures import Mixture, uniform
from spin_lightning.packing import pack_padded
from spin_lightning.policies.mixture_model import MixtureModel
from spin_lightning.policies.saved import load_policy
from tests.toys.runs import play, write_examples

BATCH = pack_padded([(1, 5), (1, 6, 7)], [(8, 9, 2), (4, 2)], 0)


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    data = write_examples(root / "data.jsonl", 60)
    play(root / "run", tiny_model_dir, data, epochs=2, settings={"learning_rate": 0.03})
    return root / "run"


def iterate_logps(run: Path) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([response_logps(load_iterate(run, t)[0], BATCH) for t in range(3)])


@pytest.mark.parametrize("weights", [None, {0: 0.2, 2: 0.8}, {1: 1.0}])
def test_mixture_log_probs_are_the_log_of_the_mean_probability(weights, run):
    model, _ = load_mixture(run, weights)
    shares = weights or dict.fromkeys(range(3), 1 / 3)
    members = iterate_logps(run)
    wanted = sum(share * members[t].exp() for t, share in shares.items()).log()
    torch.testing.assert_close(model.response_logps(BATCH), wanted)
    assert not torch.allclose(members[0], members[2], atol=0.1)


def test_mixture_writes_each_row_by_an_iterate_of_its_own(run):
    """One token after one prompt, against the mean of the iterates' probabilities."""
    model, _ = load_mixture(run)
    prompt = torch.tensor([[1, 5]])
    torch.manual_seed(0)
    written = model.generate(prompt.repeat(4000, 1), max_new_tokens=1)[:, 2]
    with torch.no_grad():
        mean = sum(load_iterate(run, t)[0](prompt).logits[0, -1].softmax(-1) for t in range(3)) / 3
    likely = (mean * 4000 >= 10).nonzero().squeeze(-1)
    counts = [int((written == token).sum()) for token in likely]
    expected = (mean[likely] * 4000).tolist()
    counts, expected = [*counts, 4000 - sum(counts)], [*expected, 4000 - sum(expected)]
    if expected[-1] < 10:  # pooled with the last cell
        counts[-2:], expected[-2:] = [sum(counts[-2:])], [sum(expected[-2:])]
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_mixture_pads_prompts_on_the_left_and_responses_on_the_right(run):
    model, tokenizer = load_mixture(run)
    prompts = torch.tensor([[0, 1, 5], [1, 6, 7]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    written = model.generate(prompts, mask, max_new_tokens=4)
    assert written.shape[0] == 2
    assert written.shape[1] <= 7
    assert written[:, :3].tolist() == prompts.tolist()
    assert isinstance(tokenizer.decode(written[0]), str)


def test_mixture_of_an_iterate_that_is_not_there_is_refused(run):
    with pytest.raises(RunFolderError, match="has no iterate 7"):
        load_mixture(run, {7: 1.0})
    with pytest.raises(SettingError, match=r"sum to 0\.5"):
        load_mixture(run, {0: 0.5})


def test_mixture_of_token_level_mixtures_is_refused(run):
    with pytest.raises(SettingError, match=r"mixture=.*at every token.*Fix: give a mixture"):
        MixtureModel(Mixture({0: 0.5, 1: 0.5}, token_alpha=0.3), load_policy(run))


@pytest.mark.parametrize("call", ["generate", "response_logps"])
def test_mixture_leaves_the_policy_as_it_was_also_by_an_exception(call, run):
    policy = load_policy(run)
    mixture = MixtureModel(uniform(range(3)), policy)
    prompts = torch.ones(8, 2, dtype=torch.long)

    def state() -> tuple[list[str], list[bool], list[bool]]:
        # Without the iterates' adapters, which stay loaded.
        own = [p for name, p in policy.named_parameters() if ".iterate_" not in name]
        modes = [m.training for name, m in policy.named_modules() if "iterate_" not in name]
        return policy.model.active_adapters, [p.requires_grad for p in own], modes

    def compute() -> torch.Tensor:
        torch.manual_seed(0)
        if call == "generate":
            return mixture.generate(prompts, max_new_tokens=1)
        return mixture.response_logps(BATCH)

    def fail(*args: object) -> None:
        if policy.model.active_adapters == ["iterate_002"]:
            raise KeyError("stop here")

    before, trained = state(), policy.logps(BATCH)
    wanted = compute()
    assert state() == before
    hook = policy.model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="stop here"):
        compute()
    assert state() == before
    hook.remove()
    assert torch.equal(policy.logps(BATCH), trained)
    assert torch.equal(compute(), wanted)
