import pytest

from spa_fast.cil.metrics import AccuracyMatrix


def three_stages():
    matrix = AccuracyMatrix()
    matrix.add_stage([9], [10])
    matrix.add_stage([7, 15], [10, 20])
    matrix.add_stage([8, 10, 30], [10, 20, 30])
    return matrix


def test_figures_against_hand_values():
    matrix = three_stages()
    assert matrix.rows == [[90.0], [70.0, 75.0], [80.0, 50.0, 100.0]]
    assert matrix.accuracies == pytest.approx([90.0, 100 * 22 / 30, 100 * 48 / 60])
    assert matrix.average == pytest.approx((90 + 220 / 3 + 80) / 3)
    assert matrix.last == pytest.approx(80.0)
    # Task 0 peaked at 90 and ended at 80; task 1 peaked at 75 and ended at 50.
    assert matrix.forgetting == pytest.approx((10 + 25) / 2)
    assert matrix.bwt == pytest.approx((-10 - 25) / 2)
    assert matrix.square() == [[90.0, None, None], [70.0, 75.0, None], [80.0, 50.0, 100.0]]


def test_forgetting_uses_the_best_earlier_stage_and_can_be_negative():
    matrix = AccuracyMatrix()
    matrix.add_stage([5], [10])
    matrix.add_stage([8, 10], [10, 10])
    matrix.add_stage([9, 10, 10], [10, 10, 10])
    assert matrix.forgetting == pytest.approx(((80 - 90) + (100 - 100)) / 2)
    assert matrix.bwt == pytest.approx(((90 - 50) + 0) / 2)


def test_one_task_forgets_nothing():
    matrix = AccuracyMatrix()
    matrix.add_stage([4], [8])
    assert (matrix.average, matrix.last, matrix.forgetting, matrix.bwt) == (50.0, 50.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("correct", "sizes"), [([1], [2]), ([1, 1], [2, 2]), ([1, 1, 1], [9, 20, 2]), ([1, 1], [10, 20, 3])]
)
def test_a_stage_that_does_not_follow_is_refused(correct, sizes):
    matrix = AccuracyMatrix()
    matrix.add_stage([9], [10])
    matrix.add_stage([7, 15], [10, 20])
    with pytest.raises(ValueError, match="stage 2"):
        matrix.add_stage(correct, sizes)
