"""Samples of many processes, collected in one .npz: `arr_0` uint8 (N, H, W, C), labels, if any, as `arr_1`.

Of clips `arr_0` is (N, F, H, W, C).

During sampling there is a folder NAME.partial/ next to the final file:

    samples.npz     the images, each at its final position
    finished.RANK   one line per chunk: its number and the checksum of its bytes, written after the bytes
    settings.json   all settings that fix the images

A killed job is resumed from it: chunks with the right checksum are kept, all others are made again. Processes on
several nodes need a shared file system. A finished job is NAME.npz, NAME.json, and a folder NAME of PNG files where
they are asked for, or of GIF and mp4 files of clips. What no job wrote keeps its place, whatever its name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.npz_file import NpzFile, Piece
from runtime import migrate
from runtime.download import sha256_of
from runtime.errors import UserError
from runtime.files import atomic_path, remove_temporary
from runtime.json_file import KEY, Json, is_intact, write_json
from runtime.locks import locked
from runtime.settings import flag_name

SHARD = "shard"  # key in the JSON of a part of a job
LISTING = ".txt"  # suffix of the file of prompts next to the .npz
LOCK = "lock"  # removed with the folder, after all else
_PARTIAL_NAME = re.compile(r"samples\.npz|settings\.json|finished\.\d+|lock")
_SINGLE_NAME, _SINGLE_TEMPORARY = (re.compile(p + r"\.(png|gif|mp4)") for p in (r"\d{6,}", r"\.\d{6,}\.\d+\.tmp"))
_SINGLE_FLAGS = ("save_png", "save_gif", "save_mp4")
_FINISHED_LINE = re.compile(rb"^(\d{1,9}) (\d{1,10})$", re.MULTILINE)


class SampleFile:
    """The images of one sampling job.

    Args:
        path: Final name, ending in ".npz".
        shape: (N, H, W, C) of all images, or (N, F, H, W, C) of clips.
        chunk: Images per chunk; the last one may have fewer.
        rank: Rank of this process.
        first: Number of the first image in the job, for names of single files; not 0 in a shard.

    Attributes:
        chunks: Number of chunks.
        partial: Folder of the unfinished job.
        folder: Folder of files of single samples.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], chunk: int, rank: int = 0, *, first: int = 0) -> None:
        self.path, self.images, self.chunk, self._first = path, shape[0], chunk, first
        self.chunks = -(-shape[0] // chunk)
        self.partial, self.folder = path.with_name(f"{path.stem}.partial"), path.with_suffix("")
        self._npz, self._final = NpzFile(self.partial / "samples.npz", shape), NpzFile(path, shape)
        self._record, self._settings = path.with_suffix(".json"), self.partial / "settings.json"
        self._finished = self.partial / f"finished.{rank}"
        self._lock = ExitStack()

    def open(self, settings: Mapping[str, object], *, overwrite: bool = False, files: Sequence[str] = ()) -> list[int]:
        """Start or resume the job; on one process, before the others write.

        Args:
            settings: All settings that fix the images, as JSON values by flag or name.
            overwrite: Delete images made with other settings, and replace a finished file.
            files: Suffixes of files that are written of every sample, too, in a folder that is made for them.

        Returns:
            Numbers of the chunks that are still to be made.

        Raises:
            UserError: If the file exists, was started with other settings, is being written, or exceeds the disk, or
                if something that no job wrote has the name of one of its files.
        """
        try:
            with self._writing():
                self._check_origin(files)
                if self.path.exists() and not overwrite and not self._settings.exists():
                    self._sweep()
                    raise UserError(f"{self.path} exists already; --overwrite replaces it")
                self.partial.mkdir(parents=True, exist_ok=True)
                self._acquire_lock()
                return self._open(settings, overwrite, files)
        except UserError:
            self.close()
            raise

    def _open(self, settings: Mapping[str, object], overwrite: bool, files: Sequence[str]) -> list[int]:
        """Start or resume the job under the lock."""
        for path in (self._settings, self._record):
            remove_temporary(path)
        started = _read_json(self._settings)
        if started is None and self._settings.exists():
            print(f"warning: {self._settings} is damaged; the job starts again", file=sys.stderr)
        changed = [] if started is None else differences(migrate.sample_job(started, settings), settings)
        if changed and not overwrite:
            raise UserError(
                f"{self.partial} was started with other settings ({'; '.join(changed)}); "
                "--overwrite deletes it and starts again"
            )
        resumes = started is not None and not changed
        if resumes and not self._npz.path.is_file() and self.path.exists() and not self._missing(self._final):
            os.replace(self.path, self._npz.path)  # `finish` was killed after its first step, and is repeated
        for path in (self.path, self._record):
            if path.exists() and not overwrite and (path == self.path or not resumes):
                raise UserError(f"{path} exists already; --overwrite replaces it")
        if not resumes or not self._npz.path.is_file():
            self._start(settings, files)
        if files:
            self.folder.mkdir(exist_ok=True)
            _remove_files(self.folder, _SINGLE_TEMPORARY)
        return self._missing(self._npz, files)

    def _check_origin(self, files: Sequence[str]) -> None:
        """Raise a UserError if something that no job wrote has the name of one of this job's files."""
        record = _read_json(self._record) or {}
        if self._record.exists() and not ("config" in record and "checkpoint" in record):
            raise _foreign(self._record)
        settings = _read_json(self._settings) or {}
        if self.partial.exists() and "--ckpt" not in settings:
            names = {path.name for path in self.partial.iterdir()} if self.partial.is_dir() else {""}
            killed = LOCK in names or names >= {"samples.npz", "settings.json"}  # before all settings were written
            if names and (settings or not killed or not all(map(_PARTIAL_NAME.fullmatch, names))):
                raise _foreign(self.partial / min(names))
        ours = any(settings.get(flag_name(name)) for name in _SINGLE_FLAGS) or _saved_files(record)
        if (
            files
            and not ours
            and self.folder.exists()
            and not (self.folder.is_dir() and not any(self.folder.iterdir()))
        ):
            raise _foreign(self.folder)

    def _acquire_lock(self) -> None:
        """Lock the folder against other jobs until `close`, or the end of this process."""
        self._lock.enter_context(locked(self.partial, str(self.partial), LOCK))

    def _start(self, settings: Mapping[str, object], files: Sequence[str]) -> None:
        for folder, pattern in ((self.partial, _PARTIAL_NAME), (self.folder, _SINGLE_NAME))[: 1 + bool(files)]:
            _remove_files(folder, pattern)
        needed, free = self._npz.bytes_reserved, shutil.disk_usage(self.partial).free
        if needed > free:
            self._remove_partial()
            raise UserError(f"{self.path}: the images take {needed:,} bytes, and {free:,} are free on the disk")
        self._npz.create()
        write_json(self._settings, settings)  # last: with them the job can be resumed

    def _sweep(self) -> None:
        """Delete what a job left that was killed while it removed its folder, after all work."""
        if self.partial.is_dir():
            self._acquire_lock()
            self._remove_partial()

    def _remove_partial(self) -> None:
        """Delete the job's files in its folder, and the folder if nothing else is in it."""
        self._settings.unlink(missing_ok=True)  # first: without them `open` knows a rest
        _remove_files(self.partial, _PARTIAL_NAME)
        (self.partial / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            self.partial.rmdir()
        if self.partial.exists():
            print(f"warning: {self.partial} is kept: it has files that no job wrote", file=sys.stderr)

    def _missing(self, npz: NpzFile, files: Sequence[str] = ()) -> list[int]:
        """Chunks that are not finished, or have another checksum: a disk may lose bytes, a copy may be cut short."""
        pieces = self._pieces()
        return [
            chunk
            for chunk in range(self.chunks)
            if chunk not in pieces
            or pieces[chunk] != npz.read_piece(*self._rows(chunk))
            or not all(self.path_of(i, suffix).exists() for i in range(*self._rows(chunk)) for suffix in files)
        ]

    def path_of(self, index: int, suffix: str) -> Path:
        """Path of a file of one sample, the `index`-th of this file."""
        return self.folder / f"{self._first + index:06d}{suffix}"

    def rows_in(self, chunk: int) -> int:
        """Number of images in a chunk."""
        start, stop = self._rows(chunk)
        return stop - start

    def _rows(self, chunk: int) -> tuple[int, int]:
        return chunk * self.chunk, min((chunk + 1) * self.chunk, self.images)

    def _pieces(self) -> dict[int, Piece]:
        """Finished chunks of all processes. A damaged line has another form, or another checksum than the chunk."""
        pieces: dict[int, Piece] = {}
        for path in self.partial.glob("finished.*"):
            for chunk, crc in _FINISHED_LINE.findall(path.read_bytes() if path.is_file() else b""):
                if int(chunk) < self.chunks:
                    start, stop = self._rows(int(chunk))
                    pieces[int(chunk)] = Piece(int(crc), (stop - start) * self._npz.row_bytes)
        return pieces

    def write(self, chunk: int, images: npt.NDArray[np.uint8]) -> None:
        """Store a chunk (n, ..., H, W, C), then record it as finished; rows after the job's end are dropped.

        Raises:
            UserError: If the disk is full; finished chunks are kept.
        """
        start, stop = self._rows(chunk)
        with self._writing():
            piece = self._npz.write(start, images[: stop - start])
            with self._finished.open("a") as file:
                # The line break in front separates it from a line that a kill cut short
                file.write(f"\n{chunk} {piece.crc}\n")
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.partial}: cannot write there ({error.strerror or error}); the same command resumes the job"
            ) from error

    def finish(
        self,
        labels: npt.NDArray[np.int64] | None,
        record: Mapping[str, object] | None = None,
        *,
        digest: bool = False,
    ) -> None:
        """Move the file to its final name, write NAME.json, and remove the rest; on one process, after all others.

        Args:
            labels: (N,) labels of all images; None for none.
            record: Content of NAME.json; None writes none.
            digest: Add the file's sha256 to it.

        Raises:
            UserError: If the disk is full.
        """
        pieces = self._pieces()
        with self._writing():
            self._npz.seal([pieces[k] for k in range(self.chunks)], {} if labels is None else {"arr_1": labels})
            os.replace(self._npz.path, self.path)
            if record is not None:
                record = {**record, "sha256": sha256_of(self.path)} if digest else record
                with atomic_path(self._record) as temporary:
                    temporary.write_text(json.dumps(record, indent=2) + "\n")
        self._remove_partial()
        self.close()

    def close(self) -> None:
        """Release the lock; the folder is kept."""
        self._lock.close()


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Settings that changed, one phrase each."""
    now = json.loads(json.dumps(now))
    if then.get("format") != now.get("format"):
        return ["those of another version of this code"]
    return [
        f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]


def _remove_files(folder: Path, pattern: re.Pattern[str]) -> None:
    """Delete files of these names, but not the lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != LOCK and pattern.fullmatch(path.name):
            path.unlink()


def _foreign(path: Path) -> UserError:
    return UserError(f"{path}: no sampling job wrote it, so it is not replaced; move it, or give another --output")


def _read_json(path: Path) -> Json | None:
    """Read a JSON object; None if there is none, or it does not match its checksum."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not is_intact(document):
        return None
    return {name: value for name, value in document.items() if name != KEY}


def _saved_files(record: Json) -> bool:
    """True if the job that wrote this record, of either format, wrote files of single samples."""
    config = record.get("config")
    groups = [config, *config.values()] if isinstance(config, dict) else []
    return any(group.get(name) is True for group in groups if isinstance(group, dict) for name in _SINGLE_FLAGS)
