import numpy as np
import pytest
import torch
from PIL import Image

from data import open_dataset
from data.digits import load_digits
from data.image_folder import ArrayImages, ImageFolder, center_crop
from tests import golden_data


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
