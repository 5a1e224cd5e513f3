"""Data sets by name, and data sets of one's own."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import data
from data import GlobalBatches, conditioning, encoder_for, open_dataset
from data.dataset import Dataset, DatasetSettings, Example, Key
from data.encoders import Pixels


class Captions:
    """A data set of clips with text, as a user writes it."""

    classes: list[str] = []
    image_shape: tuple[int, ...] = (2, 1, 4, 6)
    vae = "none"
    worth_workers = False

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: Key) -> Example:
        _, index = key
        text: Mapping[str, Tensor] = {"text": torch.full((3, 7), float(index)), "text_mask": torch.ones(3)}
        return torch.full(self.image_shape, index, dtype=torch.uint8), text, index


def test_a_data_set_is_any_object_with_its_members() -> None:
    dataset: Dataset = Captions()
    keys = GlobalBatches(len(dataset), 4, rank=0, world=1, seed=0, steps=range(2))
    for images, labels, indices in DataLoader(dataset, batch_sampler=keys):  # type: ignore[arg-type]
        assert images.shape == (4, 2, 1, 4, 6) and indices.shape == (4,)
        given = conditioning(labels)
        assert given["text"].shape == (4, 3, 7) and torch.equal(given["text"][:, 0, 0], indices.float())
    encoder = encoder_for(dataset, dataset.vae)
    assert isinstance(encoder, Pixels) and encoder.latent_shape(dataset.image_shape) == (2, 1, 4, 6)
    assert encoder.encode_pixels(images).shape == images.shape


def test_labels_become_the_conditioning_y() -> None:
    labels = torch.tensor([1, 2])
    assert conditioning(labels).keys() == {"y"} and conditioning(labels)["y"] is labels


def test_a_data_set_is_added_by_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[DatasetSettings] = []

    def open_captions(settings: DatasetSettings) -> Captions:
        opened.append(settings)
        return Captions()

    monkeypatch.setitem(data.DATASETS, "captions", open_captions)
    assert isinstance(open_dataset("captions", None, 8, 1, seed=3), Captions)
    assert opened == [DatasetSettings(path=None, size=(8, 8), channels=1, seed=3)]
    open_dataset("captions", None, (8, 6), 1)
    assert opened[1].size == (8, 6)


def test_digits_may_be_given_with_their_size() -> None:
    assert open_dataset("digits", None, (8, 8), 1).image_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="8 pixels wide, not 16"):
        open_dataset("digits", None, (8, 16), 1)
