import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.processes import ROOT


def quickstart(folder, **settings):
    environment = {**os.environ, "QUICKSTART_PYTHON": sys.executable, **settings}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), str(folder / "out with space")],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_short_quickstart_leaves_pictures_scores_and_a_table(tmp_path):
    done = quickstart(tmp_path, QUICKSTART_STEPS="3", QUICKSTART_SAMPLES="20")
    assert done.returncode == 0, done.stderr
    assert "| recognised by an independent classifier " in done.stdout
    out = tmp_path / "out with space"
    assert {"digits.png", "loss.png", "scores.json", "samples.npz", "samples.json", "runs"} == {
        p.name for p in out.iterdir()
    }
    for name in ("digits.png", "loss.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_a_wrong_setting_is_one_line(tmp_path):
    done = quickstart(tmp_path, QUICKSTART_STEPS="abc")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not 'abc'" in done.stderr


@pytest.mark.slow
def test_full_quickstart_meets_all_goals_at_once(tmp_path):
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out with space" / "scores.json").read_text())
    scores = document["scores"]
    assert document["samples"]["images"] == 1000
    assert scores["accuracy"] >= 0.97
    assert scores["frechet_distance"] <= scores["frechet_distance_of_test"]
    assert scores["recall"] >= 0.85
    assert scores["nearest_ratio"] > 0.8
