"""Errors: a user's mistake is one line and exit status 2; anything else is a bug and keeps its traceback."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

USER_ERROR_STATUS = 2
FAILED_STATUS = 1


class UserError(Exception):
    """A mistake of the user; the message names flag or file, value and remedy.

    Attributes:
        is_repeated: Another rank prints the same line.
    """

    is_repeated = False


class RankError(UserError):
    """A mistake that one rank may have met alone, or when ranks are not known yet; each prints the line itself."""


class RankTimeout(Exception):
    """A collective operation timed out: another process hangs or is gone."""


def is_first() -> bool:
    """True on rank 0, known before the launcher's variables are checked: a value that is no rank counts as 0."""
    rank = os.environ.get("RANK", "0")
    return not (rank.isascii() and rank.isdigit() and int(rank) > 0)


@contextmanager
def error_prefix(flag: str) -> Iterator[None]:
    """Turn a ValueError of the library inside the block into a `UserError` that starts with the flag at fault.

    An OSError that names a file becomes one, too: a folder that may not be read, a disk that fails.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        path = os.fsdecode(error.filename)
        raise UserError(f"{flag}: {path}: {error.strerror}" if flag else f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{flag}: {error}" if flag else str(error)) from error


def run(main: Callable[[Sequence[str]], None], program: str, argv: Sequence[str] | None = None) -> int:
    """Run an entry point.

    Args:
        main: Takes the arguments after the program's name.
        program: Name for the message.
        argv: Arguments; None takes the command line's.

    Returns:
        0; 2 after a `UserError`, which is printed as one line (by one rank only); 1 after a `RankTimeout`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may hold bytes that are not UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if (is_first() or isinstance(error, RankError)) and not error.is_repeated:
            print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR_STATUS
    except RankTimeout as error:
        print(f"{program}: {error}", file=sys.stderr)
        return FAILED_STATUS
    return 0
