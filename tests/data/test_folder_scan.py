"""Folders and files as people have them: what is seen, what is left out with a word, what is refused."""

import errno
import io
import itertools
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, PngImagePlugin
from torchvision.datasets import ImageFolder as TorchvisionFolder

from data.folder_scan import scan
from data.image_folder import ImageFolder, UnreadableImageError, center_crop, check_size, decode_image
from runtime.errors import RankError, UserError, error_prefix
from tests import runs
from training.trainer import batches

PICTURE = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.save(path, "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("b/2.png", "b/10.png", "a/x.JPG", "a/deep/er/1.webp", "a/deep/0.jpeg", "c/z.tif", "a/a b.bmp"):
        put(tmp_path / name)
    return tmp_path


def test_order_and_labels_are_torchvisions(root: Path) -> None:
    assert scan(root) == (TorchvisionFolder(str(root)).classes, TorchvisionFolder(str(root)).samples)


@pytest.mark.parametrize("name", [".ipynb_checkpoints/a.png", "__MACOSX/a/b.png", "@eaDir/x.png", ".git/1.png"])
def test_folders_that_programs_add_are_no_classes(root: Path, name: str) -> None:
    before = scan(root)
    put(root / name)
    assert scan(root) == before


@pytest.mark.parametrize(
    "name", ["a/._x.jpg", "a/.DS_Store", "b/.thumb.png", "a/@eaDir/x.png", "c/Thumbs.db", "a/notes.txt"]
)
def test_files_that_programs_add_are_no_images(root: Path, name: str) -> None:
    before = scan(root)
    put(root / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan(root) == before


def test_other_images_are_left_out_with_a_word(root: Path) -> None:
    before = scan(root)
    for name in ("a/1.gif", "b/2.gif", "c/3.avif", "c/4.HEIC", "a/5.jp2", "a/6.eps"):
        put(root / name)
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    message = "left out 1 .avif, 1 .eps, 2 .gif, 1 .heic, 1 .jp2, 1 links to missing files; JPEG, PNG, WebP, BMP"
    with pytest.warns(UserWarning, match=message):
        assert scan(root) == before


def test_images_under_unusual_names_are_left_out_with_a_word(root: Path) -> None:
    before = scan(root)
    for name in ("a/1.dib", "a/2.PCX", "b/3.dib", "b/deep/4", "c/IMG_0005", "c/6.", "c/.hidden"):
        put(root / name)
    with pytest.warns(
        UserWarning, match=r"left out 2 \.dib, 1 \.pcx, 3 without an extension; JPEG, PNG, WebP, BMP"
    ) as found:
        assert scan(root) == before
    assert len(found) == 1


def test_a_class_of_files_without_an_extension_says_so(root: Path) -> None:
    put(root / "d" / "picture")
    with pytest.raises(ValueError, match="the class folder d has no image; it has 1 without an extension; remove"):
        scan(root)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


INSIDE = ("a/loop", "a/deep/loop", "a/deep/er/loop")


@pytest.mark.parametrize(
    ("place", "up"), [*itertools.product(INSIDE, ("a", ".", "..")), ("loop", "."), ("loop", ".."), ("z", "../..")]
)
def test_a_link_to_a_folder_that_holds_it_is_not_followed(root: Path, place: str, up: str) -> None:
    before = scan(root)
    link(root / place, root / up)
    with pytest.warns(
        UserWarning, match=rf"left out 1 links to folders that hold them \(the first is {place}\);"
    ) as found:
        assert scan(root) == before
    assert len(found) == 1


def test_links_between_folders_are_followed_once_around(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    put(outside / "more" / "3.png")
    for place, target in (("a/to_b", root / "b"), ("b/to_a", root / "a"), ("c/out", outside), ("d", root / "c")):
        link(root / place, target)
    link(outside / "back", root / "c")
    link(outside / "more" / "up", outside)
    with pytest.warns(UserWarning, match=r"left out 6 links to folders that hold them \(the first is a/to_b/to_a\);"):
        classes, samples = scan(root)
    assert classes == [*"abcd"]
    relative = [Path(path).relative_to(root).as_posix() for path, _ in samples]
    assert [path for path in relative if "to_" in path or "out" in path] == [
        "a/to_b/10.png", "a/to_b/2.png", "b/to_a/a b.bmp", "b/to_a/x.JPG", "b/to_a/deep/0.jpeg",
        "b/to_a/deep/er/1.webp", "c/out/more/3.png", "d/out/more/3.png",
    ]  # fmt: skip


def test_two_links_to_one_folder_count_twice_as_in_torchvision(root: Path) -> None:
    for place in ("b/copy", "b/deep/copy"):
        link(root / place, root / "a")
    assert scan(root) == (TorchvisionFolder(str(root)).classes, TorchvisionFolder(str(root)).samples)


def test_links_that_multiply_are_refused(root: Path) -> None:
    for here in range(9):
        for there in range(9):
            if here != there:
                link(root / "a" / str(here) / str(there), root / "a" / str(there))
    with pytest.raises(ValueError, match=f"{root}/a: its links lead to the same folders more than 10,000 times$"):
        scan(root)


@pytest.mark.parametrize(
    ("place", "reason"), [("a/x.png", "1 links to missing files"), ("a/x", "1 without an ext"), ("x", "")]
)
def test_links_to_themselves_are_left_out(root: Path, place: str, reason: str) -> None:
    before = scan(root)
    (root / place).symlink_to(root / place)
    with warnings.catch_warnings(record=True) as found:
        assert scan(root) == before
    assert [reason in str(each.message) for each in found] == [True] * bool(reason)


def test_pipes_and_devices_are_left_out(root: Path) -> None:
    """Reading one would wait for ever."""
    before = scan(root)
    os.mkfifo(root / "a" / "pipe.png")
    os.mkfifo(root / "a" / "pipe")
    (root / "b" / "zero.jpg").symlink_to("/dev/zero")
    with pytest.warns(UserWarning, match="left out 2 pipes or devices, 1 without an extension; JPEG, PNG"):
        assert scan(root) == before


def test_a_folder_that_may_not_be_read_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with (
        pytest.raises(UserError, match=f"^--data-path: {root}/a/deep: Permission denied$"),
        error_prefix("--data-path"),
    ):
        ImageFolder(root, 8)


def test_jfif_is_jpeg(root: Path) -> None:
    PICTURE.save(root / "a" / "w.jpg")
    (root / "a" / "w.jpg").rename(root / "a" / "w.jfif")
    assert len(ImageFolder(root, 8)) == len(scan(root).samples) == 8


@pytest.mark.parametrize("splits", [("train", "val"), ("Train", "Test"), ("train", "valid", "test"), ("validation",)])
def test_splits_are_no_classes(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        put(tmp_path / split / "cat" / "0.png")
    with pytest.raises(ValueError, match=f"holds the splits .*, not classes; give {tmp_path / splits[0]}"):
        ImageFolder(tmp_path, 8)


def test_an_empty_class_is_named_with_what_it_holds(root: Path) -> None:
    (root / "d").mkdir()
    with pytest.raises(ValueError, match="the class folder d has no image; remove it"):
        ImageFolder(root, 8)
    put(root / "d" / "0.gif")
    with pytest.raises(ValueError, match="the class folder d has no image; it has 1 .gif"):
        ImageFolder(root, 8)


def test_numbers_as_class_names_are_said_to_sort_as_text(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        put(tmp_path / name / "0.png")
    with pytest.warns(UserWarning, match="sorted as text: 1, 10, 2, ..."):
        assert scan(tmp_path).classes == ["1", "10", "2"]
    shutil.rmtree(tmp_path / "10")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan(tmp_path).classes == ["1", "2"]


# ----------------------------------------------------------------------------------------------------------------------
# Hostile and odd images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(touch /tmp/x) run\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("content", [EPS, b"%PDF-1.4\n", b"\x00\x00\x01\x00\x01\x00", b"<svg xmlns='x'/>", b"GIF89"])
def test_formats_that_start_programs_are_not_opened(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **_: started.append(args))
    with pytest.raises(UnreadableImageError, match="cannot be read"):
        decode_image(content, 3)
    assert not started


def encoded(size: tuple[int, int], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, 7).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1010, 10), (3, 301)])
def test_threads_are_named_as_unreadable(size: tuple[int, int]) -> None:
    with pytest.raises(UnreadableImageError, match=f"{size[0]} x {size[1]} pixels; a side may be at most 100 times"):
        decode_image(encoded(size), 3)


def test_many_megapixels_have_a_stated_limit() -> None:
    with pytest.raises(UnreadableImageError, match="20000 x 10001 pixels; at most 200 million are read"):
        decode_image(encoded((20_000, 10_001)), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded((12_000, 9_000)), 1).size == (12_000, 9_000)  # Pillow warns of 89 million


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "BMP"])
def test_the_limit_of_pixels_holds_in_every_format(kind: str) -> None:
    assert decode_image(encoded((13_400, 13_400), kind), 1).size == (13_400, 13_400)
    with (
        pytest.raises(UnreadableImageError, match="at most 200 million are read"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        decode_image(encoded((20_000, 10_001), kind), 1)


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("add", [PngImagePlugin.PngInfo.add_text, PngImagePlugin.PngInfo.add_itxt])
def test_a_png_with_a_long_text_is_read(add: Any, is_compressed: bool) -> None:
    text = PngImagePlugin.PngInfo()
    add(text, "workflow", "x" * 3_000_000, zip=is_compressed)
    assert decode_image(encoded((8, 8), pnginfo=text), 3).size == (8, 8)


@pytest.mark.parametrize(("length", "count"), [(20_000_000, 1), (3_000_000, 30)])
def test_a_text_that_swells_is_not_decompressed(length: int, count: int) -> None:
    text = PngImagePlugin.PngInfo()
    for i in range(count):
        text.add_text(f"{i}", "x" * length, zip=True)
    with pytest.raises(UnreadableImageError, match="cannot be read: .*MAX_TEXT_"):
        decode_image(encoded((8, 8), pnginfo=text), 3)


def adm_crop(image: Image.Image, size: int, *, rows_first: bool = False) -> npt.NDArray[np.uint8]:
    """The crop of guided-diffusion's image_datasets.py, in calls of PIL.

    Releases of Pillow choose whether rows or columns are resized first, and round in between; the older ones took rows.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    whole = round(image.width * scale), round(image.height * scale)
    for stage in ((whole[0], image.height), whole) if rows_first else (whole,):
        image = image.resize(stage, resample=Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def odd(rng: random.Random, low: float, high: float) -> int:
    return round(rng.uniform(low, high)) // 2 * 2 + 1


@pytest.mark.parametrize("seed", range(12))
def test_long_images_are_cropped_as_by_adm(seed: int) -> None:
    rng = random.Random(seed)
    for low, high in (4, 15), (20, 99):
        size, short = rng.choice((8, 15, 32)), odd(rng, 3, 90)
        sides = short, odd(rng, short * low, short * high)
        pixels = np.random.default_rng(seed).integers(0, 256, (*sides, 3), np.uint8)
        for shown in pixels, pixels.swapaxes(0, 1).copy():
            check_size(*shown.shape[:2])
            image = Image.fromarray(shown)
            expected = adm_crop(image, size, rows_first=high == 99)
            off = np.abs(np.asarray(center_crop(image, size)).astype(int) - expected)
            # Where only a part is resized, one level in one of a thousand numbers; ordinary images keep their bits
            assert off.max() <= (high == 99) and np.count_nonzero(off) <= 0.002 * off.size, (image.size, size)


# ----------------------------------------------------------------------------------------------------------------------
# In a run


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["damaged", "deleted"])
def test_strict_runs_and_lost_files_end_in_one_line(root: Path, workers: int, fault: str) -> None:
    argv = "--vae none --model DiT-debug/2 --num-classes 3 --image-size 8 --device cpu --strict --max-steps 2"
    given = [*argv.split(), "--global-batch-size", 7, "--num-workers", workers, "--data-path", root]
    setup = runs.open_setup(*given)
    if fault == "damaged":
        (root / "b" / "2.png").write_bytes(b"nothing")
    else:
        (root / "b" / "2.png").unlink()
    with pytest.raises(RankError, match="--data-path: .*2.png") as error:
        next(batches(setup, runs.CPU, 0))
    assert "\n" not in str(error.value)


def test_images_without_class_folders_name_the_folder_above(root: Path) -> None:
    with pytest.raises(ValueError, match=f"b: holds images, and no class folders .* give the folder above, {root}, or"):
        scan(root / "b")
