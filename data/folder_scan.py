"""The classes and image files of a folder, as people have them."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.packed_names import PackedNames

# File names that are opened; the content may be any of `data.image_folder.FORMATS`
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
OTHER_IMAGES = (
    ".gif", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga", ".ico", ".svg", ".psd", ".eps", ".dib", ".pcx",
    ".pbm", ".pnm", ".apng", ".dds", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw",
)  # fmt: skip
READ = "JPEG, PNG, WebP, BMP, TIFF and PPM are read; convert other images to JPEG or PNG"
NO_EXTENSION, BROKEN, LOOP = "without an extension", "links to missing files", "links to folders that hold them"
FILE, FOLDER = "file", "folder"
SPECIAL = "pipes or devices"  # reading them could wait for ever
MAX_REPEATS = 10_000  # times that links of a class may lead to a folder again; links of links multiply
OTHER_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "System Volume Information"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


Identity = tuple[int, int]  # device and inode of a folder


class Samples:
    """Paths and labels of images, in a fraction of the memory of a list of pairs.

    Args:
        root: Folder of all paths.
    """

    def __init__(self, root: str | Path) -> None:
        self._start, self._names, self._labels = os.path.join(root, ""), PackedNames(), array("i")

    def append(self, path: str, label: int) -> None:
        """Add an image, by its path under the root as `os.scandir` gives it."""
        self._names.append(path.removeprefix(self._start))
        self._labels.append(label)

    def path(self, index: int) -> str:
        """Path of an image, which starts with the root."""
        return self._start + self._names[index]

    def name(self, index: int) -> str:
        """Path of an image relative to the root, with forward slashes."""
        return self._names[index].replace(os.sep, "/")

    def label(self, index: int) -> int:
        """Label of an image."""
        return self._labels[index]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._labels)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Path and label of each image."""
        return ((self._start + name, label) for name, label in zip(self._names, self._labels, strict=True))

    def __eq__(self, other: object) -> bool:
        """True for the same paths and labels, in the same order, also in a list."""
        return isinstance(other, Samples | list) and [*self] == [*other]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self._names.nbytes + sys.getsizeof(self._labels)


class Scan(NamedTuple):
    """Content of an image folder.

    Attributes:
        classes: Names of the class folders, sorted as text.
        samples: Path and label of each image, by class, then by folder and name.
    """

    classes: list[str]
    samples: Samples


def scan(root: Path, *, captioned: bool = False) -> Scan:
    """Find the classes of a folder, and their images in a fixed order; the same as torchvision's ImageFolder.

    With captions, which take the place of labels, no folder of a class is needed: there are no classes then.

    Hidden files and folders, and those that file systems and archives add, are not seen. What else is left out is said
    in a warning. Links to folders are followed, but for those to a folder that holds them.

    Raises:
        ValueError: If some classes have images and one has none, if they are the splits of a data set, or if links lead
            to the same folders too often.
    """
    around = holders(root)
    folders = [entry for entry in os.scandir(root) if not is_hidden(entry.name) and what_is(entry) == FOLDER]
    loops = sorted(entry.path for entry in folders if is_loop(entry, around))
    names = sorted(entry.name for entry in folders if entry.path not in loops)
    check_splits(root, names)
    samples = Samples(root)
    left_out, empty = Counter({LOOP: len(loops)}), dict[str, str]()  # of the whole folder; classes without an image
    for label, name in enumerate(names):
        before, here = len(samples), Counter[str]()
        for path, reason in _files(os.path.join(root, name), around):
            if reason == LOOP:
                loops.append(path)
            if reason is None:
                samples.append(path, label)
            else:
                here[reason] += 1
        left_out += here
        if len(samples) == before:
            empty[name] = f"; it has {counted(here)}" if here else ""
    for name, kinds in empty.items() if samples else ():
        raise ValueError(f"{root}: the class folder {name} has no image{kinds}; remove it, or add images")
    if not samples and any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(root)):
        if captioned:
            return scan_flat(root)
        above = root.parent if root.name else root.resolve().parent
        raise ValueError(
            f"{root}: holds images, and no class folders with images; give the folder above, {above}, or put the "
            "images into one folder in it"
        )
    if +left_out:
        first = f" (the first is {os.path.relpath(loops[0], root)})" if loops else ""
        warnings.warn(f"{root}: left out {counted(left_out)}{first}; {READ}", stacklevel=3)
    warn_of_numbers(root, names)
    return Scan(names, samples)


