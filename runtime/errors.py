"""A user's mistake is one line and exit status 2; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

USER_ERROR_STATUS = 2
FAILED_STATUS = 1


class UserError(Exception):
    """Says what the user can mend: the flag or file, its value, and what to do."""


class PeerLost(Exception):
    """A collective waited in vain for another process."""


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """Turns a ValueError of the library inside the block into a `UserError` that names the flag behind it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def run(main: Callable[[Sequence[str]], None], program: str, argv: Sequence[str] | None = None) -> int:
    """Runs an entry point.

    Args:
        main: takes the arguments behind the program's name.
        program: name for the message.
        argv: arguments; None takes the command line's.

    Returns:
        0; 2 after a `UserError`, which is printed as one line (by one rank only); 1 after a `PeerLost`.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR_STATUS
    except PeerLost as error:
        print(f"{program}: {error}", file=sys.stderr)
        return FAILED_STATUS
    return 0
