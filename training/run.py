"""A run: its folder, log and metrics, the checkpoint that it is resumed from, signals that stop it, and its profile."""

from __future__ import annotations

import json
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from runtime import distributed
from runtime.checkpoint import read_groups
from runtime.distributed import World
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.settings import differences, document, flag_of, flatten, free_settings
from training.config import KINDS, TrainSettings, upgrade
from training.setup import Setup

if TYPE_CHECKING:
    from torch.profiler import profile
    from torch.utils.tensorboard import SummaryWriter

DRAWS = 2  # version of the random numbers of a step; version 0.1 had 1
# sysexits.h: a temporary failure, try again. The state is saved; the same command resumes the run.
INTERRUPTED_STATUS = 75
PROFILE_FROM, PROFILE_STEPS = 10, 5  # after the steps in which kernels are chosen and memory is allocated
PROFILE_ROWS = 25


# ----------------------------------------------------------------------------------------------------------------------
# Folder and log


def create_run_folder(results: Path, name: str) -> Path:
    """Make results/NNN-name with the next free number (not the count, so that deleting an old run is harmless).

    Raises:
        UserError: If the folder cannot be made.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(p.name[:3]) for p in results.iterdir() if p.name[:3].isdigit()]
            folder = results / f"{max(taken, default=-1) + 1:03d}-{name}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue  # another run was faster
            return folder
    except OSError as error:
        raise UserError(f"--results-dir {results}: cannot write there ({error.strerror})") from error


class RunLog:
    """Writes log.txt and metrics.jsonl in a run's folder, and the same lines to the terminal.

    Args:
        folder: Existing folder; None makes a log that writes nothing (for ranks other than 0).
        tensorboard: Write the metrics as TensorBoard events too, under folder/tensorboard.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self._events = open_events(folder / "tensorboard") if tensorboard and folder is not None else None

    def line(self, message: str) -> None:
        """Write one line with a timestamp, as the official scripts print it (coloured only on a terminal)."""
        if self.folder is None:
            return
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        stamp = f"\033[34m{now}\033[0m" if sys.stdout.isatty() else now
        print(f"[{stamp}] {message}", flush=True)
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"[{now}] {message}\n")

    def metrics(self, step: int, **values: float) -> None:
        """Write one JSON object as a line."""
        if self.folder is None:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()


def open_events(folder: Path) -> SummaryWriter:
    """A TensorBoard writer.

    TensorBoard would import TensorFlow where that is installed, and TensorFlow together with Triton can abort the
    process; an (empty) module of this name makes it work without.
    """
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter  # an extra

    return SummaryWriter(str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


class ResumeState(NamedTuple):
    """A run to resume.

    Attributes:
        folder: Folder of the run.
        groups: "model", "optimizer", the averages, and "projector" if the run has one: name -> tensor.
        meta: The checkpoint's JSON document.
    """

    folder: Path
    groups: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def read_resume_state(path: Path) -> ResumeState:
    """Read everything from one checkpoint of train.py.

    Raises:
        UserError: If the file is missing, damaged, or not such a checkpoint.
    """

    def everything(present: Sequence[str]) -> list[str]:
        return list(dict.fromkeys([*present, "model"]))

    groups, meta = read_groups(path, everything, "--resume")
    if meta is None:
        raise UserError(f"--resume {path}: not a checkpoint of train.py; to start from weights alone use --init-from")
    return ResumeState(path.parent.parent, groups, meta)


def find_run(setup: Setup) -> ResumeState | None:
    """The run that --resume means: that of a checkpoint, or the newest run with the same settings.

    Raises:
        UserError: If a checkpoint was named that is unusable, or was made with other settings.
    """
    resume, results = setup.config.run.resume, setup.config.run.results_dir
    if resume is None:
        return None
    if resume != "auto":
        state = read_resume_state(Path(resume))
        changed = changes_since(setup, state.meta)
        if changed:
            raise UserError(f"--resume {resume}: the run has other settings: {'; '.join(changed[:3])}")
        return state
    for folder in sorted((p for p in results.glob("[0-9][0-9][0-9]-*") if p.is_dir()), reverse=True):
        for path in sorted((folder / "checkpoints").glob("[0-9]*.safetensors"), reverse=True):
            try:
                state = read_resume_state(path)
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
                continue
            if changes_since(setup, state.meta):
                break  # another run; its older checkpoints are no closer
            return state
    return None


def changes_since(setup: Setup, meta: dict[str, Any]) -> list[str]:
    """Settings of a checkpoint's run that are others now, and that its result depends on."""
    free = free_settings(TrainSettings)
    # A cosine spans all steps: with another number of them, the steps already taken would have been others.
    if setup.config.optimization.lr_schedule != "constant":
        free -= {"optimization.epochs", "optimization.max_steps"}
    if setup.config.run.init_from is not None:
        free -= {"run.init_from"}  # with --resume auto: the run that began there, or a new one
    # Settings that did not exist yet had the effect of their defaults.
    defaults = {kind: (name, type(settings)()) for kind, (name, settings) in setup.owners.items() if kind != "model"}
    then = flatten(document(TrainSettings(), **{**setup.owners, **defaults})) | flatten(upgrade(meta["train"]))
    then |= flatten({kind: meta[kind] for kind in setup.owners if kind in meta})
    return differences(then, setup.document(), free, partial(flag_of, TrainSettings, KINDS))


def open_run(setup: Setup, world: World, saved: ResumeState | None = None) -> Path | None:
    """The run's folder, on rank 0: that of the run to resume, or a new one with its config."""
    if not world.is_main:
        return None
    if saved is not None:
        step, folder = saved.meta["step"], saved.folder
        cut_metrics(folder, step)
        log = RunLog(folder)
        log.line(f"Resumed {folder} at step {step}")
        if saved.meta.get("draws") != DRAWS:
            log.line("Note: the random draws of a step (times, noise, dropped labels) changed with version 0.2")
        return folder
    folder = create_run_folder(setup.config.run.results_dir, setup.config.model.replace("/", "-"))
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_text(json.dumps(setup.document(), indent=2) + "\n")
    log = RunLog(folder)
    log.line(f"Experiment directory created at {folder}")
    for note in setup.notes:
        log.line(f"--init-from: {note}")
    return folder


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl about steps after `step`, which are about to be repeated."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Signals and profile


class StopRequest:
    """A flag that a signal sets."""

    def __init__(self) -> None:
        self.received = False

    def by_any_rank(self) -> bool:
        """True if any process was asked to stop; a collective operation, so that all stop after the same step."""
        return distributed.any_rank(self.received)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM (what schedulers send before they kill) and Ctrl-C into a `StopRequest` while the block runs.

    A second signal has its usual effect at once: a process that waits for a hung rank reads no flag.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.received = True
        signal.signal(number, before[signal.Signals(number)])

    signals = (signal.SIGTERM, signal.SIGINT)
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
