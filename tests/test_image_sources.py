"""Shards and tables of images are what an image folder of the same images is: items, order, training, latents."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import open_dataset
from data.image_folder import ImageFolder, UnreadableImageError
from data.latents import LatentShards
from runtime.errors import run
from scripts import extract_latents
from tests import runs
from tests.image_sources import SOURCES, as_flags, convert, table_cache, write_images  # noqa: F401  (a fixture)
from tests.networks import small_autoencoder
from tests.processes import run_ranks

TRAIN = "--vae none --image-size 8 --model DiT-debug/2 --num-classes 3 --global-batch-size 4 --device cpu".split()
TRAIN += "--log-every 1 --ckpt-every 2 --num-workers 0".split()


@pytest.fixture(params=SOURCES)
def source(request: Any) -> str:
    if request.param != "webdataset":
        pytest.importorskip("datasets")
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "folder")


def test_items_are_those_of_the_folder(source: str, folder: Path, tmp_path: Path) -> None:
    one, other = ImageFolder(folder, 16, seed=3), convert(folder, source, tmp_path / "other")
    data = open_dataset(**other, image_size=16, channels=3, seed=3)
    assert (data.classes, data.image_shape, len(data)) == (one.classes, one.image_shape, len(one)) and data.vae == "ema"
    for key in ((epoch, index) for epoch in range(3) for index in range(len(one))):
        (ours, *facts), (expected, *expected_facts) = data[key], one[key]
        assert torch.equal(ours, expected) and facts == expected_facts
    grey = open_dataset(**other, image_size=(4, 6), channels=1, flip=False)
    assert torch.equal(grey[0, 2][0], ImageFolder(folder, (4, 6), channels=1, flip=False)[0, 2][0])


def test_loader_processes_read_the_same(source: str, folder: Path, tmp_path: Path) -> None:
    data = open_dataset(**convert(folder, source, tmp_path / "other"), image_size=8, channels=3)
    keys = [[(epoch, index) for index in range(9)] for epoch in range(2)]
    for (images, labels, indices), wanted in zip(
        DataLoader(data, batch_sampler=keys, num_workers=2), keys, strict=True
    ):
        assert torch.equal(images, torch.stack([data[key][0] for key in wanted]))
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and indices.tolist() == [*range(9)]


def test_a_damaged_image_is_named_once_and_replaced(source: str, folder: Path, tmp_path: Path) -> None:
    (folder / "ant/1.png").write_bytes((folder / "ant/1.png").read_bytes()[:200])
    (folder / "cat/2.png").write_bytes(b"")
    other = convert(folder, source, tmp_path / "other")
    data = open_dataset(**other, image_size=8, channels=3, flip=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index, substitute in ((1, 2), (8, 0), (1, 2)):
            assert torch.equal(data[0, index][0], data[0, substitute][0]) and data[0, index][2] == substitute
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and "the file is empty" in texts[1] and "\n" not in "".join(texts)
    assert all(name in text for name, text in zip(data.unreadable, texts, strict=True))
    assert all(text.startswith(str(other["path"])) and "replace or remove" in text for text in texts)
    with pytest.raises(UnreadableImageError, match="replace or remove"):
        open_dataset(**other, image_size=8, channels=3, strict=True)[0, 1]


def test_the_digest_is_that_of_images_and_labels(source: str, folder: Path, tmp_path: Path) -> None:
    digests = [digest(convert(folder, source, tmp_path / "a")), digest(convert(folder, source, tmp_path / "b"))]
    assert digests[0] == digests[1], "the same on another machine"
    with (folder / "bee/0.png").open("ab") as file:
        file.write(b"0")
    digests.append(digest(convert(folder, source, tmp_path / "c")))
    (folder / "bee/2.png").rename(folder / "ant/3.png")
    digests.append(digest(convert(folder, source, tmp_path / "d")))
    assert len({*digests}) == 3 and digests[0].partition(" ")[0] == digests[2].partition(" ")[0]


def digest(source: dict[str, Any]) -> str:
    return open_dataset(**source, image_size=8, channels=3).digest()


def test_training_is_that_on_the_folder_and_is_resumed_bit_by_bit(source: str, folder: Path, tmp_path: Path) -> None:
    other = as_flags(convert(folder, source, tmp_path / "other"))
    assert runs.start(tmp_path / "a", *TRAIN, "--data-path", folder, "--max-steps", 4) == 0
    assert runs.start(tmp_path / "b", *TRAIN, *other, "--max-steps", 2) == 0
    assert runs.start(tmp_path / "b", *TRAIN, *other, "--max-steps", 4, "--resume", "auto") == 0
    runs.assert_same(runs.state(runs.checkpoint(tmp_path / "a", 4)), runs.state(runs.checkpoint(tmp_path / "b", 4)))
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b") and len(runs.losses(tmp_path / "a")) == 4


@pytest.mark.slow
def test_two_ranks_read_what_one_does(source: str, folder: Path, tmp_path: Path) -> None:
    other = as_flags(convert(folder, source, tmp_path / "other"))
    assert runs.start(tmp_path / "a", *TRAIN, *other, "--max-steps", 3) == 0
    argv = [*TRAIN, *other, "--max-steps", "3", "--results-dir", str(tmp_path / "b")]
    done = run_ranks("train.py", *argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = runs.losses(tmp_path / "a"), runs.losses(tmp_path / "b")
    assert [*two.values()] == pytest.approx([*one.values()], rel=1e-5)


def test_a_run_is_not_resumed_with_other_classes(
    source: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = as_flags(convert(folder, source, tmp_path / "first"))
    assert runs.start(tmp_path / "a", *TRAIN, *first, "--max-steps", 1) == 0
    (folder / "bee").rename(folder / "dog")
    second = as_flags(convert(folder, source, tmp_path / "second"))
    capsys.readouterr()
    assert runs.start(tmp_path / "a", *TRAIN, *second, "--max-steps", 2, "--resume", "auto") == 2
    assert "class 1 was 'bee' and is 'cat' in the data" in capsys.readouterr().err


def test_latents_are_those_of_the_folder(source: str, folder: Path, tmp_path: Path) -> None:
    small_autoencoder(tmp_path / "vae")
    shutil.rmtree(folder / "cat")
    (folder / "ant/0.png").write_bytes(b"damaged")
    flags = f"--vae {tmp_path / 'vae'} --image-size 16 --batch-size 2 --shard-size 4 --num-workers 0 --device cpu"
    sources = {"a": ["--data-path", str(folder)], "b": as_flags(convert(folder, source, tmp_path / "other"))}
    for name, argv in sources.items():
        output = ["--output", str(tmp_path / name)]
        assert run(extract_latents.main, "extract_latents.py", [*argv, *flags.split(), *output]) == 0
    one, two = LatentShards(tmp_path / "a"), LatentShards(tmp_path / "b")
    assert one.classes == two.classes == ["ant", "bee"] and len(one) == len(two) == 5
    keys = [(0, i) for i in range(5)]
    for ours, expected in zip(two.gather(keys), one.gather(keys), strict=True):
        assert torch.equal(ours, expected)
    assert all(np.array_equal(a, b) for a, b in zip(one.shards, two.shards, strict=True))


def test_settings_of_columns_belong_to_tables_and_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.start(tmp_path, *TRAIN, "--data-path", folder, "--label-column", "x", "--max-steps", 1) == 2
    words = "--label-column x: has no effect without --dataset huggingface or webdataset"
    assert words in runs.the_error(capsys)
    argv = ["--data-path", str(folder), "--split", "train", "--output", str(tmp_path / "latents")]
    assert run(extract_latents.main, "extract_latents.py", argv) == 2
    assert "--split train: has no effect without --dataset huggingface" in capsys.readouterr().err
