"""Files of format 1, as commit 3528681 wrote them: recorded text and small files, and large files rebuilt to the byte.

Recorded are the layout of every large file (metadata, names, types and shapes of its tensors) and everything that is
small. The numbers in the large files follow from a formula in integer arithmetic, the same on every machine. Nothing
here uses the project's code, because that code changes with the format. tests/golden/format1/manifest.json describes
every file and the command that made it.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "golden" / "format1"
STEP = 2  # of every checkpoint here; the runs end at step 4
LAST_STEP = 4
METADATA, CHECKSUMS = "dit_family", "crc32"  # keys of the safetensors metadata
IMAGE_SIZE, IMAGES, CLASSES = 16, 5, ("ant", "cat")  # of the images that the stored latents were made from


class Layout(NamedTuple):
    """What is recorded of a large safetensors file.

    Attributes:
        metadata: Its text entries, in their order.
        tensors: Name, type and shape of each tensor, in the order of the file.
        sha256: Of the rebuilt file.
    """

    metadata: dict[str, str]
    tensors: list[tuple[str, str, list[int]]]
    sha256: str


def manifest() -> dict[str, Any]:
    """The description of all files."""
    return json.loads((FOLDER / "manifest.json").read_text())


def layout(folder: str) -> Layout:
    """The recorded layout in a folder of fixtures, such as "dit" or "autoencoder"."""
    return Layout(**json.loads(gzip.decompress((FOLDER / folder / "layout.json.gz").read_bytes())))


def numbers(name: str, shape: list[int]) -> npt.NDArray[np.float32]:
    """The values of a tensor: zero mean and variance 1 / fan-in for matrices, small for biases, near 1 for norms.

    Second moments of the optimizer are positive, its steps are those of the checkpoint, and positional embeddings,
    which no run trains, are the recorded ones.
    """
    if name.endswith("/step"):
        return np.full(shape, STEP, np.float32)
    if name.endswith("/pos_embed"):
        return load_file(FOLDER / "pos_embed.safetensors")["pos_embed"]
    uniform = _uniform(name, math.prod(shape)).reshape(shape)
    spread = 2 * uniform - 1
    if name.endswith("/exp_avg"):
        values = 1e-3 * spread
    elif name.endswith("/exp_avg_sq"):
        values = 1e-7 * (0.5 + uniform)
    elif len(shape) > 1:
        values = np.sqrt(np.float64(3) / math.prod(shape[1:])) * spread
    else:
        values = 0.1 * spread + float("norm" in name and name.endswith("weight"))
    return values.astype(np.float32)


def _uniform(name: str, count: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) that follow from a name: splitmix64 of the name's CRC-32 and the index."""
    state = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    state *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def write_safetensors(path: Path, metadata: dict[str, str], tensors: dict[str, npt.NDArray[Any]]) -> Path:
    """Writes a safetensors file with everything in the given order, so that its bytes depend on no library version."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = {"float32": "F32", "float64": "F64"}[str(tensor.dtype)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.tobytes() for t in tensors.values()))
    return path


def with_checksums(metadata: dict[str, str], tensors: dict[str, npt.NDArray[Any]]) -> dict[str, str]:
    """The metadata with the checksums of these tensors, in the recorded order."""
    checksums = {name: zlib.crc32(tensors[name].tobytes()) for name in json.loads(metadata[CHECKSUMS])}
    return {**metadata, CHECKSUMS: json.dumps(checksums)}


def write_checkpoint(run: str, path: Path) -> Path:
    """Rebuilds the checkpoint of a run, such as "dit", at step 2."""
    recorded = layout(run)
    tensors = {name: numbers(name, shape) for name, _, shape in recorded.tensors}
    return write_safetensors(path, with_checksums(recorded.metadata, tensors), tensors)


def write_run(run: str, results: Path) -> Path:
    """Rebuilds the folder of a run at step 2, as if it had been stopped there; returns its checkpoint."""
    folder = results / f"000-{json.loads(config_path(run).read_text())['model'].replace('/', '-')}"
    folder.mkdir(parents=True)
    for name in ("config.json", "log.txt", "metrics.jsonl"):
        shutil.copy(FOLDER / run / name, folder)
    return write_checkpoint(run, folder / "checkpoints" / f"{STEP:07d}.safetensors")


def config_path(run: str) -> Path:
    """The config.json of a run."""
    return FOLDER / run / "config.json"


def metrics(run: str) -> list[dict[str, float]]:
    """What the run logged, a dictionary for each of its steps."""
    return [json.loads(line) for line in (FOLDER / run / "metrics.jsonl").read_text().splitlines()]


def write_autoencoder(folder: Path) -> Path:
    """Rebuilds the folder of the small AutoencoderKL (factor 2, 4 latent channels) of the stored latents."""
    recorded = layout("autoencoder")
    tensors = {name: numbers(f"autoencoder/{name}", shape) for name, _, shape in recorded.tensors}
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", recorded.metadata, tensors)
    shutil.copy(FOLDER / "autoencoder" / "config.json", folder)
    return folder


def write_images(folder: Path) -> Path:
    """Makes the image folder that the stored latents were made from."""
    for i in range(IMAGES):
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        pixels = (256 * _uniform(f"image {i}", math.prod(shape))).astype(np.uint8).reshape(shape)
        path = folder / CLASSES[i >= 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def copy_folder(name: str, target: Path) -> Path:
    """Copies a folder of small files, such as "latent_store", to where it may be changed."""
    return Path(shutil.copytree(FOLDER / name, target))


def write_similarities(folder: Path, similarity: npt.NDArray[np.float64]) -> Path:
    """Rebuilds the calibration file of the job in "shared_job" with other similarities (6, 6), under the same name."""
    (recorded,) = (FOLDER / "shared_job" / "sharing").glob("*.safetensors")
    with safe_open(recorded, framework="numpy") as file:
        metadata, (name,) = file.metadata(), file.keys()
    return write_safetensors(folder / recorded.name, with_checksums(metadata, {name: similarity}), {name: similarity})


def late_similarities() -> npt.NDArray[np.float64]:
    """States that are alike from the third evaluation on: of 3 evaluations that compute them, the first 3 are best."""
    similarity = np.full((6, 6), 0.5)
    similarity[2:, 2:] = 0.999
    np.fill_diagonal(similarity, 1)
    return similarity
