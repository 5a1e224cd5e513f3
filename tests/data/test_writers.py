"""Files of images and clips, read back as their readers do."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pixels import grid, is_picture, note_in, save_png, strips, to_uint8, written_by
from data.writers import ClipWriter, Writer, writer_of
from tests import golden_data

RNG = np.random.default_rng(0)


def clips(count: int = 2, channels: int = 3, height: int = 7, width: int = 12) -> np.ndarray:
    """Clips of five frames, in few colours, which a GIF keeps exactly."""
    return (RNG.integers(0, 5, (count, 5, height, width, channels)) * 60).astype(np.uint8)


def video(path: Path) -> tuple[np.ndarray, float]:
    """Frames (F, H, W, 3) and frames a second of a video."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return np.stack(frames), float(file.streams.video[0].average_rate)


def animation(path: Path) -> tuple[np.ndarray, list[int]]:
    """Frames (F, H, W, 3) and durations in milliseconds of a GIF."""
    with Image.open(path) as file:
        frames, durations = [], []
        for k in range(file.n_frames):
            file.seek(k)
            frames.append(np.asarray(file.convert("RGB")))
            durations.append(file.info["duration"])
        return np.stack(frames), durations


def test_pixels_of_clips_are_the_recorded_ones() -> None:
    recorded = golden_data.arrays("latte/c2v_data/io")
    pixels = recorded["pixels.in"].view(1, 1, 1, 1, -1)
    assert torch.equal(ClipWriter().to_uint8(pixels).flatten(), recorded["pixels.out"])


