import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader

from data import open_dataset
from data.array_images import ArrayImages
from data.digits import load_digits
from data.image_folder import ImageFolder, UnreadableImageError, center_crop, decode_image
from tests import golden_data
from tests.processes import ROOT


@pytest.mark.parametrize("size", [(6, 10), (10, 6), (24, 5), (5, 24)])
def test_crops_need_not_be_square(size):
    pixels = np.arange(24 * 20, dtype=np.uint8).reshape(24, 20)
    image = np.array(center_crop(Image.fromarray(pixels), size))
    assert image.shape == size
    flat = Image.fromarray(np.repeat(np.linspace(0, 250, 20)[None], 24, axis=0).round().astype(np.uint8))
    columns = np.array(center_crop(flat, size)).astype(int)[0]
    assert (np.diff(columns) >= 0).all() and abs(columns[0] + columns[-1] - 250) <= 14, "the centre is kept to a pixel"


def test_center_crop_matches_the_recorded_crops():
    arrays = golden_data.arrays("dit/center_crop")
    names = [name for name in arrays if name.startswith("in_")]
    assert len(names) == 7
    for name in names:
        size = int(name.rsplit("to", 1)[1])
        cropped = center_crop(Image.fromarray(arrays[name].numpy()), size)
        assert np.array_equal(np.array(cropped), arrays[name.replace("in_", "out_")].numpy()), name


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for label, count in (("cat", 3), ("ant", 2)):
        (tmp_path / label).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    return tmp_path


def test_classes_are_the_sorted_folder_names(folder):
    data = ImageFolder(folder, 16, flip=False)
    assert data.classes == ["ant", "cat"] and len(data) == 5 and data.image_shape == (3, 16, 16)
    image, label, index = data[0, 4]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and (label, index) == (1, 4)


def test_pixels_are_the_cropped_file_channels_first(folder):
    image, _, _ = ImageFolder(folder, 16, flip=False)[0, 0]
    with Image.open(folder / "ant" / "0.png") as file:
        expected = np.array(center_crop(file.convert("RGB"), 16))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_images_need_not_be_square(folder):
    data = open_dataset("imagefolder", folder, (8, 12), 3, flip=False)
    image = data[0, 4][0]
    assert data.image_shape == image.shape == (3, 8, 12)
    with Image.open(folder / "cat" / "2.png") as file:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(center_crop(file.convert("RGB"), (8, 12))))


def test_grey_has_one_channel(folder):
    assert ImageFolder(folder, 16, channels=1)[0, 0][0].shape == (1, 16, 16)


def test_flips_depend_on_seed_epoch_and_index_alone(folder):
    data, again = (ImageFolder(folder, 16, flip=True, seed=5) for _ in range(2))
    plain = ImageFolder(folder, 16, flip=False)
    flipped = []
    for epoch in range(40):
        for index in range(5):
            image = data[epoch, index][0]
            assert torch.equal(image, again[epoch, index][0])
            still = plain[epoch, index][0]
            flipped.append(not torch.equal(image, still))
            assert torch.equal(image.flip(-1) if flipped[-1] else image, still)
    assert 70 < sum(flipped) < 130


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ImageFolder(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="expected class folders"):
        ImageFolder(tmp_path, 16)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="expected class folders"):
        ImageFolder(tmp_path, 16)


def test_open_dataset_digits_are_not_mirrored():
    data = open_dataset("digits", None, None, 1)
    images, labels = load_digits("train")
    assert isinstance(data, ArrayImages) and len(data) == 1297 and data.image_shape == (1, 8, 8)
    for epoch in range(4):
        image, label, index = data[epoch, 7]
        assert np.array_equal(image[0].numpy(), images[7, :, :, 0]) and (label, index) == (labels[7], 7)


def test_open_dataset_says_what_does_not_fit(folder):
    assert isinstance(open_dataset("imagefolder", folder, 16, 3), ImageFolder)
    with pytest.raises(ValueError, match="8 pixels wide, not 16"):
        open_dataset("digits", None, 16, 1)
    with pytest.raises(ValueError, match="--data-path"):
        open_dataset("imagefolder", None, 16, 3)
    with pytest.raises(ValueError, match="unknown data set"):
        open_dataset("cifar", None, 16, 3)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def decoded(path, channels):
    return np.array(decode_image(path.read_bytes(), channels))


GRADIENT = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)
COLOURS = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], axis=-1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_grey_or_rgb(mode, channels, tmp_path):
    image = Image.fromarray(COLOURS).convert(mode)
    path = save(tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}", image)
    pixels = decoded(path, channels)
    assert np.array_equal(pixels, np.array(image.convert("RGB" if channels == 3 else "L")))
    if mode in ("RGB", "RGBA", "CMYK"):
        assert np.array_equal(pixels, COLOURS if channels == 3 else np.array(Image.fromarray(COLOURS).convert("L")))


