"""Values that are passed between parts: they move as a whole, and None stays None."""

import pytest
import torch

from spin_lightning.packing import pack_prompts
from spin_lightning.types import PairBatch, PairLogps

PAIRS = pack_prompts([(1, 2), (3,)], [((4,), (7,)), ((5, 6), (8,))])
REFERENCE = torch.tensor([-1.0, -2.0], dtype=torch.float64)


def test_pair_batch_moves_with_all_its_tensors():
    there = PairBatch(PAIRS, REFERENCE, REFERENCE).to("meta")
    tensors = [there.pairs.input_ids, there.reference_real, there.reference_generated]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert there.pairs.response_lengths == PAIRS.response_lengths
    assert len(there) == 2


def test_pair_batch_without_generated_responses_moves_and_has_none():
    there = PairBatch(PAIRS, REFERENCE, None).to("meta")
    assert there.reference_real.device.type == "meta"
    assert there.reference_generated is None
    assert len(there) == 2


def test_pair_logps_margin_is_the_difference_of_the_log_ratios():
    """(-2 - -5) - (-7 - -6) = 3 - -1 = 4."""
    logps = PairLogps(*(torch.tensor([x]) for x in (-2.0, -7.0, -5.0, -6.0, 3, 4)))
    ratios = logps.real_log_ratio, logps.generated_log_ratio, logps.margin
    assert torch.cat(ratios).tolist() == [3.0, -1.0, 4.0]


def test_pair_logps_without_generated_responses_has_no_margin():
    logps = PairLogps(REFERENCE, None, REFERENCE, None, torch.tensor([1, 2]), None)
    with pytest.raises(TypeError, match="no generated responses"):
        _ = logps.margin


def test_pair_logps_of_a_batch_alternate_between_real_and_generated():
    """Two prompts, each with its real response and then the generated one."""
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    found = PairLogps.of(PairBatch(PAIRS, REFERENCE, 2 * REFERENCE), logps)
    assert found.policy_real.tolist() == [-1.0, -3.0]
    assert found.policy_generated.tolist() == [-2.0, -4.0]
    assert found.real_lengths.tolist() == [1, 2]
    assert found.generated_lengths.tolist() == [1, 1]
    assert found.reference_real is REFERENCE


def test_pair_logps_of_a_batch_without_generated_responses_have_none():
    alone = pack_prompts([(1, 2), (3,)], [((4,),), ((5, 6),)])
    found = PairLogps.of(PairBatch(alone, REFERENCE, None), REFERENCE)
    assert found.policy_real.tolist() == [-1.0, -2.0]
    assert found.real_lengths.tolist() == [1, 2]
    assert (found.policy_generated, found.generated_lengths) == (None, None)
