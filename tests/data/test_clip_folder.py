"""Folders of frames and of videos as data sets of clips."""

import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data import GlobalBatches, conditioning, open_dataset
from data.clip_folder import ClipFolder
from data.clip_settings import ClipSettings
from data.image_folder import UnreadableImageError
from data.video_listing import LISTING, pattern_of
from tests import video_files

needs_pyav = pytest.mark.skipif(find_spec("av") is None, reason="PyAV is not installed (pip install av)")
STRIDE_2 = ClipSettings(frame_interval=2)


def numbers_of(clip: Tensor, step: int = video_files.STEP) -> list[int]:
    """Numbers of the frames of a clip (F, C, H, W) uint8, by the pixel in the lower right corner."""
    return [round(float(frame[0, -1, -1]) / step) for frame in clip]


def numbers_in(clip: Tensor) -> list[int]:
    """Numbers of the frames of a clip of a video file."""
    return numbers_of(clip, video_files.VIDEO_STEP)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Two classes with a video of 12 frames each, and one of 9."""
    root = tmp_path / "frames"
    video_files.write_frames(root / "cat/a", range(1, 13), size=(10, 14))
    video_files.write_frames(root / "cat/b", range(20, 29), size=(10, 14))
    video_files.write_frames(root / "dog/a", range(30, 42), name="v_7_{}.jpg", size=(16, 9))
    return root


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos of 20 frames without classes, of several containers, and one with a variable rate."""
    root = tmp_path / "videos"
    video_files.write_video(root / "a.mp4", 20)
    video_files.write_video(root / "b.avi", 20, codec="mpeg4")
    video_files.write_video(root / "c.mkv", 20)
    return root


def test_clips_of_folders_of_frames(frames: Path) -> None:
    data = ClipFolder(frames, 8, frames=4, settings=STRIDE_2, flip=False, seed=5)
    assert data.classes == ["cat", "dog"] and len(data) == 3 and data.image_shape == (4, 3, 8, 8)
    assert [data.path(i) for i in range(3)] == ["cat/a", "cat/b", "dog/a"]
    starts = set()
    for epoch in range(40):
        for index, (first, last) in enumerate([(1, 12), (20, 28), (30, 41)]):
            clip, label, same = data[epoch, index]
            assert clip.shape == (4, 3, 8, 8) and clip.dtype == torch.uint8 and same == index
            assert label == (index == 2)
            start = numbers_of(clip)[0]
            assert numbers_of(clip) == [start, start + 2, start + 4, start + 6] and first <= start <= last - 6
            starts.add(start)
    assert starts >= {1, 6, 20, 22, 30, 35}, "every place is taken sometimes, the last one too"
    again = ClipFolder(frames, 8, frames=4, settings=STRIDE_2, flip=False, seed=5)
    assert all(torch.equal(again[e, 0][0], data[e, 0][0]) for e in range(5)), "by seed, epoch and index alone"


def test_videos_without_classes_have_no_labels(frames: Path) -> None:
    data = ClipFolder(frames / "cat", 8, frames=4)
    assert data.classes == [] and len(data) == 2 and data[0, 0][1] == {}
    loader = DataLoader(data, batch_sampler=GlobalBatches(2, 4, rank=0, world=1, seed=0, steps=range(1)), num_workers=1)
    ((clips, labels, _),) = loader
    assert clips.shape == (4, 4, 3, 8, 8) and conditioning(labels) == {}


def test_frames_of_a_clip_are_mirrored_together(tmp_path: Path) -> None:
    video_files.write_frames(tmp_path / "a", range(6), size=(8, 8))
    for path in (tmp_path / "a").iterdir():
        import numpy as np
        from PIL import Image

        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:, :4] = 255
        Image.fromarray(pixels).save(path)
    data, plain = ClipFolder(tmp_path, 8, frames=3), ClipFolder(tmp_path, 8, frames=3, flip=False)
    sides = {tuple((clip[:, 0, 0, 0] == 255).tolist()) for clip in (data[e, 0][0] for e in range(30))}
    assert sides == {(True,) * 3, (False,) * 3}
    assert all((plain[e, 0][0][:, 0, 0, 0] == 255).all() for e in range(10))


def test_single_frames_behind_a_clip_have_labels_of_their_own(frames: Path) -> None:
    data = ClipFolder(frames, 8, frames=4, joint_images=5, flip=False)
    assert data.image_shape == (9, 3, 8, 8)
    seen = set()
    for epoch in range(30):
        clip, labels, _ = data[epoch, 0]
        assert isinstance(labels, dict) and int(labels["y"]) == 0
        assert clip.shape == (9, 3, 8, 8) and labels["image_labels"].shape == (5,)
        behind = numbers_of(clip[4:])
        assert [n >= 30 for n in behind] == labels["image_labels"].bool().tolist()
        seen |= {*behind}
    assert seen == {*range(1, 13), *range(20, 29), *range(30, 42)}, "all frames of all videos"
    assert ClipFolder(frames / "cat", 8, frames=4, joint_images=2)[0, 0][1] == {}