def test_a_cmyk_jpeg_shows_its_colours(tmp_path):
    flat = Image.new("RGB", (16, 16), (200, 100, 30))
    pixels = decoded(save(tmp_path / "a.jpg", flat.convert("CMYK"), quality=100), 3)
    assert np.abs(pixels.astype(int) - (200, 100, 30)).max() <= 3


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped_and_colours_stay(tmp_path):
    alpha = Image.fromarray(COLOURS)
    alpha.putalpha(Image.fromarray(GRADIENT))
    assert np.array_equal(decoded(save(tmp_path / "a.png", alpha), 3), COLOURS)
    grey = Image.merge("LA", (Image.fromarray(GRADIENT), Image.fromarray(GRADIENT[::-1])))
    assert np.array_equal(decoded(save(tmp_path / "b.png", grey), 1), GRADIENT)
    palette = Image.fromarray(COLOURS).quantize(16)
    path = save(tmp_path / "c.png", palette, transparency=bytes(range(16)))
    assert np.array_equal(decoded(path, 3), np.array(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_and_not_clipped(suffix, channels, tmp_path):
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(levels))
    pixels = decoded(path, channels)
    assert pixels.reshape(6, -1)[:, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_cameras_are_set_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS), exif=exif)
    with Image.open(path) as file:
        expected = np.array(ImageOps.exif_transpose(file))
    assert np.array_equal(decoded(path, 3), expected)
    assert (expected.shape == (16, 12, 3)) == (orientation > 4)


def test_damaged_exif_does_not_damage_the_pixels(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS), exif=b"Exif\0\0no header at all")
    assert np.array_equal(decoded(path, 3), COLOURS)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_tiny_images_are_enlarged(shape, tmp_path):
    save(tmp_path / "a" / "0.png", Image.fromarray(np.full((*shape, 3), 77, dtype=np.uint8)))
    image, _, _ = ImageFolder(tmp_path, 16, flip=False)[0, 0]
    assert image.shape == (3, 16, 16) and (image == 77).all()


@pytest.fixture
def damaged(tmp_path):
    """Classes a (0 damaged, 1), b (all damaged) and c (1 good, the last damaged)."""
    root = tmp_path / "root"
    rng = np.random.default_rng(0)
    for name in ("a/0.jpg", "a/1.png", "b/0.png", "b/1.jpg", "c/0.png", "c/1.png"):
        save(root / name, Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    (root / "a/0.jpg").write_bytes((root / "a/0.jpg").read_bytes()[:400])
    (root / "b/0.png").write_bytes(b"")
    (root / "b/1.jpg").write_text("<html>404</html>")
    (root / "c/1.png").write_bytes((root / "c/1.png").read_bytes()[:-100].replace(b"IDAT", b"IDAT\xff", 1))
    return root


DAMAGED = ["a/0.jpg", "b/0.png", "b/1.jpg", "c/1.png"]


def test_the_next_readable_image_stands_in_and_each_damaged_one_is_named_once(damaged):
    data = ImageFolder(damaged, 16, seed=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(3):
            for index, substitute in ((0, 1), (2, 4), (3, 4), (5, 1)):
                ours, theirs = data[epoch, index], data[epoch, substitute]
                assert torch.equal(ours[0], theirs[0]) and ours[1:] == theirs[1:] == (theirs[1], substitute)
    assert data.unreadable == DAMAGED
    texts = [str(w.message) for w in caught]
    assert len(texts) == 4 and all(sum(str(damaged / name) in text for text in texts) == 1 for name in DAMAGED)
    assert any("the file is empty" in text for text in texts) and any("known format" in text for text in texts)
    assert all("\n" not in text and "replace or remove the file; until then" in text for text in texts)


@pytest.mark.filterwarnings("ignore:.*replaces it")
def test_workers_survive_damaged_files_and_tell_which(damaged):
    data = ImageFolder(damaged, 16, seed=2)
    keys = [[(0, i) for i in range(6)], [(1, i) for i in range(6)]]
    loader = DataLoader(data, batch_sampler=keys, num_workers=2)
    again = ImageFolder(damaged, 16, seed=2)
    for (images, labels, indices), wanted in zip(loader, keys, strict=True):
        assert indices.tolist() == [1, 1, 4, 4, 4, 1] and labels.tolist() == [0, 0, 2, 2, 2, 0]
        assert torch.equal(images, torch.stack([again[key][0] for key in wanted]))
    assert data.unreadable == DAMAGED


def test_strict_stops_and_names_the_file(damaged):
    data = open_dataset("imagefolder", damaged, 16, 3, strict=True)
    assert data[0, 4][2] == 4
    words = r"root/b/1\.jpg: cannot be read: not an image of a known format; replace or remove the file"
    with pytest.raises(UnreadableImageError, match=words) as error:
        data[0, 3]
    assert data.unreadable == []
    # A loader's worker sends no exception but its type and text (raising through one costs PyTorch 5 s of clean-up)
    assert str(type(error.value)(f"Caught in worker 0: {error.value}")).endswith("remove the file")


@pytest.mark.filterwarnings("ignore:.*replaces it")
def test_a_folder_without_a_readable_image_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").touch()
    with pytest.raises(ValueError, match="none of its 3 images can be read"):
        ImageFolder(tmp_path, 16)[0, 1]


def test_a_lost_file_system_is_not_taken_for_damaged_images(damaged):
    data = ImageFolder(damaged, 16)
    (damaged / "c/0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"c/0\.png"):
        data[0, 4]
    assert data.unreadable == []


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.ones((4, 4), dtype=np.float32), "floating-point pixels have"),
        (np.full((4, 4), 70_000, dtype=np.int32), "pixels of more than 16 bits"),
        (np.full((4, 4), -1, dtype=np.int32), "pixels of more than 16 bits"),
    ],
)
def test_pixels_without_a_known_range_are_not_guessed_at(pixels, reason, tmp_path):
    with pytest.raises(UnreadableImageError, match=f"cannot be read: {reason}"):
        decoded(save(tmp_path / "a.tif", Image.fromarray(pixels)), 3)


