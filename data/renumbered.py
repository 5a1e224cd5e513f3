"""A data set with the labels of a longer list of classes, so that a network learns new ones and keeps its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.dataset import Dataset, Example, Key


class Renumbered:
    """A data set as it is, but for its classes and labels.

    Args:
        dataset: Data with labels.
        classes: Names of classes, those of the data among them.

    Raises:
        ValueError: If a class of the data is not among them.
    """

    def __init__(self, dataset: Dataset, classes: Sequence[str]) -> None:
        missing = [name for name in dataset.classes if name not in classes]
        if missing:
            raise ValueError(f"class {missing[0]} of the data is not among the {len(classes)} of the network")
        self._dataset, self.classes = dataset, list(classes)
        self._labels = [self.classes.index(name) for name in dataset.classes]
        self.image_shape, self.vae, self.worth_workers = dataset.image_shape, dataset.vae, dataset.worth_workers

    def __len__(self) -> int:
        """Number of images."""
        return len(self._dataset)

    def __getitem__(self, key: Key) -> Example:
        """The image at `index` as it is in `epoch`, with its new label."""
        image, label, index = self._dataset[key]
        return image, self._labels[label] if isinstance(label, int) else label, index

    def __getattr__(self, name: str) -> Any:
        """Members that only some data sets have, such as a digest."""
        if name.startswith("_"):
            raise AttributeError(name)  # asked for while a loader's worker unpickles it, before there is a data set
        return getattr(self._dataset, name)


def renumber(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """Give a data set the labels of these classes; the data set itself if they are its own."""
    return dataset if list(dataset.classes) == list(classes) else Renumbered(dataset, classes)
