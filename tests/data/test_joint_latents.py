"""Latent stores of clips with single frames of other clips behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data import open_dataset
from data.image_folder import is_flipped
from data.joint_latents import JointLatents
from data.latent_files import Encoded, Raw, write_index, write_shard
from data.latents import LatentShards
from runtime.errors import run
from runtime.json_file import write_json
from scripts import extract_latents
from tests import video_files
from tests.networks import small_autoencoder
from tests.runs import CPU, open_setup, start
from training.trainer import batches

COUNTS, FRAMES, IMAGES = (4, 3), 5, 6
ENCODER = {"name": "ema", "class": "AutoencoderKL", "sha256": "0", "stochastic": True, "scaling_factor": 0.5}


@pytest.fixture
def raw() -> Raw:
    """Raw latents (clips, flips, F, 2 C, h, w) of which each value says where it stands."""
    return np.arange(sum(COUNTS) * 2 * FRAMES * 6 * 4, dtype=np.float16).reshape(sum(COUNTS), 2, FRAMES, 6, 2, 2)


@pytest.fixture
def folder(tmp_path: Path, raw: Raw) -> Path:
    folder = tmp_path / "latents"
    folder.mkdir()
    shape = {"image_shape": [FRAMES, 3, 4, 4], "row_shape": list(raw.shape[1:])}
    write_json(folder / "manifest.json", {"format": 2, "classes": ["ant", "cat"], "encoder": ENCODER, **shape})
    for number, end in enumerate(np.cumsum(COUNTS).tolist()):
        rows = list(range(end - COUNTS[number], end))
        labels, names = [i % 2 for i in rows], [f"{i}.mp4#0" for i in rows]
        write_shard(folder, number, shape["row_shape"], [Encoded(raw[rows], labels, names, [])])
    write_index(folder, len(COUNTS))
    return folder


def place_of(frame: Tensor, raw: Raw) -> tuple[int, int, int]:
    """Clip, flip and number of a frame in the store."""
    clip, flip, number = np.argwhere(raw[..., 0, 0, 0] == frame[0, 0, 0].item())[0].tolist()
    assert np.array_equal(raw[clip, flip, number], frame.numpy())
    return clip, flip, number


def test_frames_behind_a_clip_are_whole_frames_of_the_store_with_the_labels_of_their_clips(
    folder: Path, raw: Raw
) -> None:
    joint, plain = JointLatents(folder, joint_images=IMAGES, seed=3), LatentShards(folder, seed=3)
    keys = [(epoch, index) for epoch in range(8) for index in range(7)]
    seen = []
    for key, (rows, given, index), (clip, label, _) in zip(
        keys, joint.__getitems__(keys), plain.__getitems__(keys), strict=True
    ):
        assert rows.shape == joint.raw_shape == (FRAMES + IMAGES, 6, 2, 2) and index == key[1]
        assert torch.equal(rows[:FRAMES], clip) and given["y"] == label
        places = [place_of(frame, raw) for frame in rows[FRAMES:]]
        assert given["image_labels"].tolist() == [place[0] % 2 for place in places]
        assert {place[1] for place in places} == {is_flipped(key, 4)}, "alike, by a draw of their own"
        seen += [(place[0], place[2]) for place in places]
    assert {*seen} == {(clip, frame) for clip in range(7) for frame in range(FRAMES)}, "all frames of all clips"
    alone = joint[keys[11]]
    again = JointLatents(folder, joint_images=IMAGES, seed=3).__getitems__(keys)[11]
    assert torch.equal(alone[0], again[0]), "by seed, epoch and index alone"
    assert not torch.equal(joint[0, 4][0], joint[1, 4][0])
    assert joint.digest() == plain.digest()


def test_of_a_frame_only_its_own_bytes_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, sizes, read = JointLatents(folder, joint_images=IMAGES), list[int](), os.preadv
    data[0, 0]  # checksums are compared

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return read(descriptor, buffers, offset)

    expected = data.__getitems__([(0, 1), (0, 6)])
    monkeypatch.setattr(os, "preadv", preadv)
    data.__getitems__([(0, 1), (0, 6)])
    frame = 2 * 6 * 2 * 2
    assert sizes == [FRAMES * frame] * 2 + [frame] * 2 * IMAGES
    monkeypatch.delattr(os, "preadv")
    mapped = JointLatents(folder, joint_images=IMAGES).__getitems__([(0, 1), (0, 6)])
    assert all(torch.equal(one[0], two[0]) for one, two in zip(mapped, expected, strict=True))


def test_a_store_is_opened_with_its_shape_and_images_have_none(folder: Path, tmp_path: Path) -> None:
    data = open_dataset("latents", folder, 4, 3, frames=FRAMES, joint_images=2)
    assert data.image_shape == (FRAMES + 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"images \(7, 3, 4, 4\), not \(6, 3, 4, 4\)"):
        open_dataset("latents", folder, 4, 3, frames=4, joint_images=2)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shape = {"image_shape": [3, 4, 4], "row_shape": [1, 6, 2, 2]}
    write_json(pictures / "manifest.json", {"format": 2, "classes": [], "encoder": ENCODER, **shape})
    write_shard(pictures, 0, shape["row_shape"], [Encoded(np.zeros((1, 1, 6, 2, 2), np.float16), [0], ["a"], [])])
    write_index(pictures, 1)
    with pytest.raises(ValueError, match="--joint-images 2: follow clips, and .*pictures holds latents of images"):
        open_dataset("latents", pictures, 4, 3, joint_images=2)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of clips with captions, made by the script."""
    folder = tmp_path_factory.mktemp("captioned")
    small_autoencoder(folder / "vae")
    for first, (name, text) in enumerate((("a", "a small one"), ("b", "a large two"), ("c", "three"))):
        video_files.write_frames(folder / "frames" / name, range(9 * first, 9 * first + 9), size=(20, 18))
        (folder / "frames" / f"{name}.txt").write_text(text)
    argv = f"--data-path {folder}/frames --dataset videofolder --num-frames 4 --vae {folder}/vae --image-size 16"
    argv += f" --output {folder}/latents --num-workers 0 --device cpu --captions txt --text-encoder words"
    assert run(extract_latents.main, "extract_latents.py", argv.split()) == 0
    yield folder / "latents"


