"""Names of many files in one buffer."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator

_ERRORS = "surrogateescape"  # as file systems and archives give bytes that are not UTF-8


class PackedNames:
    """A list of names that can grow.

    A list of Python strings takes some 60 bytes more a name, and every process that reads it copies it:
    reading a string counts references to it, and so writes to the page that the processes share.

    Args:
        names: First names.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text, self._ends = bytearray(), array("Q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Add a name at the end."""
        self._text += name.encode(errors=_ERRORS)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        """Number of names."""
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """A name; an IndexError if there are fewer."""
        place = range(len(self._ends))[index]
        start = self._ends[place - 1] if place else 0
        return self._text[start : self._ends[place]].decode(errors=_ERRORS)

    def __iter__(self) -> Iterator[str]:
        """All names in their order."""
        return map(self.__getitem__, range(len(self)))

    @property
    def nbytes(self) -> int:
        """Memory of all names in bytes."""
        return sys.getsizeof(self._text) + sys.getsizeof(self._ends)
