"""The digits experiment, in a moment, and its table."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.digits import load_digits
from models import create_model
from runtime.checkpoint import save_checkpoint
from runtime.errors import run
from scripts.digits_dydit_report import main
from tests.networks import randomise
from tests.processes import ROOT


def dit_checkpoint(path: Path) -> Path:
    """A random DiT for the digits, as the quick start's run leaves it."""
    network = randomise(create_model("DiT-digits/2"))
    meta = {
        "model": {"name": "DiT-digits/2", **dataclasses.asdict(network.config)},
        "process": {
            "name": "gaussian", "noise_schedule": "squaredcos_cap_v2", "predict_xstart": False, "learn_sigma": False,
        },
        "data": {"vae": "none", "image_shape": [1, 8, 8], "classes": [str(k) for k in range(10)]},
    }  # fmt: skip
    save_checkpoint(path, {"ema": network.state_dict()}, meta)
    return path


@pytest.mark.slow
def test_the_experiment_in_a_moment(tmp_path: Path) -> None:
    start = dit_checkpoint(tmp_path / "0000001.safetensors")
    settings = {"QUICKSTART_PYTHON": sys.executable, "DIGITS_DIT": str(start), "DIGITS_STEPS": "2"}
    settings |= {"DIGITS_SAMPLES": "12", "DIGITS_TARGETS": "0.6", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "digits_dydit.sh"), str(tmp_path / "out with space")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in (lines[0], *lines[2:])] == [
        "model",
        "DiT-digits/2",
        "DyDiT-digits/2",
    ]
    assert (tmp_path / "out with space" / "0.6" / "cost.json").exists()


def test_a_wrong_setting_is_one_line() -> None:
    command = ["bash", str(ROOT / "scripts" / "digits_dydit.sh")]
    done = subprocess.run(command, env=os.environ | {"DIGITS_STEPS": "few"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not 'few'" in done.stderr


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Real digits for samples, and costs and logs that are made up."""
    images, labels = load_digits("test")
    for name, ratio in (("DiT", 1.0), ("0.7", 0.69), ("0.5", 0.51)):
        place = tmp_path / name
        (place / "runs" / "000-x").mkdir(parents=True)
        np.savez(place / "samples.npz", images[:200], labels[:200])
        cost = {"model": "DiT-digits/2", "block_ratio": ratio, "multiply_adds_per_image": ratio * 5e8}
        (place / "cost.json").write_text(json.dumps(cost))
        log = [{"flops_ratio": 0.9}, {"flops_ratio": ratio + 0.005}]
        (place / "runs" / "000-x" / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    return tmp_path


def test_the_table_sets_work_and_quality_beside_the_dit(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "digits_dydit_report.py", ["--folder", str(results), "--check"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:6] == [
        "model", "target", "ratio in training", "ratio in sampling", "G multiply-adds an image", "of the DiT's",
    ]  # fmt: skip
    assert rows[2][1:6] == ["", "", "1.000", "0.500", "1.000"]
    assert rows[3][1:6] == ["0.7", "0.695", "0.690", "0.345", "0.690"]
    assert float(rows[4][6]) > 0.97  # they are real


def test_a_ratio_that_was_not_reached_fails_the_check(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "0.5" / "runs" / "000-x" / "metrics.jsonl").write_text(json.dumps({"flops_ratio": 0.55}))
    with pytest.raises(SystemExit) as leaving:
        run(main, "digits_dydit_report.py", ["--folder", str(results), "--check"])
    assert leaving.value.code == 1 and "0.55 in training is not within 0.02 of 0.5" in capsys.readouterr().err


def test_missing_results_are_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "digits_dydit_report.py", ["--folder", str(results), "--targets", "0.3"]) == 2
    error = capsys.readouterr().err
    assert "0.3/cost.json is missing; run digits_dydit.sh" in error and error.count("\n") == 1
