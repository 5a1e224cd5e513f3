"""The evaluator's benchmark: every stage at a tiny size. No test depends on how long a thing takes."""

import json
import os

import pytest

from benchmarks import evaluation
from benchmarks.evaluation import TINY, Stage, peak_memory, run_alone, write_black_images
from evaluator.npz import ImageFile
from runtime.errors import run
from scripts.benchmark_evaluator import extrapolate, main, table


def test_smoke(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "run_alone", lambda work, threads, sizes: work(sizes))
    output = tmp_path / "new" / "result.json"
    assert run(main, "benchmark_evaluator.py", ["--smoke", "--output", str(output)]) == 0
    document, printed = json.loads(output.read_text()), capsys.readouterr().out
    rows = {row["name"]: row for row in document["rows"]}
    assert len(rows) == 11 and all(name in printed for name in rows)
    assert rows["reading"]["images"] == 60 and rows["features, 16 x 16"]["images"] == 4
    by_cholesky, by_square_root = (
        rows[name]["facts"]["distance"]
        for name in ("Frechet distance, full rank", "the same by a general square root (scipy)")
    )
    assert by_cholesky == pytest.approx(by_square_root, rel=1e-6)
    by_statistics, by_features = (
        rows[name]["facts"]["distance"]
        for name in ("Frechet distance, singular covariances", "Frechet distance of 20 rows")
    )
    assert by_statistics == pytest.approx(by_features, rel=1e-9)
    assert document["peak_memory"] == max(row["memory"] for row in rows.values()) > 0
    assert document["extrapolated_seconds"] > rows["everything but the network"]["seconds"]
    assert str(tmp_path) not in output.read_text()


def other_process():
    return Stage(str(os.getpid()), 1.0, peak_memory())


def test_stages_run_in_processes_of_their_own():
    stage = run_alone(other_process, 1)
    assert int(stage.name) != os.getpid() and 5e7 < stage.memory < 5e9


def test_totals_and_goals():
    measured = [
        Stage("features, 256 x 256", 20.0, 10, images=200, seconds_goal=30.0),
        Stage("everything but the network", 7.0, 10),
        Stage("slow", 3.0, 2_000_000_000, seconds_goal=2.0),
    ]
    sizes = TINY
    assert extrapolate(measured, sizes) == pytest.approx(0.1 * (sizes.reference + sizes.samples) + 7)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(measured).splitlines()]
    assert cells[2] == ["features, 256 x 256", "20.00", "<= 30.0 met", "100.00", "0.00"]
    assert cells[4] == ["slow", "3.00", "<= 2.0 MISSED", "", "2.00"]


def test_black_images_take_no_space(tmp_path):
    path = write_black_images(tmp_path / "a.npz", 300, 64)
    assert path.stat().st_size > 300 * 64 * 64 * 3 > 100 * path.stat().st_blocks * 512
    batches = list(ImageFile(path).batches(0, 300, 64))
    assert [len(batch) for batch in batches] == [64] * 4 + [44] and not any(batch.any() for batch in batches)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--num-images", "7"], "--num-images 7: must be at least 8"),
        (["--output", "/dev/null/a.json"], "--output /dev/null/a.json: cannot write there"),
    ],
)
def test_mistakes(capsys, argv, message):
    assert run(main, "benchmark_evaluator.py", argv) == 2
    assert message in capsys.readouterr().err
