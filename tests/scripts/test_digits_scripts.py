"""The shell scripts that train on the digits: in a moment, with wrong settings, and (slow) in full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.digits_checkpoints import save_digits_checkpoint
from tests.processes import ROOT

SCRIPTS = (
    "digits_dydit",
    "digits_ddt",
    "digits_skip_dit",
    "digits_families",
    "digits_samplers",
    "digits_video",
    "digits_text",
)


def script(name: str, folder: Path, *argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DIGITS_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *(argv or [str(folder / "out with space")])]
    return subprocess.run(command, cwd=folder, env=environment | settings, capture_output=True, text=True)


def networks(done: subprocess.CompletedProcess[str]) -> list[str]:
    """First column of the tables."""
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    return [line for line in lines if line != "network" and set(line) != {"-"}]


@pytest.mark.slow
def test_dydit_in_a_moment(tmp_path: Path) -> None:
    start = save_digits_checkpoint(tmp_path / "0000001.safetensors", "DiT-digits/2")
    short = {"DIGITS_DIT": str(start), "DIGITS_STEPS": "2", "DIGITS_SAMPLES": "12", "DIGITS_TARGETS": "0.6 0.5"}
    actual = networks(script("digits_dydit", tmp_path, **short))
    assert actual == ["DiT-digits/2"] * 4 + ["DyDiT-digits/2, target 0.6", "DyDiT-digits/2, target 0.5"]


@pytest.mark.slow
def test_ddt_in_a_moment(tmp_path: Path) -> None:
    done = script("digits_ddt", tmp_path, DIGITS_STEPS="2", DIGITS_SAMPLES="10")
    assert networks(done) == ["DDT-digits/2"] * 4 + ["DiT-digits/2, flow"] * 4
    assert "5 of 50" in done.stdout


@pytest.mark.slow
def test_skip_dit_in_a_moment(tmp_path: Path) -> None:
    done = script("digits_skip_dit", tmp_path, DIGITS_STEPS="2", DIGITS_SAMPLES="4", DIGITS_SEEDS="0 1")
    assert networks(done) == (["DiT-digits-deep/2"] * 6 + ["Skip-DiT-digits/2"] * 6) * 2
    assert " to " in done.stdout  # two seeds have a spread
    assert {"ddim", "ddpm"} <= {path.name for path in (tmp_path / "out with space").iterdir()}


@pytest.mark.slow
def test_text_in_a_moment(tmp_path: Path) -> None:
    done = script("digits_text", tmp_path, DIGITS_STEPS="2", DIGITS_SAMPLES="10")
    assert done.returncode == 0, done.stderr
    assert "| clips " in done.stdout and "| pictures " in done.stdout
    made = {path.name for path in (tmp_path / "out with space").iterdir()}
    assert {"clips.png", "clips.gif", "pictures.png", "text.md"} <= made


@pytest.mark.slow
def test_clips_in_a_moment(tmp_path: Path) -> None:
    done = script("digits_video", tmp_path, DIGITS_STEPS="2", DIGITS_SAMPLES="10")
    rows = networks(done)
    assert rows[:8] == ["Skip-Latte-digits/4"] * 4 + ["Latte-digits/4"] * 4
    assert (tmp_path / "out with space" / "Skip-Latte-digits-4.gif").exists()


@pytest.mark.slow
def test_samplers_in_a_moment(tmp_path: Path) -> None:
    short = {"DIGITS_STEPS": "2", "DIGITS_SAMPLES": "4", "DIGITS_SEEDS": "0", "DIGITS_SEARCH": "5"}
    done = script("digits_samplers", tmp_path, **short)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n## ") + done.stdout.startswith("## ") == 4
    assert "searched" in done.stdout and (tmp_path / "out with space" / "samplers.png").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_wrong_setting(name: str, tmp_path: Path) -> None:
    assert script(name, tmp_path, "--help").stdout.count(f"bash scripts/{name}.sh [OUTPUT_FOLDER]") == 1
    done = script(name, tmp_path, DIGITS_STEPS="abc")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not 'abc'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ddt_in_full_draws_good_digits_with_and_without_sharing(tmp_path: Path) -> None:
    assert script("digits_ddt", tmp_path).returncode == 0
    for row in json.loads((tmp_path / "out with space" / "families.json").read_text())["rows"]:
        if row["full"] >= 12:  # three quarters shared, and less
            scores = row["scores"]
            assert scores["accuracy"] >= 0.97 and scores["recall"] >= 0.85 and scores["nearest_ratio"] > 0.8
            assert scores["frechet_distance"] <= scores["frechet_distance_of_test"]
