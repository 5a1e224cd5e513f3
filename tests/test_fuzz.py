"""Flipped bits and truncations of every format that the program reads: found, or without effect; never a traceback."""

import gzip
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.idx import read_idx
from data.image_folder import decode_image
from data.latent_files import Encoded, write_index, write_shard
from data.latents import LatentShards
from data.video_files import inspect_video, read_frames
from diffusion.solver_table import read_table, write_table
from evaluator.features import FileFeatures, load_features, save_features
from evaluator.npz import ImageFile
from evaluator.small import DIGITS, load_feature_network
from evaluator.video.weights import load_i3d
from models import create_model
from models.loading import load_network
from runtime.errors import UserError
from runtime.json_file import read_json, write_json
from sampling.published_solvers import published_table
from tests.checkpoints import write_network
from tests.i3d_files import NARROW, write_i3d
from tests.networks import randomise
from tests.video_files import write_video


class Format(NamedTuple):
    """A format of files.

    Attributes:
        suffix: Of the file.
        write: Writes a file.
        read: Reads it; returns numbers, or None where the program takes the file for absent.
        checked: It carries checksums: no change may be silent.
    """

    suffix: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    checked: bool


def network() -> Any:
    return randomise(create_model("DiT-debug/2", sample_shape=(1, 8, 8), num_classes=4))


def numbers(module: Any) -> dict[str, Any]:
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def pt(path: Path, zipped: bool) -> None:
    torch.save({"ema": network().state_dict(), "epoch": 3}, path, _use_new_zipfile_serialization=zipped)


def training_pt(path: Path) -> None:
    """The average among what is not read."""
    raw, ema = network().state_dict(), network().state_dict()
    moments = {i: {"exp_avg": tensor / 3} for i, tensor in enumerate(raw.values())}
    torch.save({"model": raw, "ema": ema, "opt": {"state": moments, "param_groups": [{"lr": 1e-4}]}}, path)


def features(path: Path) -> FileFeatures | None:
    return load_features(path, count=6, spatial=False, device=torch.device("cpu"))


def picture(path: Path) -> Any:
    return np.asarray(decode_image(path.read_bytes(), 3))


RAW = np.random.default_rng(1).standard_normal((6, 2, 4, 4, 4)).astype(np.float16)


def store(path: Path, name: str) -> None:
    """A store of latents, and a copy of one of its files."""
    folder = path.parent / "store"
    if not folder.exists():
        folder.mkdir()
        manifest = {
            "format": 2, "classes": ["a", "b"], "image_shape": [3, 8, 8], "batch_size": 2, "row_shape": RAW.shape[1:],
            "encoder": {"name": "ema", "sha256": "0", "stochastic": False, "scaling_factor": 0.5, "shift_factor": 0.0},
        }  # fmt: skip
        write_json(folder / "manifest.json", json.loads(json.dumps(manifest)))
        write_shard(folder, 0, RAW.shape[1:], [Encoded(RAW, [i % 2 for i in range(6)], list("abcdef"), [])])
        write_index(folder, 1)
    shutil.copy(folder / name, path)


def latents(path: Path, name: str) -> Any:
    """Latents and labels of the store with one of its files replaced."""
    file = path.parent / "store" / name
    file.unlink()
    shutil.copy(path, file)
    data = LatentShards(file.parent, flip=False)
    return {"raw": np.stack([data[0, i][0].numpy() for i in range(6)]), "labels": [data[0, i][1] for i in range(6)]}


def idx(path: Path) -> None:
    content = bytes([0, 0, 8, PIXELS.ndim]) + b"".join(size.to_bytes(4, "big") for size in PIXELS.shape)
    content += PIXELS.tobytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def sharded(path: Path) -> None:
    """An index of safetensors files, and the file."""
    weights = network().state_dict()
    save_file(weights, path.parent / "shard.safetensors")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "shard.safetensors")}))


