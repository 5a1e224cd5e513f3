"""The network of a run: what decides its config, and the files of weights that training reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from data import Dataset, Encoder
from data.dataset import text_of
from data.renumbered import renumber
from diffusion import PROCESSES
from diffusion.loss import DiffusionLoss
from models import family_of, model_config
from models.recognise import check_conditional, recognised_name
from models.sources import Located, locate_repository
from models.transfer import LABEL_TABLE, adapt_weights
from runtime import distributed
from runtime.checkpoint import Checkpoint, load_weights, read_checkpoint
from runtime.documents import flag_of
from runtime.errors import UserError, error_prefix
from runtime.given import Given
from runtime.json_file import Json
from runtime.releases import find_release
from runtime.settings import Values, flag_name, typed_flag
from runtime.sharding import outline_of
from runtime.stores import fetch
from runtime.weight_files import weights_sha256
from training.config import KINDS, TrainSettings

START = "start_sha256"  # member of checkpoints: digest of the file that a run began with
# Members of checkpoints with digests of files -> the settings that name these files
DIGESTS = {START: "run.init_from", "align_sha256": "alignment.align_ckpt"}


def network_fields(given: Given[TrainSettings], names: Mapping[str, str], start: Checkpoint | None) -> Values:
    """Fields of the network's config that flags, the process or the weights to start from decide.

    Raises:
        UserError: For values that the family refuses, or that contradict the weights.
    """
    model, init_from = given.general.model, given.general.run.init_from
    family, fields = family_of(model), given.fields("model", names["model"])
    if not PROCESSES[names["process"]].has_variance and "learn_sigma" in family.config.__dataclass_fields__:
        if fields.get("learn_sigma"):
            raise UserError(f"--learn-sigma: has no effect with --process {names['process']}, which has no variance")
        fields["learn_sigma"] = False
    with error_prefix(given.prefix("model", names["model"]) or f"--model {model}"):
        config = model_config(model, **fields)
    if start is None or family.settings_from is None:
        return fields
    with error_prefix(f"--init-from {init_from} as {model}"):
        from_weights = family.settings_from(start.weights, config)
    for name, value in from_weights.items():
        if fields.get(name, value) != value:
            raise UserError(f"{flag_name(name)} {fields[name]}: --init-from {init_from} has {value}")
    return fields | from_weights


def locate_start(config: TrainSettings) -> Located | None:
    """Find the weights that a run starts from, fetched if they are on the hub; None without. Every process calls it.

    Raises:
        UserError: If a repository cannot be had.
    """
    path = config.run.init_from
    return None if path is None else locate_repository(path, "--init-from") or Located(path)


def read_start(path: Path) -> Checkpoint:
    """Read the weights that a run starts from, from a path of `locate_start`.

    Raises:
        UserError: If the file cannot be read; for the name of a release, with the place of its file.
    """
    path = fetch(path, "--init-from")
    release = None if path.exists() else find_release(str(path))
    if release is not None:
        file = Path("pretrained_models") / release.file
        how = f"it is {file}" if file.exists() else f"python sample.py --ckpt {release.name} downloads it to {file}"
        raise UserError(f"--init-from {path}: is a released checkpoint, give its file: {how}")
    return read_checkpoint(path, flag="--init-from")


def outline(start: Checkpoint) -> Checkpoint:
    """The document of weights, their names and shapes, small enough to be sent to other processes."""
    return start._replace(weights=outline_of(start.weights), foreign=None)


def take_data_settings(config: TrainSettings, meta: Json) -> tuple[TrainSettings, list[str]]:
    """Take the autoencoder, size and channels of the images that weights were trained on, where no flag gives them.

    Args:
        config: Settings of the run.
        meta: Document of one of our checkpoints.

    Returns:
        The settings, and a line about what was taken.
    """
    shape: list[int] = meta["data"].get("image_shape") or []
    theirs: Values = {"vae": meta["encoder"]["name"]}
    if len(shape) == 3 and shape[1] == shape[2]:
        theirs |= {"image_size": shape[2], "channels": shape[0]}
    taken = {name: value for name, value in theirs.items() if getattr(config.data, name) is None}
    if not taken:
        return config, []
    flags = [typed_flag(flag_of(TrainSettings, KINDS, f"data.{name}"), value) for name, value in taken.items()]
    with error_prefix(""):
        return replace(config, data=replace(config.data, **taken)), [f"{' '.join(flags)}, as the weights were trained"]


def check_channels(config: TrainSettings, meta: Json, vae: str, channels: int) -> None:
    """Check that the latents or pixels of a run have as many channels as those that weights were trained on.

    Raises:
        UserError: With the flag to give.
    """
    own, theirs = meta["model"]["sample_shape"][-3], meta["encoder"]["name"]
    if own == channels:
        return
    remedy = f"--in-channels {own}" if vae == theirs == "none" else f"--vae {theirs}"
    if config.data.dataset == "latents":
        remedy = "images by --dataset imagefolder" if theirs == "none" else f"latents of {remedy}"
    raise UserError(
        f"--init-from {config.run.init_from}: was trained with --vae {theirs} on {own} channels, and this run has "
        f"{channels} (--vae {vae}); give {remedy}"
    )


def start_warnings(config: TrainSettings, meta: Json, process: Values, encoder: Encoder) -> list[str]:
    """Lines about a process or an autoencoder that are others than those that the weights were trained with.

    Args:
        config: Settings of the run.
        meta: Document of one of our checkpoints.
        process: Name and settings of the run's process.
        encoder: Encoder of the run.
    """
    lines, keys = [], ["name"]
    if meta["process"]["name"] == process["name"]:
        keys = ["prediction", "noise_schedule"]  # which decide what the outputs mean
    for key in keys:
        then, now, flag = meta["process"].get(key), process.get(key), flag_of(TrainSettings, KINDS, f"process.{key}")
        if then not in (None, now):
            lines.append(f"{flag} {now}: --init-from {config.run.init_from} was trained with {flag} {then}")
    try:
        encoder.check_same(meta.get("autoencoder", {}))
    except ValueError as error:
        lines.append(f"--init-from {config.run.init_from}: trained with another autoencoder: {error}")
    return lines


def check_classes(config: TrainSettings, fields: Values, dataset: Dataset) -> None:
    """Check that the network has as many classes as the data, if both have any.

    Raises:
        UserError: With the flag to give.
    """
    expected = getattr(model_config(config.model, **fields), "num_classes", None)
    count = len(dataset.classes)
    if expected in (None, 0, count):
        return  # 0: an unconditional network takes any data
    if "num_classes" in fields:
        raise UserError(f"--num-classes {expected}: the data has {count} classes; use --num-classes {count}")
    hint = "--model DiT-digits/2, or " if config.data.dataset == "digits" else ""
    raise UserError(
        f"--model {config.model}: made for {expected} classes, but the data has {count}; "
        f"give {hint}--num-classes {count}"
    )


def text_fields(config: TrainSettings, fields: Values, dataset: Dataset) -> Values:
    """Fields of the network's config that follow from the captions of the data.

    Raises:
        UserError: If one of both has text and the other does not, or a flag contradicts the captions.
    """
    text, source = text_of(dataset), config.data.data_path or f"--dataset {config.data.dataset}"
    takes = {"text_width", "text_length"} <= family_of(config.model).config.__dataclass_fields__.keys()
    if (dropped := config.data.caption_dropout_prob) and not takes:
        raise UserError(f"--caption-dropout-prob {dropped}: has no effect: --model {config.model} takes no text")
    if text is None:
        if takes and not hasattr(dataset, "null_conditioning"):
            raise UserError(
                f"--model {config.model}: takes text, and {source} has no captions; give --dataset captioned-digits, "
                "latents with captions, or a model for labels"
            )
        return {}
    if not takes:
        if getattr(model_config(config.model, **fields), "num_classes", 0) == 0:
            return {}  # an unconditional network takes any data
        raise UserError(
            f"--model {config.model}: takes labels, and {source} has captions; give a model for text, such as "
            "LatteT2V, or --num-classes 0 where the family can do without"
        )
    own = {"text_width": text["width"], "text_length": text["length"]}
    for name, value in own.items():
        if fields.get(name, value) != value:
            raise UserError(f"{flag_name(name)} {fields[name]}: the captions of {source} have {value}")
    return own


def class_names(start: Checkpoint) -> list[str] | None:
    """Names of the classes of weights: as recorded, or the numbers of a released label table; None without labels."""
    if start.meta is not None:
        return list(start.meta["data"].get("classes") or []) or None
    table = start.weights.get(LABEL_TABLE)
    return None if table is None else [str(i) for i in range(len(table) - 1)]  # the last row is the null class


def keep_classes(config: TrainSettings, start: Checkpoint | None, dataset: Dataset) -> Dataset:
    """Number the classes of the data after those of the weights, if --keep-classes asks for it.

    Those of the same names keep their labels.

    Raises:
        UserError: If the weights or the data have no classes.
    """
    if start is None or not config.run.keep_classes:
        return dataset
    theirs = class_names(start)
    if theirs is None or not dataset.classes:
        which = "the data has" if theirs is not None else f"--init-from {config.run.init_from} has"
        raise UserError(f"--keep-classes: {which} no classes; leave it out")
    return renumber(dataset, [*theirs, *(name for name in dataset.classes if name not in theirs)])


def load_start(config: TrainSettings, loss: DiffusionLoss, start: Checkpoint, dataset: Dataset) -> list[str]:
    """Fill the network with the weights of --init-from; returns what they are, and what was changed to fit.

    Raises:
        UserError: If they are those of another network.
    """
    source, name = f"--init-from {config.run.init_from}", None if start.meta is None else start.meta["model"]["name"]
    with error_prefix(source):
        weights, notes = adapt_weights(
            loss.network,
            start.weights,
            added_parts=family_of(config.model).added_parts,
            old_classes=class_names(start) if config.run.keep_classes or start.meta is not None else None,
            new_classes=dataset.classes,
            old_shape=None if start.meta is None else start.meta["model"]["sample_shape"],
            frame_positions=config.run.frame_positions,
        )
        remedy = "give weights of the other kind, or --num-classes"
        check_conditional(loss.network, weights, f"{remedy} {0 if loss.network.conditioning else len(dataset.classes)}")
    load_weights(loss.network, weights, f"{source} as {config.model}", lambda _: name or recognised_name(start.weights))
    with error_prefix(source):
        notes += loss.start(start.weights)
    if start.meta is not None:
        process, step = start.meta["process"]["name"], start.meta.get("step")
        return [f"{name}, process {process}, step {step}, weights {start.group!r}", *notes]
    return notes if start.foreign is None else [*start.foreign.notes, start.foreign.verification, *notes]


def file_digests(config: TrainSettings, start: Located | None) -> dict[str, str]:
    """SHA-256 of each file of weights that the settings name, by its name in `DIGESTS`; one process reads them.

    Args:
        config: Settings of the run.
        start: From `locate_start`.
    """
    digests = {}
    for name, setting in DIGESTS.items():
        section, field = setting.split(".")
        path = start.path if name == START and start is not None else getattr(getattr(config, section), field)
        if path is not None:
            digests[name] = distributed.on_rank0(partial(weights_sha256, path, flag_name(field)))
    return digests


def digest_notes(digests: Mapping[str, str]) -> list[str]:
    """A line of the log for each of these digests."""
    flags = {name: flag_of(TrainSettings, KINDS, DIGESTS[name]) for name in digests}
    return [f"{flags[name]}: SHA-256 {value}, compared when the run is resumed" for name, value in digests.items()]
