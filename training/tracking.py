"""Trackers of experiments: a run's settings, metrics and samples in TensorBoard, Weights & Biases or Trackio.

A run that is resumed reports into the run of the tracker that it began; its id is in tracking.json in its folder.
Steps that a kill made it repeat were reported before, with the same numbers, and are not reported again.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from runtime.errors import UserError
from runtime.json_file import Json, read_json, write_json
from runtime.settings import setting

RECORD = "tracking.json"
TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """The tracker that a run reports to.

    Raises:
        ValueError: Naming the flag, if its package is not installed.
    """

    track: TrackerName | None = setting(
        None,
        "report metrics, samples and settings to a tracker of experiments, too",
        shown="none",
        free=True,
        was={"--tensorboard": "tensorboard"},
    )
    track_project: str = setting("dit-family", "project there; TensorBoard has none", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.track is not None and importlib.util.find_spec(self.track) is None:
            extra = "tensorboard" if self.track == "tensorboard" else "track"
            raise ValueError(f"--track {self.track}: the package is not installed; pip install '.[{extra}]'")
        if not self.track_project.strip() or any(letter in self.track_project for letter in '/\\#?%:"'):
            raise ValueError(f'--track-project {self.track_project!r}: must be a name without / \\ # ? % : "')


class TrackedRun(NamedTuple):
    """A run as trackers know it.

    Attributes:
        folder: Its folder.
        project: Project that it belongs to.
        id: Eight letters and digits that are its own.
        settings: All of its settings, "section.field" -> value.
        first_step: Step from which it reports; what an earlier start reported from there on is replaced, where the
            tracker can do that.
    """

    folder: Path
    project: str
    id: str
    settings: Mapping[str, object]
    first_step: int


class Tracker(ABC):
    """A tracker of experiments; any method may raise what its package raises."""

    @abstractmethod
    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report numbers of a step."""

    @abstractmethod
    def samples(self, step: int, path: Path) -> None:
        """Report a grid of samples: a PNG, or a GIF of clips."""

    @abstractmethod
    def finish(self, *, failed: bool) -> None:
        """Write what is still in memory, and end the report."""


class TensorBoard(Tracker):
    """Events in the run's folder, under tensorboard/."""

    def __init__(self, run: TrackedRun) -> None:
        # TensorBoard would import TensorFlow where that is installed, and TensorFlow together with Triton can abort the
        # process; an (empty) module of this name makes it work without.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter  # an extra

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step or None)
        rows = [f"| {name} | {value} |" for name, value in run.settings.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), run.first_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, path: Path) -> None:
        """Write an image; TensorBoard shows no GIF."""
        import numpy as np
        from PIL import Image

        if path.suffix == ".png":
            with Image.open(path, formats=("PNG",)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image("samples", pixels, step, dataformats="HWC")
            self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        """Close the file of events."""
        self._writer.close()


def media(package: types.ModuleType, path: Path) -> dict[str, object]:
    """A picture of samples, or an animation of clips, under its name, as wandb and Trackio take them."""
    if path.suffix == ".png":
        return {"samples": package.Image(str(path))}
    return {"clips": package.Video(str(path), format="gif")}


class WeightsAndBiases(Tracker):
    """A run of wandb, online or, with WANDB_MODE=offline, in the run's folder under wandb/."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # an extra

        self._package = wandb
        self._run = wandb.init(
            project=run.project,
            name=run.folder.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own step may only grow

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report numbers over the training step."""
        self._run.log({**values, "step": step})

    def samples(self, step: int, path: Path) -> None:
        """Report an image or a video."""
        self._run.log({**media(self._package, path), "step": step})

    def finish(self, *, failed: bool) -> None:
        """End the run with the exit status that it will have."""
        self._run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """A run of Trackio, with its files where TRACKIO_DIR says."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio  # an extra

        self._package = trackio
        trackio.init(
            project=run.project,
            name=f"{run.folder.name}-{run.id}",
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report numbers of a step."""
        self._package.log(dict(values), step=step)

    def samples(self, step: int, path: Path) -> None:
        """Report an image or a video."""
        self._package.log(media(self._package, path), step=step)

    def finish(self, *, failed: bool) -> None:
        """Write what is left."""
        self._package.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


class Reporter:
    """Reports a run to a tracker; a tracker that fails on the way is left out, and the training continues.

    Args:
        settings: The tracker.
        folder: Folder of the run.
        values: All of its settings, "section.field" -> value.
        step: Step that the training starts from.
        repeats: True if the steps that follow are those of an earlier start, to the bit.

    Raises:
        UserError: If the tracker cannot be started.
    """

    def __init__(
        self, settings: TrackingSettings, folder: Path, values: Mapping[str, object], step: int, *, repeats: bool
    ) -> None:
        assert settings.track is not None
        self._name = f"--track {settings.track}"
        record = read_record(folder)
        logged = record.get("logged")
        self._reported = logged if repeats and isinstance(logged, int) else step
        record |= {"id": record.get("id") or uuid.uuid4().hex[:8], "logged": self._reported}
        run = TrackedRun(folder, settings.track_project, record["id"], values, self._reported + 1 if step else 0)
        try:
            write_json(folder / RECORD, record)
            self._tracker: Tracker | None = TRACKERS[settings.track](run)
        except Exception as error:  # of any package
            raise UserError(f"{self._name}: cannot start ({first_line(error)}); {remedy(settings.track)}") from error

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report numbers of a step, unless an earlier start did."""
        if step > self._reported:
            self._call(lambda tracker: tracker.metrics(step, values))

    def samples(self, step: int, path: Path) -> None:
        """Report a picture of samples, unless an earlier start did."""
        if step > self._reported:
            self._call(lambda tracker: tracker.samples(step, path))

    def finish(self, *, failed: bool) -> None:
        """End the report."""
        self._call(lambda tracker: tracker.finish(failed=failed))
        self._tracker = None

    def _call(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:  # of any package: a lost connection, a full disk
            self._tracker = None
            print(f"warning: {self._name}: {first_line(error)}; training continues without it", file=sys.stderr)


def read_record(folder: Path) -> Json:
    """Content of tracking.json of a run; empty without one, or for a damaged one."""
    try:
        return read_json(folder / RECORD)
    except (OSError, ValueError):
        return {}


def note_reported(folder: Path, step: int) -> None:
    """Note the last step that a run has reported, if it has a tracker."""
    record = read_record(folder)
    if record:
        write_json(folder / RECORD, record | {"logged": step})


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def remedy(name: TrackerName) -> str:
    """Advice for a tracker that does not start."""
    if name == "wandb":
        return "`wandb login`, or WANDB_MODE=offline and `wandb sync` later"
    return "see that its folder can be written to"
