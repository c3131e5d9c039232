from spin_lightning.data.numbering import example_id, place


def test_last_answer_has_the_number_of_its_row():
    assert [example_id(row) for row in range(3)] == [0, 1, 2]
    assert example_id(7, answers_after=2) == 7 + 2 * 2**32
    assert place(example_id(7)) == "7"


def test_numbers_of_different_answers_differ_and_fit_into_parquet():
    numbers = {example_id(row, k) for row in (0, 1, 2**32 - 1) for k in (0, 1, 2**30)}
    assert len(numbers) == 9
    assert max(numbers) < 2**63
