"""Log of a run: lines, metrics and samples in its folder, on the terminal and in a tracker."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from runtime import distributed
from runtime.documents import flatten
from training.setup import Setup
from training.tracking import Reporter


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
