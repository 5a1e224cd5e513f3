"""From a file to a network: `network, info = load_network("DiT-XL-2-256x256")`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models import Network, family_of, model_config
from models.blank import blank_model
from models.contract import TimeConvention
from models.diffusers_format import from_diffusers, is_diffusers
from models.frame_positions import FramePositions
from models.recognise import check_conditional, check_family, describe_unknown, recognise, recognised_name
from models.sources import locate
from models.transfer import LABEL_TABLE, fit_frames, without_variance
from runtime.checkpoint import Checkpoint, load_weights, read_checkpoint
from runtime.errors import UserError, error_prefix
from runtime.json_file import Json
from runtime.licences import Origin, origin_of
from runtime.releases import Preset, Release, find_release

# Files of SiT have DiT's names and shapes, and another process
SIT_NAME = re.compile(r"(?<![a-z])sit(?![a-z])", re.IGNORECASE)
PROCESSES_WITH_VARIANCE = {"gaussian"}


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint.

    Attributes:
        path: The file.
        weights: Name of the set of weights that was read: "model", "ema-0.9999".
        model: Name in the registry.
        config: Fields of the model's config that are known to differ from the named one's.
        process: Name of the noise process.
        process_settings: Settings of the process.
        encoder: Value of --vae.
        image_shape: (C, H, W) of the images, or (F, C, H, W) of clips where the number of frames is known; None if the
            file does not tell.
        classes: Names of the classes, if known.
        step: Training step, if known.
        release: The released checkpoint that it is, if any.
        preset: Settings of the published samples, if it is a release.
        meta: JSON document of our own files, in format 2.
        time_convention: Units of the network's times, where they are not those of its family.
        notes: What was found in a file of other code, and how its model and process were guessed.
        repository: "owner/name@commit" of weights from the hub.
    """

    path: Path
    weights: str
    model: str
    config: Mapping[str, object]
    process: str
    process_settings: Mapping[str, object]
    encoder: str
    image_shape: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    step: int | None = None
    release: Release | None = None
    preset: Preset | None = None
    meta: Json | None = None
    time_convention: TimeConvention | None = None
    notes: tuple[str, ...] = ()
    repository: str | None = None

    @property
    def file(self) -> str:
        """Name of the file or folder, or "owner/name" of a repository."""
        return self.path.name if self.repository is None else self.repository.partition("@")[0]

    @property
    def source(self) -> str:
        """The path, or "owner/name@commit" of a repository, for messages."""
        return str(self.path) if self.repository is None else self.repository

    @property
    def is_foreign(self) -> bool:
        """True for weights that other code trained, in its own file or in a folder of ours."""
        return self.meta is None or bool(self.meta.get("foreign"))

    @property
    def origin(self) -> Origin | None:
        """Published weights that these are, or were trained from; None for the user's own."""
        return origin_of(self.path if self.release is None else Path(self.release.file), self.meta, self.repository)


def load_network(
    source: str | Path,
    *,
    weights: str = "ema",
    model: str | None = None,
    device: str | torch.device = "cpu",
    download_dir: str | Path = "pretrained_models",
    flag: str = "--ckpt",
    frame_positions: FramePositions | None = None,
    **overrides: object,
) -> tuple[Network, CheckpointInfo]:
    """Load the network of a checkpoint.

    Args:
        source: A file (ours or an official one), a folder of `Pipeline.save_pretrained`, the name of a release, or of a
            model with one release, or "owner/name" or "owner/name@revision" on the Hugging Face hub.
        weights: "model", "ema" for the file's average, or the name of one of several averages ("ema-0.9999").
        model: Name in the registry, for foreign files that are not recognised by names and shapes.
        device: Device of the network.
        download_dir: Folder of released checkpoints, downloaded where necessary.
        flag: Flag of the source, for messages.
        frame_positions: How positions of frames become those of another number (`models.frame_positions`), where a
            `sample_shape` has another one.
        **overrides: Fields of the model's config that change no weights, such as `cache_depth`.

    Returns:
        The network, in evaluation mode and without gradients, and the description of its checkpoint.

    Raises:
        UserError: If the file cannot be had or read, or does not fit the model.
    """
    info, tensors = resolve_checkpoint(source, weights=weights, model=model, download_dir=download_dir, flag=flag)
    network = build_network(info, tensors, device=device, flag=flag, frame_positions=frame_positions, **overrides)
    return network, info


