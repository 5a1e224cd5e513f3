"""Samples of many processes into one .npz: `arr_0` uint8 (N, H, W, C), labels as `arr_1`, in the order of their index.

While sampling goes on, images lie in a memory-mapped array under a temporary name, where every process writes the rows
that are its own. At the end they are streamed into the .npz, so that 50,000 images never sit in memory. Processes on
several nodes need a shared file system.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.files import atomic_path

ROWS_AT_A_TIME = 256


class SampleFile:
    """The images of one sampling job on their way into an .npz.

    Args:
        path: final name, ending in ".npz".
        shape: (N, H, W, C) of all images.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self.path, self.shape = path, shape
        self._partial = path.with_name(f".{path.stem}.partial.npy")

    def create(self) -> None:
        """Reserves the temporary array; by one process, before the others write."""
        np.lib.format.open_memmap(self._partial, mode="w+", dtype=np.uint8, shape=self.shape).flush()

    def write(self, start: int, images: npt.NDArray[np.uint8]) -> None:
        """Stores images (n, H, W, C) as rows start .. start + n - 1; rows behind the end are padding and dropped."""
        array = np.lib.format.open_memmap(self._partial, mode="r+")
        stop = min(start + len(images), self.shape[0])
        array[start:stop] = images[: stop - start]
        array.flush()

    def finish(self, labels: npt.NDArray[np.int64]) -> None:
        """Writes the .npz, whole or not at all, and removes the temporary array; by one process, after all others."""
        array = np.load(self._partial, mmap_mode="r")
        with atomic_path(self.path) as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                _add_array(archive, "arr_0", array)
                _add_array(archive, "arr_1", labels)
        self.discard()

    def discard(self) -> None:
        """Removes the temporary array."""
        self._partial.unlink(missing_ok=True)


def _add_array(archive: zipfile.ZipFile, name: str, array: npt.NDArray[np.generic]) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # equal content, equal bytes
    with archive.open(entry, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(array), ROWS_AT_A_TIME):
            file.write(np.ascontiguousarray(array[start : start + ROWS_AT_A_TIME]).tobytes())