def test_published_crops_are_floats(frames: Path) -> None:
    for crop in ("resize", "square"):
        clip, *_ = ClipFolder(frames, 8, frames=4, settings=ClipSettings(clip_crop=crop), flip=False)[0, 1]
        assert clip.dtype == torch.float32 and clip.shape == (4, 3, 8, 8)
        assert 20 <= float((clip[0, 0, 4, 4] + 1) * 127.5 / 4) <= 28
    with pytest.raises(ValueError, match="--clip-crop square: makes squares, not 8 x 12"):
        ClipFolder(frames, (8, 12), frames=4, settings=ClipSettings(clip_crop="square"))


def test_a_damaged_frame_is_named_and_its_video_replaced(frames: Path) -> None:
    for path in (frames / "cat/a").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    data = ClipFolder(frames, 8, frames=4, flip=False)
    with pytest.warns(
        UserWarning, match=r"cat/a/frame_00\d\d.png: cannot be read.*the next readable video replaces it"
    ):
        clip, label, index = data[0, 0]
    assert (label, index) == (0, 1) and 20 <= numbers_of(clip)[0] and data.unreadable == ["cat/a"]
    strict = ClipFolder(frames, 8, frames=4, strict=True)
    with pytest.raises(UnreadableImageError, match="cat/a/frame_"):
        strict[0, 0]


@pytest.mark.parametrize(
    ("names", "count", "problem"),
    [
        (["f_08.png", "f_09.png", "f_10.png"], 3, ""),
        (["9.jpg", "10.jpg", "11.jpg"], 3, ""),
        (["a0.jpg", "a5.jpg", "a10.jpg"], 3, ""),
        (["099.jpg", "100.jpg", "1000.jpg"], 2, "frames are missing after number 100"),
        ([f"f{i}.jpg" for i in (1, 2, 3, 7, 8, 9, 10, 20)], 4, "frames are missing after number 3; only its longest"),
        (["a.jpg", "b.jpg"], 0, "have no numbers"),
        (["a1.jpg", "a2.png"], 0, r"named in several ways \(aN.jpg, aN.png\)"),
        (["a1.jpg", "a01.jpg", "a2.jpg"], 0, "numbers of several widths"),
    ],
)
def test_names_of_frames(names: list[str], count: int, problem: str) -> None:
    frames, said = pattern_of(reversed(names))
    assert re.search(problem, said) if problem else said == ""
    assert (frames.length if frames else 0) == count
    if frames and not problem:
        assert [frames.name(i) for i in range(count)] == names