def video(path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (pip install av)")
    write_video(path, 12, codec="mpeg4" if path.suffix == ".avi" else "libx264")


def frames(path: Path) -> Any:
    """The first frames; damage may announce any number of them."""
    info = inspect_video(path)
    numbers = range(min(info.length, 24))
    return {i: np.asarray(frame) for i, frame in enumerate(read_frames(path, info, numbers, 3))}


PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
FORMATS = {
    "our checkpoint": Format(
        ".safetensors",
        lambda path: write_network(path, "DiT-debug/2", network()),
        lambda path: numbers(load_network(path)[0]),
        True,
    ),
    "zip .pt": Format(".pt", lambda path: pt(path, True), lambda path: numbers(load_network(path)[0]), True),
    "zip .pt of training": Format(".pt", training_pt, lambda path: numbers(load_network(path)[0]), True),
    "flat .pt": Format(".pt", lambda path: pt(path, False), lambda path: numbers(load_network(path)[0]), False),
    "foreign safetensors": Format(
        ".safetensors",
        lambda path: save_file(network().state_dict(), path),
        lambda path: numbers(load_network(path)[0]),
        False,
    ),
    "cached features": Format(
        ".safetensors",
        lambda path: save_features(FileFeatures(torch.arange(48.0).reshape(6, 8), None), path),
        lambda path: None if (kept := features(path)) is None else kept.pool.numpy(),
        True,
    ),
    "digits network": Format(
        ".safetensors",
        lambda path: path.write_bytes(DIGITS.weights.read_bytes()),
        lambda path: numbers(load_feature_network(path=path)),
        True,
    ),
    "solver table": Format(
        ".json",
        lambda path: write_table(published_table("SiT-XL/2", 5), path),
        lambda path: read_table(path),
        True,
    ),
    "JSON": Format(
        ".json",
        lambda path: write_json(path, {"a": [1, 2.5], "b": "x"}),
        lambda path: [read_json(path)[name] for name in "ab"],  # a flip in the checksum's own name adds a member
        True,
    ),
    "npz": Format(
        ".npz",
        lambda path: np.savez(path, PIXELS[None].repeat(4, 0)),
        lambda path: np.concatenate(list(ImageFile(path).batches(0, 4, 2))),
        True,
    ),
    "shard of latents": Format(
        ".npy", lambda path: store(path, "00000.npy"), lambda path: latents(path, "00000.npy"), True
    ),
    "index of latents": Format(
        ".json", lambda path: store(path, "index.json"), lambda path: latents(path, "index.json"), True
    ),
    "index of safetensors": Format(
        ".safetensors.index.json", sharded, lambda path: numbers(load_network(path)[0]), False
    ),
    "idx": Format(".idx", idx, read_idx, False),
    "idx.gz": Format(".gz", idx, read_idx, True),
    "PNG": Format(".png", lambda path: Image.fromarray(PIXELS).save(path), picture, False),
    "JPEG": Format(".jpg", lambda path: Image.fromarray(PIXELS).save(path), picture, False),
    "WebP": Format(".webp", lambda path: Image.fromarray(PIXELS).save(path), picture, False),
    "GIF": Format(".gif", lambda path: Image.fromarray(PIXELS).save(path), picture, False),
    "TIFF": Format(".tif", lambda path: Image.fromarray(PIXELS).save(path, compression="tiff_lzw"), picture, False),
    "BMP": Format(".bmp", lambda path: Image.fromarray(PIXELS).save(path), picture, False),
    "I3D": Format(".ckpt", write_i3d, lambda path: numbers(load_i3d(path, divisor=NARROW)), False),
    **{name: Format(f".{name}", video, frames, False) for name in ("mp4", "avi", "mkv", "ts", "flv")},
    "PPM": Format(".ppm", lambda path: Image.fromarray(PIXELS).save(path), picture, False),
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, np.ndarray) or bool(np.isfinite(value).all())


def fuzz(kind: str, folder: Path, flips: int, cuts: int) -> dict[str, int]:
    """Damage a file in many ways, and count what came of it."""
    own, rng, counts = FORMATS[kind], np.random.default_rng(0), {"found": 0, "without effect": 0, "silent": 0}
    path, control = folder / f"damaged{own.suffix}", folder / f"control{own.suffix}"
    own.write(control)
    content, expected = control.read_bytes(), own.read(control)
    assert expected is not None
    damaged = []
    for bit in rng.integers(0, 8 * len(content), flips):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << (bit % 8)
        damaged.append(bytes(broken))
    damaged += [content[:length] for length in rng.integers(0, len(content), cuts)]
    for broken in damaged:
        path.unlink(missing_ok=True)  # a mapped file is not written to
        path.write_bytes(broken)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = own.read(path)
        except (UserError, ValueError, OSError, KeyError) as error:
            assert "\n" not in " ".join(str(error).split()) and str(error)
            counts["found"] += 1
            continue
        if value is None:
            counts["found"] += 1
            continue
        assert finite(value)
        counts["without effect" if equal(value, expected) else "silent"] += 1
    return counts


def check(kind: str, counts: dict[str, int]) -> None:
    assert counts["silent"] == 0 or not FORMATS[kind].checked, counts


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sample_of_damages(kind: str, tmp_path: Path) -> None:
    check(kind, fuzz(kind, tmp_path, 12, 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_many_damages(kind: str, tmp_path: Path) -> None:
    counts = fuzz(kind, tmp_path, 400, 40)
    print(kind, json.dumps(counts))
    check(kind, counts)
