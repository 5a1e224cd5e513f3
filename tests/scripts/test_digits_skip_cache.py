"""The table of intervals against quality and cost, and the script that trains for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from runtime.errors import run
from scripts import digits_skip_cache
from scripts.digits_skip_cache import CachedScores, psnr, spread, table
from tests.processes import ROOT


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of a network with skip units, one of a plain network, after a few large steps."""
    paths = {}
    for name in ("Skip-DiT-debug/2", "DiT-debug/2"):
        folder = tmp_path_factory.mktemp("runs")
        argv = ["--dataset", "digits", "--model", name, "--results-dir", str(folder), "--device", "cpu"]
        argv += "--no-learn-sigma --max-steps 5 --global-batch-size 4 --lr 0.03 --ema-decay 0".split()
        assert run(train.main, "train.py", argv) == 0
        (paths[name],) = folder.glob("*/checkpoints/*")
    return paths


def main(*argv: str | Path) -> int:
    return run(digits_skip_cache.main, "digits_skip_cache.py", list(map(str, argv)))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_every_interval_of_every_checkpoint_is_scored(sampler, checkpoints, tmp_path, capsys):
    argv = f"--sampler {sampler} --num-samples 20 --num-sampling-steps ddim10 --cache-interval 2 3 --output-dir".split()
    assert main("--ckpt", *checkpoints.values(), *argv, tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / f"skip_cache_{sampler}.json").read_text())["rows"]
    assert [(row["model"], row["interval"]) for row in rows] == [
        (name, interval) for name in checkpoints for interval in (None, 2, 3)
    ]
    for of_model in (rows[:3], rows[3:]):
        costs = [row["multiply_adds"] for row in of_model]
        assert costs == sorted(costs, reverse=True) and len(set(costs)) == 3
        assert of_model[0]["psnr"] is None and all(row["psnr"] > 0 for row in of_model[1:])
    shown = capsys.readouterr().out
    assert shown.strip() == (tmp_path / "out" / f"skip_cache_{sampler}.md").read_text().strip()
    assert len(shown.strip().splitlines()) == 2 + 6


def scored(model: str, ckpt: str, interval: int | None, cost: int, distance: float, psnr: float | None) -> CachedScores:
    return CachedScores(model, ckpt, interval, cost, 0.9, distance, 0.8, psnr)


def test_seeds_of_a_model_become_one_row_with_their_spread():
    rows = [
        scored("A", "1", None, 4_000_000, 1.0, None),
        scored("A", "1", 2, 2_000_000, 3.0, 20.0),
        scored("A", "2", None, 4_000_000, 2.0, None),
        scored("A", "2", 2, 2_000_000, 6.0, 30.0),
        scored("B", "3", None, 8_000_000, 1.5, None),
    ]
    assert table(rows).splitlines()[2:] == [
        "| A | uncached | 4.0 | 1.00 x | 0.900 (0.900 to 0.900) | 1.50 (1.00 to 2.00) | 0.800 (0.800 to 0.800) |  |",
        "| A | 2 | 2.0 | 2.00 x | 0.900 (0.900 to 0.900) | 4.50 (3.00 to 6.00) | 0.800 (0.800 to 0.800) "
        "| 25.0 (20.0 to 30.0) |",
        "| B | uncached | 8.0 | 1.00 x | 0.900 | 1.50 | 0.800 |  |",
    ]


def test_spread_leaves_out_what_is_not_there():
    assert spread([None, None], ".1f") == ""
    assert spread([None, 2.0], ".1f") == "2.0"
    assert spread([4.0, 2.0], ".1f") == "3.0 (2.0 to 4.0)"


def test_psnr_of_a_known_error():
    zeros = np.zeros((2, 8, 8, 1), np.uint8)
    assert psnr(zeros, zeros) is None
    assert psnr(zeros + np.uint8(255), zeros) == 0
    assert psnr(zeros, zeros + np.uint8(51)) == pytest.approx(20 * np.log10(5))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--ckpt: required"),
        ("--ckpt nothing.safetensors", "--ckpt nothing.safetensors: no such file"),
        ("--ckpt SKIP --cache-interval 2 0", "--cache-interval 0: must be at least 1"),
        ("--ckpt SKIP --num-samples 3", "--num-samples 3: scores need at least 4"),
        ("--ckpt SKIP --cfg-scale 0.5", "--cfg-scale 0.5: must be at least 1"),
        ("--ckpt SKIP --num-sampling-steps ddim", "--num-sampling-steps ddim: step spec"),
        ("--ckpt PLAIN --cache-depth 3", "cache_depth 3 must lie in 1..2, half the depth"),
    ],
)
def test_mistakes_are_one_line(argv, words, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"SKIP": "Skip-DiT-debug/2", "PLAIN": "DiT-debug/2"}
    given = [str(checkpoints[places[word]]) if word in places else word for word in argv.split()]
    assert main(*given) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def script(folder: Path, *argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DIGITS_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **settings}
    command = ["bash", str(ROOT / "scripts" / "digits_skip_dit.sh"), *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_trains_samples_and_scores(tmp_path):
    done = script(tmp_path, str(tmp_path / "out"), DIGITS_STEPS="2", DIGITS_SAMPLES="4", DIGITS_SEEDS="0")
    assert done.returncode == 0, done.stderr
    for sampler in ("ddim", "ddpm"):
        lines = (tmp_path / "out" / f"skip_cache_{sampler}.md").read_text().splitlines()
        rows = [line.split("|")[1].strip() for line in lines[2:]]
        assert rows == ["Skip-DiT-digits/2"] * 6 + ["DiT-digits-deep/2"] * 6


def test_a_wrong_setting_of_the_script_is_one_line(tmp_path):
    done = script(tmp_path, DIGITS_STEPS="many")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not 'many'" in done.stderr