def test_gaps_other_files_and_short_videos_are_said(frames: Path) -> None:
    (frames / "cat/a/frame_0006.png").unlink()
    (frames / "dog/a/more.heic").write_bytes(b"x")
    (frames / "dog/cover.png").write_bytes(b"x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ClipFolder(frames, 8, frames=5, settings=STRIDE_2)
    lines = [str(w.message) for w in caught]
    assert len(data) == 2 and len(lines) == 4
    for text in (
        "cat/a: frames are missing after number 5; only its longest part without a gap is used, 6 of 11 frames",
        "dog/a: left out 1 .heic",
        "frames: left out 1 .png; .mp4, .m4v, .mov",
        "1 of 3 videos are too short: 5 frames at --frame-interval 2 need 9 (cat/a has 6); these are left out",
    ):
        assert any(text in line for line in lines), (text, lines)
    with (
        pytest.raises(ValueError, match="3 of 3 videos are too short.*need 40; cat/a has 6"),
        pytest.warns(UserWarning),
    ):
        ClipFolder(frames, 8, frames=40)


def test_folders_that_are_no_videos(tmp_path: Path) -> None:
    cases = {
        "missing": "no such folder",
        "empty": "holds no videos; expected",
        "bare": r"holds images \(1.png\); put the frames of each video into its own folder",
        "mixed": "b has no class, and a/v has one; put each into a class folder",
    }
    for name in ("empty", "bare", "mixed/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bare/1.png").write_bytes(b"x")
    video_files.write_frames(tmp_path / "mixed/a/v", range(3), size=(8, 8))
    video_files.write_frames(tmp_path / "mixed/b", range(3), size=(8, 8))
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            ClipFolder(tmp_path / name, 8, frames=2)


def test_the_listing_is_kept_and_checked(frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ClipFolder(frames, 8, frames=4)
    listing = frames / LISTING
    content = listing.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("data.video_listing.pattern_of", lambda names: pytest.fail("listed again"))
        second = ClipFolder(frames, 8, frames=4)
    assert second.digest() == first.digest() and listing.read_bytes() == content
    video_files.write_frames(frames / "dog/b", range(6), size=(8, 8))
    assert len(ClipFolder(frames, 8, frames=4)) == 4 and listing.read_bytes() != content
    shutil.rmtree(frames / "dog/b")
    (frames / "cat/a/frame_0013.png").write_bytes((frames / "cat/a/frame_0001.png").read_bytes())
    longer = ClipFolder(frames, 8, frames=4)
    assert len(longer) == 3 and longer.digest() != first.digest()
    (frames / "cat/a/frame_0013.png").unlink()
    listing.write_bytes(content.replace(b'"cat/a"', b'"cat/x"'))
    with pytest.warns(UserWarning, match=r"clip_listing.json: cannot be used .*all videos are opened again"):
        assert ClipFolder(frames, 8, frames=4).digest() == first.digest()


def test_by_the_value_of_dataset(frames: Path) -> None:
    data = open_dataset("videofolder", frames, 8, 1, frames=4, joint_images=1, clips=STRIDE_2, flip=False)
    assert isinstance(data, ClipFolder) and data.image_shape == (5, 1, 8, 8) and data[0, 0][0].shape == (5, 1, 8, 8)
    with pytest.raises(ValueError, match="a folder of videos needs --data-path"):
        open_dataset("videofolder", None, 8, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Files


@needs_pyav
def test_clips_of_video_files(videos: Path) -> None:
    data = ClipFolder(videos, (8, 12), frames=4, settings=STRIDE_2, flip=False)
    assert data.classes == [] and [data.path(i) for i in range(3)] == ["a.mp4", "b.avi", "c.mkv"]
    starts = set()
    for epoch in range(15):
        for index in range(3):
            clip, label, _ = data[epoch, index]
            assert clip.shape == (4, 3, 8, 12) and clip.dtype == torch.uint8 and label == {}
            start = numbers_in(clip)[0]
            assert numbers_in(clip) == [start, start + 2, start + 4, start + 6] and 0 <= start <= 13
            starts.add(start)
    assert {0, 13} <= {*starts}


@needs_pyav
def test_every_frame_is_found_by_its_number(videos: Path) -> None:
    video_files.write_video(videos / "d.mp4", 20, times=[i + i // 5 * 3 for i in range(20)])
    with pytest.warns(UserWarning, match=r"1 videos have a variable frame rate \(the first is d.mp4\)"):
        data = ClipFolder(videos, 8, frames=4)
    for index in range(4):
        for number in range(20):
            assert numbers_in(data.read(index, [number])) == [number]
        assert numbers_in(data.read(index, [2, 2, 19])) == [2, 2, 19]


@needs_pyav
@pytest.mark.parametrize("name", ["a.ts", "b.avi", "c.flv", "d.mov"])
def test_containers_that_seek_badly_or_have_no_times(name: str, tmp_path: Path) -> None:
    video_files.write_video(tmp_path / name, 20)
    data = ClipFolder(tmp_path, 8, frames=4)
    for number in range(20):
        assert numbers_in(data.read(0, [number])) == [number]
    assert numbers_in(data.read(0, range(20))) == [*range(20)]


@needs_pyav
def test_turned_and_odd_videos(tmp_path: Path) -> None:
    video_files.write_video(tmp_path / "a.mp4", 6, size=(24, 48))
    video_files.write_video(tmp_path / "b.mp4", 6, size=(33, 47))
    plain = ClipFolder(tmp_path, (24, 48), frames=2, flip=False).read(0, [5])[0, 0]
    assert plain[4, 4] > 200 and plain[4, 40] < 90 and plain[20, 4] < 90
    video_files.rotate(tmp_path / "a.mp4")
    turned = ClipFolder(tmp_path, (48, 24), frames=2, flip=False).read(0, [5])[0, 0]
    assert turned[4, 20] > 200 and turned[4, 4] < 90 and turned[40, 20] < 90, "white is at the upper right"
    assert numbers_in(ClipFolder(tmp_path, (33, 47), frames=2).read(1, [3])) == [3]


@needs_pyav
def test_damaged_videos_are_named(videos: Path) -> None:
    video_files.write_sound(videos / "d.mp4")
    (videos / "e.mp4").write_bytes(b"")
    (videos / "f.mp4").write_bytes((videos / "a.mp4").read_bytes()[:900])
    (videos / "g.webm").write_bytes(b"no video at all" * 100)
    (videos / "h.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ClipFolder(videos, 8, frames=4)
    lines = sorted(str(w.message) for w in caught)
    assert len(data) == 3 and len(lines) == 5
    for line, (name, reason) in zip(
        lines,
        {"d": "it has sound, and no video", "e": "the file is empty", "f": "", "g": "", "h": ""}.items(),
        strict=True,
    ):
        assert re.search(rf"videos/{name}\.\w+: cannot be read, and is left out: {reason}", line) and "\n" not in line
    with pytest.raises(ValueError, match="d.mp4: cannot be read: it has sound"):
        ClipFolder(videos, 8, frames=4, strict=True)


@needs_pyav
def test_a_video_that_is_cut_short_while_it_is_used_is_replaced(videos: Path) -> None:
    data = ClipFolder(videos, 8, frames=12, flip=False)
    path = videos / "b.avi"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.warns(UserWarning, match=r"b.avi: cannot be read: .*the next readable video replaces it"):
        assert data[0, 1][2] == 2


def test_files_need_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    monkeypatch.setattr("data.video_files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="reading videos needs PyAV, which is missing: pip install av"):
        ClipFolder(tmp_path, 8, frames=4)
