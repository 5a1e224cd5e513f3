"""Every checkpoint that the authors of the four families released: where it is, what it is, how its figures were made.

Files are named as their authors named them. Some links in the official READMEs are wrong and put right here: those to
`DiT-XL-2-skip.pt` and `Latte-skip.pt` are exchanged, and `skytimelapse-skip.pt` is linked as `skylapse-skip.pt`. Hashes
are published for none of the files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from runtime.errors import UserError

HUB = "https://huggingface.co"
# Official model names that stand for a model of the registry and a sampling setting.
ALIASES: dict[str, dict[str, object]] = {
    "DiT-skip": {"--model": "Skip-DiT-XL/2"},
    **{f"DiT-cache-{n}": {"--model": "Skip-DiT-XL/2", "--cache-interval": n} for n in range(2, 7)},
}


class Preset(NamedTuple):
    """How the images behind the published figures were sampled.

    Attributes:
        sampler: its name on the command line.
        steps: step spec, or number of steps.
        cfg_scale: guidance scale; 1 is none.
        channels: how many leading channels are guided; None is all.
        interval: bounds between which guidance acts, as timesteps (0 clean, 1000 noise); None is everywhere.
        vae: autoencoder that decodes.
        options: further settings of the sampler, by their names.
    """

    sampler: str
    steps: str
    cfg_scale: float
    channels: int | None
    interval: tuple[float, float] | None = None
    vae: str = "ema"
    options: Mapping[str, float] = MappingProxyType({})


class Release(NamedTuple):
    """One released checkpoint.

    Attributes:
        file: its name, unique in the table.
        family: as the registry of models calls it.
        model: name in the registry.
        image_size: side of its images in pixels.
        layout: how the weights lie in it: "weights" by name; "ema", groups of which this one is sampled from;
            "training", groups with the optimizer's state beside them; "lightning", groups told apart by a prefix.
            Where nobody could look into the file, what its authors' code reads; the loader finds out by itself.
        folder: where it lies: an address, or "hub:OWNER/NAME/FOLDER" on the Hugging Face hub.
        gigabytes: size as published, or computed from the number of parameters; None where unknown.
        fid: reported FID-50K on ImageNet under `preset`; None where there is none.
        preset: how to sample from it.
        config: fields of the model's config that differ from those of its name.
        there: its name there, if it is another; may be a pattern that one file fits.
        sha256: of the file, once somebody vouches for one.
    """

    file: str
    family: str
    model: str
    image_size: int
    layout: str
    folder: str
    gigabytes: float | None
    fid: float | None
    preset: Preset
    config: Mapping[str, Any] = MappingProxyType({})
    there: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix; `--ckpt` takes either."""
        return Path(self.file).stem

    @property
    def hub(self) -> tuple[str, str] | None:
        """Repository and path on the hub; None for a plain address."""
        if not self.folder.startswith("hub:"):
            return None
        owner, name, *folders = self.folder.removeprefix("hub:").split("/")
        return f"{owner}/{name}", "/".join([*folders, self.there or self.file])

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        if self.hub is None:
            return f"{self.folder}/{self.there or self.file}"
        repository, path = self.hub
        return f"{HUB}/{repository}" + ("" if "*" in path else f"/resolve/main/{path}")


_OFFICIAL = Preset("ddpm", "250", 1.5, channels=3)
_VIDEO = Preset("ddpm", "250", 1.0, channels=4)
_TEXT = Preset("ddim", "ddim50", 7.5, channels=None)
_FLOW = {"last_step": 0.04, "shift": 1.0}
_META = "https://dl.fbaipublicfiles.com/DiT/models"
_DAMO, _NANJING, _SPARSE = "hub:heisejiasuo/DyDiT", "hub:MCG-NJU", "hub:GuanjieChen/Skip-DiT"

