"""Tables of images of Hugging Face `datasets` as a data set: saved to disk, Parquet or Arrow files, or from the hub.

The library, an extra, maps Arrow files into memory; other files, and those of the hub, it prepares in its cache first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from data.columns import LABEL, NONE, Labels, labels_of
from data.dataset import DatasetSettings
from data.folder_scan import warn_of_numbers
from data.image_folder import EncodedImages
from runtime.download import why_not_loaded

if TYPE_CHECKING:
    from datasets import Dataset

HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")  # name of a data set on the hub
FORMATS = {".parquet": "parquet", ".arrow": "arrow"}  # of single files
HELD_OUT = ("validation", "val", "valid", "test")  # splits that are held out, the first that is there
_ROWS_AT_A_TIME = 10_000


def open_huggingface(settings: DatasetSettings) -> TableImages:
    """Open a table, by default with crops of 256 x 256 pixels, mirrored at random.

    The path is a folder of `save_to_disk`, a folder of Parquet or Arrow files, one of these, or a name on the hub.

    Raises:
        ValueError: Naming what is missing: the library, the data, the split, the column of images or of labels.
    """
    path = settings.require_path("a folder of tables, or name on the hub,")
    if find_spec("datasets") is None:
        raise ValueError("tables need the package datasets, which is missing: pip install datasets")
    split, table = _choose_split(path, load_splits(path), settings.columns.split, settings.held_out)
    where = f"{path}: the split {split}"
    if not len(table):
        raise ValueError(f"{where} is empty")
    image = _image_column(where, table, settings.columns.image_column)
    try:
        labels = _read_labels(table, settings.columns.label_column or LABEL)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    warn_of_numbers(path, labels.classes)
    return TableImages(path, split, table, image, labels, settings)


def load_splits(path: Path) -> dict[str, Dataset]:
    """Tables by split; a single table has the split "train".

    Raises:
        ValueError: In one line, if there are none, or the library cannot load them.
    """
    import datasets  # heavy, and only tables need it

    if not path.exists() and (path.is_absolute() or not HUB.fullmatch(str(path))):
        raise ValueError(f"{path}: no such file or folder")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix in FORMATS:
            loaded = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except MemoryError:
        raise
    except Exception as error:  # the library's, Arrow's and the hub's client's
        source = str(path.parent if path.is_file() else path)
        raise ValueError(f"{path}: cannot be loaded{why_not_loaded(source, error)}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _choose_split(path: Path, splits: dict[str, Dataset], wanted: str | None, held_out: bool) -> tuple[str, Dataset]:
    """Name and table of the split that is meant; a ValueError if it is not there, or not clear."""
    flag = "--eval-split" if held_out else "--split"
    names = HELD_OUT if held_out else ("train",)
    name = wanted or next((each for each in names if each in splits), None)
    if name is None and len(splits) == 1:
        (name,) = splits
    if name not in splits:
        missing = f"no split {name!r}" if name else f"no split {names[0]!r}, and several others"
        raise ValueError(f"{path}: {missing}; {flag} names one of {', '.join(sorted(splits))}")
    return name, splits[name]


def _image_column(where: str, table: Dataset, wanted: str | None) -> str:
    """The column of images: of type Image, or with bytes."""
    import datasets

    found = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or getattr(feature, "dtype", None) in ("binary", "large_binary")
    ]
    if wanted is not None and wanted not in found:
        raise ValueError(f"{where} has no column of images {wanted!r}; --image-column is one of {_listed(found)}")
    if wanted is None and len(found) != 1:
        raise ValueError(f"{where} has {len(found)} columns of images; --image-column names one ({_listed(found)})")
    return wanted or found[0]


def _read_labels(table: Dataset, column: str) -> Labels:
    """Classes and labels of a table; a ValueError without the column."""
    import datasets

    if column == NONE:
        return Labels([], [])
    if column not in table.column_names:
        raise ValueError(
            f"no column {column!r} with labels; --label-column names one of {_listed(table.column_names)}, or {NONE}"
        )
    feature = table.features[column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else []
    parts = table.select_columns([column]).with_format("arrow").iter(_ROWS_AT_A_TIME)
    return labels_of([value for part in parts for value in part[column].to_pylist()], names)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


class TableImages(EncodedImages):
    """The images of a table, in the order of its rows.

    Args:
        root: Path or name of the data.
        split: Name of the table's split.
        table: The table.
        column: Column of images.
        labels: Classes and labels of all rows.
        settings: Settings of the data set.
    """

    remedy = "replace or remove the row"

    def __init__(
        self, root: Path, split: str, table: Dataset, column: str, labels: Labels, settings: DatasetSettings
    ) -> None:
        import datasets

        super().__init__(root, labels.classes, len(table), settings, settings.size or (256, 256))
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))  # decoded here, within our limits
        self._split, self._column, self._labels = split, column, labels.values
        self._table = table.select_columns([column])

    def content(self, index: int) -> bytes:
        """Bytes of an image in its row, or in the file that it names; none for an empty row."""
        cell = self._table[index][self._column]
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is None and path and (not Path(path).exists() or Path(path).is_file()):  # a device never ends
            return Path(path).read_bytes()
        return content or b""

    def path(self, index: int) -> str:
        """Split and number of a row: "train/17"."""
        return f"{self._split}/{index}"

    def label(self, index: int) -> int:
        """Label of an image; 0 without classes."""
        return self._labels[index] if self._labels else 0

    def sizes(self) -> Iterator[int]:
        """Sizes of all images in bytes, in their order; -1 for one that is in another file, or missing."""
        import pyarrow.compute as pc

        for part in self._table.with_format("arrow").iter(_ROWS_AT_A_TIME):
            column = part[self._column]
            content = pc.struct_field(column, "bytes") if hasattr(column.type, "fields") else column
            yield from (-1 if size is None else size for size in pc.binary_length(content).to_pylist())
