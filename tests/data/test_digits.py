import numpy as np
import pytest

from data import digits
from data.digits import load_digits


def test_split_is_disjoint_complete_and_fixed():
    train, train_labels = load_digits("train")
    test, test_labels = load_digits("test")
    assert train.shape == (1297, 8, 8, 1) and test.shape == (500, 8, 8, 1) and train.dtype == np.uint8
    assert train_labels.dtype == np.int64 and set(train_labels) == set(test_labels) == set(range(10))
    # recorded once: scores in the README are relative to this split
    assert test_labels[:10].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1]
    assert int(train.astype(np.int64).sum()) == 6460983


def test_grey_levels_span_the_byte_range():
    images, _ = load_digits("train")
    levels = np.unique(images)
    assert len(levels) == 17 and levels[0] == 0 and levels[-1] == 255


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'valid'"):
        load_digits("valid")  # type: ignore[arg-type]


@pytest.mark.parametrize("is_found", [True, False])
def test_they_are_those_of_scikit_learn_whose_file_may_be_elsewhere(
    is_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.datasets import load_digits as of_the_library

    expected = of_the_library()
    if not is_found:
        monkeypatch.setattr(digits, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr("sklearn.datasets.load_digits", None)
    table = digits._table()
    assert np.array_equal(table[:, :-1], expected.data) and np.array_equal(table[:, -1], expected.target)
