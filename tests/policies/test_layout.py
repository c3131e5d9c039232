"""Where the pieces of a row lie, worked out by hand."""

from spin_lightning.packing import pack_prompts
from spin_lightning.policies.layout import Layout


def test_pieces_of_one_shape_are_sorted_together():
    # Tokens 0-2: prompt and first response, 3: second response; 4-5 and 6; 7-9 and 10.
    batch = pack_prompts([[5, 6], [7], [8, 9]], [[[3], [4]], [[3], [4]], [[3], [4]]])
    layout = Layout(batch)
    assert layout.pieces == [3, 1, 2, 1, 3, 1]
    assert [keys.tolist() for keys in layout.keys] == [
        [0, 1, 2],
        [0, 1, 3],
        [4, 5],
        [4, 6],
        [7, 8, 9],
        [7, 8, 10],
    ]
    # Shapes (queries, keys): (3, 3) twice, (1, 3) twice, (2, 2), (1, 2): 4 of 6 pieces.
    assert layout.alike is None

    doubled = pack_prompts([[5, 6]] * 2, [[[3], [4]]] * 2)
    alike = Layout(doubled).alike
    assert alike is not None
    assert alike.shapes == [(2, 3, 3), (2, 1, 3)]
    assert alike.queries.tolist() == [0, 1, 2, 4, 5, 6, 3, 7]
    assert alike.keys.tolist() == [0, 1, 2, 4, 5, 6, 0, 1, 3, 4, 5, 7]
    assert alike.back.tolist() == [0, 1, 2, 6, 3, 4, 5, 7]
