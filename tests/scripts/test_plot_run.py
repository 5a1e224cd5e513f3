"""Curves of runs: what is read, smoothed and drawn, and the curves that are expected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.curves import EXPECTED, Curve, expected_of, known_expected, read_expected, read_run, smooth
from runtime.errors import UserError, run
from scripts import plot_run
from tests import runs

SHORT = [*runs.DIGITS, *"--model DiT-debug/2 --num-classes 10 --global-batch-size 8 --max-steps 4".split()]


def plot(*argv: object) -> int:
    return run(plot_run.main, "plot_run.py", list(map(str, argv)))


def write_run(folder: Path, lines: list[str], settings: dict[str, object] | None = None) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_smoothed_line_is_that_line(share: float) -> None:
    steps = np.arange(0, 1001, 10.0)
    line = smooth(Curve(steps, 2 - steps / 1000), share)
    inside = slice(round(share * 50), len(steps) - round(share * 50))
    np.testing.assert_allclose(line.values[inside], (2 - steps / 1000)[inside], rtol=1e-12)


def test_smoothing_is_the_mean_over_a_window_of_steps() -> None:
    random = np.random.default_rng(0)
    steps = np.sort(random.choice(10_000, 300, replace=False)).astype(float)
    values = random.standard_normal(300)
    width = 0.07 * (steps[-1] - steps[0]) / 2
    expected = [values[abs(steps - step) <= width].mean() for step in steps]
    np.testing.assert_allclose(smooth(Curve(steps, values), 0.07).values, expected, atol=1e-12)


def test_metrics_are_read_as_they_are_left(tmp_path: Path) -> None:
    lines = ['{"step": 2, "loss": 1.5, "lr": 0.1}', '{"step": 1, "loss": 2}', "x", '{"step": 2, "val_loss": 3}']
    lines += ['{"step": 3, "loss": NaN}', '{"step": 2, "loss": 1.0}', '{"step": 4, "lo']
    found = read_run(write_run(tmp_path / "a", lines))
    assert found.curves["loss"].steps.tolist() == [1, 2] and found.curves["loss"].values.tolist() == [2, 1]
    assert found.curves["val_loss"].values.tolist() == [3] and found.damaged == 2 and found.settings == {}


def test_runs_are_drawn_with_their_samples_and_expected_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        argv = [*SHORT, "--eval-every", 1, "--eval-samples", 4, "--eval-steps", 2, "--global-seed", seed]
        assert runs.start(tmp_path / "results", *argv) == 0
    folders = sorted((tmp_path / "results").iterdir())
    saved = tmp_path / "mine.json"
    capsys.readouterr()
    assert plot(*folders, "--output", tmp_path / "a.png", "--save-expected", saved, "--name", "two seeds") == 0
    metrics = "loss, val_loss, frechet_distance, accuracy, grad_norm, lr, steps_per_sec"
    assert f"a.png: {metrics}\n" in capsys.readouterr().out
    expected = read_expected(saved)
    assert (
        expected.name == "two seeds" and expected.seeds == [0, 1] and expected.settings["model.name"] == "DiT-debug/2"
    )
    own = [read_run(folder).curves["loss"].values for folder in folders]
    np.testing.assert_allclose(expected.curves["loss"][1:], [np.minimum(*own), np.maximum(*own)], rtol=1e-3)
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    drawn: list[str] = []
    monkeypatch.setattr(plot_run, "draw", lambda r, m, e, g, p: drawn.extend([*m, *(x.name for x in e), *map(str, g)]))
    monkeypatch.setattr("benchmarks.curves.EXPECTED", tmp_path)
    assert plot(folders[0], "--output", tmp_path / "b.svg", "--metrics", "lr") == 0
    assert drawn == ["lr", "two seeds", "1", "2", "3", "4"]


def test_at_most_five_grids_are_shown_the_first_and_the_last_among_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", ['{"step": 1, "loss": 1}'])
    (folder / "samples").mkdir()
    for step in range(100, 1300, 100):
        (folder / "samples" / f"{step:07d}.png").touch()
    (folder / "samples" / "notes.png").touch()
    assert [*plot_run.grids(read_run(folder))] == [100, 400, 700, 900, 1200]


def test_expected_curves_of_recipes_are_those_of_their_settings(tmp_path: Path) -> None:
    committed = [read_expected(path) for path in EXPECTED.glob("*.json")]
    assert committed
    for own in committed:
        nested: dict[str, dict[str, object]] = {}
        for name, value in own.settings.items():
            section, _, field = name.partition(".")
            nested.setdefault(section, {})[field] = value
        folder = write_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", ['{"step": 1, "loss": 1}'], dict(nested))
        assert [found.name for found in known_expected([read_run(folder)])] == [own.name]
        assert all((curve[1] <= curve[2]).all() for curve in own.curves.values())
    other = write_run(tmp_path / "other", ['{"step": 1, "loss": 1}'], {"model": {"name": "DiT-XL/2"}})
    assert not known_expected([read_run(other)])


def test_runs_of_other_settings_make_no_expected_curve(tmp_path: Path) -> None:
    both = [write_run(tmp_path / f"{n}", ['{"step": 1, "loss": 1}'], {"optimization": {"lr": n}}) for n in range(2)]
    with pytest.raises(UserError, match=r"1: its optimization.lr is 1, that of 0 0"):
        expected_of([read_run(folder) for folder in both], "x")


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = write_run(tmp_path / "a", ['{"step": 1, "loss": 1}'])
    empty, wrong = write_run(tmp_path / "b", []), tmp_path / "wrong.json"
    wrong.write_text('{"curves": {"loss": [1]}}')
    for argv, message in (
        ([tmp_path / "none"], "none: no such folder; give a run"),
        (
            [tmp_path],
            f"{tmp_path}: has no metrics.jsonl (No such file or directory); give one of the runs in it",
        ),
        ([empty], "b: metrics.jsonl is empty; train for more steps than --log-every"),
        ([run_folder, "--metrics", "fid"], "--metrics fid: no run has it; there are loss"),
        ([run_folder, "--expected", wrong], f"--expected {wrong}: not a file of plot_run.py --save-expected"),
        ([run_folder, "--expected", tmp_path / "x"], "x: No such file or directory"),
        ([run_folder, "--output", "a.gif"], "--output a.gif: must end in .png, .svg or .pdf"),
        ([run_folder, "--name", "x"], "--name x: has no effect without --save-expected"),
    ):
        assert plot(*argv, *([] if "--output" in argv else ["--output", tmp_path / "c.png"])) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "c.png").exists()
