"""The videos of a folder: files, or folders of frames, by class or not; their listing is kept.

    CLASS/VIDEO.mp4    VIDEO.mp4    CLASS/VIDEO/frame_0001.jpg    VIDEO/frame_0001.jpg

The listing (`.clip_listing.json` in the folder) has the number of frames of each video. A file or folder that changed
since then, by its size and time of change, is opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data.folder_scan import (
    EXTENSIONS,
    FILE,
    FOLDER,
    LOOP,
    OTHER_IMAGES,
    Identity,
    check_splits,
    counted,
    holders,
    is_hidden,
    is_loop,
    warn_of_numbers,
    what_is,
)
from data.image_folder import UnreadableImageError
from data.video_files import EXTENSIONS as VIDEO_EXTENSIONS
from data.video_files import OTHER_VIDEOS, VideoInfo, check_pyav, inspect_video
from runtime.json_file import read_json, write_json

LISTING = ".clip_listing.json"
FORMAT = 1
NAME = re.compile(r"(?P<start>.*?)(?P<number>\d+)(?P<end>\D*\.\w+)", re.DOTALL)
THREADS = 8
NO_FRAMES = "folders without frames"
OTHERS = (*EXTENSIONS, *OTHER_IMAGES, *OTHER_VIDEOS)
READ = f"{', '.join(VIDEO_EXTENSIONS)}, and folders of PNG, JPEG or WebP are read"
NO_SIZE = -1  # of a folder of frames


class Frames(NamedTuple):
    """Files of frames with numbers in their names: start, number with at least `digits` digits, end."""

    start: str
    end: str
    digits: int
    first: int
    step: int
    length: int

    def name(self, position: int) -> str:
        """File of a frame."""
        return f"{self.start}{self.first + position * self.step:0{self.digits}d}{self.end}"

    def names(self) -> Iterator[str]:
        """Files of all frames in their order."""
        template = f"{self.start.replace('%', '%%')}%0{self.digits}d{self.end.replace('%', '%%')}"
        return map(template.__mod__, range(self.first, self.first + self.length * self.step, self.step))


class Video(NamedTuple):
    """A video of a folder.

    Attributes:
        path: Relative to the folder, with forward slashes.
        size: Of the file in bytes; NO_SIZE for a folder of frames.
        stamp: Time of its last change in nanoseconds.
        length: Number of frames; 0 if it cannot be read.
        times: Of a file, as in `VideoInfo`.
        frames: Of a folder of frames: the pattern of their names.
        problem: Why it cannot be read, or cannot be used as a whole; empty if it can.
    """

    path: str
    size: int
    stamp: int
    length: int
    times: tuple[int, float] | None = None
    frames: Frames | None = None
    problem: str = ""

    @property
    def is_folder(self) -> bool:
        """True for a folder of frames."""
        return self.size == NO_SIZE

    @property
    def info(self) -> VideoInfo:
        """Frames of a file."""
        return VideoInfo(self.length, self.times)


class Content(NamedTuple):
    """Content of one folder, sorted by name.

    Attributes:
        rows: Folders of frames, and paths of video files.
        folders: Paths of other folders.
        left_out: Number of other files and folders by kind.
    """

    rows: list[Video | str]
    folders: list[str]
    left_out: Counter[str]


class Listing(NamedTuple):
    """Content of a folder of videos.

    Attributes:
        classes: Names of the class folders, sorted as text; none if the videos have no classes.
        videos: All videos, readable or not, by class, then by name.
        labels: Class number of each; 0 without classes.
    """

    classes: list[str]
    videos: list[Video]
    labels: list[int]


def list_videos(root: Path) -> Listing:
    """List the videos of a folder, and keep the listing there. Hidden files and folders are not seen.

    Raises:
        ValueError: If the folder is missing, holds no videos, or splits, or some videos with a class and some without,
            or if some classes have videos and one has none.
        OSError: If the file system fails.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: {'not a' if root.exists() else 'no such'} folder")
    known, around = _read(root), holders(root)
    with ThreadPoolExecutor(THREADS) as pool:  # file systems answer several questions at once
        here = _find(root, "", known, around, pool)
        check_splits(root, here.folders)
        found = {name: _find(root, name, known, around, pool) for name in here.folders}
    full = [name for name in found if found[name].rows]
    _check(root, here, found, full)
    left_out = sum((each.left_out for each in found.values()), here.left_out)
    left_out[NO_FRAMES] += len(here.folders) if here.rows else 0
    if +left_out:
        warnings.warn(f"{root}: left out {counted(left_out)}; {READ}", stacklevel=3)
    if not here.rows and not full:
        raise ValueError(f"{root}: holds no videos; expected [CLASS/]VIDEO.mp4 or [CLASS/]VIDEO/frame_0001.jpg")
    warn_of_numbers(root, full)
    rows = [(0, row) for row in here.rows] or [(i, row) for i, name in enumerate(full) for row in found[name].rows]
    if any(isinstance(row, str) for _, row in rows):
        check_pyav()
    with ThreadPoolExecutor(THREADS) as pool:
        videos = [*pool.map(lambda row: _inspect(root, row[1], known), rows)]
    if videos != [*known.values()]:
        _write(root, videos)
    return Listing(full, videos, [label for label, _ in rows])


