"""Going on with a run: which checkpoint, and whether the settings still mean the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from runtime.checkpoint import read_groups
from runtime.config import flag_name
from runtime.errors import UserError
from runtime.files import atomic_path

GROUPS = ("model", "ema", "optimizer")
ALIGNMENT = "alignment"  # the projector's group, in the checkpoints of runs with one


class Resumable(NamedTuple):
    """A run to go on with.

    Attributes:
        folder: of the run.
        groups: "model", "ema" and "optimizer", and "alignment" if the run has one, name -> tensor.
        meta: the checkpoint's JSON document.
    """

    folder: Path
    groups: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def read_resumable(path: Path) -> Resumable:
    """Reads everything from one checkpoint of train.py.

    Raises:
        UserError: if the file is missing, damaged, or not such a checkpoint.
    """
    groups, meta = read_groups(path, GROUPS, "--resume")
    if meta is None:
        raise UserError(f"--resume {path}: not a checkpoint of train.py; to start from weights alone use --init-from")
    if meta["train"].get("align") is not None:
        groups |= read_groups(path, [ALIGNMENT], "--resume")[0]
    return Resumable(path.parent.parent, groups, meta)


def find_resumable(
    results: Path, settings: Mapping[str, Any], free: Collection[str], say: Callable[[str], None]
) -> Resumable | None:
    """The newest run with these settings, at its newest readable checkpoint.

    Args:
        results: where runs are put.
        settings: of the run to go on with.
        free: settings that may differ.
        say: told about damaged checkpoints that were passed over.

    Returns:
        The run, or None if there is none with a readable checkpoint.
    """
    for folder in sorted((p for p in results.glob("[0-9][0-9][0-9]-*") if p.is_dir()), reverse=True):
        for path in sorted((folder / "checkpoints").glob("[0-9]*.safetensors"), reverse=True):
            try:
                found = read_resumable(path)
            except UserError as error:
                say(f"passed over: {error}")
                continue
            if differences(found.meta["train"], settings, free):
                break  # another run; its older checkpoints are no closer
            return found
    return None


def differences(then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """Settings that changed, as sentences about flags."""
    return [
        f"{flag_name(name)} was {then.get(name)!r}, now {now[name]!r}"
        for name in now
        if name not in free and then.get(name) != now[name]
    ]


def cut_metrics(folder: Path, step: int) -> None:
    """Drops what metrics.jsonl says about steps after `step`: they are about to happen again."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    lines = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except ValueError:
            continue  # the kill cut this line short
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines))
