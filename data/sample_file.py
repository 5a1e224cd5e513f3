"""Samples of many processes on their way into one .npz: `arr_0` uint8 (N, H, W, C), labels as `arr_1`.

While sampling goes on, NAME.partial/ lies beside the final name:

    samples.npz     the images, each where it will stay
    finished.RANK   a line a chunk: its number, and the checksum of its bytes, written after the bytes reached the disk
    settings.json   what decides the images

A job that was killed goes on with it: chunks that are there as their checksums say are kept, all others are made again.
Processes on several nodes need a shared file system.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data.npz_file import NpzFile, Piece
from runtime.errors import UserError
from runtime.files import atomic_path


class SampleFile:
    """The images of one sampling job.

    Args:
        path: final name, ending in ".npz".
        shape: (N, H, W, C) of all images.
        chunk: images a chunk; the last one may have fewer.
        rank: of this process.

    Attributes:
        chunks: their number.
        partial: the folder of the unfinished job.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], chunk: int, rank: int = 0) -> None:
        self.path, self.images, self.chunk = path, shape[0], chunk
        self.chunks = -(-shape[0] // chunk)
        self.partial = path.with_name(f"{path.stem}.partial")
        self._npz = NpzFile(self.partial / "samples.npz", shape)
        self._settings = self.partial / "settings.json"
        self._finished = self.partial / f"finished.{rank}"
        self._lock: IO[bytes] | None = None

    def take_up(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> list[int]:
        """Begins the job, or goes on with it; by one process, before the others write.

        Args:
            settings: everything that decides the images, as JSON values by flag or name.
            overwrite: throw away what was made with other settings, and allow a finished file to be replaced.

        Returns:
            Numbers of the chunks that are still to be made.

        Raises:
            UserError: if the file exists, was begun with other settings, is being written, or does not fit on the disk.
        """
        if self.path.exists() and not overwrite:
            raise UserError(f"{self.path} exists already; --overwrite replaces it")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._hold()
        begun = self._begun_with()
        changed = [] if begun is None else differences(begun, settings)
        if changed and not overwrite:
            self.close()
            raise UserError(
                f"{self.partial} was begun with other settings ({'; '.join(changed)}); "
                "--overwrite throws it away and starts anew"
            )
        if begun is None or changed:
            self._begin(settings)
        return self._missing()

    def _hold(self) -> None:
        """Keeps other jobs away from the folder until this process ends, however it ends."""
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

    def _begun_with(self) -> dict[str, Any] | None:
        """The settings of a job that can be gone on with; they are written last."""
        try:
            return json.loads(self._settings.read_text()) if self._npz.path.exists() else None
        except (OSError, ValueError):
            return None

    def _begin(self, settings: Mapping[str, Any]) -> None:
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
        """Chunks that were not finished, or are not as they were: a disk may lose bytes, a copy may be cut short."""
        pieces = self._pieces()
        return [k for k in range(self.chunks) if k not in pieces or pieces[k] != self._npz.read_piece(*self._rows(k))]

    def rows_in(self, chunk: int) -> int:
        """How many images a chunk has."""
        start, stop = self._rows(chunk)
        return stop - start

    def _rows(self, chunk: int) -> tuple[int, int]:
        return chunk * self.chunk, min((chunk + 1) * self.chunk, self.images)

    def _pieces(self) -> dict[int, Piece]:
        """What all processes finished so far. A line that a kill cut short has too few words, or a wrong checksum."""
        found: dict[int, Piece] = {}
        for path in self.partial.glob("finished.*"):
            for line in path.read_text().splitlines():
                words = line.split()
                if len(words) == 2 and all(word.isdigit() for word in words) and int(words[0]) < self.chunks:
                    start, stop = self._rows(int(words[0]))
                    found[int(words[0])] = Piece(int(words[1]), (stop - start) * self._npz.row_bytes)
        return found

    def write(self, chunk: int, images: npt.NDArray[np.uint8]) -> None:
        """Stores a chunk (n, H, W, C), and then notes that it is there; rows behind the job's end are dropped.

        Raises:
            UserError: if the disk is full; what is finished stays.
        """
        start, stop = self._rows(chunk)
        try:
            piece = self._npz.write(start, images[: stop - start])
            with self._finished.open("a") as file:
                # On a line of its own, even behind one that a kill cut short
                file.write(f"\n{chunk} {piece.crc}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.partial}: cannot write there ({error.strerror}); the same command goes on"
            ) from error

    def finish(self, labels: npt.NDArray[np.int64]) -> None:
        """Gives the file its final name, and removes the rest; by one process, after all others."""
        pieces = self._pieces()
        self._npz.seal([pieces[k] for k in range(self.chunks)], {"arr_1": labels})
        os.replace(self._npz.path, self.path)
        shutil.rmtree(self.partial)
        self.close()

    def close(self) -> None:
        """Lets others at the folder; what is in it stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that changed, in words."""
    now = json.loads(json.dumps(now))
    return [
        f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
