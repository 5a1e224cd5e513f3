"""How alike a network's states are along a sampling run: what a schedule for sharing them is derived from.

The similarities are measured once, on a few images drawn as usual with fresh state at every evaluation; every refresh
rate then has its schedule from the same matrix (`diffusion.refresh.cheapest`). They hold for the settings they were
measured with, and are kept under these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.sampling import Denoise, ImageNoise, NoiseFn, Sampler, guided, sample_loop
from runtime.checkpoint import read_groups, save_checkpoint
from runtime.errors import UserError

if TYPE_CHECKING:
    from models.contract import ModelOutput, Network

GROUP, TENSOR = "sharing", "similarity"
_CHUNK = 1 << 24  # numbers that are brought to float64 at a time


def state_similarity(states: Sequence[Tensor]) -> Tensor:
    """Mean cosine between the tokens of every two states.

    Args:
        states: E tensors (rows, T, D) on one device.

    Returns:
        (E, E) float64 on the CPU; the products are taken in float64, because what counts is how little is missing to 1.
    """
    rows, tokens, width = states[0].shape
    directions = [functional.normalize(state.float(), dim=-1).reshape(-1, width) for state in states]
    total = torch.zeros(len(states), len(states), dtype=torch.float64, device=states[0].device)
    step = max(1, _CHUNK // (len(states) * width))
    for start in range(0, rows * tokens, step):
        part = torch.stack([direction[start : start + step] for direction in directions]).double().flatten(1)
        total += part @ part.T
    return (total / (rows * tokens)).cpu()


def run_similarity(denoise: Denoise, sampler: Sampler, x: Tensor, noise_fn: NoiseFn) -> Tensor:
    """`state_similarity` along one run that computes fresh state at every evaluation.

    Args:
        denoise: with the same rows at every evaluation (`guided(..., always_both=True)`).
        sampler: of the run.
        x: (N, C, H, W) starting noise.
        noise_fn: as for `sample_loop`.

    Raises:
        ValueError: if the network hands out no tokens to compare.
    """
    states: list[Tensor] = []

    def keep(i: int, x: Tensor, out: ModelOutput) -> None:
        if not isinstance(out.state, Tensor) or out.state.ndim != 3:
            raise ValueError("this network keeps no tokens between evaluations that could be shared")
        states.append(out.state)

    sample_loop(denoise, sampler, x, noise_fn=noise_fn, on_step=keep)
    return state_similarity(states)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A few images to be drawn exactly as those that will share state.

    Args:
        network: as it will be sampled from, on its device.
        sampler: in use.
        sampling: how process and sampler were made, as JSON values: what tells this sampler from others.
        scale: of guidance.
        channels: guided, as for `guided`.
        interval: of guidance, in the network's units.
        shape: (C, H, W) of an image.
        images: how many, with labels drawn from all classes.
        images_at_a_time: each leaves its states of all evaluations in memory until it is done.
        seed: of noise and labels.
        autocast: precision of the evaluations; None is the weights' own.
    """

    network: Network
    sampler: Sampler
    sampling: Mapping[str, Any]
    scale: float
    channels: int | None = None
    interval: tuple[float, float] | None = None
    shape: tuple[int, int, int]
    images: int = 8
    images_at_a_time: int = 1
    seed: int = 0
    autocast: torch.dtype | None = None

    def settings(self) -> dict[str, Any]:
        """All that the similarities depend on, as JSON values; the weights by their checksum."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("network", "sampler", "images_at_a_time"):
            del given[name]
        given |= {"times": self.sampler.times, "weights": _weights_checksum(self.network)}
        return json.loads(json.dumps(given, default=str))

    @torch.no_grad()
    def measure(self) -> Tensor:
        """(E, E) float64 similarities, both halves of guidance included at every evaluation.

        Raises:
            ValueError: if the network keeps nothing that could be shared.
        """
        if not self.network.keeps_state:
            raise ValueError("this network keeps nothing between evaluations that could be shared")
        device = next(self.network.parameters()).device
        generator = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(self.network.num_classes, (self.images,), generator=generator)
        y_null = None if self.scale == 1 else self.network.null_class
        total = torch.zeros(len(self.sampler.times), len(self.sampler.times), dtype=torch.float64)
        for start in range(0, self.images, self.images_at_a_time):
            indices = range(start, min(start + self.images_at_a_time, self.images))
            y = labels[list(indices)].to(device)
            noise = ImageNoise(self.seed, indices, self.shape, device)
            denoise = guided(
                self.network, y, y_null, self.scale, self.channels, self.interval, self.sampler.times, always_both=True
            )
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                total += len(indices) * run_similarity(denoise, self.sampler, noise.initial(), noise)
        return total / self.images

    def similarity(self, store: Path | None = None) -> Tensor:
        """Measured before with these very settings, or now.

        Args:
            store: folder of earlier measurements, one file for each settings; None keeps nothing.

        Raises:
            ValueError: if the network keeps nothing that could be shared.
            UserError: if the folder cannot be written to.
        """
        if store is None:
            return self.measure()
        settings = self.settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        path = store / f"sharing-{digest[:16]}.safetensors"
        found = _read(path, settings)
        if found is None:
            found = self.measure()
            store.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, {GROUP: {TENSOR: found}}, settings)
        return found


def _read(path: Path, settings: Mapping[str, Any]) -> Tensor | None:
    """What a file holds for these settings; None if there is none, it is damaged, or it is of others."""
    if not path.is_file():
        return None
    try:
        groups, found = read_groups(path, [GROUP], "sharing schedule")
    except UserError:
        return None
    return groups[GROUP].get(TENSOR) if found == settings else None


def _weights_checksum(network: Network) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
