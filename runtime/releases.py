"""Table of the checkpoints that the authors of the families and of SiT released, with the settings of their figures.

Files have the names that their authors gave them. Some links in the official READMEs are wrong and corrected here:
those to `DiT-XL-2-skip.pt` and `Latte-skip.pt` are exchanged, and `skytimelapse-skip.pt` is linked as
`skylapse-skip.pt`. The authors publish no checksums.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from runtime.errors import UserError
from runtime.json_file import Json

HUB = "https://huggingface.co"
# Official model names that stand for a model of the registry and a sampling setting.
ALIASES: dict[str, dict[str, object]] = {
    "DiT-skip": {"--model": "Skip-DiT-XL/2"},
    **{f"DiT-cache-{n}": {"--model": "Skip-DiT-XL/2", "--cache-interval": n} for n in range(2, 7)},
    "Latte-skip": {"--model": "Skip-Latte-XL/2"},
    "Latte-skip-cache": {"--model": "Skip-Latte-XL/2", "--cache-interval": 2},
    **{f"Latte-skip-cache-{n}": {"--model": "Skip-Latte-XL/2", "--cache-interval": n} for n in range(2, 7)},
}


class Preset(NamedTuple):
    """Sampling settings of published figures.

    Attributes:
        sampler: Name of the sampler on the command line.
        steps: Step spec, or number of steps.
        cfg_scale: Guidance scale; 1 is none.
        channels: Number of leading channels that are guided; None is all.
        interval: Timesteps between which guidance acts (0 clean, 1000 noise); None is everywhere.
        vae: Autoencoder of the images.
        text_encoder: Text encoder of the prompts, as `--text-encoder` takes it; None for networks without text.
        options: Further settings of the sampler by name.
    """

    sampler: str
    steps: str
    cfg_scale: float
    channels: int | None
    interval: tuple[float, float] | None = None
    vae: str = "ema"
    text_encoder: str | None = None
    options: Mapping[str, float] = MappingProxyType({})

    def as_json(self) -> Json:
        """JSON values of the fields."""
        return {**self._asdict(), "options": dict(self.options)}

    @classmethod
    def from_json(cls, values: Json) -> Preset:
        """The preset of these values."""
        interval = values.get("interval")
        return cls(**{**values, "interval": None if interval is None else tuple(interval)})


class Release(NamedTuple):
    """One released checkpoint.

    Attributes:
        file: Name of the file, unique in the table.
        family: Name of the family in the registry of models.
        model: Name of the model in the registry.
        image_size: Side of its images in pixels.
        layout: Layout of the file: "weights" by name; groups with an "ema"; "averaged", groups with weights and "ema";
            "training", with the optimizer's state too; "lightning", groups with a prefix each. For files that could not
            be opened, the layout that the authors' code reads; loading does not depend on this field.
        folder: Address of its folder, or "hub:OWNER/NAME/FOLDER" on the Hugging Face hub.
        gigabytes: Size as published, or computed from the number of parameters; None if unknown.
        fid: Reported FID-50K on ImageNet with `preset`; None if there is none.
        preset: Sampling settings.
        config: Fields of the model's config that differ from those of its name.
        remote_name: Name of the file in the folder, if it is another; may be a pattern of one file.
        sha256: Checksum of the file; None if none is published.
        process: Process that it was trained under, if it is not that of its family.
        licence: Licence of the weights as the authors state it, an identifier of the hub; None if they state none.
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
    config: Mapping[str, object] = MappingProxyType({})
    remote_name: str | None = None
    sha256: str | None = None
    process: str | None = None
    licence: str | None = None

    @property
    def name(self) -> str:
        """Name of the file without its suffix; `--ckpt` takes either."""
        return Path(self.file).stem

    @property
    def hub(self) -> tuple[str, str] | None:
        """Repository and path on the hub; None for a plain address."""
        if not self.folder.startswith("hub:"):
            return None
        owner, name, *folders = self.folder.removeprefix("hub:").split("/")
        return f"{owner}/{name}", "/".join([*folders, self.remote_name or self.file])

    @property
    def address(self) -> str:
        """Address in a browser."""
        if self.hub is None:
            return f"{self.folder}/{self.remote_name or self.file}"
        repository, path = self.hub
        return f"{HUB}/{repository}" + ("" if "*" in path else f"/resolve/main/{path}")


