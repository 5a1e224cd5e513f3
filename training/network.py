"""The network of a run: what decides its config, and the files of weights that training reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from data import Dataset, Encoder
from diffusion import PROCESSES
from diffusion.loss import DiffusionLoss
from models import family_of, model_config
from models.transfer import adapt_weights
from runtime import distributed
from runtime.checkpoint import Checkpoint, load_weights
from runtime.errors import UserError, error_prefix
from runtime.settings import Given, Values, flag_name
from runtime.weight_files import weights_sha256
from training.config import TrainSettings

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


def load_start(
    config: TrainSettings, loss: DiffusionLoss, start: Checkpoint, dataset: Dataset, encoder: Encoder
) -> list[str]:
    """Fill the network with the weights of --init-from; returns what had to be changed to fit.

    Raises:
        UserError: If they are those of another network.
    """
    weights, notes = adapt_weights(
        loss.network,
        start.weights,
        added_parts=family_of(config.model).added_parts,
        old_classes=None if start.meta is None else start.meta["data"].get("classes"),
        new_classes=dataset.classes,
        old_shape=None if start.meta is None else start.meta["model"]["sample_shape"],
    )
    load_weights(loss.network, weights, f"--init-from {config.run.init_from} as {config.model}")
    with error_prefix(f"--init-from {config.run.init_from}"):
        notes += loss.start(start.weights)
    if start.foreign is not None:
        notes = [*start.foreign.notes, start.foreign.verification, *notes]
    try:
        encoder.check_same((start.meta or {}).get("autoencoder", {}))
    except ValueError as error:
        notes.append(f"trained with another autoencoder: {error}")
    return notes


def file_digests(config: TrainSettings) -> dict[str, str]:
    """SHA-256 of each file of weights that the settings name, by its name in `DIGESTS`; one process reads them."""
    digests = {}
    for name, setting in DIGESTS.items():
        section, field = setting.split(".")
        path = getattr(getattr(config, section), field)
        if path is not None:
            digests[name] = distributed.on_rank0(partial(weights_sha256, path, flag_name(field)))
    return digests
