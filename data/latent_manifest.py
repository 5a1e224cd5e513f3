"""Manifest of stored latents: the settings that fix their bytes, compared among ranks and when work continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from data.clip_windows import ClipWindows
from data.encoders import Encoder
from data.image_folder import EncodedImages
from data.latent_files import FORMAT, INDEX, MANIFEST, PART, Json, shard_files
from runtime import distributed
from runtime.errors import UserError
from runtime.json_file import is_intact, parse_json
from runtime.migrate import latent_index

# Settings in the manifest that fix the bytes, and their flags
FLAGS = {
    "classes": "--data-path",
    "images": "--data-path",
    "paths_sha256": "--data-path",
    "sizes_sha256": "--data-path",
    "image_shape": "--image-size",
    "encoder": "--vae",
    "row_shape": "--both-flips",
    "batch_size": "--batch-size",
    "shard_size": "--shard-size",
}
OF_CLIPS = {"clips": "--clip-window"}  # in manifests of clips alone
OF_CAPTIONS = {"text": "--captions"}  # in those of images with captions
LONG = ("text", "classes", "paths_sha256", "sizes_sha256", "encoder")  # values that messages leave out


def make_manifest(
    images: EncodedImages | ClipWindows,
    encoder: Encoder,
    row_shape: Sequence[int],
    batch_size: int,
    shard_size: int,
    text: Json | None = None,
) -> Json:
    """Make the manifest of an extraction, as it is read back from JSON.

    Args:
        images: The images or clips, cropped as they are encoded.
        encoder: Encoder of these images.
        row_shape: Shape of an image's latents: flips, then the shape of raw latents.
        batch_size: Images encoded at a time.
        shard_size: Images of a shard.
        text: Description of the captions and their encoder; None without any.
    """
    entry = images.entry if isinstance(images, EncodedImages) else images.path
    paths = "\n".join(map(entry, range(len(images))))
    manifest = {
        "format": FORMAT,
        "images": len(images),
        "paths_sha256": hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest(),
        "sizes_sha256": images.sizes_sha256(),
        "classes": images.classes,
        "image_shape": images.image_shape,
        **({"clips": images.describe()} if isinstance(images, ClipWindows) else {}),
        "encoder": encoder.describe_latents(),
        "row_shape": row_shape,
        "batch_size": batch_size,
        "shard_size": shard_size,
        **({} if text is None else {"text": text}),
    }
    document: Json = json.loads(json.dumps(manifest))
    return document


def difference_between(manifest: Json, encoder: Encoder, other: Json) -> tuple[str, str] | None:
    """First difference from another manifest: its flag, and words for it; None if both make the same bytes."""
    for name, flag in {**FLAGS, **OF_CLIPS, **OF_CAPTIONS}.items():
        ours, theirs = manifest.get(name), other.get(name)
        if name == "text" and theirs is None:
            continue  # captions may be added to latents that are there
        if name == "encoder" and isinstance(theirs, dict):  # its folder may have moved
            try:
                encoder.check_same(theirs)
                encoder.check_precision(theirs)
            except ValueError as error:
                return flag, f"(other encoder): {error}"
        elif ours != theirs and (name, theirs) != ("sizes_sha256", None):  # older manifests have no sizes
            return flag, f"(other {name})" if name in LONG else f"({name} {ours} instead of {theirs})"
    return None


def check_ranks(manifest: Json) -> None:
    """Check that all ranks have the same images, classes and encoder.

    Raises:
        UserError: On all ranks, naming the first that differs from rank 0.
    """
    first, *others = distributed.objects_from_all_ranks(manifest)
    for rank, other in enumerate(others, start=1):
        for name, flag in {**FLAGS, **OF_CLIPS, **OF_CAPTIONS}.items():
            theirs, ours = other.get(name), first.get(name)
            if theirs != ours:
                shown = "" if name in LONG else f" ({theirs} instead of {ours})"
                raise UserError(f"{flag}: rank {rank} has other {name} than rank 0{shown}; give all ranks the same")


def check_settings(folder: Path, manifest: Json, encoder: Encoder, *, overwrite: bool) -> None:
    """Refuse to continue an extraction that was started with other settings, and to touch files of other programs.

    Args:
        folder: Folder of the shards, which may not exist.
        manifest: Settings of this extraction.
        encoder: Its encoder.
        overwrite: It starts again, whatever the former settings.

    Raises:
        UserError: Naming the first flag that differs, or the file.
    """
    path, where = folder / MANIFEST, f"--output {folder}"
    remedy = "give the same settings, another --output, or --overwrite to start again"
    by_hand = "give the same settings or another --output, or remove what is there"
    present = [*filter(Path.exists, (folder / INDEX, folder / PART)), *shard_files(folder)]
    if not path.exists():
        if present:
            raise UserError(f"{where}: {present[0].name} is there, but no {MANIFEST}; {by_hand}")
        return
    try:
        started = parse_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{where}: {path} is not JSON; {by_hand}") from error
    document = started if isinstance(started, dict) else {}
    started = latent_index(document)
    if started.get("format") != FORMAT:
        raise UserError(f"{where}: {path} is of another format; {by_hand}")
    if overwrite:
        return
    if document["format"] == FORMAT and not is_intact(document):  # earlier formats have no checksum
        raise UserError(f"{where}: {path} is edited or damaged, it does not match its checksum; {remedy}")
    if difference := difference_between(manifest, encoder, started):
        raise UserError(f"{difference[0]}: {path} was started with other settings {difference[1]}; {remedy}")
