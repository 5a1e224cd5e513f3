"""Similarity of a network's states along a sampling run, from which the cheapest sharing schedule is computed.

The similarities are measured once, on a few images sampled as usual with fresh state at every evaluation; every sharing
interval then has its schedule from the same matrix (`diffusion.caching.cheapest`). They hold for the settings they were
measured with, and are stored under these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.guidance import guided
from diffusion.sampling import Denoiser, Evaluation, ImageNoise, NoiseFn, Sampler, evaluations, sample_loop
from models.contract import Conditioning, ModelOutput, Network
from runtime import migrate
from runtime.devices import float64_device
from runtime.errors import UserError
from runtime.groups import read_groups, save_checkpoint

GROUP, TENSOR = "sharing", "similarity"
_CHUNK = 1 << 24  # numbers that are brought to float64 at a time


def state_similarity(states: Sequence[Tensor]) -> Tensor:
    """Mean cosine between the tokens of every two states.

    Args:
        states: E tensors (rows, T, D) on one device.

    Returns:
        (E, E) float64 on the CPU.
    """
    rows, tokens, width = states[0].shape
    directions = [functional.normalize(state.float(), dim=-1).reshape(-1, width) for state in states]
    # Products in float64: the costs of schedules are sums of small differences from 1.
    place = float64_device(states[0].device)
    total = torch.zeros(len(states), len(states), dtype=torch.float64, device=place)
    step = max(1, _CHUNK // (len(states) * width))
    for start in range(0, rows * tokens, step):
        part = torch.stack([direction[start : start + step] for direction in directions])
        part = part.to(place).double().flatten(1)
        total += part @ part.T
    return (total / (rows * tokens)).cpu()


def run_similarity(
    denoise: Denoiser, sampler: Sampler, x: Tensor, run: Sequence[Evaluation], noise_fn: NoiseFn = torch.randn_like
) -> Tensor:
    """`state_similarity` along one run of `sample_loop`, to which all arguments belong.

    Every evaluation of `run` makes fresh state of the same rows: `evaluations(..., always_both=True)`.

    Raises:
        ValueError: If the network's state is not one tensor of tokens.
    """
    states: list[Tensor] = []

    def keep(i: int, x: Tensor, out: ModelOutput) -> None:
        if not isinstance(out.state, Tensor) or out.state.ndim < 3:
            raise ValueError("this network keeps no tokens between evaluations that could be shared")
        states.append(out.state.flatten(1, -2))  # those of all frames of a clip

    sample_loop(denoise, sampler, x, run, noise_fn=noise_fn, on_step=keep)
    return state_similarity(states)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A few images to sample exactly like those that will share state.

    Args:
        network: As it will be sampled from, on its device.
        sampler: Sampler in use.
        sampling: How process and sampler were made, as JSON values, which tell this sampler from others.
        scale: Guidance scale.
        channels: Guided channels, as for `guided`.
        interval: Guidance interval, in process times.
        images: Number of images.
        images_at_a_time: Each keeps the states of all its evaluations in memory until it is done.
        seed: Seed of noise and labels.
        autocast: Precision of the evaluations; None is that of the weights.
        conditioning: Conditioning of the images, such as text; None takes random labels of all classes.
        null: Their unconditional rows; None asks the network.
    """

    network: Network
    sampler: Sampler
    sampling: Mapping[str, object]
    scale: float
    channels: int | None = None
    interval: tuple[float, float] | None = None
    images: int = 8
    images_at_a_time: int = 1
    seed: int = 0
    autocast: torch.dtype | None = None
    conditioning: Conditioning | None = None
    null: Conditioning | None = None

    def settings(self) -> dict[str, object]:
        """All that the similarities depend on, as JSON values; weights and conditioning by their checksums."""
        own = ("sampling", "scale", "channels", "interval", "images", "seed", "autocast")
        values = {"format": 2, **{name: getattr(self, name) for name in own}}
        values |= {"times": self.sampler.times, "shape": self.network.sample_shape}
        values |= {"weights": _checksum(self.network.state_dict())}
        if self.conditioning is not None:
            values |= {"conditioning": _checksum(self.conditioning), "null": _checksum(self.null or {})}
        plain: dict[str, object] = json.loads(json.dumps(values, default=str))
        return plain

    @torch.no_grad()
    def measure(self) -> Tensor:
        """(E, E) float64 similarities, with the unconditional rows at every evaluation if there is guidance.

        Raises:
            ValueError: If the network keeps no state that could be shared.
        """
        if not self.network.keeps_state:
            raise ValueError("this network keeps nothing between evaluations that could be shared")
        device = next(self.network.parameters()).device
        conditioning, null = self._conditioning(), self.null
        if null is None and self.scale != 1:
            null = self.network.null_conditioning(self.images)
        run = evaluations(self.sampler.times, self.scale, self.interval, always_both=True)
        total = torch.zeros(len(run), len(run), dtype=torch.float64)
        for start in range(0, self.images, self.images_at_a_time):
            rows = slice(start, min(start + self.images_at_a_time, self.images))
            noise = ImageNoise(self.seed, range(rows.start, rows.stop), self.network.sample_shape, device)
            cond, second = (
                None if values is None else {name: value[rows].to(device) for name, value in values.items()}
                for values in (conditioning, null)
            )
            denoise = guided(
                self.network, cond or {}, second, times=self.sampler.time_convention, channels=self.channels
            )
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                similarity = run_similarity(denoise, self.sampler, noise.initial(), run, noise)
            total += (rows.stop - rows.start) * similarity
        return total / self.images

    def _conditioning(self) -> Conditioning:
        """The images' conditioning, or random labels."""
        if self.conditioning is not None:
            return self.conditioning
        if not self.network.conditioning:
            return {}
        if self.network.conditioning != ("y",):
            raise ValueError(f"calibration needs the conditioning {', '.join(self.network.conditioning)}")
        generator = torch.Generator().manual_seed(self.seed)
        return {"y": torch.randint(self.network.config.num_classes, (self.images,), generator=generator)}

    def similarity(self, store: Path | None = None) -> Tensor:
        """Read the similarities measured earlier with exactly these settings, or measure them.

        Args:
            store: Folder of earlier measurements, one file for each settings; None keeps nothing.

        Raises:
            ValueError: If the network keeps no state that could be shared.
            UserError: If the folder cannot be written to.
        """
        if store is None:
            return self.measure()
        settings = self.settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        path = store / f"sharing-{digest[:16]}.safetensors"
        # An earlier version gave files other names.
        candidates = [path] if path.exists() else sorted(store.glob("sharing-*.safetensors"))
        similarity = next((stored for each in candidates if (stored := _read(each, settings)) is not None), None)
        if similarity is None:
            similarity = self.measure()
            store.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, {GROUP: {TENSOR: similarity}}, settings)
        return similarity


def _read(path: Path, settings: Mapping[str, object]) -> Tensor | None:
    """Similarities in a file of these settings; None if it is damaged, or of others."""
    try:
        groups, stored = read_groups(path, lambda names: [GROUP], "sharing schedule")
    except UserError:
        return None
    stored = None if stored is None else migrate.calibration(stored, dict(settings))
    return groups[GROUP].get(TENSOR) if stored == settings else None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
