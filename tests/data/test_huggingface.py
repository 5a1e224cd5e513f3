import importlib.util
import struct
from pathlib import Path

import pytest

from data import open_dataset
from data.columns import ColumnSettings
from tests.image_sources import encoded, table, table_cache  # noqa: F401  (a fixture)

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra stores")
PNG = encoded()


def opened(path, held_out=False, strict=False, **columns):
    settings = ColumnSettings(**columns)
    return open_dataset("huggingface", path, 8, 3, columns=settings, held_out=held_out, strict=strict)


def save(path, rows, **splits):
    """Save a table, or splits of the first rows of it by name and number."""
    import datasets

    parts = {name: rows.select(range(count)) for name, count in splits.items()}
    (datasets.DatasetDict(parts) if parts else rows).save_to_disk(str(path))
    return path


@needs_datasets
def test_classes_are_those_of_the_column(tmp_path):
    named = table([PNG] * 3, [1, 0, 1], ["zebra", "ant", "unseen"])
    assert opened(save(tmp_path / "named", named)).classes == ["zebra", "ant", "unseen"]
    assert opened(save(tmp_path / "numbers", table([PNG] * 2, [0, 2]))).classes == ["0", "1", "2"]
    names = opened(save(tmp_path / "names", table([PNG] * 2, ["cat", "ant"])))
    assert names.classes == ["ant", "cat"] and [names[0, i][1] for i in range(2)] == [1, 0]
    unlabelled = opened(tmp_path / "named", label_column="none")
    assert unlabelled.classes == [] and unlabelled[0, 1][1] == {} and unlabelled[0, 1][2] == 1


@needs_datasets
def test_columns_are_chosen_by_name(tmp_path):
    rows = table([PNG, PNG], [0, 1]).rename_columns({"image": "picture", "label": "fine"})
    rows = rows.add_column("coarse", ["x", "y"])
    assert opened(save(tmp_path / "a", rows), label_column="coarse").classes == ["x", "y"]
    for columns, message in (
        (
            {},
            r"split train: no column 'label' with labels; --label-column names one of picture, fine, coarse, or none",
        ),
        (
            {"label_column": "fine", "image_column": "image"},
            r"no column of images 'image'; --image-column is one of pic",
        ),
        ({"label_column": "picture"}, "the label of image 0 is {'bytes'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            opened(tmp_path / "a", **columns)
        assert str(error.value).startswith(f"{tmp_path / 'a'}: the split train") and "\n" not in str(error.value)[:200]
    without = rows.remove_columns("picture")
    with pytest.raises(ValueError, match=r"has 0 columns of images; --image-column names one \(none\)"):
        opened(save(tmp_path / "b", without))


@needs_datasets
def test_columns_of_bytes_are_images_too(tmp_path):
    import datasets

    kinds = datasets.Features({"png": datasets.Value("binary"), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"png": [PNG, None], "label": [0, 0]}, features=kinds)
    data = opened(save(tmp_path / "a", rows), strict=True)
    assert data.content(0) == PNG and [*data.sizes()] == [len(PNG), -1]
    with pytest.raises(ValueError, match="a/train/1: cannot be read: the file is empty; replace or remove the row"):
        data[0, 1]


@needs_datasets
def test_images_in_files_of_their_own_are_read_and_devices_are_not(tmp_path):
    import datasets
    import pyarrow.parquet

    (tmp_path / "x.png").write_bytes(PNG)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    paths = [str(tmp_path / "x.png"), "/dev/zero", str(tmp_path / "gone.png")]
    cells = [{"bytes": None, "path": path} for path in paths]
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 0, 0]}, features=kinds)
    (tmp_path / "a").mkdir()
    pyarrow.parquet.write_table(rows.data.table, tmp_path / "a/0.parquet")  # the library would open the files
    data = opened(tmp_path / "a/0.parquet")
    with (
        pytest.warns(UserWarning, match="train/1: cannot be read: the file is empty"),
        pytest.raises(FileNotFoundError, match="gone.png"),
    ):
        data[0, 1]
    assert data.content(0) == PNG and data.unreadable == ["train/1"]


@needs_datasets
def test_limits_of_images_hold(tmp_path):
    bomb = bytearray(PNG)
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    with pytest.raises(ValueError, match="train/0: cannot be read: "):
        opened(save(tmp_path / "a", table([bytes(bomb)], [0])), strict=True)[0, 0]


@needs_datasets
def test_splits_are_chosen_by_name(tmp_path):
    rows = table([PNG] * 4, [0] * 4)
    path = save(tmp_path / "a", rows, train=4, test=2, validation=1)
    assert (len(opened(path)), len(opened(path, split="test")), len(opened(path, held_out=True))) == (4, 2, 1)
    assert len(opened(save(tmp_path / "b", rows, other=3))) == len(opened(tmp_path / "b", held_out=True)) == 3
    with pytest.raises(ValueError, match="a: no split 'x'; --split names one of test, train, validation"):
        opened(path, split="x")
    save(tmp_path / "c", rows, a=1, b=1)
    with pytest.raises(ValueError, match="no split 'validation', and several others; --eval-split names one of a, b"):
        opened(tmp_path / "c", held_out=True)


@needs_datasets
def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "0.parquet").write_bytes(b"PAR1 something else")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "0.parquet", tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"^{path}: cannot be loaded") as error:
            opened(path)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "nowhere", Path("no/such/folder"), Path("~/x")):
        with pytest.raises(ValueError, match="no such file or folder"):
            opened(path)

    def offline(name, **_):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"without network download it and give its folder \(Couldn't reach 'a/b' on"):
        opened(Path("a/b"))


@needs_datasets
def test_a_name_on_the_hub_is_left_to_the_library(monkeypatch):
    import datasets

    rows, asked = table([PNG] * 2, [0, 1], ["ant", "bee"]), []

    def stand_in(name, **_):
        asked.append(name)
        return datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    data = opened(Path("someone/insects"))
    assert asked == ["someone/insects"] and data.classes == ["ant", "bee"] and data.path(1) == "train/1"
    rows = rows.select([])
    with pytest.raises(ValueError, match="^insects: the split train is empty$"):
        opened(Path("insects"))


def test_the_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data.huggingface.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tables need the package datasets, which is missing: pip install datasets"):
        opened(tmp_path)
