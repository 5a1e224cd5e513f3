"""Folders of videos and of frames in the place of .npz files of clips: the same distance, and what is named."""

import json
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image_folder import center_crop
from data.writers import ClipWriter
from evaluator import evaluation, stages
from evaluator.__main__ import main, open_videos
from evaluator.npz import BadImageFile
from evaluator.video.folder import VideoFolder, VideoOpener
from evaluator.video.weights import load_i3d
from runtime.errors import run
from tests.i3d_files import NARROW, moving_squares, write_i3d
from tests.inception_files import make_images, write_npz

needs_pyav = pytest.mark.skipif(find_spec("av") is None, reason="PyAV is not installed (pip install av)")
OPENER = VideoOpener((".mp4", ".gif"), open_videos)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_i3d(tmp_path_factory.mktemp("i3d") / "i3d-kinetics-400.ckpt")


def write_frames(folder: Path, clips: np.ndarray, suffix: str = ".png") -> Path:
    for number, clip in enumerate(clips):
        (folder / f"{number:03d}").mkdir(parents=True)
        for place, frame in enumerate(clip):
            Image.fromarray(frame).save(folder / f"{number:03d}" / f"frame_{place}{suffix}")
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same clips as arrays and as frames; the network is narrow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "load_i3d", partial(load_i3d, divisor=NARROW))
    for name, clips in (("ref", moving_squares(3, 48, seed=1)), ("samples", moving_squares(3, 17, seed=2, speed=2))):
        write_npz(tmp_path / f"{name}.npz", clips)
        write_frames(tmp_path / name, clips)
    return tmp_path


def evaluate(weights, reference, samples, *argv):
    fixed = ["--cache-dir", "cache", "--device", "cpu", "--i3d-weights", str(weights), "--json", "out.json"]
    return run(main, "evaluator", [reference, samples, *fixed, *argv])


def distance(*args) -> float:
    assert evaluate(*args) == 0
    return json.loads(Path("out.json").read_text())["scores"]["fvd"]


def test_frames_have_the_distance_of_the_same_clips_in_arrays(files, weights, capsys):
    argv = ("--frame-interval", "3", "--num-reference", "2")
    expected = distance(weights, "ref.npz", "samples.npz", *argv)
    for files_or_folders in (("ref", "samples.npz"), ("ref.npz", "samples"), ("ref", "samples")):
        more = ("--metrics", "fvd") if files_or_folders == ("ref", "samples") else ()  # else PNG files are images
        assert distance(weights, *files_or_folders, *argv, *more) == expected
    described = json.loads(Path("out.json").read_text())["video_network"]
    assert described["reference"] == {
        "clips": 2, "clips_in_file": 3, "frames_in_file": 48, "chosen": "at random", "window": "from a random frame",
        "frame_interval": 3, "seed": 0, "source": "folder of videos",
        "crop": "to 24 x 24 pixels, as ADM crops images",
    }  # fmt: skip
    assert (described["samples"]["crop"], described["samples"]["window"]) == ("none", "the first 16 frames")
    assert "(16 frames from a random one on, one in 3, seed 0)" in capsys.readouterr().out


def test_real_frames_are_cropped_to_the_size_of_the_samples(files):
    real = np.stack([make_images(16, (40, 62), seed=5)])
    folder = VideoFolder(write_frames(files / "large", real), OPENER, (24, 24), 1)
    (window,) = folder.windows({0: range(16)})
    expected = np.stack([np.asarray(center_crop(Image.fromarray(frame), 24)) for frame in real[0]])
    assert np.array_equal(window, expected) and (folder.count, folder.size, folder.frames) == (1, (24, 24), 16)


def test_short_videos_are_left_out_and_named(files, weights, capsys):
    write_frames(files / "ref" / "class", moving_squares(1, 5))
    for video in list((files / "ref").iterdir()):
        if video.name != "class":
            video.rename(files / "ref" / "class" / f"long{video.name}")
    assert evaluate(weights, "ref", "samples.npz", "--frame-interval", "2") == 0
    assert "ref: 1 of 4 videos are too short: 16 frames at --frame-interval 2 need 31 (class/000 has 5)" in (
        capsys.readouterr().err
    )
    document = json.loads(Path("out.json").read_text())
    assert document["video_network"]["reference"]["clips"] == 3 and "too short" in " ".join(document["warnings"])


