"""Dataclass fields that carry their command-line flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    flag: str | None = None,
    was: Sequence[str] = (),
    free: bool = False,
    sampling: bool = False,
) -> Any:
    """Declare a dataclass field with a help text.

    Args:
        default: Value where the flag is not given.
        help: One sentence for `--help`.
        choices: Allowed values of a string.
        flag: Official name of the flag where it differs from the field's.
        was: Former names, accepted for one version with a warning.
        free: May change on resume, or has no influence on a job's images.
        sampling: Offered by the sampling scripts, too.
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "was": was, "free": free, "sampling": sampling}
    return dataclasses.field(default=default, metadata=metadata)
