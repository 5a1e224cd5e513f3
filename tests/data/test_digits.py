import numpy as np
import pytest

from data.digits import load_digits, open_digits
from data.image_folder import ArrayImages

DIGITS_DIGEST = "f7a01b5e402948fd4aab7f9cc0484b97e8f98b91fe693b980bec42a25e05ad38"


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


def test_the_digest_is_that_of_images_and_labels():
    images, labels = load_digits("train")
    classes = list(map(str, range(10)))
    assert open_digits("train").digest() == DIGITS_DIGEST, "recorded once: checkpoints have it"
    assert open_digits("train", flip=True, seed=3).digest() == ArrayImages(images, labels, classes).digest()
    brighter, relabelled = images.copy(), labels.copy()
    brighter[700, 3, 3] ^= 1
    relabelled[700] = 9 - relabelled[700]
    order = np.arange(len(labels))[::-1]
    others = [
        open_digits("test"),
        ArrayImages(brighter, labels, classes),
        ArrayImages(images, relabelled, classes),
        ArrayImages(images[order], labels[order], classes),
    ]
    assert len({DIGITS_DIGEST, *(other.digest() for other in others)}) == 5