def test_features_of_the_reference_are_kept_until_a_frame_changes(files, weights, monkeypatch):
    calls, extract = [], evaluation.extract_features
    monkeypatch.setattr(
        evaluation, "extract_features", lambda file, *a, **o: (calls.append(file.path.name), extract(file, *a, **o))[1]
    )
    first = distance(weights, "ref", "samples.npz")
    assert distance(weights, "ref", "samples.npz") == first and calls == ["ref", "samples.npz", "samples.npz"]
    for frame in (files / "ref" / "001").iterdir():
        Image.fromarray(make_images(1, (24, 24), seed=9)[0]).save(frame)
    assert distance(weights, "ref", "samples.npz") != first and calls[3:] == ["ref", "samples.npz"]


@needs_pyav
@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_video_files_of_a_sampling_job_are_recognised(suffix, files, weights):
    clips = np.load("samples.npz")["arr_0"]
    (files / "job").mkdir()
    for number, clip in enumerate(clips):
        ClipWriter().save(clip[None], files / "job" / f"{number:06d}{suffix}")
    folder = VideoFolder(files / "job", OPENER, None, 1)
    windows = np.stack(list(folder.windows({i: range(16) for i in range(3)})))
    assert windows.shape == (3, 16, 24, 24, 3) and np.abs(windows.astype(float) - clips[:, :16]).mean() < 15
    if suffix == ".gif":
        with Image.open(files / "job" / "000001.gif") as shown:
            shown.seek(7)
            assert np.array_equal(windows[1, 7], np.asarray(shown.convert("RGB")))
    near, far = distance(weights, "samples.npz", "job"), distance(weights, "ref.npz", "job")
    assert 0 < near < far


def other_sizes():
    write_frames(Path("more"), moving_squares(1, 16, side=32))
    Path("more/000").rename("samples/003")


def damaged():
    Path("samples/001/frame_3.png").write_bytes(b"no picture")


def images():
    write_npz(Path("ref.npz"), make_images(4, (24, 24)))


def empty():
    Path("nothing").mkdir()


WRONG = {
    "too short": (
        None, ("ref.npz", "samples"), ("--frame-interval", "4"), "ref.npz: its clips have 48 frames, but 16 frames at"
    ),
    "all too short": (
        None, ("ref", "samples.npz"), ("--frame-interval", "4"),
        "ref: 3 of 3 videos are too short: 16 frames at --frame-interval 4 need 61; 000 has 48"
    ),
    "other sizes": (
        other_sizes, ("ref.npz", "samples"), (), "003/frame_0.png: 32 x 32 pixels, but the first video has 24 x 24"
    ),
    "damaged": (damaged, ("ref.npz", "samples"), (), "frame_3.png: .*replace or remove the file"),
    "images": (images, ("ref.npz", "samples"), ("--metrics", "fvd"), "ref.npz: holds no clips, but samples does"),
    "empty": (empty, ("ref.npz", "nothing"), (), "nothing: holds no videos"),
    "metrics of images": (
        None, ("ref.npz", "samples"), ("--metrics", "fid,fvd"), "samples: a folder of videos has metric fvd alone"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line_and_status_2(files, weights, capsys, name):
    prepare, paths, argv, message = WRONG[name]
    if prepare:
        prepare()
    assert evaluate(weights, *paths, *argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluator: error")]
    assert len(errors) == 1 and re.match(f"evaluator: error: .*{message}", errors[0]), errors
    assert not Path("out.json").exists()


def test_a_missing_folder_is_named(files):
    with pytest.raises(BadImageFile, match="gone: no such folder"):
        VideoFolder(files / "gone", OPENER, None, 1)
