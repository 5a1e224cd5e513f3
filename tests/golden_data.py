"""Recorded numbers of the official implementations, the networks they belong to, and how close counts as equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from models import DiT
from models.dit import DiTConfig

GOLDEN = Path(__file__).parent / "golden"
TINY_DITS = ("tiny_p2", "tiny_p4_nosigma", "tiny_nodrop_rgb")


def arrays(name: str) -> dict[str, Tensor]:
    """All arrays of a fixture such as "dit/pos_embed"."""
    return load_file(GOLDEN / f"{name}.safetensors")


def table(name: str) -> Any:
    """A JSON fixture such as "dit/official_model_table"; the order of keys is part of it."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def with_sample_shape(recorded: dict[str, Any]) -> dict[str, Any]:
    """Replace input_size and in_channels of the official configs by our sample_shape."""
    side, channels = recorded.pop("input_size"), recorded.pop("in_channels")
    return {**recorded, "sample_shape": (channels, side, side)}


def tiny_dit(name: str) -> DiT:
    """One of `TINY_DITS` with its recorded weights, strictly loaded, in evaluation mode."""
    network = DiT(DiTConfig(**with_sample_shape(table(f"dit/{name}/config"))))
    network.load_state_dict(arrays(f"dit/{name}/state_dict"))
    return network.eval()


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """max|actual - reference| / max|reference|, in float64."""
    return float((actual.double() - reference.double()).abs().max() / reference.double().abs().max())


def assert_close(actual: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    """Asserts equal shapes and max|actual - reference| <= tolerance * max|reference|; NaN is never close."""
    assert actual.shape == reference.shape
    error = relative_error(actual, reference)
    assert error <= tolerance, f"differs by {error:.2e} of the reference's largest value; allowed: {tolerance:.0e}"


def assert_features_close(actual: Tensor, reference: Tensor, t: Tensor) -> None:
    """For sinusoidal timestep features (N, dim), which no two machines agree on to the last bit.

    Implementations of exp differ in the last place of a frequency (MKL's do, from processor to processor), and
    an angle t * frequency carries t times that difference. So each feature may move by one such unit, not more.
    """
    half = reference.shape[1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    allowed = 1e-6 + t.double()[:, None] * frequencies * torch.finfo(torch.float32).eps
    allowed = functional.pad(torch.cat([allowed, allowed], dim=1), (0, reference.shape[1] % 2))
    assert actual.shape == reference.shape and actual.dtype == torch.float32
    assert ((actual.double() - reference.double()).abs() <= allowed).all()


def assert_close_elementwise(actual: Tensor, reference: Tensor, rtol: float = 1e-4) -> None:
    """For losses: every element within its own relative tolerance, or within what float32 leaves of terms near 1."""
    torch.testing.assert_close(actual, reference, rtol=rtol, atol=1e-7)
