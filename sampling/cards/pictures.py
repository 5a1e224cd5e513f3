"""Pictures of a card: checked, and shown with the settings that their files note."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from data.pixels import is_picture, note_in
from runtime.errors import UserError
from runtime.json_file import Json
from sampling.cards.text import at

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
CURVE = "loss.png"  # that publish.py draws


def check_names(paths: Sequence[Path], taken: Sequence[str] = (CURVE,), flag: str = "--pictures") -> None:
    """Check names of pictures, which are copied next to the card; no file is opened.

    Raises:
        ValueError: For a file that is not there or no picture by its name, and for a name that is taken.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{flag} {path}: no such file")
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{flag} {path}: no picture by its name; give {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            )
        if path.name.lower() in map(str.lower, taken):
            raise ValueError(f"{flag} {path}: the card has a curve of this name; rename the picture")
        if [other.name.lower() for other in paths].count(path.name.lower()) > 1:
            raise ValueError(f"{flag} {path}: two pictures are named {path.name}; rename one")


def check_pictures(paths: Sequence[Path], weights: Json, flag: str) -> None:
    """Check that files are pictures, and of these weights as far as they say it.

    Args:
        paths: The files.
        weights: Document of the weights, from `sampling.publishing.document_of`.
        flag: Their flag, for messages.

    Raises:
        UserError: If one is not.
    """
    for path in paths:
        if not is_picture(path):
            raise UserError(f"{flag} {path}: cannot be read as a picture")
        checkpoint = at(read_note(path), "checkpoint")
        own = {"model": weights["model"]["name"], "weights": weights["weights"], "step": weights.get("step")}
        if checkpoint is not None and any(checkpoint.get(name) != value for name, value in own.items()):
            of = f"{checkpoint.get('model')}, {checkpoint.get('weights')}"
            raise UserError(f"{flag} {path}: of {checkpoint.get('file')} ({of}), not of these weights")


def read_note(path: Path) -> Json:
    """Settings that sample.py noted in a picture; none in others."""
    try:
        note = json.loads(note_in(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return note if at(note, "checkpoint") and isinstance(at(note, "flags"), list) else {}


def show_pictures(paths: Sequence[Path], name: str, preset: Json) -> Iterator[str]:
    """Pictures with the commands that make them again.

    Args:
        paths: The pictures.
        name: Repository or folder of the weights.
        preset: Sampling by default.
    """
    for path in paths:
        yield f"![samples]({quote(path.name)})\n"
        yield caption(read_note(path), name, preset) + "\n"


def caption(note: Json, name: str, preset: Json) -> str:
    """Describe how a picture was made."""
    if not note:
        return "The file does not say by which settings it was made."
    command = shlex.join(["python", str(note["script"]), "--ckpt", name, *map(str, note["flags"])])
    text = f"Made by `{command}`, on {note.get('device')} with PyTorch {note.get('torch')}."
    scale, default = note.get("cfg_scale"), preset.get("cfg_scale")
    if scale not in (None, default):
        text += f" Its guidance scale is {scale}; the default of `Pipeline.sample` and sample_ddp.py is {default}."
    return text
