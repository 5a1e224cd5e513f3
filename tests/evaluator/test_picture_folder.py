"""Folders of images as people have them, on either side of an evaluation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image_folder import center_crop
from data.photos import Photos
from evaluator import evaluation, inputs
from evaluator.__main__ import main
from evaluator.npz import BadImageFile
from evaluator.picture_folder import PictureFolder
from runtime.errors import run
from tests.inception_files import make_images, write_npz

QUICK = ("--metrics", "is,fid,pr")
SIZES = [(32, 32), (70, 45), (33, 90), (128, 128), (50, 50), (40, 41), (64, 36), (36, 64), (200, 40), (35, 35)]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> list[Image.Image]:
    """A folder of photos of all sizes, formats and modes in folders, and samples; the photos in their order."""
    monkeypatch.chdir(tmp_path)
    images = []
    for i, size in enumerate(SIZES):
        image = Image.fromarray(make_images(1, size, seed=i)[0])
        path = tmp_path / "photos" / f"class {i % 3}" / f"{i}.{('jpg', 'png', 'webp')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert("L" if i in (0, 4) else "RGBA" if i == 7 else "RGB").save(path)
        with Image.open(path) as saved:
            images.append(saved.convert("RGB"))
    write_npz(tmp_path / "samples.npz", make_images(11, seed=2))
    return images


def evaluate(graph, reference, samples, *argv):
    fixed = ["--weights", str(graph), "--cache-dir", "cache", "--device", "cpu", "--json", "out.json"]
    return run(main, "evaluator", [str(reference), str(samples), *fixed, *argv])


def result():
    return json.loads(Path("out.json").read_text())


def open_folder(path, size=None) -> PictureFolder:
    return PictureFolder(Path(path), Photos, size)


def test_photos_are_a_reference_cropped_as_adm_crops(photos, graph, capsys):
    cropped = np.stack([np.asarray(center_crop(image, 32)) for image in photos])
    write_npz(Path("cropped.npz"), cropped)
    assert evaluate(graph, "cropped.npz", "samples.npz", *QUICK) == 0
    expected = result()["scores"]
    capsys.readouterr()
    assert evaluate(graph, "photos", "samples.npz", *QUICK) == 0
    document, err = result(), capsys.readouterr().err
    assert document["scores"] == expected
    reference = document["reference"]
    assert (reference["images"], reference["source"]) == (10, "folder of images")
    assert reference["formats"] == {"JPEG": 4, "PNG": 3, "WEBP": 3}
    assert reference["crop"] == "to 32 x 32 pixels, as ADM crops images" and reference["image_size"] == [32, 32]
    line = "reference: photos: 10 images; folder of images; JPEG, PNG, WEBP; crop to 32 x 32 pixels, as ADM crops "
    assert re.search(f"^{line}images; sha256 {reference['sha256'][:16]}$", err, re.MULTILINE)


def test_the_crop_is_part_of_the_digest_so_that_features_of_another_are_not_taken(photos, graph, capsys, monkeypatch):
    write_npz(Path("large.npz"), make_images(11, (48, 48), seed=2))
    assert evaluate(graph, "photos", "samples.npz", "--metrics", "fid") == 0
    first = result()
    seen = []
    real = evaluation.extract_features
    monkeypatch.setattr(
        evaluation, "extract_features", lambda file, *args, **o: seen.append(1) or real(file, *args, **o)
    )
    assert evaluate(graph, "photos", "large.npz", "--metrics", "fid") == 0
    assert len(seen) == 2 and result()["reference"]["sha256"] != first["reference"]["sha256"]
    assert "warning: photos: 8 of 10 images are smaller than the samples, and are enlarged" in capsys.readouterr().err
    seen.clear()
    assert evaluate(graph, "photos", "samples.npz", "--metrics", "fid") == 0
    assert len(seen) == 1 and result()["scores"] == first["scores"]


def test_a_damaged_photo_is_named(photos, graph, capsys):
    path = Path("photos/class 1/4.png")
    path.write_bytes(path.read_bytes()[:-300])
    assert evaluate(graph, "photos", "samples.npz", *QUICK) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluator:"))
    assert "photos/class 1/4.png: damaged or cut short" in line and not Path("out.json").exists()


def test_samples_are_never_resized_nor_converted(photos, graph, capsys):
    assert evaluate(graph, "samples.npz", "photos", *QUICK) == 2
    assert "photos/class 0/0.jpg: is in mode L; expected 8-bit RGB" in capsys.readouterr().err
    for i in range(5):
        Path("small").mkdir(exist_ok=True)
        Image.fromarray(make_images(1, (31, 31))[0]).save(f"small/{i}.png")
    assert evaluate(graph, "samples.npz", "small", *QUICK) == 2
    assert "small: images of 31 x 31 pixels, but samples.npz has 32 x 32" in capsys.readouterr().err


def test_samples_in_jpeg_are_read_with_a_warning(photos, graph, capsys):
    Path("jpegs").mkdir()
    for i, image in enumerate(make_images(11, seed=2)):
        Image.fromarray(image).save(f"jpegs/{i}.jpg", quality=100)
    (Path("jpegs") / "all.heic").touch()
    assert evaluate(graph, "samples.npz", "jpegs", *QUICK) == 0
    err = capsys.readouterr().err
    assert "warning: jpegs: samples in JPEG: compression changes the scores" in err
    assert "warning: jpegs: left out 1 .heic" in err
    assert result()["samples"]["formats"] == {"JPEG": 11} and len(result()["warnings"]) >= 2
    assert open_folder("jpegs", (32, 32)).warnings == ["jpegs: left out 1 .heic"]  # photos are JPEG


def put(names):
    for i, name in enumerate(names):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_images(1, seed=i)[0]).save(path)


def test_folders_of_classes_in_turn_are_a_warning_where_their_order_counts(photos, monkeypatch):
    put([f"mixed/{label}/{i}.png" for i in range(3) for label in "ab"])
    put([f"in turn/{label}/{label}_{i}.png" for label in "ab" for i in range(3)])
    put([f"flat/{i}.png" for i in range(6)])
    reference = open_folder("flat")
    for limit, num_samples, expected in ((5, None, True), (6, None, False), (6, 4, True)):
        monkeypatch.setattr(inputs, "ADM_SPLIT_SIZE", limit)
        for name, by_folder in (("mixed", False), ("in turn", True), ("flat", False)):
            found = inputs.order_warnings(reference, open_folder(name), num_samples)
            assert any("folder by folder" in line for line in found) == (expected and by_folder), (name, limit)


def test_images_are_decoded_when_they_are_needed(photos, monkeypatch):
    folder = open_folder("photos", (32, 32))
    seen = []
    real = Photos.read
    monkeypatch.setattr(Photos, "read", lambda self, index, size=None: seen.append(index) or real(self, index, size))
    batches = folder.batches(2, 9, 3)
    assert seen == []
    next(batches)
    assert sorted(seen) == [2, 3, 4]
    assert [len(batch) for batch in batches] == [3, 1] and sorted(seen) == list(range(2, 9))


def test_a_photo_turned_by_its_camera_is_no_sample(photos):
    Path("turned").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_images(1, (32, 16))[0]).save("turned/0.jpg", exif=exif)
    with pytest.raises(BadImageFile, match=r"turned/0\.jpg: 32 x 16 pixels upright, but 16 x 32 are expected"):
        next(open_folder("turned").batches(0, 1, 1))
