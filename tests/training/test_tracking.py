"""Runs report to trackers of experiments: settings, metrics and samples; resumed, into the same run."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime.json_file import read_json
from tests import runs
from tests.processes import run_ranks
from tests.tracker_files import Tracked, of_tensorboard, of_trackio, of_wandb
from training import tracking
from training.tracking import TRACKERS, TrackedRun, Tracker
from training.trainer import Trainer

RUN = [*runs.DIGITS, *"--model DiT-debug/2 --num-classes 10 --global-batch-size 8 --max-steps 6 --ckpt-every 2".split()]
RUN += "--eval-every 2 --eval-images 32 --eval-samples 4 --eval-steps 2 --resume auto".split()
PATIENCE = 60  # seconds to wait for what a run reported


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of runs; trackers keep to this machine and to the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    if importlib.util.find_spec("trackio") is not None:
        import trackio.sqlite_storage

        places = [trackio, trackio.sqlite_storage, trackio.utils, trackio.media.utils]
        for module in places:
            if hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path / "results"


def read(name: str, results: Path, steps: int, samples: int) -> Tracked:
    """What a tracker wrote of so many losses and grids; wandb's process may write it some time after the run's end."""
    readers: dict[str, Callable[[], Tracked]] = {
        "trackio": lambda: of_trackio("digits"),
        "tensorboard": lambda: of_tensorboard(runs.run_folder(results)),
        "wandb": lambda: of_wandb(runs.run_folder(results)),
    }
    deadline = time.monotonic() + PATIENCE
    while True:
        found = readers[name]()
        if (len(dict(found.losses)) >= steps and len(found.samples) >= samples) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def killed_at(step: int) -> pytest.MonkeyPatch:
    """Let training die before a step, as by SIGKILL: nothing is saved after it."""
    patch, usual = pytest.MonkeyPatch(), Trainer.train_step

    def train_step(trainer: Trainer, number: int, *rest: Any) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return usual(trainer, number, *rest)

    patch.setattr(Trainer, "train_step", train_step)
    return patch


@pytest.mark.parametrize("name", TRACKERS)
def test_a_killed_run_is_resumed_in_the_same_run_of_the_tracker(
    name: str, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    argv = [*RUN, "--track", name, "--track-project", "digits"]
    patch = killed_at(5)
    with pytest.raises(KeyboardInterrupt):
        runs.start(offline, *argv)
    patch.undo()
    assert [step for step, _ in read(name, offline, 5, 2).losses] == [1, 2, 3, 4, 5]
    assert runs.start(offline, *argv) == 0 and len(list(offline.iterdir())) == 1
    tracked = read(name, offline, 6, 3)
    expected = {line["step"]: line["loss"] for line in runs.metrics(offline) if "loss" in line}
    assert dict(tracked.losses) == pytest.approx(expected, rel=1e-6) and list(expected) == [1, 2, 3, 4, 5, 6]
    # The step before the kill may be there twice, with the same numbers; earlier ones are not
    assert [step for step, _ in tracked.losses if step != 5] == [1, 2, 3, 4, 6] and tracked.runs == 1
    assert tracked.samples == [2, 4, 6]
    assert str(tracked.settings["optimization.lr"]) == "0.0001" and tracked.settings["model.name"] == "DiT-debug/2"


class Recorder(Tracker):
    """A tracker that writes down its calls."""

    calls: list[tuple[Any, ...]]

    def __init__(self, run: TrackedRun) -> None:
        self.calls.append(("start", run.folder.name, run.project, run.first_step, run.settings["optimization.lr"]))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("metrics", step, *sorted({"loss", "val_loss"} & values.keys())))

    def samples(self, step: int, path: Path) -> None:
        assert path.exists()
        self.calls.append(("samples", step, path.suffix))

    def finish(self, *, failed: bool) -> None:
        self.calls.append(("finish", failed))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    made = list[tuple[Any, ...]]()
    monkeypatch.setattr(Recorder, "calls", made, raising=False)
    monkeypatch.setitem(TRACKERS, "wandb", Recorder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    return made


def test_a_tracker_gets_settings_first_and_is_told_how_a_run_ends(calls: list[Any], tmp_path: Path) -> None:
    argv = [*RUN, "--track", "wandb", "--max-steps", 3]
    assert runs.start(tmp_path, *argv) == 0
    assert calls[0] == ("start", "000-DiT-debug-2", "dit-family", 0, 1e-4) and calls[-1] == ("finish", False)
    assert calls[1:-1] == [
        ("metrics", 1, "loss"), ("metrics", 2, "loss"), ("samples", 2, ".png"), ("metrics", 2, "val_loss"),
        ("metrics", 3, "loss"), ("samples", 3, ".png"), ("metrics", 3, "val_loss"),
    ]  # fmt: skip
    identity = read_json(runs.run_folder(tmp_path) / "tracking.json")["id"]
    calls.clear()
    assert runs.start(tmp_path, *RUN, "--track", "wandb", "--max-steps", 4) == 0
    # The longer run has other settings, so what follows the checkpoint is new
    assert calls[0][3] == 4 and [call[1] for call in calls if call[0] == "metrics"] == [4, 4]
    assert read_json(runs.run_folder(tmp_path) / "tracking.json")["id"] == identity


def test_a_changed_run_reports_its_repeated_steps_anew(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = killed_at(5)
    with pytest.raises(KeyboardInterrupt):
        runs.start(tmp_path, *RUN, "--track", "wandb")
    patch.undo()
    assert calls[-1] == ("finish", True)
    calls.clear()
    assert runs.start(tmp_path, *RUN, "--track", "wandb", "--lr", 2e-4, "--override", "lr") == 0
    assert [call[1] for call in calls if call[:1] == ("metrics",) and call[2] == "loss"] == [5, 6]


@pytest.mark.parametrize("fault", ["metrics", "samples", "finish"])
def test_a_tracker_that_fails_does_not_end_the_training(
    fault: str, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host\nTraceback of the package")

    monkeypatch.setattr(Recorder, fault, failing)
    assert runs.start(tmp_path, *RUN, "--track", "wandb") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "--track wandb" in line]
    assert lines == ["warning: --track wandb: no route to host; training continues without it"]
    assert runs.checkpoint(tmp_path, 6).exists()


def test_a_tracker_that_cannot_start_is_one_line_before_the_first_step(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)\ncall wandb.login(key=[your_api_key])")

    monkeypatch.setattr(Recorder, "__init__", failing)
    assert runs.start(tmp_path, *RUN, "--track", "wandb") == 2
    expected = "--track wandb: cannot start (api_key not configured (no-tty)); `wandb login`, or WANDB_MODE=offline"
    assert expected in runs.the_error(capsys)
    assert not (runs.run_folder(tmp_path) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--track wandb", "--track wandb: the package is not installed; pip install '.[track]'"),
        ("--track tensorboard", "--track tensorboard: the package is not installed; pip install '.[tensorboard]'"),
        ("--tensorboard", "--track tensorboard: the package is not installed"),
        ("--track-project a/b", "--track-project 'a/b': must be a name without"),
        ("--track mlflow", "--track"),
    ],
)
def test_mistakes_are_one_line(
    argv: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert runs.start(tmp_path, *RUN, *argv.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_rank_0_alone_reports(tmp_path: Path) -> None:
    argv = [*RUN, "--track", "tensorboard", "--results-dir", str(tmp_path / "results")]
    done = run_ranks("train.py", *map(str, argv), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((runs.run_folder(tmp_path / "results") / "tensorboard").iterdir())) == 1
    assert [step for step, _ in of_tensorboard(runs.run_folder(tmp_path / "results")).losses] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_record_begins_a_new_run_of_the_tracker(calls: list[Any], tmp_path: Path) -> None:
    assert runs.start(tmp_path, *RUN, "--track", "wandb", "--max-steps", 2) == 0
    (runs.run_folder(tmp_path) / tracking.RECORD).write_text("{")
    assert runs.start(tmp_path, *RUN, "--track", "wandb", "--max-steps", 4) == 0
    assert [call[1] for call in calls if call[0] == "metrics" and call[2] == "loss"] == [1, 2, 3, 4]
