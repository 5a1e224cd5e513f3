"""Columns and splits of tables of images, and classes by the values of a column of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from runtime.settings import flag_name, setting

LABEL = "label"  # column, or member of a .json, unless another is named
NONE = "none"  # value of --label-column for data without classes
MAX_CLASSES = 1_000_000  # larger numbers are something else than classes


@dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """Columns and splits of tables and shards of images."""

    label_column: str | None = setting(
        None, "column of class numbers or names (of shards: member of .json); none for data without classes",
        shown=f"{LABEL}; of shards .cls, else {LABEL} in .json",
    )  # fmt: skip
    image_column: str | None = setting(None, "column of images of a table", shown="the only one")
    split: str | None = setting(None, "split of a table", shown="train, or the only one")

    def check_used(self, used: bool, where: str) -> None:
        """Raise a ValueError, naming a flag, if one is given where none has an effect."""
        for own in fields(self):
            value = getattr(self, own.name)
            if value is not None and not used:
                raise ValueError(f"{flag_name(own.name)} {value}: has no effect without {where}")


class Labels(NamedTuple):
    """Classes of a data set, and the label of each image.

    Attributes:
        classes: Names; a class's label is its position. Empty for data without classes.
        values: Label of each image; empty without classes.
    """

    classes: list[str]
    values: list[int]


def labels_of(values: Sequence[object], classes: Sequence[str] = ()) -> Labels:
    """Find the classes of a column of labels.

    Numbers stay as they are, and classes are named by all numbers from 0 to the largest one, so that a part of a data
    set has the labels of the whole. Names are sorted as text, as those of class folders are.

    Args:
        values: Class numbers from 0, or names.
        classes: Names of the numbers, where they are known.

    Raises:
        ValueError: Naming the first value that is neither, or out of range.
    """
    kind: type = str if values and isinstance(values[0], str) else int
    odd = next((i for i, value in enumerate(values) if type(value) is not kind), None)
    if odd is not None:
        raise ValueError(f"the label of image {odd} is {values[odd]!r}; all must be class numbers, or all names")
    if kind is str:
        names = sorted({str(value) for value in values})
        places = {name: place for place, name in enumerate(names)}
        return Labels(names, [places[str(value)] for value in values])
    numbers = [value for value in values if isinstance(value, int)]
    limit = len(classes) or MAX_CLASSES
    odd = next((i for i, number in enumerate(numbers) if not 0 <= number < limit), None)
    if odd is not None:
        reason = "test splits often have no labels" if numbers[odd] == -1 else f"classes are 0 to {limit - 1:,}"
        raise ValueError(f"the label of image {odd} is {numbers[odd]}; {reason}")
    return Labels([*classes] or [*map(str, range(max(numbers, default=-1) + 1))], numbers)
