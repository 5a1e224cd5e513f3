"""Extraction of latents of clips, and training from them."""

import json
from pathlib import Path

import pytest
import torch

from data import open_dataset, open_encoder
from data.clip_folder import ClipFolder
from data.latents import LatentShards
from runtime.errors import run
from scripts import extract_latents
from tests import video_files
from tests.networks import small_autoencoder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_autoencoder(folder)
    return folder


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    for name, count in (("cat/a", 13), ("cat/b", 7), ("dog/a", 8)):
        video_files.write_frames(tmp_path / "frames" / name, range(count), size=(20, 18))
    return tmp_path / "frames"


def extract(frames: Path, vae: Path, *more: str) -> int:
    argv = f"--data-path {frames} --dataset videofolder --num-frames 3 --frame-interval 2 --vae {vae} --image-size 16"
    argv += f" --output {frames.parent / 'latents'} --batch-size 7 --shard-size 2 --num-workers 0 --device cpu"
    return run(extract_latents.main, "extract_latents.py", [*argv.split(), *more])


PATHS = ["cat/a#0", "cat/a#6", "cat/b#0", "dog/a#0"]


def test_stored_latents_are_those_of_all_clips_without_a_common_frame(frames: Path, vae: Path) -> None:
    assert extract(frames, vae) == 0
    latents = open_dataset("latents", frames.parent / "latents", 16, 3, frames=3, flip=False)
    assert isinstance(latents, LatentShards) and latents.image_shape == (3, 3, 16, 16)
    assert latents.classes == ["cat", "dog"] and [latents.path(i) for i in range(4)] == PATHS
    videos, encoder = ClipFolder(frames, 16, frames=3, flip=False), open_encoder(str(vae), (3, 16, 16))
    for index, (video, start) in enumerate([(0, 0), (0, 6), (1, 0), (2, 0)]):
        raw, label, _ = latents[0, index]
        clip = videos.read(video, [start, start + 2, start + 4])
        expected = encoder.encode_pixels(clip[None])[0]
        assert label == (index == 3) and raw.shape == expected.shape == latents.raw_shape
        torch.testing.assert_close(raw.float(), expected, rtol=2e-3, atol=1e-3)
    index = json.loads((frames.parent / "latents/index.json").read_text())
    assert index["clips"] == {"frame_interval": 2, "clip_window": "every", "clip_crop": "adm"}
    before = {path.name: path.read_bytes() for path in (frames.parent / "latents").iterdir()}
    assert extract(frames, vae) == 0
    assert {path.name: path.read_bytes() for path in (frames.parent / "latents").iterdir()} == before


def test_other_clips_are_another_extraction(frames: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract(frames, vae) == 0
    assert extract(frames, vae, "--clip-crop", "resize") == 2
    assert "--clip-window: " in capsys.readouterr().err
    assert extract(frames, vae, "--num-frames", "2") == 2
    assert extract(frames, vae, "--overwrite", "--clip-crop", "resize") == 0, "floats are encoded too"


def test_clips_that_cannot_be_read_are_left_out(frames: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (frames / "cat/a/frame_0010.png").write_bytes(b"damaged")
    assert extract(frames, vae) == 0
    assert "left out cat/a#6: not an image" in capsys.readouterr().err
    latents = open_dataset("latents", frames.parent / "latents", 16, 3)
    assert [latents.path(i) for i in range(3)] == ["cat/a#0", "cat/b#0", "dog/a#0"]  # type: ignore[attr-defined]
    assert extract(frames, vae, "--overwrite", "--strict") == 2


def test_videos_without_classes_have_latents_without_labels(frames: Path, vae: Path) -> None:
    assert extract(frames / "cat", vae) == 0
    latents = open_dataset("latents", frames / "latents", None, 3)
    assert latents.classes == [] and latents[0, 0][1] == {}


def test_what_does_not_fit_is_one_line(frames: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract(frames, vae, "--dataset", "imagefolder") == 2
    assert "--clip-crop: are for --dataset videofolder" in capsys.readouterr().err
    assert extract(frames, vae, "--num-frames", "40") == 2
    assert "3 of 3 videos are too short: 40 frames at --frame-interval 2 need 79" in capsys.readouterr().err
    assert extract(frames, vae) == 0
    with pytest.raises(ValueError, match=r"of images \(3, 3, 16, 16\), not \(4, 3, 16, 16\)"):
        open_dataset("latents", frames.parent / "latents", 16, 3, frames=4)