def scan_flat(root: Path) -> Scan:
    """Find the images of a folder without classes; what is left out is said in a warning."""
    samples, (images, left_out) = Samples(root), find_images(root)
    for path in images:
        samples.append(path, 0)
    if +left_out:
        warnings.warn(f"{root}: left out {counted(left_out)}; {READ}", stacklevel=4)
    return Scan([], samples)


def find_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Find all images under a folder, whatever folders they are in, and count what else there is by its kind.

    Raises:
        ValueError: If links lead to the same folders too often.
    """
    images, left_out = list[str](), Counter[str]()
    for path, reason in _files(str(root), holders(root)[1:]):
        if reason is None:
            images.append(path)
        else:
            left_out[reason] += 1
    return images, left_out


def check_splits(root: Path, names: Sequence[str]) -> None:
    """Raise a ValueError if all folders of a data set have names of splits."""
    if names and SPLITS.issuperset(name.lower() for name in names):
        inside = next((name for name in names if name.lower().startswith("train")), names[0])
        raise ValueError(f"{root}: holds the splits {', '.join(names)}, not classes; give {root / inside}")


def warn_of_numbers(root: Path, classes: Sequence[str]) -> None:
    """Warn if names of classes are numbers, and sorted as text they are in another order."""
    if all(map(str.isdecimal, classes)) and [*classes] != sorted(classes, key=int):
        shown = ", ".join(classes[:4])
        warnings.warn(f"{root}: class names are numbers, and are sorted as text: {shown}, ...", stacklevel=4)


def is_hidden(name: str) -> bool:
    """True for names that programs give to files and folders of their own."""
    return name.startswith(".") or name in OTHER_FOLDERS


def what_is(entry: os.DirEntry[str]) -> str:
    """FOLDER or FILE, also by a link; else why it is neither."""
    try:
        if entry.is_dir():
            return FOLDER
        if entry.is_file():
            return FILE
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
    return BROKEN if entry.is_symlink() and not os.path.exists(entry.path) else SPECIAL


def holders(root: Path) -> tuple[Identity, ...]:
    """A folder, and those that hold it."""
    place = root.resolve()
    return tuple(map(_identity, (place, *place.parents)))


def is_loop(folder: os.DirEntry[str], around: Collection[Identity]) -> bool:
    """True for a link to a folder that holds it."""
    return folder.is_symlink() and _identity(folder.path) in around


def counted(left_out: Counter[str]) -> str:
    """Numbers of what is left out, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted((+left_out).items()))


def _identity(folder: str | Path) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _files(folder: str, around: tuple[Identity, ...]) -> Iterator[tuple[str, str | None]]:
    """Paths of the images under a folder, in order, and of what is left out with a reason.

    Args:
        folder: A class folder.
        around: Folders that hold it.

    Raises:
        ValueError: If links lead to the same folders too often.
    """
    found: list[tuple[str, list[tuple[str, str | None]]]] = []
    seen, repeats = set[Identity](), 0
    folders = [(folder, around)]
    while folders:
        place, above = folders.pop()
        own, files = _identity(place), list[tuple[str, str | None]]()
        if own in above:
            found.append((place, [(place, LOOP)]))
            continue
        repeats += own in seen
        if repeats > MAX_REPEATS:
            raise ValueError(f"{folder}: its links lead to the same folders more than {MAX_REPEATS:,} times")
        seen.add(own)
        for entry in os.scandir(place):
            suffix = os.path.splitext(entry.name)[1].lower()
            if is_hidden(entry.name):
                continue
            kind = what_is(entry)
            if kind == FOLDER:
                folders.append((entry.path, (*above, own)))
            elif suffix in EXTENSIONS:
                files.append((entry.path, None if kind == FILE else kind))
            elif suffix in OTHER_IMAGES:
                files.append((entry.path, suffix))
            elif suffix in ("", "."):
                files.append((entry.path, NO_EXTENSION))
        found.append((place, sorted(files)))
    for _, files in sorted(found):
        yield from files
