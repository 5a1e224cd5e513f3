"""Adapters for autoencoders of diffusers, by the class that a folder's config.json names."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.encoders import FP32, Encoder, LatentScaling
from runtime.download import quiet_hub, why_not_loaded
from runtime.errors import UserError
from runtime.json_file import Json, parse_json
from runtime.zip_checksums import compare_checksums

OFFICIAL_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
OFFICIAL_FACTOR = 8
OFFICIAL_CHANNELS = 4  # of their latents

_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.(safetensors|bin)")  # that diffusers reads in a folder
_NORMALISATION = re.compile("scal|shift|mean|std|offset|whiten")  # in keys of a config
_NOT_ENCODING = re.compile("decoder|up|out_|use_post|sample_size|force_upcast")  # starts of keys of a config
_LONGEST = 1000  # characters of a value: longer lists are buffers of the module, which the fingerprint covers


@contextmanager
def fastest_convolutions(chosen: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms for each new shape and take the fastest, inside of the block, if that is chosen.

    The choice may differ from run to run, and rounding with it, so the networks that are trained are left out.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or chosen
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Autoencoder(Encoder):
    """Base class of the adapters. In bfloat16 convolutions decode about three times as fast.

    Raises:
        ValueError: If the autoencoder cannot be loaded, or its weights do not fill it exactly.
    """

    packages: ClassVar[tuple[str, ...]] = ()  # needed besides diffusers
    decoder_parts: ClassVar[tuple[str, ...]] = ("decoder.",)  # prefixes of the weights that do not encode
    latents: ClassVar[str] = "latent"  # field of the module's encoding
    blocks: ClassVar[str] = "block_out_channels"  # key of the config with a number for each level of resolution
    scaling_keys: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(LatentScaling))  # applied here

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, device, dtype)
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{self.class_name} needs the package {package}; install it with pip")
        self.module = _load(self.class_name, OFFICIAL_VAES.get(name, name))
        self.module.eval().requires_grad_(False)
        config = self.module.config
        self.read_config(config)
        own = inspect.signature(type(self.module).__init__).parameters.keys() - set(self.scaling_keys)
        self.check_normalisation(config, {*own, *self.scaling_keys, "block_out_channels"})
        encoding = {key: config[key] for key in own & config.keys() if not _NOT_ENCODING.match(key)}
        self.settings = {key: value for key, value in sorted(encoding.items()) if len(str(value)) < _LONGEST}
        self._sha256: dict[bool, str] = {}  # of the parts that do not decode, and of those that do
        if dtype != torch.float32:
            self.describe()  # takes the fingerprints, before the weights are rounded
        nn.Module.to(self.module, device, dtype)  # that of diffusers warns where there is nothing to warn of
        if dtype != torch.float32:  # convolutions are faster channels last; float32 keeps the rounding of training
            self.module.to(memory_format=torch.channels_last)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.module.parameters())

    def read_config(self, config: Json) -> None:
        """Set channels, factor and scaling."""
        self.image_channels, self.latent_channels = config["in_channels"], config["latent_channels"]
        self.factor = 2 ** (len(config[self.blocks]) - 1)
        self.scaling = LatentScaling.from_config(config, self.latent_channels)

    def check_normalisation(self, config: Json, known: Set[str]) -> None:
        """Raise a ValueError for a key of the config that seems to normalise latents, and that nothing reads."""
        for key, value in config.items():
            if key[:1] != "_" and key not in known and value is not None and _NORMALISATION.search(key):
                raise ValueError(f"its config.json has {key} {value}, which diffusers' {self.class_name} does not know")
        if "scaling_factor" in {*config.get("_use_default_values", ())}.intersection(self.scaling_keys):
            if self.name not in OFFICIAL_VAES:
                factor = f"{config['scaling_factor']}, the default of {self.class_name}"
                warnings.warn(f"--vae {self.name}: config.json has no scaling_factor; it is {factor}", stacklevel=2)

    def encode_rows(self, pixels: Tensor) -> Tensor:
        """Raw latents, float32."""
        raw: Tensor = getattr(self.encode_images(pixels), self.latents)
        return raw.float()

    def encode_images(self, pixels: Tensor) -> Any:
        """The module's encoding of images, in its precision."""
        with fastest_convolutions(self.precision != FP32):
            return self.module.encode(pixels.to(self.module.dtype))

    def decode_rows(self, z: Tensor) -> Tensor:
        """Images of latents that are neither shifted nor scaled."""
        return self.module.decode(z.to(self.module.dtype)).sample.float()

    def describe(self) -> dict[str, object]:
        """JSON values that fix raw latents, how they become latents, and the decoder."""
        return {**super().describe(), "decoder_sha256": self._fingerprint(decoder=True)}

    def is_unverified(self, recorded: Mapping[str, object]) -> bool:
        """True if a record has no digest of the weights."""
        return not recorded.get("sha256")

    def encoder_sha256(self) -> str:
        """Fingerprint of the weights that encode; autoencoders that differ in the decoder alone share it."""
        return self._fingerprint(decoder=False)

    def _fingerprint(self, decoder: bool) -> str:
        if decoder not in self._sha256:
            digest = hashlib.sha256()
            for name, weight in sorted(self.module.state_dict().items()):
                if name.startswith(self.decoder_parts) == decoder:
                    digest.update(f"{name} {tuple(weight.shape)} ".encode())
                    digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
            self._sha256[decoder] = digest.hexdigest()
        return self._sha256[decoder]


