import math

import numpy as np
import pytest
import torch

from spin_lightning.data.collate import Collate
from spin_lightning.data.dataset import Pair

PAD = 99


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


PAIRS = [
    Pair(ids(1, 4), ids(5, 2), ids(6, 7, 8, 2), -1.5, -2.5),
    Pair(ids(1, 4, 5, 6), ids(7, 8, 2), ids(2), -1500.0625, -0.125),
]
ALONE = [pair._replace(generated_ids=ids(), reference_generated=math.nan) for pair in PAIRS]


def test_collate_pads_each_prompt_with_its_response_on_the_left():
    batch = Collate(PAD)(PAIRS)
    assert batch.real.input_ids.tolist() == [
        [PAD, PAD, PAD, 1, 4, 5, 2],
        [1, 4, 5, 6, 7, 8, 2],
    ]
    assert batch.real.attention_mask.tolist() == [[0, 0, 0, 1, 1, 1, 1], [1] * 7]
    assert batch.real.response_lengths.tolist() == [2, 3]
    assert batch.generated.input_ids.tolist() == [
        [1, 4, 6, 7, 8, 2],
        [PAD, 1, 4, 5, 6, 2],
    ]
    assert batch.generated.attention_mask.tolist() == [[1] * 6, [0, 1, 1, 1, 1, 1]]
    assert batch.generated.response_lengths.tolist() == [4, 1]
    assert len(batch) == 2


def test_collate_keeps_reference_logps_in_float64():
    batch = Collate(PAD)(PAIRS)
    for column, values in [
        (batch.reference_real, [-1.5, -1500.0625]),
        (batch.reference_generated, [-2.5, -0.125]),
    ]:
        assert column.dtype == torch.float64
        assert column.tolist() == values


@pytest.mark.parametrize("side", ["real", "generated"])
def test_collate_ids_are_int64_as_embeddings_take_them(side):
    sequences = getattr(Collate(PAD)(PAIRS), side)
    tensors = (sequences.input_ids, sequences.attention_mask, sequences.response_lengths)
    assert [tensor.dtype for tensor in tensors] == [torch.int64] * 3


def test_collate_without_generated_responses_has_no_generated_side():
    batch = Collate(PAD)(ALONE)
    assert batch.generated is None
    assert batch.reference_generated is None
    assert batch.real.input_ids.shape == (2, 7)


def test_collate_padding_is_masked_even_where_it_is_a_token():
    batch = Collate(1)(PAIRS)
    assert batch.real.attention_mask[0].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.real.input_ids[0, 0] == 1
