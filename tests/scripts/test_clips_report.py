"""The report of moving digits: its table, its pictures, and checkpoints of something else."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from runtime.errors import run
from scripts import clips_report
from tests.digits_checkpoints import save_digits_checkpoint
from tests.runs import start

RUN = (
    "--dataset moving-digits --device cpu --num-workers 0 --max-steps 1 --global-batch-size 2 --hidden-size 16".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each family, one under each process."""
    folder = tmp_path_factory.mktemp("runs")
    for model, process in (("Skip-Latte", "flow"), ("Latte", "gaussian")):
        argv = [*RUN, "--model", f"{model}-digits/4", "--process", process]
        assert start(folder / model, *argv) == 0
    return folder


def report(*argv: object) -> int:
    return run(clips_report.main, "clips_report.py", [str(value) for value in argv])


def test_every_interval_is_a_row_and_the_work_falls(folder: Path, tmp_path: Path, capsys) -> None:
    argv = ["--num-sampling-steps", 4, "--intervals", 2, "--num-clips", 10, "--output-dir", tmp_path / "new"]
    assert report("--ckpt", folder, *argv) == 0
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    rows = [line for line in lines[2:] if len(line) == 9]
    assert [(row[0], row[1]) for row in rows] == [
        ("Latte-digits/4", ""), ("Latte-digits/4", "2"), ("Skip-Latte-digits/4", ""), ("Skip-Latte-digits/4", "2"),
        ("real, held out", ""),
    ]  # fmt: skip
    macs = [int(row[3].replace(",", "")) for row in rows[:4]]
    assert macs[1] < macs[0] and macs[3] < macs[2]
    assert [row[2] for row in rows[:4]] == ["4 of 4", "2 of 4", "4 of 4", "2 of 4"]
    assert float(rows[4][4]) > 0.97 and rows[4][5] == "1.000" and 0.7 < float(rows[4][6]) < 1.4
    assert all(float(row[6]) > 2 for row in rows[:4]), "untrained"
    for name in ("Latte-digits-4", "Skip-Latte-digits-4-N2"):
        with Image.open(tmp_path / "new" / f"{name}.gif") as animation:
            assert animation.n_frames == 8
        with Image.open(tmp_path / "new" / f"{name}.png") as sheet:
            assert sheet.width > 8 * 64 and sheet.height > 10 * 64
    document = json.loads((tmp_path / "new" / "Skip-Latte-digits-4-N2.scores.json").read_text())
    assert f"{document['scores']['accuracy']:.3f}" == rows[3][4] and document["samples"]["clips_in_file"] == 10
    protocol, path = document["protocol"], next((folder / "Skip-Latte").rglob("*.safetensors"))
    assert protocol["checkpoint"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert protocol["checkpoint"]["model"] == "Skip-Latte-digits/4" and protocol["checkpoint"]["weights"].startswith(
        "ema"
    )
    assert protocol["config"]["caching"]["cache_interval"] == 2 and protocol["config"]["num_sampling_steps"] == "4"


def test_other_checkpoints_and_numbers_are_refused(tmp_path: Path, capsys) -> None:
    path = save_digits_checkpoint(tmp_path / "0000001.safetensors", "DiT-digits/2")
    for argv, message in (
        (["--ckpt", path], f"--ckpt {path}: not a checkpoint of train.py --dataset moving-digits"),
        (["--ckpt", tmp_path], "no checkpoint there; bash scripts/digits_video.sh makes some"),
        (["--intervals", 1], "--intervals 1: must be at least 2"),
        (["--num-clips", 5], "--num-clips 5"),
    ):
        assert report(*argv, "--output-dir", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