RELEASES = (
    Release("DiT-XL-2-256x256.pt", "DiT", "DiT-XL/2", 256, "weights", _META, 2.70, 2.27, _OFFICIAL),
    Release("DiT-XL-2-512x512.pt", "DiT", "DiT-XL/2", 512, "weights", _META, 2.70, 3.04, _OFFICIAL),
    Release(
        "dydit_0.7.pth", "DyDiT", "DyDiT-XL/2", 256, "ema", _DAMO, None, 2.12, _OFFICIAL,
        {"router_layout": "all_heads"},
    ),
    Release(
        "new_dydit0.7.pt", "DyDiT", "DyDiT-XL/2", 256, "ema", f"{_DAMO}/new_release_2025_03_26", None, 2.12, _OFFICIAL,
        {"router_layout": "first_always_on"},
    ),
    Release(
        "new_dydit0.5.pt", "DyDiT", "DyDiT-XL/2", 256, "ema", f"{_DAMO}/new_release_2025_03_26", None, 2.07, _OFFICIAL,
        {"router_layout": "first_always_on"},
    ),
    # How the files in these two repositories are called is not published.
    Release(
        "DDT-XL-22en6de-R256.ckpt", "DDT", "DDT-XL/2", 256, "lightning", f"{_NANJING}/DDT-XL-22en6de-R256", None, 1.26,
        Preset("euler", "250", 2.0, None, (0, 700), options=_FLOW), there="*.ckpt",
    ),
    Release(
        "DDT-XL-22en6de-R512.ckpt", "DDT", "DDT-XL/2", 512, "lightning", f"{_NANJING}/DDT-XL-22en6de-R512", None, 1.28,
        Preset("euler", "250", 3.0, None, (0, 700), options=_FLOW), {"sample_shape": (4, 64, 64)}, there="*.ckpt",
    ),
    Release(
        "DiT-XL-2-skip.pt", "Skip-DiT", "Skip-DiT-XL/2", 256, "training", _SPARSE, 11.40, None,
        _OFFICIAL._replace(vae="mse"),
    ),
    # Video: from classes, and the last one from text
    Release("ffs-skip.pt", "Latte", "Latte-skip", 256, "ema", _SPARSE, 2.77, None, _VIDEO),
    Release("taichi-skip.pt", "Latte", "Latte-skip", 256, "ema", _SPARSE, 2.77, None, _VIDEO),
    Release("skytimelapse-skip.pt", "Latte", "Latte-skip", 256, "ema", _SPARSE, 2.77, None, _VIDEO),
    Release("ucf101-skip.pt", "Latte", "Latte-skip", 256, "ema", _SPARSE, 2.77, None, _VIDEO._replace(cfg_scale=7.0)),
    Release("Latte-skip.pt", "Latte", "LatteT2V-skip", 512, "ema", _SPARSE, 8.76, None, _TEXT),
)  # fmt: skip


def find_release(name: str) -> Release | None:
    """The release that a file's name, with or without its suffix, stands for."""
    return next((release for release in RELEASES if name in (release.name, release.file)), None)


def close_names(name: str, families: Collection[str]) -> list[str]:
    """Names of the releases of these families that are spelt like this one."""
    lower = {release.name.lower(): release.name for release in RELEASES if release.family in families}
    for suffix in {Path(release.file).suffix for release in RELEASES}:
        name = name.removesuffix(suffix)
    return [lower[match] for match in get_close_matches(name.lower(), lower, cutoff=0.75)]


def release_of_model(model: str, image_size: int | None, families: Collection[str]) -> Release:
    """The released checkpoint of a model.

    Args:
        model: name in the registry.
        image_size: side of its images in pixels; None is 256.
        families: those that are here; no other's release is meant or offered.

    Raises:
        UserError: if there is none, or a choice.
    """
    size = image_size or 256
    here = [release for release in RELEASES if release.family in families]
    found = [release for release in here if (release.model, release.image_size) == (model, size)]
    if not found:
        known = dict.fromkeys(f"{release.model} ({release.image_size} pixels)" for release in here)
        raise UserError(
            f"--model {model}: no checkpoint of it for {size} pixels was released; give one with --ckpt "
            f"(released: {', '.join(known)})"
        )
    if len(found) > 1:
        names = ", ".join(release.name for release in found)
        raise UserError(f"--model {model}: several checkpoints of it were released; choose by --ckpt: {names}")
    return found[0]
