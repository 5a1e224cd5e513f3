"""The classes and image files of a folder, as people have them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# File names that are opened; the content may be any of `data.image_folder.FORMATS`
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
OTHER_IMAGES = (
    ".gif", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga", ".ico", ".svg", ".psd", ".eps", ".dib", ".pcx",
    ".pbm", ".pnm", ".apng", ".dds", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw",
)  # fmt: skip
NO_EXTENSION = "without an extension"
OTHER_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "System Volume Information"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Scan(NamedTuple):
    """Content of an image folder.

    Attributes:
        classes: Names of the class folders, sorted as text.
        samples: Path and label of each image, by class, then by folder and name.
    """

    classes: list[str]
    samples: list[tuple[str, int]]


def scan(root: Path) -> Scan:
    """Find the classes of a folder, and their images in a fixed order; the same as torchvision's ImageFolder.

    Hidden files and folders, and those that file systems and archives add, are not seen. What else is left out is said
    in a warning.

    Raises:
        ValueError: If some classes have images and one has none, or if they are the splits of a data set.
    """
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name))
    if names and SPLITS.issuperset(name.lower() for name in names):
        inside = next((name for name in names if name.lower().startswith("train")), names[0])
        raise ValueError(f"{root}: holds the splits {', '.join(names)}, not classes; give {root / inside}")
    samples: list[tuple[str, int]] = []
    left_out, empty = Counter[str](), dict[str, str]()  # of the whole folder; classes without an image
    for label, name in enumerate(names):
        before, here = len(samples), Counter[str]()
        for path, reason in _files(os.path.join(root, name)):
            if reason is None:
                samples.append((path, label))
            else:
                here[reason] += 1
        left_out += here
        if len(samples) == before:
            empty[name] = f"; it has {_counted(here)}" if here else ""
    for name, kinds in empty.items() if samples else ():
        raise ValueError(f"{root}: the class folder {name} has no image{kinds}; remove it, or add images")
    if left_out:
        warnings.warn(f"{root}: left out {_counted(left_out)}; PNG, JPEG and WebP are read", stacklevel=3)
    if all(map(str.isdecimal, names)) and names != sorted(names, key=int):
        shown = ", ".join(names[:4])
        warnings.warn(f"{root}: class names are numbers, and are sorted as text: {shown}, ...", stacklevel=3)
    return Scan(names, samples)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in OTHER_FOLDERS


def _files(folder: str) -> Iterator[tuple[str, str | None]]:
    """Paths of the images under a folder, in order, and of what is left out with a reason."""
    found: list[tuple[str, list[tuple[str, str | None]]]] = []
    folders = [folder]
    while folders:
        place, files = folders.pop(), list[tuple[str, str | None]]()
        for entry in os.scandir(place):
            suffix = os.path.splitext(entry.name)[1].lower()
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif suffix in EXTENSIONS:
                dangling = entry.is_symlink() and not os.path.exists(entry.path)
                files.append((entry.path, "links to missing files" if dangling else None))
            elif suffix in OTHER_IMAGES:
                files.append((entry.path, suffix))
            elif suffix in ("", "."):
                files.append((entry.path, NO_EXTENSION))
        found.append((place, sorted(files)))
    for _, files in sorted(found):
        yield from files


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
