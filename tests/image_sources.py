"""The same images as a folder, as shards and as tables, for tests that must not see a difference."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.image_folder import ImageFolder

SOURCES = ("webdataset", "saved", "parquet", "arrow")  # other forms than a folder; all but the first are tables
CLASSES = ("ant", "bee", "cat")


def write_images(root: Path, count: int = 3) -> Path:
    """Write an image folder with three classes of so many images."""
    rng = np.random.default_rng(0)
    for name in (f"{label}/{i}.png" for label in CLASSES for i in range(count)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / name)
    return root


def encoded(size: tuple[int, int] = (8, 8), value: int = 100) -> bytes:
    """A PNG file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar file of named contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def table(rows: Sequence[bytes | None], labels: Sequence[object], names: Sequence[str] | None = None) -> Any:
    """A `datasets.Dataset` with the columns image and label, of class names if there are any; skips without it."""
    datasets = pytest.importorskip("datasets")
    label = datasets.Value("string" if isinstance(labels[0], str) else "int64")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names)) if names else label}
    cells = [{"bytes": content, "path": None} for content in rows]
    columns = {"image": cells, "label": list(labels)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def convert(folder: Path, source: str, output: Path) -> dict[str, Any]:
    """Write the images of a folder as another source; returns arguments of `open_dataset` (`name`, `path`)."""
    data = ImageFolder(folder, 8)
    contents = [data.content(i) for i in range(len(data))]
    if source == "webdataset":
        half = len(data) // 2
        for number, part in enumerate((range(half), range(half, len(data)))):
            members = [
                (f"{i:03d}.{kind}", content)
                for i in part
                for kind, content in (
                    ("json", json.dumps({"label": data.classes[data.label(i)]}).encode()),
                    ("png", contents[i]),
                )
            ]
            write_tar(output / f"{number}.tar", members)
        return {"name": "webdataset", "path": output}
    rows = table(contents, [data.label(i) for i in range(len(data))], data.classes)
    output.mkdir(parents=True, exist_ok=True)
    if source == "saved":
        rows.save_to_disk(str(output))
    elif source == "parquet":
        rows.to_parquet(str(output / "train-00000-of-00001.parquet"))
    else:
        rows.save_to_disk(str(output))
        (output / "state.json").unlink()
        (output / "dataset_info.json").unlink()
    return {"name": "huggingface", "path": output}


def as_flags(source: Mapping[str, Any]) -> list[str]:
    """The same as flags of train.py and extract_latents.py."""
    return ["--dataset", source["name"], "--data-path", str(source["path"])]


@pytest.fixture(autouse=True)
def table_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets`, if it is installed, keep its cache in a temporary folder."""
    try:
        import datasets
    except ImportError:
        return
    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # of other processes
