"""Curves of training runs: reading metrics.jsonl, smoothing, and expected curves to compare with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.documents import flatten
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.json_file import Json, json_lines, parse_json

EXPECTED = Path(__file__).parent / "expected"  # curves of recipes, one file each
# Settings that decide a loss curve; a run has the curve of another with the same values of all of them
DECISIVE = (
    "model.name", "data.dataset", "process.name", "process.prediction", "process.noise_schedule", "loss.name",
    "optimization.global_batch_size", "optimization.lr",
)  # fmt: skip
Values = npt.NDArray[np.float64]


class Curve(NamedTuple):
    """One metric over training steps.

    Attributes:
        steps: (N,) steps, ascending.
        values: (N,) numbers.
    """

    steps: Values
    values: Values


class RunCurves(NamedTuple):
    """Measurements of a run.

    Attributes:
        name: Its folder.
        curves: Metric -> its curve.
        settings: Its settings, "section.field" -> value; empty without a config.json.
        samples: Step -> grid of samples.
        damaged: Lines of metrics.jsonl that could not be read.
    """

    name: str
    curves: dict[str, Curve]
    settings: dict[str, object]
    samples: dict[int, Path]
    damaged: int


def read_run(folder: Path) -> RunCurves:
    """Read the metrics of a run's folder.

    Raises:
        UserError: If it is no run, or has measured nothing yet.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run, such as results/000-DiT-XL-2")
    try:
        records = [record for _, record in json_lines(folder / "metrics.jsonl")]
    except OSError as error:
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        hint = f"give one of the runs in it, such as {folder / inside[-1]}" if inside else "give the folder of a run"
        raise UserError(f"{folder}: has no metrics.jsonl ({error.strerror}); {hint}") from error
    points: dict[str, dict[float, float]] = {}
    damaged = 0
    for record in records:
        if record is None or not isinstance(step := record.pop("step", None), int | float):
            damaged += 1
            continue
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, {})[step] = value
    if not points:
        raise UserError(f"{folder}: metrics.jsonl is empty; train for more steps than --log-every")
    curves = {name: _curve(found.items()) for name, found in points.items()}
    return RunCurves(folder.resolve().name, curves, _settings(folder), _samples(folder), damaged)


def _curve(points: Iterable[tuple[float, float]]) -> Curve:
    steps, values = np.array(sorted(points), np.float64).reshape(-1, 2).T
    return Curve(steps, values)


def _settings(folder: Path) -> dict[str, object]:
    try:
        return flatten(parse_json((folder / "config.json").read_bytes()))
    except (OSError, ValueError, AttributeError):
        return {}


def _samples(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted((folder / "samples").glob("*.png")) if path.stem.isdigit()}


def smooth(curve: Curve, share: float = 0.02) -> Curve:
    """Average a curve over a window of a share of its steps, at its ends over a shorter one.

    The average is centred, so a smoothed curve is not late, as an exponential average is.
    """
    half = share * (curve.steps[-1] - curve.steps[0]) / 2
    first = np.searchsorted(curve.steps, curve.steps - half, side="left")
    last = np.searchsorted(curve.steps, curve.steps + half, side="right")
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    return Curve(curve.steps, (sums[last] - sums[first]) / (last - first))


class Expected(NamedTuple):
    """Curves that runs of a recipe have.

    Attributes:
        name: Its name.
        seeds: Seeds of the runs that it is from.
        settings: Values of `DECISIVE`.
        curves: Metric -> (steps, lowest, highest) over its runs, smoothed, as rows of (3, N).
    """

    name: str
    seeds: list[object]
    settings: dict[str, object]
    curves: dict[str, Values]


def decisive(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings of a run that decide its loss curve."""
    return {name: settings.get(name) for name in DECISIVE}


def expected_of(runs: Sequence[RunCurves], name: str, points: int = 60) -> Expected:
    """Make the expected curves of a recipe from its runs, which differ in their seed alone.

    Args:
        runs: The runs.
        name: Name of the recipe.
        points: Number of steps to keep, evenly spaced.

    Raises:
        UserError: If they have different settings.
    """
    first = decisive(runs[0].settings)
    for run in runs:
        for key, value in decisive(run.settings).items():
            if value != first[key]:
                raise UserError(f"{run.name}: its {key} is {value}, that of {runs[0].name} {first[key]}")
    curves = {}
    for metric in ("loss", "val_loss"):
        own = [smooth(run.curves[metric]) for run in runs if metric in run.curves]
        if len(own) < len(runs):
            continue
        start, end = max(c.steps[0] for c in own), min(c.steps[-1] for c in own)
        steps = np.unique(np.linspace(start, end, points).round())
        rows = [np.interp(steps, c.steps, c.values) for c in own]
        curves[metric] = np.stack([steps, np.min(rows, axis=0), np.max(rows, axis=0)])
    seeds = [run.settings.get("optimization.global_seed") for run in runs]
    return Expected(name, seeds, first, curves)


def write_expected(expected: Expected, path: Path) -> None:
    """Write expected curves as JSON, with four digits."""
    rows = {name: [[float(f"{x:.4g}") for x in row] for row in curve] for name, curve in expected.curves.items()}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({**expected._asdict(), "curves": rows}) + "\n")


def read_expected(path: Path) -> Expected:
    """Read expected curves.

    Raises:
        UserError: If the file is missing or none of ours.
    """
    try:
        document: Json = parse_json(path.read_bytes())
        curves = {name: np.array(rows, np.float64) for name, rows in document["curves"].items()}
        if any(curve.ndim != 2 or len(curve) != 3 for curve in curves.values()):
            raise ValueError("its curves are not of three rows")
        return Expected(document["name"], document["seeds"], document["settings"], curves)
    except OSError as error:
        raise UserError(f"--expected {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--expected {path}: not a file of plot_run.py --save-expected ({error})") from error


def known_expected(runs: Sequence[RunCurves]) -> list[Expected]:
    """The curves of committed recipes that some of these runs follow."""
    wanted = [decisive(run.settings) for run in runs if run.settings]
    return [own for path in sorted(EXPECTED.glob("*.json")) if (own := read_expected(path)).settings in wanted]
