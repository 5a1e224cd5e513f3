"""scripts/digits_ddt.sh, short and in full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


def digits_ddt(folder: Path, *argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DIGITS_PYTHON": sys.executable, **settings}
    command = ["bash", str(ROOT / "scripts" / "digits_ddt.sh"), *(argv or [str(folder / "out with space")])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_short_run_leaves_both_networks_and_their_tables(tmp_path: Path) -> None:
    done = digits_ddt(tmp_path, DIGITS_STEPS="2", DIGITS_SAMPLES="10")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out with space"
    assert sorted(p.name for p in out.iterdir()) == ["ddt.json", "dit.json", "runs"]
    assert sorted(p.name for p in (out / "runs").iterdir()) == ["000-DDT-digits-2", "001-DiT-digits-2"]
    assert done.stdout.count("| encoder calls |") == 2 and "| 5 of 50 | 90% |" in done.stdout
    assert [len(json.loads((out / name).read_text())) for name in ("ddt.json", "dit.json")] == [4, 1]


def test_help_and_a_wrong_setting(tmp_path: Path) -> None:
    assert "DDT from scratch on the embedded digits" in digits_ddt(tmp_path, "--help").stdout
    done = digits_ddt(tmp_path, DIGITS_STEPS="abc")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not 'abc'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_full_run_draws_good_digits_with_and_without_sharing(tmp_path: Path) -> None:
    done = digits_ddt(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out with space" / "ddt.json").read_text())
    rows += json.loads((tmp_path / "out with space" / "dit.json").read_text())
    for row in rows:
        if row["encoder_calls"] >= 12:  # three quarters shared, and less
            scores = row["scores"]
            assert scores["accuracy"] >= 0.97 and scores["recall"] >= 0.85 and scores["nearest_ratio"] > 0.8
            assert scores["frechet_distance"] <= scores["frechet_distance_of_test"]
