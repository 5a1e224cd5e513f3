import numpy as np
import torch
from PIL import Image

from data.pixels import enlarge, from_uint8, grid, save_gif, save_png, to_picture, to_uint8
from tests import golden_data


def test_rounding_matches_the_recorded_pixels():
    arrays = golden_data.arrays("dit/pixels")
    decoded = arrays["decoded"].view(1, 1, 1, -1)
    assert torch.equal(to_uint8(decoded).flatten(), arrays["npz_uint8"])
    assert torch.equal(to_picture(decoded).flatten(), arrays["save_image_uint8"])


def test_bytes_survive_conversion_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = from_uint8(images)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_picture(x)[0, :, :, 0], images[0, 0])


def test_channels_move_last():
    x = torch.full((2, 3, 4, 5), -1.0)
    x[:, 2] = 1
    out = to_uint8(x)
    assert out.shape == (2, 4, 5, 3) and out[..., 2].min() == 255 and out[..., :2].max() == 0


def test_frames_of_clips_are_converted_like_images():
    clips = torch.randn(2, 3, 3, 4, 6)
    for convert in (to_uint8, to_picture):
        frames = convert(clips)
        assert frames.shape == (2, 3, 4, 6, 3) and torch.equal(frames.flatten(0, 1), convert(clips.flatten(0, 1)))
    assert grid(frames.numpy(), columns=3, gap=0).shape == (1, 8, 18, 3)
    assert enlarge(frames.numpy(), 2).shape == (2, 3, 8, 12, 3)


def test_grid_places_tiles_row_by_row_with_gaps():
    tiles = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) + 10
    sheet = grid(tiles, columns=2, gap=1)[0, :, :, 0]
    assert sheet.tolist() == [
        [255, 255, 255, 255, 255],
        [255, 10, 255, 11, 255],
        [255, 255, 255, 255, 255],
        [255, 12, 255, 255, 255],
        [255, 255, 255, 255, 255],
    ]


def test_png_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        image = rng.integers(0, 256, (6, 4, channels), dtype=np.uint8)
        save_png(image, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as file:
            assert np.array_equal(np.array(file).reshape(image.shape), image)
    assert enlarge(image[None], 3).shape == (1, 18, 12, 3)


def test_an_animation_shows_every_image_and_the_last_one_longest(tmp_path):
    images = [np.full((4, 6, 3), value, np.uint8) for value in (0, 100, 250)]
    save_gif(images, tmp_path / "a.gif", [50, 50, 900])
    with Image.open(tmp_path / "a.gif") as shown:
        assert (shown.n_frames, shown.size, shown.info["loop"]) == (3, (6, 4), 0)
        for k, image in enumerate(images):
            shown.seek(k)
            assert np.array_equal(np.asarray(shown.convert("RGB")), image)
            assert shown.info["duration"] == (900 if k == 2 else 50)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_pixels_are_converted_without_touching_the_argument():
    x = torch.randn(2, 3, 4, 4)
    copy = x.clone()
    to_uint8(x)
    assert torch.equal(x, copy)
