"""What a run leaves behind: a folder of its own, log lines for people, metrics for programs."""

from __future__ import annotations

import json
import sys
import types
from datetime import datetime
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def create_run_folder(results: Path, name: str) -> Path:
    """Makes results/NNN-name with the next free number (not the count, so that deleting an old run is harmless).

    Raises:
        UserError: if the folder cannot be made.
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
        folder: existing folder; None makes a log that swallows everything (for ranks other than 0).
        tensorboard: write the metrics as TensorBoard events too, under folder/tensorboard.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self._events = open_events(folder / "tensorboard") if tensorboard and folder is not None else None

    def line(self, message: str) -> None:
        """One line with a timestamp, as the official scripts print it (coloured only on a terminal)."""
        if self.folder is None:
            return
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        stamp = f"\033[34m{now}\033[0m" if sys.stdout.isatty() else now
        print(f"[{stamp}] {message}", flush=True)
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"[{now}] {message}\n")

    def metrics(self, step: int, **values: float) -> None:
        """One JSON object, on a line of its own."""
        if self.folder is None:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()


def open_events(folder: Path) -> Any:
    """A TensorBoard writer.

    TensorBoard would import TensorFlow where that is installed, and TensorFlow beside Triton can abort the process; an
    (empty) module of this name tells it to do without.
    """
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter  # an extra

    return SummaryWriter(str(folder))
