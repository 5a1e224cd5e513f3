"""The table and the picture of guidance."""

import json
from pathlib import Path

import pytest
from PIL import Image

from runtime.errors import run
from scripts import sweep_guidance
from tests.digits_checkpoints import save_digits_checkpoint


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "a.safetensors"
    save_digits_checkpoint(path, "DiT-digits/2", "gaussian", 0)
    return path


def main(ckpt: Path, folder: Path, *argv: str) -> int:
    few = f"--ckpt {ckpt} --num-sampling-steps 3 --num-images 4 --device cpu --output-dir {folder}".split()
    return run(sweep_guidance.main, "sweep_guidance.py", [*few, *argv])


def test_every_combination_is_scored(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"--scales 1 1.5 2 --intervals all 200:800 --guide-ckpts none {ckpt}".split()
    assert main(ckpt, tmp_path, *argv) == 0
    rows = json.loads((tmp_path / "guidance.json").read_text())["rows"]
    assert len(rows) == 1 + 2 * 2 * 2 and [row["scale"] for row in rows] == [1.0, *([1.5, 2.0] * 4)]
    assert {row["interval"] for row in rows} == {"all", "200:800"}
    itself = [row["scores"] for row in rows if row["guide"] == str(ckpt)]
    assert all(score["frechet_distance"] == pytest.approx(rows[0]["scores"]["frechet_distance"]) for score in itself)
    assert capsys.readouterr().out.strip() == (tmp_path / "guidance.md").read_text().strip()
    with Image.open(tmp_path / "guidance.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--scales 0.5", "--scales 0.5: must be at least 1"),
        ("--intervals 3", "--intervals 3: must be LOW:HIGH"),
        ("--intervals 8:3 --scales 2", "must be two timesteps, LOW < HIGH"),
        ("--guide-ckpts none.pt", "--guide-ckpt none.pt"),
    ],
)
def test_mistakes_are_one_line(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, message: str
) -> None:
    assert main(ckpt, tmp_path / "out", *argv.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
