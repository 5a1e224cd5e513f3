"""Names of runs and of their checkpoints in a folder of results, and what becomes of old ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from runtime.files import remove
from runtime.groups import is_whole
from runtime.parts import SUFFIX, is_sharded

RUN_NAME = re.compile(r"(\d{3,})-.+")
ASIDE = ".aside"  # added to checkpoints that a run has not reached again


def runs_in(results: Path) -> Iterator[Path]:
    """Folders of runs, newest first."""
    folders = {path: match for path in results.glob("*-*") if (match := RUN_NAME.fullmatch(path.name))}
    yield from sorted((path for path in folders if path.is_dir()), key=run_number, reverse=True)


def run_number(folder: Path) -> int:
    """Number of a run's folder; -1 for other names."""
    match = RUN_NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    suffixes = (".safetensors", SUFFIX)
    paths = [p for p in (run / "checkpoints").glob("[!.]*") if p.suffix in suffixes and p.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


def run_of(path: Path) -> Path | None:
    """Folder of the run that a checkpoint is in; None outside of one."""
    run = path.absolute().parent.parent
    is_run = path.absolute().parent.name == "checkpoints" and path.stem.isdecimal() and (run / "config.json").is_file()
    return path.parent.parent if is_run else None


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of a run that are newer than the step it is resumed from; returns their new names."""
    renamed = []
    for path in checkpoints_in(folder):
        if int(path.stem) > step:
            target = path.with_name(path.name + ASIDE)
            if is_sharded(path):
                remove(target)  # which a file would replace
            path.replace(target)
            renamed.append(target)
    return renamed


def thin(folder: Path, step: int, keep: int) -> None:
    """Remove old checkpoints of a run, but for the newest readable ones up to the step that was just saved."""
    kept = 0
    for path in checkpoints_in(folder):
        if int(path.stem) > step:
            continue
        if kept >= keep:
            remove(path)
        elif int(path.stem) == step or is_whole(path):
            kept += 1
