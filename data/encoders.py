"""Encoders: the two maps between pixels and the latents that a network models.

    pixels --encode_pixels--> raw latents --to_latents--> latents --decode--> pixels

Raw latents are what a latent store keeps. Those of a stochastic encoder are posterior parameters: means, then standard
deviations, along the channel axis. The adapters for autoencoders of diffusers are in autoencoders.py.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Final

import torch
from torch import Tensor

from data.pixels import from_uint8
from runtime.json_file import Json, parse_json

FP32: Final = "fp32"
PRECISIONS = {FP32: torch.float32, "bf16": torch.bfloat16}  # values of `--vae-precision`
UNVERIFIED = "unverified: no digest of its weights is known"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LatentScaling:
    """The map from raw latents z to latents: (z - shift_factor - latents_mean) * scaling_factor / latents_std.

    The names are those of diffusers' configs.

    Raises:
        ValueError: For values that cannot be inverted.
    """

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()  # one number per channel, or none
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name, value in vars(self).items():
            positive = name in ("scaling_factor", "latents_std")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, bool) or not isinstance(number, (int, float)):
                    raise ValueError(f"{name} {value}: not a number")
                rounded = float(torch.tensor(float(number), dtype=torch.float32))
                if not math.isfinite(rounded) or (positive and rounded <= 0):
                    raise ValueError(f"{name} {value}: must be {'positive' if positive else 'finite'} in float32")
        if bool(self.latents_mean) != bool(self.latents_std):
            raise ValueError("latents_mean and latents_std belong together; one of them is missing")

    @classmethod
    def from_config(cls, config: Json, channels: int) -> LatentScaling:
        """Read the fields from a config of diffusers or a latent store's index; absent and null mean no effect."""
        values = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        for name in values.keys() & {"latents_mean", "latents_std"}:
            if not isinstance(values[name], (list, tuple)):
                raise ValueError(f"{name} {values[name]}: not a list of numbers, one per latent channel")
            values[name] = tuple(values[name])
            if len(values[name]) not in (0, channels):
                raise ValueError(f"{name} has {len(values[name])} numbers for {channels} latent channels")
        return cls(**values)

    def undo(self, latents: Tensor) -> Tensor:
        """Raw latents z of latents (..., C, H, W)."""
        shift, scale = _coefficients(self, latents.device)
        return latents / scale + shift