class KLAutoencoder(Autoencoder, folder_class="AutoencoderKL"):
    """AutoencoderKL: raw latents are means and standard deviations of a normal posterior."""

    stochastic = True
    decoder_parts = ("decoder.", "post_quant_conv.")

    def encode_rows(self, pixels: Tensor) -> Tensor:
        """Posterior parameters: C channels of means, then C of standard deviations."""
        posterior = self.encode_images(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()


class OfficialAutoencoder(KLAutoencoder, names=tuple(OFFICIAL_VAES)):
    """The autoencoders of Stable Diffusion, from the hub or its cache."""

    factor = OFFICIAL_FACTOR


class TinyAutoencoder(Autoencoder, folder_class="AutoencoderTiny"):
    """AutoencoderTiny, which approximates the latents of a larger autoencoder; deterministic."""

    latents = "latents"


class DCAutoencoder(Autoencoder, folder_class="AutoencoderDC"):
    """AutoencoderDC, of high compression; deterministic."""

    blocks = "encoder_block_out_channels"


class RepresentationAutoencoder(Autoencoder, folder_class="AutoencoderRAE"):
    """AutoencoderRAE: features of a frozen vision transformer, for images of one size; deterministic."""

    packages = ("transformers",)
    scaling_keys = ()  # the autoencoder itself normalises

    def read_config(self, config: Json) -> None:
        """Set channels and factor; there is no scaling, because the autoencoder itself normalises by position."""
        if not config["reshape_to_2d"]:
            raise ValueError("reshape_to_2d is false: its latents are not images")
        self.image_channels, self.latent_channels = config["num_channels"], config["encoder_hidden_size"]
        self.factor, side = config["patch_size"], self.module.decoder_image_size
        self.image_size = (side, side)

    def encode_rows(self, pixels: Tensor) -> Tensor:
        """Normalised features; this autoencoder takes pixels in [0, 1]."""
        return super().encode_rows((pixels + 1) / 2)

    def decode_rows(self, z: Tensor) -> Tensor:
        """Images of normalised features."""
        return super().decode_rows(z) * 2 - 1


def _load(class_name: str, source: str) -> Any:
    """Load an autoencoder of diffusers in float32, from a folder or the hub.

    Raises:
        ValueError: Of one line, for any failure, weights that do not fit, and numbers that are not finite.
    """
    import diffusers  # heavy, and only latents need it
    from diffusers.utils import logging

    _check_files(Path(source))
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it warns of is an error here, in one line
    logging.disable_progress_bar()
    try:
        with quiet_hub():
            module, report = getattr(diffusers, class_name).from_pretrained(
                source,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
            )
    except Exception as error:  # a config of other code fails in many ways
        raise ValueError(f"cannot load the autoencoder {source!r}{why_not_loaded(source, error)}") from error
    finally:
        logging.set_verbosity(level)
    _check_report(module, report)
    for name, weight in module.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"the weights {name} of {source!r} are not finite; the file is damaged, download it again")
    return module


def _check_files(folder: Path) -> None:
    """Check the files of weights where diffusers does not: names in shards, checksums of zip files, types of numbers.

    Raises:
        ValueError: Naming the file. Files that cannot be read are left to the loader.
    """
    files = {path.name: path for path in folder.glob("*") if _WEIGHTS.fullmatch(path.name)}
    safe = {name: path for name, path in files.items() if path.suffix == ".safetensors"}
    types = {name: _types(path) for name, path in (safe or files).items()}
    for name, held in types.items():
        for key, is_floating in held.items():
            if not is_floating:
                raise ValueError(f"{folder / name}: {key} does not hold floating-point numbers; quantised weights?")
    for index in folder.glob("diffusion_pytorch_model.*.index.json"):
        shards = parse_json(index.read_text())["weight_map"]
        for key, name in shards.items():
            if types.get(name) and key not in types[name]:
                raise ValueError(f"{folder / name}: lacks {key}, which {index.name} places there")


def _types(path: Path) -> dict[str, bool]:
    """Names in a file of weights, and True for floating-point numbers; empty if it cannot be read.

    Raises:
        ValueError: Naming the file, if a checksum of the zip format does not match.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: "F" in file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        if zipfile.is_zipfile(path):
            compare_checksums(path, str(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.is_floating_point() for name, value in content.items() if isinstance(value, Tensor)}
    except UserError as error:
        raise ValueError(f"{error}; download it again") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError):
        return {}


def _check_report(module: nn.Module, report: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ValueError that names the first key of each kind of misfit, which diffusers only logs."""
    problems = {
        "missing": [key for key in module.state_dict() if key in report["missing_keys"]],
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(key for key, *_ in report["mismatched_keys"]),
    }
    more = {kind: f" and {len(keys) - 1} more" if len(keys) > 1 else "" for kind, keys in problems.items()}
    words = [f"{kind}: {keys[0]}{more[kind]}" for kind, keys in problems.items() if keys]
    if words:
        raise ValueError(f"its weights do not fit {type(module).__name__} ({'; '.join(words)})")