def test_pixels_of_clips_are_rounded_as_in_the_official_samplers_to_the_bit() -> None:
    """At every half, and the 64 numbers next to it on both sides, where the two ways of rounding differ."""
    halves = ((torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1).float()
    near = [halves]
    for direction in (-9.0, 9.0):
        x = halves
        for _ in range(64):
            near.append(x := torch.nextafter(x, torch.tensor(direction)))
    x = torch.cat([*near, torch.tensor([-torch.inf, torch.inf])])
    official = torch.trunc(torch.clamp((x * 0.5 + 0.5) * 255 + 0.5, 0, 255)).to(torch.uint8)
    pixels = x.view(1, 1, 1, 1, -1)
    assert torch.equal(ClipWriter().to_uint8(pixels).flatten(), official)
    assert not torch.equal(Writer().to_uint8(pixels).flatten(), official), "published jobs of images round otherwise"
    assert torch.equal(Writer().to_uint8(pixels), to_uint8(pixels))


def test_the_shape_of_a_sample_chooses_the_writer() -> None:
    assert type(writer_of((3, 8, 8))) is Writer and writer_of((3, 8, 8)).unit == "image"
    writer = writer_of((5, 3, 8, 8), fps=12)
    assert isinstance(writer, ClipWriter) and (writer.unit, writer.fps) == ("clip", 12)
    assert Writer().overviews(Path("a.png")) == (Path("a.png"),)
    assert writer.overviews(Path("a.jpg")) == (Path("a.jpg"), Path("a.gif"))


def test_one_image_is_written_as_before(tmp_path: Path) -> None:
    image = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    save_png(image, tmp_path / "a.png")
    Writer().save(image[None], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_has_a_row_a_clip_with_its_frames_side_by_side(channels: int, tmp_path: Path) -> None:
    samples = clips(channels=channels)
    ClipWriter().save(samples, tmp_path / "a.png", columns=9, gap=2)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (5 * 14 + 2, 2 * 9 + 2)
        shown = np.asarray(picture).reshape(20, 72, channels)
    for clip in range(2):
        for frame in range(5):
            tile = shown[9 * clip + 2 : 9 * clip + 9, 14 * frame + 2 : 14 * frame + 14]
            assert np.array_equal(tile, samples[clip, frame])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_shows_all_clips_at_once_frame_by_frame(channels: int, tmp_path: Path) -> None:
    samples = clips(3, channels)
    ClipWriter().save(samples, tmp_path / "a.gif", columns=2, gap=2, software="me")
    frames, durations = animation(tmp_path / "a.gif")
    expected = np.stack([grid(samples[:, k], 2)[0] for k in range(5)])
    assert np.array_equal(frames, np.broadcast_to(expected, frames.shape))
    assert durations == [120, 130, 130, 120, 120] and written_by(tmp_path / "a.gif", "me")
    ClipWriter(25).save(samples[:1], tmp_path / "one.gif")
    frames, durations = animation(tmp_path / "one.gif")
    assert durations == [40] * 5 and np.array_equal(frames, np.broadcast_to(samples[0], frames.shape))


@pytest.mark.parametrize(("still", "shown"), [([2, 3], [120, 130, 250, 120]), ([0, 1, 2, 3, 4], [620])])
def test_equal_frames_of_a_gif_are_shown_for_as_long(still: list[int], shown: list[int], tmp_path: Path) -> None:
    samples = np.arange(5, dtype=np.uint8)[None, :, None, None, None] * np.full((7, 12, 3), 50, np.uint8)
    samples[:, still] = 10
    ClipWriter().save(samples, tmp_path / "a.gif")
    assert animation(tmp_path / "a.gif")[1] == shown


@pytest.mark.parametrize(("height", "width", "channels"), [(7, 12, 3), (64, 48, 1)])
def test_an_mp4_is_close_to_the_clip_and_equal_clips_make_equal_bytes(
    height: int, width: int, channels: int, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    ramp = np.linspace(0, 200, width)[None, None, :, None] + 10 * np.arange(5)[:, None, None, None]
    samples = np.broadcast_to(ramp, (5, height, width, channels)).astype(np.uint8)[None]
    for name in "ab":
        ClipWriter(12).save(samples, tmp_path / f"{name}.mp4", software="me")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    frames, fps = video(tmp_path / "a.mp4")
    assert frames.shape == (5, height + height % 2, width + width % 2, 3) and fps == 12
    assert np.abs(frames[:, :height, :width].astype(int) - samples[0]).mean() < 6
    assert written_by(tmp_path / "a.mp4", "me") and not written_by(tmp_path / "a.mp4", "you")
    (tmp_path / "a.mp4").write_text("notes")
    assert not written_by(tmp_path / "a.mp4", "me")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_video_without_its_library_is_of_unknown_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0" * 64)
    assert not written_by(tmp_path / "a.mp4", "me")


# ----------------------------------------------------------------------------------------------------------------------
# Texts under samples


def test_texts_are_under_their_samples_and_pixels_stay_as_they_are(tmp_path: Path) -> None:
    images = np.full((3, 40, 60, 1), 90, np.uint8)
    plain, sheet = (Writer().sheet(images, 2, 2, texts) for texts in ((), ["a seven", "", "a large two moving up"]))
    assert plain.shape[1] == sheet.shape[1] and sheet.shape[0] > plain.shape[0]
    tile = (sheet.shape[0] - 2) // 2
    strips = [sheet[top + 42 : top + tile, left : left + 60] for top, left in ((0, 2), (0, 64), (tile, 2))]
    dark = [int((strip < 128).sum()) for strip in strips]
    assert dark[1] == 0 < dark[0] < dark[2], "nothing under the second"
    assert (sheet[2:42, 2:62] == 90).all() and (sheet[2 + tile : 42 + tile, 2:62] == 90).all()
    Writer().save(images, tmp_path / "a.png", 2, gap=2, texts=["a", "b", "c"])
    assert Image.open(tmp_path / "a.png").size[0] == plain.shape[1]


def test_clips_have_their_text_in_the_sheet_and_in_every_frame_of_an_animation(tmp_path: Path) -> None:
    samples = clips(2, 1, 20, 30)
    texts = ["a small seven moving right", "a two"]
    sheet = ClipWriter().sheet(samples, 1, 2, texts)
    assert sheet.shape[1] == 5 * 32 + 2 and np.array_equal(sheet[2:22, 2:32], samples[0, 0])
    ClipWriter().save(samples, tmp_path / "a.gif", 2, gap=2, texts=texts)
    frames, _ = animation(tmp_path / "a.gif")
    assert len(frames) == 5 and frames.shape[1] > 44
    under = frames[:, 23:, 2:32]
    assert (under == under[0]).all() and (under < 128).any()


def test_long_words_are_broken_and_lines_stay_inside() -> None:
    strip = strips(["incomprehensibilities of a very long prompt"], 40, 3)
    assert strip.shape[2:] == (40, 3) and strip.shape[1] >= 5 * 12
    assert (strip[0, :, -1] == 255).all() and (strip < 128).any()
    assert strips(["", ""], 40, 1).shape == (2, 16, 40, 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
def test_notes_are_read_back_and_change_no_pixel(suffix: str, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1), dtype=np.uint8)
    path, plain, note = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", json.dumps({"flags": ["x" * 3000, "é"]})
    ClipWriter().save(samples, path, software="me", note=note)
    ClipWriter().save(samples, plain, software="me")
    assert note_in(path) == note and note_in(plain) == "" and is_picture(path)
    assert written_by(path, "me") and not written_by(path, "you")
    with Image.open(path) as noted, Image.open(plain) as other:
        assert np.array_equal(np.asarray(noted), np.asarray(other))
    ClipWriter().save(samples, path, software="me", note="x" * 70_000)
    assert note_in(path) == "" and written_by(path, "me")
    path.write_bytes(path.read_bytes()[:60])
    assert not is_picture(path) and not is_picture(tmp_path)