_OFFICIAL = Preset("ddpm", "250", 1.5, channels=3)
_VIDEO = Preset("ddpm", "250", 1.0, channels=4)
_TEXT = Preset("ddim", "ddim50", 7.5, channels=None, text_encoder="maxin-cn/Latte-1")
_FLOW = {"last_step": 0.04, "shift": 1.0}
_NC, _SKIP = "cc-by-nc-4.0", "apache-2.0"  # DyDiT's and DDT's authors state none for their weights
_META = "https://dl.fbaipublicfiles.com/DiT/models"
_SIT = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0"
_DAMO, _NANJING, _SPARSE = "hub:heisejiasuo/DyDiT", "hub:MCG-NJU", "hub:GuanjieChen/Skip-DiT"

RELEASES = (
    Release("DiT-XL-2-256x256.pt", "DiT", "DiT-XL/2", 256, "weights", _META, 2.70, 2.27, _OFFICIAL, licence=_NC),
    Release("DiT-XL-2-512x512.pt", "DiT", "DiT-XL/2", 512, "weights", _META, 2.70, 3.04, _OFFICIAL, licence=_NC),
    # DiT's network under another process; its authors report FID 2.15 with an adaptive solver of the same equation
    Release(
        "SiT-XL-2-256x256.pt", "DiT", "DiT-XL/2", 256, "weights", _SIT, 2.70, None, _OFFICIAL._replace(sampler="euler"),
        remote_name="SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0", process="flow",
        licence="mit",  # of the authors' project, which states no other for the weights
    ),
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
    # The names of the files in these two repositories are not published.
    Release(
        "DDT-XL-22en6de-R256.ckpt", "DDT", "DDT-XL/2", 256, "lightning", f"{_NANJING}/DDT-XL-22en6de-R256", None, 1.26,
        Preset("euler", "250", 2.0, None, (0, 700), options=_FLOW), remote_name="*.ckpt",
    ),
    Release(
        "DDT-XL-22en6de-R512.ckpt", "DDT", "DDT-XL/2", 512, "lightning", f"{_NANJING}/DDT-XL-22en6de-R512", None, 1.28,
        Preset("euler", "250", 3.0, None, (0, 700), options=_FLOW), {"sample_shape": (4, 64, 64)}, remote_name="*.ckpt",
    ),
    Release(
        "DiT-XL-2-skip.pt", "Skip-DiT", "Skip-DiT-XL/2", 256, "training", _SPARSE, 11.40, None,
        _OFFICIAL._replace(vae="mse"), licence=_SKIP,
    ),
    # Video: from classes, and the last one from text
    *(
        Release(
            f"{name}-skip.pt", "Skip-Latte", "Skip-Latte-XL/2", 256, "ema", _SPARSE, 2.77, None, _VIDEO,
            {"num_classes": 0}, licence=_SKIP,
        )
        for name in ("ffs", "taichi", "skytimelapse")
    ),
    Release(
        "ucf101-skip.pt", "Skip-Latte", "Skip-Latte-XL/2", 256, "ema", _SPARSE, 2.77, None,
        _VIDEO._replace(cfg_scale=7.0), {"num_classes": 101}, licence=_SKIP,
    ),
    Release(
        "Latte-skip.pt", "Skip-LatteT2V", "Skip-LatteT2V-XL/2", 512, "averaged", _SPARSE, 8.76, None, _TEXT,
        licence=_SKIP,
    ),
)  # fmt: skip


def find_release(name: str) -> Release | None:
    """Find a release by the name of its file, with or without suffix; None if there is none."""
    return next((release for release in RELEASES if name in (release.name, release.file)), None)


def close_names(name: str, families: Collection[str]) -> list[str]:
    """Names of these families' releases that are spelt similarly."""
    lower = {release.name.lower(): release.name for release in RELEASES if release.family in families}
    for suffix in {Path(release.file).suffix for release in RELEASES}:
        name = name.removesuffix(suffix)
    return [lower[match] for match in get_close_matches(name.lower(), lower, cutoff=0.75)]


def release_of_model(model: str, image_size: int | None, families: Collection[str]) -> Release:
    """Find the released checkpoint of a model.

    Args:
        model: Name in the registry.
        image_size: Side of its images in pixels; None is 256.
        families: Families that the code has; releases of others are ignored.

    Raises:
        UserError: If there is none, or more than one.
    """
    size = image_size or 256
    usable = [release for release in RELEASES if release.family in families]
    own = [release for release in usable if release.process is None]
    matching = [release for release in own if (release.model, release.image_size) == (model, size)]
    if not matching:
        known = dict.fromkeys(f"{release.model} ({release.image_size} pixels)" for release in own)
        raise UserError(
            f"--model {model}: no checkpoint of it for {size} pixels was released; give one with --ckpt "
            f"(released: {', '.join(known)})"
        )
    if len(matching) > 1:
        names = ", ".join(release.name for release in matching)
        raise UserError(f"--model {model}: several checkpoints of it were released; choose by --ckpt: {names}")
    return matching[0]
