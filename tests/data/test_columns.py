import pytest

from data.columns import ColumnSettings, labels_of


def test_numbers_stay_as_they_are_and_name_the_classes():
    assert labels_of([2, 0, 2]) == (["0", "1", "2"], [2, 0, 2])
    assert labels_of([1, 0], ["cat", "ant", "bee"]) == (["cat", "ant", "bee"], [1, 0])
    assert labels_of([]) == ([], [])


def test_names_are_sorted_as_those_of_folders():
    assert labels_of(["cat", "ant", "cat"]) == (["ant", "cat"], [1, 0, 1])


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ([0, None], [], "the label of image 1 is None; all must be class numbers, or all names"),
        ([0, "cat"], [], "the label of image 1 is 'cat'"),
        (["cat", 1], [], "the label of image 1 is 1;"),
        ([True], [], "the label of image 0 is True"),
        ([0, 1.0], [], "the label of image 1 is 1.0"),
        ([[0]], [], r"the label of image 0 is \[0\]"),
        ([0, -1], [], "the label of image 1 is -1; test splits often have no labels"),
        ([-2], [], "is -2; classes are 0 to 999,999"),
        ([0, 2], ["a", "b"], "the label of image 1 is 2; classes are 0 to 1"),
        ([10**6], [], "is 1000000; classes are"),
    ],
)
def test_other_labels_are_named(values, classes, message):
    with pytest.raises(ValueError, match=message):
        labels_of(values, classes)


def test_a_setting_without_effect_is_named():
    ColumnSettings().check_used(False, "--dataset x")
    ColumnSettings(split="test").check_used(True, "--dataset x")
    with pytest.raises(ValueError, match="^--split test: has no effect without --dataset x$"):
        ColumnSettings(split="test").check_used(False, "--dataset x")
