"""Samples of many processes, collected in one .npz: `arr_0` uint8 (N, H, W, C), labels as `arr_1`.

During sampling there is a folder NAME.partial/ next to the final file:

    samples.npz     the images, each at its final position
    finished.RANK   one line per chunk: its number and the checksum of its bytes, written after the bytes
    settings.json   all settings that fix the images

A killed job is resumed from it: chunks with the right checksum are kept, all others are made again. Processes on
several nodes need a shared file system.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from data.npz_file import NpzFile, Piece
from runtime.errors import UserError
from runtime.files import atomic_path


class SampleFile:
    """The images of one sampling job.

    Args:
        path: Final name, ending in ".npz".
        shape: (N, H, W, C) of all images, or (N, F, H, W, C) of clips.
        chunk: Images per chunk; the last one may have fewer.
        rank: Rank of this process.

    Attributes:
        chunks: Number of chunks.
        partial: Folder of the unfinished job.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], chunk: int, rank: int = 0) -> None:
        self.path, self.images, self.chunk = path, shape[0], chunk
        self.chunks = -(-shape[0] // chunk)
        self.partial = path.with_name(f"{path.stem}.partial")
        self._npz = NpzFile(self.partial / "samples.npz", shape)
        self._settings = self.partial / "settings.json"
        self._finished = self.partial / f"finished.{rank}"
        self._lock: IO[bytes] | None = None

    def open(self, settings: Mapping[str, object], *, overwrite: bool = False) -> list[int]:
        """Start or resume the job; on one process, before the others write.

        Args:
            settings: All settings that fix the images, as JSON values by flag or name.
            overwrite: Delete images made with other settings, and replace a finished file.

        Returns:
            Numbers of the chunks that are still to be made.

        Raises:
            UserError: If the file exists, was started with other settings, is being written, or exceeds the disk.
        """
        if self.path.exists() and not overwrite:
            raise UserError(f"{self.path} exists already; --overwrite replaces it")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._acquire_lock()
        started = self._started_settings()
        changed = [] if started is None else differences(started, settings)
        if changed and not overwrite:
            self.close()
            raise UserError(
                f"{self.partial} was started with other settings ({'; '.join(changed)}); "
                "--overwrite deletes it and starts again"
            )
        if started is None or changed:
            self._start(settings)
        return self._missing()

    def _acquire_lock(self) -> None:
        """Lock the folder against other jobs until this process ends."""
        self._lock = (self.partial / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{self.partial}: another process is writing it; wait for it, or give another name"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _started_settings(self) -> dict[str, object] | None:
        """The settings of a job that can be resumed; they are written last."""
        try:
            return json.loads(self._settings.read_text()) if self._npz.path.exists() else None
        except (OSError, ValueError):
            return None

    def _start(self, settings: Mapping[str, object]) -> None:
        self._settings.unlink(missing_ok=True)
        for old in self.partial.glob("finished.*"):
            old.unlink()
        self._npz.path.unlink(missing_ok=True)
        needed, free = self._npz.bytes_reserved, shutil.disk_usage(self.partial).free
        if needed > free:
            shutil.rmtree(self.partial)
            self.close()
            raise UserError(f"{self.path}: the images take {needed:,} bytes, and {free:,} are free on the disk")
        self._npz.create()
        with atomic_path(self._settings) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")

    def _missing(self) -> list[int]:
        """Chunks that are not finished, or have another checksum: a disk may lose bytes, a copy may be cut short."""
        pieces = self._pieces()
        return [k for k in range(self.chunks) if k not in pieces or pieces[k] != self._npz.read_piece(*self._rows(k))]

    def rows_in(self, chunk: int) -> int:
        """Number of images in a chunk."""
        start, stop = self._rows(chunk)
        return stop - start

    def _rows(self, chunk: int) -> tuple[int, int]:
        return chunk * self.chunk, min((chunk + 1) * self.chunk, self.images)

    def _pieces(self) -> dict[int, Piece]:
        """Finished chunks of all processes. A line that a kill cut short has too few words, or a wrong checksum."""
        pieces: dict[int, Piece] = {}
        for path in self.partial.glob("finished.*"):
            for line in path.read_text().splitlines():
                words = line.split()
                if len(words) == 2 and all(word.isdigit() for word in words) and int(words[0]) < self.chunks:
                    start, stop = self._rows(int(words[0]))
                    pieces[int(words[0])] = Piece(int(words[1]), (stop - start) * self._npz.row_bytes)
        return pieces

    def write(self, chunk: int, images: npt.NDArray[np.uint8]) -> None:
        """Store a chunk (n, H, W, C), then record it as finished; rows after the job's end are dropped.

        Raises:
            UserError: If the disk is full; finished chunks are kept.
        """
        start, stop = self._rows(chunk)
        try:
            piece = self._npz.write(start, images[: stop - start])
            with self._finished.open("a") as file:
                # The line break in front separates it from a line that a kill cut short
                file.write(f"\n{chunk} {piece.crc}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.partial}: cannot write there ({error.strerror}); the same command resumes the job"
            ) from error

    def finish(self, labels: npt.NDArray[np.int64]) -> None:
        """Move the file to its final name, and remove the rest; on one process, after all others."""
        pieces = self._pieces()
        self._npz.seal([pieces[k] for k in range(self.chunks)], {"arr_1": labels})
        os.replace(self._npz.path, self.path)
        shutil.rmtree(self.partial)
        self.close()

    def close(self) -> None:
        """Release the lock; the folder is kept."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


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