def test_frames_have_the_captions_of_their_clips_and_a_network_trains_on_them(captioned: Path, tmp_path: Path) -> None:
    plain, joint = (open_dataset("latents", captioned, 16, 3, joint_images=count, flip=False) for count in (0, 3))
    items = [plain[0, index] for index in range(len(plain))]
    for epoch in range(4):
        rows, given, _ = joint[epoch, 1]
        assert isinstance(given, dict) and given["text"].shape == (4, 8, 32) and given["text_mask"].shape == (4, 8)
        clips = [next(i for i, item in enumerate(items) if any(map(frame.equal, item[0]))) for frame in rows[4:]]
        for place, clip in enumerate([1, *clips]):
            caption = items[clip][1]
            assert isinstance(caption, dict)
            assert all(torch.equal(given[name][place], caption[name]) for name in ("text", "text_mask"))
    argv = ["--dataset", "latents", "--data-path", captioned, "--model", "Skip-LatteT2V-debug/2", "--joint-images", 3]
    argv += "--global-batch-size 2 --num-workers 0 --max-steps 2 --log-every 1 --device cpu".split()
    setup = open_setup(*argv, "--caption-dropout-prob", 0.5)
    ((batch, _),) = next(batches(setup, CPU, 0))[1]
    assert batch.x_start.shape == (2, 4 + 3, 4, 8, 8) and batch.conditioning["text"].shape == (2, 4, 8, 32)
    assert start(tmp_path, *argv) == 0