def test_the_machines_shortage_of_memory_is_not_blamed_on_the_file(monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        decode_image(b"x", 3)


FILES = {
    "JPEG": {"progressive": True, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True, "quality": 0, "method": 0},
    "TIFF": {},
    "BMP": {},
    "PPM": {},
    "GIF": {},
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_decoded_outlives_its_file(kind, mode):
    buffer, channels = io.BytesIO(), len(mode)
    pixels = np.random.default_rng(1).integers(0, 256, (17, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **FILES[kind])
    with Image.open(io.BytesIO(buffer.getvalue())) as file:
        expected = [np.asarray(file.convert(mode)), np.asarray(center_crop(file.convert(mode), 8))]
    image = decode_image(buffer.getvalue(), channels)
    assert image.mode == mode and np.array_equal(np.asarray(image), expected[0])
    assert np.array_equal(np.asarray(center_crop(image, 8)), expected[1])
    assert np.array_equal(np.asarray(image.copy()), expected[0])


MEMORY = """
import sys
from pathlib import Path
from data.image_folder import center_crop, decode_image

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

for path in sys.argv[2:]:
    content = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = memory("VmRSS")
    center_crop(decode_image(content, 3), int(sys.argv[1]))
    print(path, memory("VmHWM") - before)
"""


def peaks(size, paths):
    """Bytes of memory that reading each image and cropping it to a size takes at its most."""
    command = [sys.executable, "-c", MEMORY, str(size), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = dict(line.split() for line in done.stdout.splitlines())
    assert list(found) == [*map(str, paths)]
    return {name: int(peak) for name, peak in found.items()}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_memory_of_decoding_is_bounded_by_the_number_of_pixels(tmp_path):
    exif, side = Image.Exif(), 2500
    exif[ExifTags.Base.Orientation] = 6
    colours = Image.new("RGB", (side, side), (7, 80, 3))
    levels = np.full((side, side), 40_000)
    images = {"JPEG": colours, "PNG": Image.fromarray(levels.astype(np.uint16)), "WEBP": colours}
    images["TIFF"] = Image.fromarray(levels.astype(np.int32))
    for kind, image in images.items():
        options = FILES[kind] | ({} if kind == "TIFF" else {"exif": exif})
        image.save(tmp_path / kind, kind, **options)
    for name, peak in peaks(64, [tmp_path / kind for kind in images]).items():
        assert peak < 16.5 * side**2, f"{name}: {peak / side**2:.1f} bytes a pixel"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_memory_of_a_crop_is_that_of_what_survives_it(tmp_path):
    """Resized as a whole, these would take 311 MB."""
    for name, size in (("tall.png", (40, 3960)), ("wide.jpg", (3960, 40))):
        Image.new("RGB", size, (7, 80, 3)).save(tmp_path / name)
    assert max(peaks(1024, sorted(tmp_path.iterdir())).values()) < 40e6