def resolve_checkpoint(
    source: str | Path,
    *,
    weights: str = "ema",
    model: str | None = None,
    download_dir: str | Path = "pretrained_models",
    flag: str = "--ckpt",
    process: str | None = None,
    network_times: TimeConvention | None = None,
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Read a checkpoint and find out all that it tells, without building the network.

    Args and exceptions are those of `load_network`, and for files of other code

        process: Name of the process that the network was trained under; None for a guess.
        network_times: Units of its times; None for a guess.

    Returns:
        The description, and the weights by name.
    """
    if model is not None:
        with error_prefix(f"--model {model}"):
            family_of(model)
    path, release, repository = locate(source, Path(download_dir), flag)
    checkpoint = read_checkpoint(path, weights, flag)
    actual = None if release is None else release.model
    if checkpoint.meta is not None:
        actual = str(checkpoint.meta["model"]["name"])
    if model is not None and actual not in (None, model):
        raise UserError(f"--model {model}: {flag} {source} was trained with {actual}; leave --model out")
    if checkpoint.meta is not None:
        info = _own_info(path, checkpoint.group, checkpoint.meta)
        if process not in (None, info.process):
            raise UserError(f"--process {process}: {flag} {source} was trained under {info.process!r}")
        if network_times is not None:
            raise UserError(f"--network-times {network_times}: has no effect on {flag} {source}, which knows its own")
        return replace(info, repository=repository), checkpoint.weights
    info, tensors = _foreign_info(path, checkpoint, release, model, f"{flag} {source}", process, network_times)
    return replace(info, repository=repository), tensors


def build_network(
    info: CheckpointInfo,
    weights: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    flag: str = "--ckpt",
    frame_positions: FramePositions | None = None,
    **overrides: object,
) -> Network:
    """Build the network of a resolved checkpoint; arguments as for `load_network`.

    Raises:
        UserError: If the overrides or the weights do not fit the model.
    """
    source, classes = f"{flag} {info.source}", overrides.get("num_classes")
    if info.meta is not None and classes not in (None, info.config.get("num_classes", classes)):
        raise UserError(f"--num-classes {classes}: {source} was trained with {info.config['num_classes']}")
    table = weights.get(LABEL_TABLE)
    if info.meta is None and classes is not None and table is not None and len(table) == classes:
        overrides["class_dropout_prob"] = 0.0  # a table without a null class, which shapes alone do not tell
    with error_prefix(source):
        network = blank_model(info.model, **{**info.config, **overrides})
        if network.state_dict().keys() != weights.keys():
            check_family(info.model, weights)
            check_conditional(network, weights, _other_labels(info, classes is not None))
        weights = {**weights, **fit_frames(network, weights, frame_positions)}
    load_weights(network, weights, f"{source} as {info.model}", recognised_name)
    if info.time_convention is not None:
        network.time_convention = info.time_convention  # type: ignore[misc]  # of this one network
    return network.to(device).eval().requires_grad_(False)


def _other_labels(info: CheckpointInfo, by_flag: bool) -> str:
    """Say what to do with weights that have labels where their config has none, or the reverse."""
    if info.release is None or by_flag:
        return "leave out --num-classes, or choose another file"
    kind = "class-conditional" if info.release.config.get("num_classes", 1) else "unconditional"
    return f"by its name the file is the release {info.release.name}, which is {kind}: give that one, or rename this"


def _own_info(path: Path, group: str, meta: Json) -> CheckpointInfo:
    """Describe one of our own files."""
    fields: Json = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["model"].items()}
    process, data = dict(meta["process"]), meta.get("data", {})
    classes, shape = data.get("classes"), data.get("image_shape")
    preset, foreign = meta.get("preset"), meta.get("foreign", False)  # of published folders
    return CheckpointInfo(
        path=path,
        weights=group,
        model=fields.pop("name"),
        config=fields,
        process=process.pop("name"),
        process_settings=process,
        encoder=meta["encoder"]["name"],
        image_shape=None if shape is None else tuple(shape),
        classes=None if classes is None else tuple(classes),
        step=meta.get("step"),
        release=find_release(meta["origin"]["name"]) if foreign and meta.get("origin") else None,
        preset=None if preset is None else Preset.from_json(preset),
        meta=meta,
        time_convention=meta.get("time_convention"),
    )


def _foreign_info(
    path: Path,
    checkpoint: Checkpoint,
    release: Release | None,
    model: str | None,
    source: str,
    process: str | None,
    times: TimeConvention | None,
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Describe a file of other code: a release, or weights that are recognised; and its weights by our names."""
    weights, found, layout = checkpoint.weights, checkpoint.foreign, ""
    if is_diffusers(weights):
        with error_prefix(source):
            weights, layout = from_diffusers(weights, _grid(found and found.config)), ", in diffusers' layout"
    name, fields = _recognised(weights, model if release is None else release.model, source)
    reason = "given" if model is not None else "a release" if release is not None else "by names and shapes"
    own, sit = family_of(name).process, SIT_NAME.search(path.stem) is not None
    guess = "flow" if sit and own == "gaussian" else own
    why = "given" if process is not None else "by the name of the file" if guess != own else "that of its family"
    process = process or guess
    if sit and process == "flow":
        times = times or "unit"
    if process != own and fields.get("learn_sigma") and not PROCESSES_WITH_VARIANCE & {process}:
        weights, fields = without_variance(weights), {**fields, "learn_sigma": False}
        layout += ", without its outputs of a variance"
    verified = "checksums of the file compared" if found and found.verified else "unverified: the file has no checksums"
    notes = (f"{name} ({reason}{layout})", f"process {process} ({why})", *(found.notes if found else ()), verified)
    info = CheckpointInfo(
        path=path,
        weights=checkpoint.group,
        model=name,
        config=fields if release is None else {**fields, **release.config},
        process=process,
        process_settings={},
        encoder="ema" if release is None else release.preset.vae,
        image_shape=None if release is None else (3, release.image_size, release.image_size),
        release=release,
        preset=None if release is None else release.preset,
        time_convention=None if times == family_of(name).network.time_convention else times,
        notes=notes,
    )
    return info, weights


def _grid(config: Json | None) -> int | None:
    """Tokens of a side, from the config that diffusers keeps with the weights."""
    size, patch = ((config or {}).get(key) for key in ("sample_size", "patch_size"))
    return size // patch if isinstance(size, int) and isinstance(patch, int) and patch > 0 else None


def _recognised(weights: Mapping[str, Tensor], model: str | None, source: str) -> tuple[str, dict[str, object]]:
    """Return name and config fields of the given model, or of the one that takes the weights."""
    with error_prefix(source):
        recognised = recognise(weights, model)
        if recognised is not None:
            return recognised
        if model is None:
            raise ValueError(describe_unknown(weights))
    row = family_of(model)
    with error_prefix(f"{source} as {model}"):
        return model, {} if row.settings_from is None else row.settings_from(weights, model_config(model))
