"""Text files of images that follow clips in joint training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_dataset
from data.clip_folder import ClipFolder
from data.clip_settings import ClipSettings
from data.image_folder import UnreadableImageError
from data.image_list import ImageList
from tests.runs import start, the_error
from tests.video_files import write_frames

# A published name, a folder of a class, and a class that is not in the second word alone
NAMES = ("v_dog_g01_c01_0001.png", "cat/x_1.png", "frames/dog/dog_2.png", "other_cat_3.png")
LEVELS = (200, 210, 220, 230)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name, first in (("cat/a", 0), ("dog/b", 20)):
        write_frames(tmp_path / "videos" / name, range(first, first + 8), size=(10, 12))
    return tmp_path / "videos"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list whose images have a white left half, so that mirroring would be seen."""
    for name, level in zip(NAMES, LEVELS, strict=True):
        path = tmp_path / "stills" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), level, np.uint8)
        pixels[:, :4] = 255
        Image.fromarray(pixels).save(path)
    (tmp_path / "stills/list.txt").write_bytes("\r\n".join(NAMES).encode())
    return tmp_path / "stills/list.txt"


def opened(path: Path, classes: tuple[str, ...] = ("cat", "dog"), *, strict: bool = False) -> ImageList:
    return ImageList(path, classes, (8, 8), crop="adm", channels=3, strict=strict)


def test_lines_are_paths_and_name_their_classes(listed: Path) -> None:
    images = opened(listed)
    assert len(images) == 4 and [images.file(i) for i in range(4)] == [listed.parent / name for name in NAMES]
    assert [images.label(i) for i in range(4)] == [1, 0, 1, 0]
    for index, level in enumerate(LEVELS):
        image = images.read(index)
        assert image is not None and image.shape == (3, 8, 8)
        assert (image[:, :, :4] == 255).all() and (image[:, :, 4:] == level).all(), "of the right size, they stay"
    assert [opened(listed, ()).label(i) for i in range(4)] == [0] * 4
    resized = ImageList(listed, (), (8, 8), crop="resize", channels=1, strict=False).read(0)
    assert resized is not None and resized.dtype == torch.float32 and resized.shape == (1, 8, 8)
    torch.testing.assert_close(resized[0, 0, 7], torch.tensor(200 / 127.5 - 1))


def test_listed_images_follow_clips_with_their_labels_and_are_not_mirrored(videos: Path, listed: Path) -> None:
    data = open_dataset("videofolder", videos, 8, 3, frames=3, joint_images=5, joint_list=listed)
    assert isinstance(data, ClipFolder) and data.image_shape == (8, 3, 8, 8)
    seen = set()
    for epoch in range(12):
        rows, labels, _ = data[epoch, 1]
        assert isinstance(labels, dict) and labels["y"] == 1 and (rows[3:, :, :, :4] == 255).all()
        found = [(int(image[0, 0, 7]), label) for image, label in zip(rows[3:], labels["image_labels"], strict=True)]
        seen |= {(level, int(label)) for level, label in found}
        assert torch.equal(rows, data[epoch, 1][0])
    assert seen == {(200, 1), (210, 0), (220, 1), (230, 0)}
    plain = open_dataset("videofolder", videos, 8, 3, frames=3, joint_images=5)
    digest = data.digest()
    listed.write_text("\n".join(NAMES[:2]))
    again = open_dataset("videofolder", videos, 8, 3, frames=3, joint_images=5, joint_list=listed)
    assert len({plain.digest(), digest, again.digest()}) == 3, "another list is other data"


def test_damaged_images_are_named_once_and_replaced(videos: Path, listed: Path) -> None:
    (listed.parent / NAMES[1]).write_bytes(b"damaged")
    (listed.parent / NAMES[2]).unlink()
    data = ClipFolder(videos, 8, frames=3, settings=ClipSettings(), joint_images=6, joint_list=listed)
    with pytest.warns(UserWarning) as caught:
        rows = [data[epoch, 0][0] for epoch in range(6)]
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2 and "cat/x_1.png: cannot be read: not an image of a known format" in messages[0]
    assert "dog_2.png: cannot be read: No such file or directory; replace the file, or take its line" in messages[1]
    assert {int(image[0, 0, 7]) for row in rows for image in row[3:]} == {200, 230}
    with pytest.raises(UnreadableImageError, match=r"x_1\.png: cannot be read"):
        opened(listed, strict=True).read(1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("v_bird_1.png", "v_bird_1.png: no folder of it, and not the second word of its name, is a class"),
        ("cat/none.png", "no file .*cat/none.png; paths are relative to the list's folder"),
        ("\n \n", "names no image; give a path a line"),
        (None, r"--joint-image-list .*list.txt: cannot be read \(No such file or directory\)"),
    ],
)
def test_what_does_not_fit_is_named(content: str | None, words: str, listed: Path) -> None:
    listed.unlink() if content is None else listed.write_text(content)
    with pytest.raises(ValueError, match=words):
        opened(listed)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dataset videofolder", "--joint-image-list {list}: needs --dataset videofolder and --joint-images"),
        ("--dataset latents --joint-images 2", "--joint-image-list {list}: needs --dataset videofolder"),
        ("--dataset videofolder --joint-images 2", "--joint-image-list {list}: v_bird_1.png: no folder of it"),
    ],
)
def test_a_run_says_so_before_it_starts(
    argv: str, words: str, videos: Path, listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed.write_text("v_bird_1.png")
    flags = ["--model", "Latte-debug/2", *argv.split(), "--data-path", videos, "--joint-image-list", listed]
    flags += "--vae none --image-size 8 --num-frames 4 --global-batch-size 2 --device cpu".split()
    assert start(tmp_path, *flags) == 2
    assert words.format(list=listed) in the_error(capsys)
