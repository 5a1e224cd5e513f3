"""A network as a folder for the hub: weights, what is known of them, and a card; see docs/publishing.md."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from data.encoders import Encoder
from models import Network
from models.layers import rounded_state
from models.loading import CheckpointInfo
from runtime.errors import UserError, error_prefix
from runtime.files import check_folder, new_folder
from runtime.groups import FORMAT
from runtime.hub import CARD, CARD_DIGEST, card_digest, check_repository, push_folder
from runtime.json_file import Json
from runtime.licences import licence_to_publish, origin_to_name
from runtime.pretrained import ENCODER, SHARD_SIZE, check_shard_size, write_weights
from runtime.weight_files import weights_sha256
from sampling.bundle import write_bundle
from sampling.cards.card import CardContent, model_card
from sampling.cards.pictures import check_names, check_pictures
from sampling.cards.scores import check_scores
from sampling.cards.text import without_places
from sampling.provenance import checkout_url
from sampling.resolution import preset_of
from sampling.upload import kept_files

SOURCES = "sources"  # member of a document: the files that the weights are from, the last one first
ROUNDED = "rounded"  # member of a document: precision that the blocks' weights were rounded to
DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # of weights that are saved
# Members of a checkpoint's document that describe how the weights came about
HISTORY = ("step", "updates", "loss", "optimizer", "averages", "train", "text", "draws", ROUNDED)


def document_of(network: Network, info: CheckpointInfo, encoder: Encoder, licence: str | None, name: str) -> Json:
    """Describe a network and its history as JSON values, without places on this machine.

    Args:
        network: The network.
        info: Description of its checkpoint.
        encoder: Its encoder.
        licence: Licence of the weights; None if it is not known.
        name: Name of the repository or folder.
    """
    meta = info.meta or {}
    origin = origin_to_name(info.origin, info.meta, name)
    vae = ENCODER if Path(encoder.name).is_dir() else encoder.name
    image_shape = info.image_shape or encoder.image_shape(network.sample_shape)
    document: Json = {
        "format": FORMAT,
        "name": name,
        "weights": info.weights,
        "model": {"name": info.model, **dataclasses.asdict(network.config)},
        "process": {"name": info.process, **info.process_settings},
        "encoder": {"name": vae},
        "autoencoder": {**encoder.describe(), "name": vae},
        "data": {**meta.get("data", {}), "image_shape": image_shape, "classes": info.classes},
        "preset": preset_of(info).as_json(),
        "time_convention": network.time_convention if info.time_convention else None,
        "foreign": info.is_foreign,
        "licence": licence,
        SOURCES: sources_of(info),
        **{member: without_places(meta[member]) for member in HISTORY if member in meta},
    }
    known = {name: value for name, value in document.items() if value is not None}
    return {**known, "origin": None if origin is None else origin.as_json()}


def sources_of(info: CheckpointInfo) -> list[dict[str, str]]:
    """Names and digests of a checkpoint and of the files that it was made of, by which scores know their weights."""
    own = {"file": info.file, "sha256": weights_sha256(info.path)}
    return [own, *((info.meta or {}).get(SOURCES) or ())]


def save_folder(
    folder: Path,
    network: Network,
    info: CheckpointInfo,
    encoder: Encoder,
    *,
    license: str | None = None,
    name: str | None = None,
    dtype: str = "fp32",
    shard_size: int | str = SHARD_SIZE,
    for_diffusers: bool = False,
    flag: str = "folder",
    **known: Any,
) -> Path:
    """Save a network as a folder with weights, config.json, the autoencoder where it is a folder, and a card.

    Args:
        folder: The folder, which must not exist, or be empty.
        network: The network.
        info: Description of its checkpoint.
        encoder: Its encoder.
        license: Licence of the weights; None for that of the weights that they came from, or none.
        name: Name in the card; None for the folder's.
        dtype: "fp32", or "bf16" for half the size: of what autocast rounds in blocks (`models.layers.rounded_state`).
        shard_size: Largest size of a file of weights, in bytes or as "5GB".
        for_diffusers: Write a pipeline that diffusers loads without this code; it is loaded here, too.
        flag: Name of the folder in messages.
        **known: Content of the card: fields of `sampling.cards.card.CardContent`; and `licence`, another name of
            `license`.

    Returns:
        The folder.

    Raises:
        UserError: If it cannot be written, or the licence is against that of the weights that these came from.
    """
    with error_prefix(""):
        check_shard_size(shard_size)
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    name, licence = name or folder.name, _licence(known.pop("licence", license), info)
    document = document_of(network, info, encoder, licence, name)
    weights, lower = network.state_dict(), DTYPES[dtype]
    if lower is not None:
        weights, document[ROUNDED] = rounded_state(network, lower), dtype
    known.setdefault("code_url", checkout_url())
    card = CardContent(name, sum(p.numel() for p in network.parameters()), for_diffusers=for_diffusers, **known)
    _check_content(card, document, "--" * flag.startswith("--"))
    text = model_card(document, card)
    document[CARD_DIGEST] = card_digest(text)

    def write(inside: Path) -> None:
        if for_diffusers:
            write_bundle(inside, weights, document, encoder, shard_size)
        else:
            write_weights(inside, weights, document, shard_size)
            if document["encoder"]["name"] == ENCODER:
                shutil.copytree(encoder.name, inside / ENCODER)
        for picture in (*card.pictures, *card.curves):
            shutil.copyfile(picture, inside / picture.name)
        (inside / CARD).write_text(text)

    write_folder(folder, write, flag)
    return folder


def _licence(given: str | None, info: CheckpointInfo) -> str | None:
    """Licence of weights: the one that is given, or was recorded, or is that of the weights that they came from."""
    chosen = given or (info.meta or {}).get("licence")
    if chosen is not None:
        return licence_to_publish(chosen, info.origin)
    return None if info.origin is None else info.origin.licence


def _check_content(card: CardContent, document: Json, dashes: str) -> None:
    """Check the files of a card, by name and content; a UserError names their kind, with these dashes before it."""
    with error_prefix(""):
        check_names(card.pictures, [curve.name for curve in card.curves], f"{dashes}pictures")
        check_names(card.curves, (), "curves")
    check_pictures(card.pictures, document, f"{dashes}pictures")
    for file, scores in card.scores.items():
        check_scores(scores, document, f"{dashes}scores {file}")


def push(
    repository: str,
    network: Network,
    info: CheckpointInfo,
    encoder: Encoder,
    *,
    license: str | None = None,
    private: bool = False,
    update: bool = False,
    card: Literal["keep", "new"] | None = None,
    flag: str = "repository",
    **options: Any,
) -> str:
    """Save a network and upload it to the Hugging Face hub, as one commit.

    Args:
        repository: "owner/name".
        network: The network.
        info: Description of its checkpoint.
        encoder: Its encoder.
        license: Licence of the weights; None for that of the weights that they came from.
        private: Make a new repository private.
        update: Replace weights of this code that are there already.
        card: "keep" leaves a card that is there, with its pictures, "new" replaces it; None replaces one that was not
            edited, and refuses another.
        flag: Name of the repository in messages.
        **options: As for `save_folder`.

    Returns:
        Address of the repository.

    Raises:
        UserError: Without a licence, against that of the weights that these came from, without a token or network, and
            for a repository with other content.
    """
    chosen = options.pop("licence", license) or (info.meta or {}).get("licence")
    chosen = licence_to_publish(chosen, info.origin)
    former = check_repository(repository, update=update, card=card, flag=flag)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "weights"
        save_folder(folder, network, info, encoder, license=chosen, name=repository, flag=flag, **options)
        pictures = [path.name for path in (*options.get("pictures", ()), *options.get("curves", ()))]
        left_out = kept_files(card, former, pictures)
        return push_folder(folder, repository, former=former, left_out=left_out, private=private, flag=flag)


def write_folder(folder: Path, write: Callable[[Path], None], flag: str = "folder") -> None:
    """Make a folder, whole or not at all.

    Args:
        folder: The folder, which must not exist, or be empty.
        write: Function that writes into the folder that it is given.
        flag: Name of the setting in messages.

    Raises:
        UserError: If there is something already, or the files cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{flag} {folder}: exists already; delete it, or give another name")
    check_folder(folder, flag)
    try:
        with new_folder(folder) as unfinished, error_prefix(f"{flag} {folder}"):
            write(unfinished)
    except OSError as error:
        raise UserError(f"{flag} {folder}: could not be written ({error.strerror or error})") from error
