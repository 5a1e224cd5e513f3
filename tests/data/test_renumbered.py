"""Labels among more classes."""

import pickle

import numpy as np
import pytest
import torch

from data.array_images import ArrayImages
from data.renumbered import renumber


def photos() -> ArrayImages:
    images = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2, 1)
    return ArrayImages(images, np.array([0, 1, 1, 0]), ["cat", "emu"])


def test_labels_are_those_of_the_longer_list_and_all_else_stays() -> None:
    plain, more = photos(), renumber(photos(), ["dog", "emu", "fox", "cat"])
    assert list(more.classes) == ["dog", "emu", "fox", "cat"] and len(more) == 4
    assert [more[0, i][1] for i in range(4)] == [3, 1, 1, 3]
    assert all(torch.equal(more[0, i][0], plain[0, i][0]) and more[0, i][2] == i for i in range(4))
    assert (more.image_shape, more.vae, more.worth_workers) == ((1, 2, 2), "none", False)
    assert more.digest() == plain.digest() and not hasattr(more, "encoder")
    copy = pickle.loads(pickle.dumps(more))  # as loaders send it to workers
    assert copy[0, 0][1] == 3


def test_data_of_these_classes_stay_themselves() -> None:
    plain = photos()
    assert renumber(plain, ["cat", "emu"]) is plain


def test_a_class_that_is_not_among_them_is_named() -> None:
    with pytest.raises(ValueError, match="class emu of the data is not among the 2 of the network"):
        renumber(photos(), ["cat", "dog"])
