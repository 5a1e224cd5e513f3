"""Pickles of nested dictionaries of NumPy arrays, read without running any code in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from runtime.errors import UserError

Array = npt.NDArray[np.generic]

# Raised by pickle and NumPy for damage; a damaged shape may ask for any number of bytes
DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, RecursionError,
)  # fmt: skip


class ForbiddenName(Exception):
    """The pickle refers to something else than arrays."""


class _ArrayType:
    """Stands for numpy.ndarray, which a pickle must not call."""

    def __new__(cls, *_: object) -> _ArrayType:
        """Refuse a call."""
        raise ValueError("a call of numpy.ndarray")


class _Dtype:
    """Stands for a dtype of real numbers; NumPy's own could be brought into states that it cannot handle."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch("[fiu][1248]", code):
            raise ValueError(f"an array of {code}; expected real numbers")
        self.code, self.order = code, "|"

    def __setstate__(self, state: Sequence[object]) -> None:
        """Take the byte order, the second entry."""
        order = state[1]
        if not isinstance(order, str) or order not in ("<", ">", "|"):
            raise ValueError(f"{order!r} is no byte order")
        self.order = order


class _Array:
    """Stands for an array until its content comes."""

    array: Array

    def __init__(self, kind: object, *_: object) -> None:
        if kind is not _ArrayType:
            raise ValueError("an array of another kind than numpy.ndarray")

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, object]) -> None:
        """Take (version, shape, dtype, order of Fortran, bytes)."""
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise ValueError("an array of objects; expected real numbers")
        flat = np.frombuffer(content, np.dtype(dtype.order + dtype.code))
        self.array = flat.reshape(shape, order="F" if fortran_order else "C")


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler that admits NumPy arrays of real numbers, and nothing else by name."""

    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _ArrayType,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> type:
        """Look a name up among the admitted ones."""
        if (module, name) not in self.ADMITTED:
            raise ForbiddenName(f"{module}.{name}")
        return self.ADMITTED[module, name]

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuse references to anything outside the file."""
        raise ForbiddenName("a reference to something outside the file")


def read_arrays(path: Path, remedy: str) -> dict[str, Array]:
    """Read a pickle of nested dictionaries of arrays, as Python writes them in protocols 3 and 4.

    Args:
        path: The file.
        remedy: Advice that ends an error message.

    Returns:
        Arrays of real numbers by their keys, joined by "/".

    Raises:
        UserError: If it cannot be read, is damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file).load()
        return dict(_flatten(content, ""))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    except ForbiddenName as error:
        raise UserError(
            f"{path}: refused, because it holds {error} (unpickling it could run code) where arrays are expected; "
            f"{remedy}"
        ) from error
    except DAMAGED as error:
        reason = f": {error}" if str(error) else ""
        raise UserError(
            f"{path}: damaged, or no pickle of arrays ({type(error).__name__}{reason}); {remedy}"
        ) from error


def _flatten(content: object, prefix: str) -> Iterator[tuple[str, Array]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{prefix or 'the file'} is no dictionary")
    for key, value in content.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, _Array):
            yield name, value.array
        else:
            yield from _flatten(value, name)