def digest_of_videos(videos: Sequence[Video]) -> str:
    """Digest of the paths of videos, of their sizes and numbers of frames."""
    total = hashlib.sha256()
    for video in videos:
        total.update(f"{video.path}\n{video.size} {video.length} {video.frames}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def pattern_of(names: Iterable[str]) -> tuple[Frames | None, str]:
    """Pattern of the names of a video's frames, and what is wrong with them in a few words.

    Frames are sorted by the last number in their names. Where some are missing, the longest run without a gap is taken.
    """
    present = [*names]
    if (frames := _even(present)) is not None:  # most folders, tried first because it is fast
        return frames, ""
    matches = [match for match in map(NAME.fullmatch, sorted(present)) if match]
    kinds = Counter((match["start"], match["end"]) for match in matches)
    if not kinds:
        return None, "the names of its frames have no numbers"
    if len(kinds) > 1:
        first, second = (f"{start}N{end}" for start, end in list(kinds)[:2])
        return None, f"its frames are named in several ways ({first}, {second})"
    texts = [match["number"] for match in matches]
    digits = min((len(text) for text in texts if text[0] == "0"), default=1)
    numbers = sorted(map(int, texts))
    if len({*numbers}) < len(numbers) or any(f"{int(text):0{digits}d}" != text for text in texts):
        return None, "its frames have numbers of several widths"
    steps = [b - a for a, b in zip(numbers, numbers[1:], strict=False)]
    step = Counter(steps).most_common(1)[0][0] if steps else 1
    breaks = [0, *(i + 1 for i, each in enumerate(steps) if each != step), len(numbers)]
    begin, stop = max(zip(breaks, breaks[1:], strict=False), key=lambda run: run[1] - run[0])
    frames = Frames(*next(iter(kinds)), digits, numbers[begin], step, stop - begin)
    if len(breaks) == 2:
        return frames, ""
    gap = f"frames are missing after number {numbers[breaks[1] - 1]}"
    return frames, f"{gap}; only its longest part without a gap is used, {stop - begin} of {len(numbers)} frames"


def _even(names: list[str]) -> Frames | None:
    """Pattern of names with numbers at equal steps; None for any others."""
    lengths = [*map(len, names)]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    same = shortest == longest
    first = NAME.fullmatch(min(names if same else (name for name in names if len(name) == shortest), default=""))
    last = NAME.fullmatch(max(names if same else (name for name in names if len(name) == longest), default=""))
    if first is None or last is None:
        return None
    begin, stop, length = int(first["number"]), int(last["number"]), len(names)
    step = max(1, (stop - begin) // max(1, length - 1))
    digits = len(first["number"]) if first["number"][0] == "0" else 1
    frames = Frames(first["start"], first["end"], digits, begin, step, length)
    return frames if {*frames.names()} == {*names} else None


def _find(
    root: Path, folder: str, known: dict[str, Video], around: tuple[Identity, ...], pool: ThreadPoolExecutor
) -> Content:
    """Look through a folder, given by its path relative to the root."""
    rows, folders, left_out = list[Video | str](), list[str](), Counter[str]()
    entries = [entry for entry in os.scandir(root / folder) if not is_hidden(entry.name)]
    kinds = {entry.name: what_is(entry) for entry in entries}
    kinds |= {each.name: LOOP for each in entries if kinds[each.name] == FOLDER and is_loop(each, around)}
    paths = {name: f"{folder}/{name}".removeprefix("/") for name in sorted(kinds)}
    opened = {name: pool.submit(_folder, root, path, known) for name, path in paths.items() if kinds[name] == FOLDER}
    for name, path in paths.items():
        suffix, kind = _suffix(name), kinds[name]
        if kind == FOLDER:
            if (video := opened[name].result()) is None:
                folders.append(path)
            else:
                rows.append(video)
        elif kind != FILE:
            left_out[kind] += 1
        elif suffix in VIDEO_EXTENSIONS:
            rows.append(path)
        else:
            left_out[suffix] += suffix in OTHERS
    left_out[NO_FRAMES] += len(folders) if folder else 0
    return Content(rows, folders, left_out)


def _check(root: Path, here: Content, found: dict[str, Content], full: list[str]) -> None:
    """Raise a ValueError for images among videos, videos without a class among classes, and empty classes."""
    images = [name for name in os.listdir(root) if _suffix(name) in EXTENSIONS and here.left_out[_suffix(name)]]
    if images:
        raise ValueError(f"{root}: holds images ({min(images)}); put the frames of each video into its own folder")
    if here.rows and full:
        first, second = _path(here.rows[0]), _path(found[full[0]].rows[0])
        raise ValueError(f"{root}: {first} has no class, and {second} has one; put each into a class folder")
    if full and len(full) < len(found):
        name = next(name for name in found if name not in full)
        kinds = f"; it has {counted(found[name].left_out)}" if +found[name].left_out else ""
        raise ValueError(f"{root}: the class folder {name} has no video{kinds}; remove it, or add videos")


def _inspect(root: Path, row: Video | str, known: dict[str, Video]) -> Video:
    """A video file from the listing, or as it is now; a folder of frames is one already."""
    if isinstance(row, Video):
        return row
    status, before = os.stat(root / row), known.get(row)
    if before is not None and (before.size, before.stamp) == (status.st_size, status.st_mtime_ns):
        return before
    try:
        return Video(row, status.st_size, status.st_mtime_ns, *inspect_video(root / row))
    except UnreadableImageError as error:
        return Video(row, status.st_size, status.st_mtime_ns, 0, problem=error.reason)


def _folder(root: Path, path: str, known: dict[str, Video]) -> Video | None:
    """A folder of frames from the listing, or as it is now; None for a folder without images, or of folders."""
    stamp, before = os.stat(root / path).st_mtime_ns, known.get(path)
    if before is not None and before.is_folder and before.stamp == stamp:
        return before
    listed = [*os.scandir(root / path)]
    frames = _even([entry.name for entry in listed]) if _are_files(listed) else None
    if frames is not None and frames.start[:1] != "." and _suffix(frames.name(0)) in EXTENSIONS:  # most folders
        return Video(path, NO_SIZE, stamp, frames.length, frames=frames)
    entries = [entry for entry in listed if not is_hidden(entry.name)]
    images = [entry.name for entry in entries if _suffix(entry.name) in EXTENSIONS and what_is(entry) == FILE]
    rest = [] if len(images) == len(entries) else sorted({entry.name for entry in entries} - {*images})
    if not images or any(os.path.isdir(root / path / name) for name in rest):
        return None
    frames, problem = pattern_of(images)
    others = [_suffix(name) for name in rest if _suffix(name) in OTHER_IMAGES]
    if others and not problem:
        problem = "left out " + ", ".join(f"{count} {suffix}" for suffix, count in sorted(Counter(others).items()))
    return Video(path, NO_SIZE, stamp, frames.length if frames else 0, frames=frames, problem=problem)


def _are_files(entries: Sequence[os.DirEntry[str]]) -> bool:
    """True if all entries are files; False if one cannot be looked at."""
    try:
        return all(map(os.DirEntry.is_file, entries))
    except OSError:
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _path(row: Video | str) -> str:
    return row if isinstance(row, str) else row.path


def _read(root: Path) -> dict[str, Video]:
    """Videos of the kept listing by path; none if there is no listing, or it is damaged."""
    file = root / LISTING
    try:
        document = read_json(file)
        if document["format"] != FORMAT:
            return {}
        videos = [
            Video(path, size, stamp, length, times and tuple(times), frames and Frames(*frames), problem)
            for path, size, stamp, length, times, frames, problem in document["videos"]
        ]
        if document["digest"] != digest_of_videos(videos):
            raise ValueError(f"{file}: does not match its digest")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file}: cannot be used ({error}); all videos are opened again", stacklevel=4)
        return {}
    return {video.path: video for video in videos}


def _write(root: Path, videos: Sequence[Video]) -> None:
    """Keep a listing; a folder that cannot be written to gets a warning."""
    try:
        content = {"format": FORMAT, "digest": digest_of_videos(videos), "videos": json.loads(json.dumps(videos))}
        write_json(root / LISTING, content, indent=None)
    except OSError as error:
        warnings.warn(f"{root}: its listing cannot be kept ({error.strerror}); starts take longer", stacklevel=4)
