"""The table of sharing against quality, from a few steps of training."""

import json
from pathlib import Path

import pytest
import torch

import train
from data import load_digits
from models import create_model
from runtime.errors import run
from scripts import digits_sharing

SHORT = "--dataset digits --device cpu --num-workers 0 --global-batch-size 16 --max-steps 12".split()
SHORT += "--lr 5e-3 --ema-decay 0".split()


TRAINED = {"DDT-digits/2": "", "DiT-digits/2": "--process flow", "IDiT-digits/2": "--process gaussian"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by model."""
    found = {}
    for model, flags in TRAINED.items():
        folder = tmp_path_factory.mktemp("runs")
        argv = [*SHORT, "--model", model, *flags.split(), "--results-dir", str(folder)]
        assert run(train.main, "train.py", argv) == 0
        (found[model],) = folder.glob("*/checkpoints/*")
    return found


def table(ckpt: Path, *argv: str) -> int:
    given = [
        "--ckpt",
        str(ckpt),
        "--num-samples",
        "20",
        "--num-sampling-steps",
        "8",
        "--rates",
        "1",
        "--cfg-scale",
        "1.1",
        *argv,
    ]
    return run(digits_sharing.main, "digits_sharing.py", given)


def test_rows_share_more_and_more(trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--rates", "1", "2", "4", "--output", str(tmp_path / "a.json")]
    assert table(trained["DDT-digits/2"], *argv) == 0
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["encoder_calls"] for row in rows] == [8, 4, 2]
    network = create_model("DDT-digits/2")
    full, decoder = (sum(f().values()) for f in (network.multiply_adds, network.multiply_adds_with_state))
    assert [row["multiply_adds"] for row in rows] == [2 * (n * full + (8 - n) * decoder) for n in (8, 4, 2)]
    assert all(row["scores"]["num_samples"] == 20 for row in rows)
    out = capsys.readouterr().out
    assert "| 8 of 8 | 0% |" in out and "| 2 of 8 | 75% |" in out and "Real held-out digits" in out
    assert len({row["scores"]["frechet_distance"] for row in rows}) == 3  # sharing does change the images


def test_guidance_off_halves_the_work(trained: dict[str, Path], tmp_path: Path) -> None:
    works = []
    for scale in ("1", "2"):
        assert (
            table(trained["DDT-digits/2"], "--rates", "1", "--cfg-scale", scale, "--output", str(tmp_path / "a")) == 0
        )
        works.append(json.loads((tmp_path / "a").read_text())[0]["multiply_adds"])
    assert works[1] == 2 * works[0]


def test_a_network_without_an_encoder_has_one_row(trained: dict[str, Path], tmp_path: Path) -> None:
    """On the index scale, too."""
    assert table(trained["DiT-digits/2"], "--output", str(tmp_path / "a.json"), "--rates", "1", "2") == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["encoder_calls"] == row["evaluations"] == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--rates 9", "--rates 9: the refresh rate must lie in 1..8"),
        ("--rates 0", "--rates 0: the refresh rate must lie in 1..8"),
        ("--num-samples 3", "--num-samples 3: the scores need at least 4"),
        ("--cfg-scale 0.5", "--cfg-scale 0.5: must be at least 1"),
        ("--num-sampling-steps 0", "--num-sampling-steps 0: the number of steps must be at least 1"),
        ("--ckpt {gaussian}", "not of a flow trained on the digits"),
        ("--ckpt {official}", "not of a flow trained on the digits"),
        ("--ckpt nothing.safetensors", "--ckpt nothing.safetensors: no such file"),
    ],
)
def test_a_mistake_is_one_line(
    argv: str, words: str, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "official.pt")
    places = {"gaussian": trained["IDiT-digits/2"], "official": tmp_path / "official.pt"}
    assert table(trained["DDT-digits/2"], *argv.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_checkpoint_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(digits_sharing.main, "digits_sharing.py", []) == 2
    assert "--ckpt: required" in capsys.readouterr().err


def test_samples_do_not_depend_on_chunks(trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = digits_sharing.SharingConfig(ckpt=trained["DDT-digits/2"], num_samples=6, num_sampling_steps=4, rates=(1,))
    network, process = digits_sharing.load(trained["DDT-digits/2"])
    sampler = process.euler(4)
    drawn = []
    for chunk in (125, 2):
        monkeypatch.setattr(digits_sharing, "CHUNK", chunk)
        counting = digits_sharing.CountingNetwork(network)
        drawn.append(digits_sharing.draw(counting, 10, sampler, (True, False) * 2, config)[0].astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].shape == (6, *load_digits("test")[0].shape[1:])