@functools.cache  # numbers per channel are uploaded once, not at every step
def _coefficients(scaling: LatentScaling, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
    mean = torch.tensor(scaling.latents_mean, device=device).view(-1, 1, 1) if scaling.latents_mean else 0.0
    std = torch.tensor(scaling.latents_std, device=device).view(-1, 1, 1) if scaling.latents_std else 1.0
    return scaling.shift_factor + mean, scaling.scaling_factor / std


class Encoder:
    """Base class of encoders that take images one by one; the frames of a clip become rows of the batch.

    Shapes of images are (C, H, W) or, for clips, (F, C, H, W); the channel axis is -3 everywhere.

    A subclass sets the attributes, defines `encode_rows` and `decode_rows`, and is registered by its class statement:
    `names` are values of `--vae`; `folder_class` is the `_class_name` in the config.json of a folder given as `--vae`.

    Args:
        name: Value of `--vae`.
        device: Device of the weights.
        dtype: Precision of the weights and computations. Latents and pixels are float32 in any case.
    """

    names: ClassVar[dict[str, type[Encoder]]] = {}
    folder_classes: ClassVar[dict[str, type[Encoder]]] = {}
    class_name: ClassVar[str] = ""

    stochastic = False  # raw latents are posterior parameters, and `to_latents` needs noise
    scaling = LatentScaling()
    settings: Mapping[str, object] = MappingProxyType({})  # JSON values that, with the weights, fix raw latents
    precision = FP32  # of weights and computations
    weight_bytes = 0  # on the device
    image_channels = 3
    image_size: tuple[int, int] | None = None  # (H, W), if the encoder takes no other
    latent_channels = 3
    factor = 1  # pixels per latent, on each side

    def __init_subclass__(cls, names: Sequence[str] = (), folder_class: str | None = None) -> None:
        """Register the class."""
        Encoder.names.update(dict.fromkeys(names, cls))
        if folder_class is not None:
            cls.class_name = folder_class
            Encoder.folder_classes[folder_class] = cls

    def __init__(
        self, name: str = "none", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.name = name
        self.precision = next((own for own, known in PRECISIONS.items() if known == dtype), str(dtype))

    def latent_shape(self, image_shape: Shape) -> Shape:
        """Shape of the latents of an image or clip.

        Raises:
            ValueError: If the encoder cannot take such images.
        """
        *frames, channels, height, width = image_shape
        if channels != self.image_channels:
            raise ValueError(f"the autoencoder takes images of {self.image_channels} channels, not {channels}")
        if self.image_size not in (None, (height, width)):
            raise ValueError(f"the autoencoder takes images of {self.image_size} pixels, not {(height, width)}")
        check_sides((height, width), self.factor)
        return *frames, self.latent_channels, height // self.factor, width // self.factor

    def image_shape(self, latent_shape: Shape) -> Shape:
        """Shape of the image or clip of such latents."""
        *frames, _, height, width = latent_shape
        return *frames, self.image_channels, height * self.factor, width * self.factor

    def raw_shape(self, image_shape: Shape) -> Shape:
        """Shape of the raw latents of an image or clip."""
        *frames, channels, height, width = self.latent_shape(image_shape)
        return *frames, 2 * channels if self.stochastic else channels, height, width

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Raw latents of pixels (N, ..., C, H, W): uint8, or float32 in [-1, 1]."""
        images = from_uint8(pixels) if pixels.dtype == torch.uint8 else pixels
        return self.encode_rows(images.flatten(0, -4)).unflatten(0, images.shape[:-3])

    def to_latents(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of raw latents of any float type: a sample of the posterior if there is one, shifted and scaled.

        Stochastic encoders need standard normal noise in the shape of the latents; zeros give the posterior's mean.
        """
        z = raw.float()
        if self.stochastic:
            if noise is None:
                raise ValueError("posterior parameters need noise to become latents")
            mean, std = z.chunk(2, dim=-3)
            z = mean + std * noise
        shift, scale = _coefficients(self.scaling, z.device)
        return (z - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, ..., C, H, W) of latents, not clamped."""
        z = self.scaling.undo(latents)
        return self.decode_rows(z.flatten(0, -4)).unflatten(0, z.shape[:-3])

    def describe(self) -> dict[str, object]:
        """JSON values that fix raw latents, and how they become latents."""
        identity = {"name": self.name, "class": self.class_name or type(self).__name__, "sha256": self.encoder_sha256()}
        return {**identity, "stochastic": self.stochastic, **asdict(self.scaling), "settings": dict(self.settings)}

    def describe_latents(self) -> dict[str, object]:
        """`describe`, and the precision of encoding if that is not float32."""
        return {**self.describe(), **({} if self.precision == FP32 else {"precision": self.precision})}

    def check_precision(self, recorded: Json) -> None:
        """Raise a ValueError if a description of latents is of those that were encoded in another precision."""
        theirs = recorded.get("precision", FP32)
        if theirs != self.precision:
            raise ValueError(
                f"the autoencoder {self.name!r} encodes in {self.precision} (--vae-precision), and these latents were "
                f"encoded in {theirs}"
            )

    def check_same(self, recorded: Json) -> None:
        """Raise a ValueError if a description is that of another encoder; it may lack entries.

        Decoders may differ, as those of the official pair do.
        """
        if recorded.get("sha256") and recorded["sha256"] != self.encoder_sha256():
            raise ValueError(f"the autoencoder {self.name!r} is not the one that made these latents")
        scaling = LatentScaling.from_config(recorded, self.latent_channels)
        if "scaling_factor" in recorded and scaling != self.scaling:
            raise ValueError(f"the autoencoder {self.name!r} has {self.scaling}, but these latents {scaling}")
        theirs = recorded.get("settings", {})
        for name, value in json.loads(json.dumps(dict(self.settings))).items():
            if theirs.get(name, value) != value:
                raise ValueError(f"the autoencoder {self.name!r} has {name} {value}, but these latents {theirs[name]}")

    def is_unverified(self, recorded: Mapping[str, object]) -> bool:
        """True if it has weights, and a record has no digest to compare them with."""
        return False

    def encoder_sha256(self) -> str:
        """Fingerprint of the weights that encode; encoders that differ in the decoder alone share it."""
        return ""

    def encode_rows(self, pixels: Tensor) -> Tensor:
        """Raw latents of images (N, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    def decode_rows(self, z: Tensor) -> Tensor:
        """Images (N, C, H, W) of latents that are neither shifted nor scaled."""
        raise NotImplementedError


class Pixels(Encoder, names=("none",)):
    """No encoder: the network models pixels, of any number of channels."""

    def latent_shape(self, image_shape: Shape) -> Shape:
        """Shape of the image or clip itself."""
        return tuple(image_shape)

    def image_shape(self, latent_shape: Shape) -> Shape:
        """Shape of the latents themselves."""
        return tuple(latent_shape)

    def encode_rows(self, pixels: Tensor) -> Tensor:
        """Pixels, unchanged."""
        return pixels

    def decode_rows(self, z: Tensor) -> Tensor:
        """Pixels, unchanged."""
        return z


def open_encoder(
    name: str, image_shape: Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """Open an encoder by the value of `--vae`: "ema", "mse", "none", or a local folder of an autoencoder of diffusers.

    A size of images that does not fit is an error before the official weights are loaded.

    Raises:
        ValueError: If the encoder cannot be loaded, or is known not to take such images.
    """
    encoder_class = Encoder.names.get(name) or _class_of_folder(Path(name))
    check_sides(image_shape[-2:], encoder_class.factor)
    return encoder_class(name, device, dtype)


def check_sides(sides: Sequence[int], factor: int) -> None:
    """Raise a ValueError unless the factor divides the sides of an image."""
    for side in sides:
        if side < factor or side % factor:
            below, above = side // factor * factor, (side // factor + 1) * factor
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(
                f"image size {side} is not a multiple of the autoencoder's factor {factor}; nearest: {nearest}"
            )


def _class_of_folder(folder: Path) -> type[Encoder]:
    """The encoder for a folder, by the class that its config.json names."""
    supported = ", ".join(sorted(Encoder.folder_classes))
    if folder.is_file():
        raise ValueError(f"is a file; give a folder of diffusers, with config.json and weights ({supported})")
    if not folder.is_dir():
        raise ValueError(f"no such folder; give {', '.join(Encoder.names)}, or the folder of an autoencoder")
    try:
        name = parse_json((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "give its subfolder vae" if (folder / "vae").is_dir() else f"supported are {supported} of diffusers"
        raise ValueError(f"has no config.json that names a class (_class_name); {hint}") from error
    if not isinstance(name, str) or name not in Encoder.folder_classes:
        raise ValueError(f"{name} is not supported; supported are {supported}, which take single images and frames")
    return Encoder.folder_classes[name]
