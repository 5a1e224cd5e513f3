"""A run: its folder, log and metrics, signals that stop it, and its profile."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from data.dataset import is_same_data
from data.encoders import UNVERIFIED
from runtime import distributed
from runtime.distributed import World
from runtime.documents import flatten
from runtime.errors import UserError, error_prefix
from runtime.files import atomic_path, sweep
from runtime.json_file import json_lines
from runtime.locks import locked
from training.mirror import RunMirror
from training.resume import ResumeState, unstarted_run
from training.run_files import run_number, set_aside
from training.setup import Setup
from training.tracking import Reporter, note_reported

if TYPE_CHECKING:
    from torch.profiler import profile

DRAWS = 2  # version of the random numbers of a step; version 0.1 had 1
# sysexits.h: a temporary failure, try again. The state is saved; the same command resumes the run.
INTERRUPTED_STATUS = 75
PROFILE_FROM, PROFILE_STEPS = 10, 5  # after the steps in which kernels are chosen and memory is allocated
PROFILE_ROWS = 25


# ----------------------------------------------------------------------------------------------------------------------
# Folder and log


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


class RunLog:
    """Writes log.txt and metrics.jsonl in a run's folder, and the same lines to the terminal.

    A full disk does not end a training: what cannot be written is left out, with one warning on the terminal.

    Args:
        folder: Existing folder; None makes a log that writes nothing (for ranks other than 0).

    Attributes:
        reporter: Gets metrics and samples, too; None without a tracker.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.reporter: Reporter | None = None
        self._is_warned = False

    def line(self, message: str) -> None:
        """Write one line with a timestamp, as the official scripts print it (coloured only on a terminal)."""
        if self.folder is None:
            return
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        stamp = f"\033[34m{now}\033[0m" if sys.stdout.isatty() else now
        print(f"[{stamp}] {message}", flush=True)
        self._append(self.folder / "log.txt", f"[{now}] {message}\n")

    def metrics(self, step: int, **values: float) -> None:
        """Write one JSON object as a line."""
        if self.folder is None:
            return
        self._append(self.folder / "metrics.jsonl", json.dumps({"step": step, **values}) + "\n")
        if self.reporter is not None:
            self.reporter.metrics(step, values)

    def samples(self, step: int, path: Path) -> None:
        """Report a picture of samples that is in the run's folder."""
        if self.reporter is not None:
            self.reporter.samples(step, path)

    def _append(self, path: Path, text: str) -> None:
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            if not self._is_warned:
                print(f"warning: {path}: cannot be written ({error.strerror}); training continues", file=sys.stderr)
            self._is_warned = True


@contextmanager
def warnings_logged(log: RunLog) -> Iterator[None]:
    """Write the warnings of a block, and of processes forked in it, to the log; without a folder they are as usual."""
    usual = warnings.showwarning

    def show(message: Warning | str, *where: object, **more: object) -> None:
        log.line(f"Warning: {message}")

    if log.folder is not None:
        warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextmanager
def reported(log: RunLog, setup: Setup, step: int, *, repeats: bool) -> Iterator[None]:
    """Report what a run logs in the block to the tracker that its settings ask for, on rank 0.

    Args:
        log: Log of the run.
        setup: Setup of the run.
        step: Step that the training starts from.
        repeats: True if the next steps are those of an earlier start, to the bit.

    Raises:
        UserError: On every rank, if it cannot be started.
    """
    settings = setup.config.tracking
    with distributed.raise_on_all_ranks():
        if settings.track is not None and log.folder is not None:
            log.reporter = Reporter(settings, log.folder, flatten(setup.document()), step, repeats=repeats)
    failed = True
    try:
        yield
        failed = False
    finally:
        if log.reporter is not None:
            log.reporter.finish(failed=failed)


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


# ----------------------------------------------------------------------------------------------------------------------
# Signals and profile


class StopRequest:
    """A flag that a signal sets."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn what schedulers send before they kill (SIGTERM, SIGUSR1) and Ctrl-C into a `StopRequest` in the block.

    A second signal has its usual effect at once: a process that waits for a hung rank reads no flag.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.received = True
        signal.signal(number, before[signal.Signals(number)])

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def trace_steps(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Trace steps 10 to 14 of the block for chrome://tracing or Perfetto; the caller marks the end of each step.

    Args:
        folder: Gets trace.json and operations.txt once those steps are over; None traces nothing.

    Yields:
        A function to call at the end of every step.
    """
    if folder is None:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    folder.mkdir(parents=True, exist_ok=True)
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, order = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"

    def write(tracer: profile) -> None:
        tracer.export_chrome_trace(str(folder / "trace.json"))
        (folder / "operations.txt").write_text(
            tracer.key_averages().table(sort_by=order, row_limit=PROFILE_ROWS) + "\n"
        )

    steps = schedule(wait=PROFILE_FROM - 1, warmup=1, active=PROFILE_STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as tracer:
        yield tracer.step
