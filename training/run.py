"""A run and its folder: new, resumed or rewound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.dataset import is_same_data
from data.encoders import UNVERIFIED
from runtime import distributed
from runtime.distributed import World
from runtime.errors import UserError, error_prefix
from runtime.files import atomic_path, sweep
from runtime.json_file import json_lines
from runtime.locks import locked
from training.log import RunLog
from training.mirror import RunMirror
from training.resume import ResumeState, unstarted_run
from training.run_files import run_number, set_aside
from training.setup import Setup
from training.tracking import note_reported

if TYPE_CHECKING:
    pass

DRAWS = 2  # version of the random numbers of a step; version 0.1 had 1


def create_run_folder(results: Path, name: str, first: int = 0) -> Path:
    """Make results/NNN-name with the next free number (not the count, so that deleting an old run is harmless).

    Args:
        results: Folder of all runs; made if it is missing.
        name: Name of the run.
        first: Smallest number.

    Raises:
        UserError: If the folder cannot be made.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        while True:
            number = max(first, 1 + max(map(run_number, results.iterdir()), default=-1))
            folder = results / f"{number:03d}-{name}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue  # another run was faster
            return folder
    except OSError as error:
        raise UserError(f"--results-dir {results}: cannot write there ({error.strerror})") from error


@contextmanager
def locked_run(
    setup: Setup, world: World, saved: ResumeState | None = None, mirror: RunMirror | None = None
) -> Iterator[Path | None]:
    """The folder of `open_run`, on rank 0 and locked while the block runs; its end is brought to `mirror`'s store.

    Raises:
        UserError: On every rank, if another job trains in it, or it cannot be written to.
    """
    with ExitStack() as stack:

        def opened() -> Path | None:
            resumed = unstarted_run(setup, mirror) if saved is None else saved.folder
            if resumed is not None:
                stack.enter_context(locked(resumed, f"--resume {setup.config.run.resume}: {resumed}"))
            folder = open_run(setup, world, saved, resumed if saved is None else None, mirror)
            if folder is not None and resumed is None:
                stack.enter_context(locked(folder, f"--results-dir {folder}"))
            if folder is not None and mirror is not None:
                RunLog(folder).line(f"Working folder of {mirror.address / folder.name}")
                mirror.claim(folder, 0 if saved is None or saved.folder is None else saved.meta["step"])
            return folder

        folder = distributed.on_rank0(opened)
        try:
            yield folder if world.is_main else None
        except BaseException:
            if mirror is not None and world.is_main:
                mirror.finish(folder, failed=True)
            raise
        if mirror is not None:
            distributed.on_rank0(lambda: mirror.finish(folder, failed=False))


def open_run(
    setup: Setup,
    world: World,
    saved: ResumeState | None = None,
    unstarted: Path | None = None,
    mirror: RunMirror | None = None,
) -> Path | None:
    """The run's folder, on rank 0: that of the run to resume, the unstarted one, or a new one, with its config.

    Raises:
        UserError: If it cannot be written to.
    """
    if not world.is_main:
        return None
    resumed = None if saved is None else saved.folder
    if saved is not None and resumed is not None:
        rewind(resumed, saved.meta["step"])
    if unstarted is not None:
        rewind(unstarted, 0)
    folder = new_run(setup, unstarted, mirror) if resumed is None else resumed
    introduce(RunLog(folder), setup, saved)
    return folder


def new_run(setup: Setup, folder: Path | None = None, mirror: RunMirror | None = None) -> Path:
    """Make the folder of a new run, or take one in which none has started, and write its config.

    Raises:
        UserError: If it cannot be written; nothing of it is left.
    """
    if folder is None:
        results, first = (
            (setup.config.run.results_dir, 0) if mirror is None else (mirror.results, mirror.first_number())
        )
        folder = create_run_folder(results, setup.config.model.replace("/", "-"), first)
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
        with atomic_path(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(setup.document(), indent=2) + "\n")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"--results-dir {folder}: cannot write there ({error.strerror})") from error
    return folder


def rewind(folder: Path, step: int) -> None:
    """Return a run's folder to a step: later metrics are dropped, later checkpoints renamed."""
    with error_prefix("--resume"):
        for place in (folder, folder / "checkpoints"):
            sweep(place)
        last = cut_metrics(folder, step)
    note_reported(folder, max(step, last - 1))  # the end of the last step may be missing
    for path in set_aside(folder, step):
        RunLog(folder).line(f"Set aside {path}")


def introduce(log: RunLog, setup: Setup, saved: ResumeState | None) -> None:
    """Log where a run starts, and what differs from the checkpoint that it starts from."""
    if saved is None or saved.folder is None:
        log.line(f"Experiment directory created at {log.folder}")
        if saved is None and setup.config.run.resume is not None:
            log.line(f"Nothing to resume in {setup.config.run.results_dir}: a new run")
    for note in [*setup.notes, *(setup.start_notes if saved is None else [])]:
        log.line(note)
    if setup.encoder.is_unverified({} if saved is None else saved.meta.get("autoencoder", {})):
        log.line(f"--vae {setup.encoder.name}: {UNVERIFIED}; it is recorded, and compared when the run is resumed")
    if saved is None:
        return
    log.line(f"Resumed {saved.path if saved.folder is None else saved.folder} at step {saved.meta['step']}")
    if saved.changed:
        log.line(f"Changed since then: {'; '.join(saved.changed)}")
    then = saved.meta.get("data", {})
    if then.get("images") not in (None, len(setup.dataset)):
        log.line(f"Note: the data has {len(setup.dataset):,} images; it had {then['images']:,}")
    elif then.get("digest") is not None and not is_same_data(then["digest"], setup.dataset):
        log.line("Note: the data has as many images as before, but not the same")
    if saved.meta.get("draws") != DRAWS:
        log.line("Note: the random draws of a step (times, noise, dropped labels) changed with version 0.2")


def cut_metrics(folder: Path, step: int) -> int:
    """Drop the lines of metrics.jsonl about steps after `step`, which are about to be repeated, and damaged ones.

    Returns:
        The last step that it had a line about; 0 without any.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    lines, last = [], 0
    for line, record in json_lines(path):
        of = None if record is None else record.get("step")
        if not isinstance(of, int | float):
            continue  # the kill cut this line short
        if of <= step:
            lines.append(line + "\n")
        last = max(last, int(of))
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines))
    return last
