"""Training on latents that are damaged, or of another autoencoder."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import runs
from tests.data.test_latents import ENCODER, flip_bit, store
from tests.processes import run_script

DATA = "--dataset latents --model DiT-debug/2 --num-classes 2 --global-batch-size 4 --max-steps 2 --device cpu".split()


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A store of 8 images in two shards."""
    return make(tmp_path / "latents")


def make(folder: Path, shards: tuple[int, ...] = (4, 4), **encoder: object) -> Path:
    raw = np.random.default_rng(0).standard_normal((8, 2, 8, 8, 8)).astype(np.float16)
    store(
        folder,
        raw,
        shards,
        image_shape=[3, 64, 64],
        encoder={**ENCODER, "latents_mean": [], "latents_std": [], **encoder},
    )
    return folder


def test_a_flipped_bit_is_one_line(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(latents / "00001.npy")
    argv = [*DATA, "--data-path", latents, "--num-workers", 0]
    assert runs.start(tmp_path / "a", *argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error")]
    assert error == [
        f"train.py: error: --data-path: {latents / '00001.npy'}: not what was written (sha256); delete it and run "
        "scripts/extract_latents.py again with the same settings: it makes what is missing"
    ]
    assert not list((tmp_path / "a").glob("*/checkpoints/*"))


@pytest.mark.slow
def test_two_ranks_that_meet_it_print_one_line(tmp_path: Path) -> None:
    one = make(tmp_path / "one", (8,))
    flip_bit(one / "00000.npy")
    argv = [*DATA, "--data-path", one, "--num-workers", 0, "--results-dir", tmp_path / "a"]
    done = run_script("train.py", *map(str, argv), ranks=2, folder=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error")]
    assert done.returncode != 0 and len(lines) == 1 and "00000.npy: not what was written" in lines[0]


def test_trusted_stamps_train_on_it(latents: Path, tmp_path: Path) -> None:
    flip_bit(latents / "00001.npy")
    os.utime(latents / "00001.npy", (0, 0))
    assert runs.start(tmp_path / "a", *DATA, "--data-path", latents, "--num-workers", 0, "--trust-stamps") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "1"}, "the autoencoder 'ema' is not the one that made these latents"),
        ({"scaling_factor": 1.0}, "the autoencoder 'ema' has LatentScaling(scaling_factor=1.0"),
        (
            {"precision": "bf16"},
            "the autoencoder 'ema' encodes in bf16 (--vae-precision), and these latents were encoded",
        ),
        ({"name": "/moved"}, ""),
    ],
)
def test_held_out_latents_are_of_the_same_autoencoder(
    change: dict[str, object], words: str, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make(tmp_path / "other", **change)
    argv = [*DATA, "--data-path", latents, "--num-workers", 0, "--eval-data-path", other, "--eval-every", 2]
    argv += ["--eval-samples", 0]
    if not words:  # the folder of an autoencoder may have moved
        assert runs.start(tmp_path / "a", *argv) == 0 and "val_loss" in runs.metrics(tmp_path / "a")[-1]
        flip_bit(other / "00000.npy")
        assert runs.start(tmp_path / "b", *argv) == 2
        assert f"error: --eval-data-path: {other / '00000.npy'}: not what was written" in capsys.readouterr().err
        return
    assert runs.start(tmp_path / "a", *argv) == 2
    error = runs.the_error(capsys)
    assert f"--eval-data-path {other}: not latents of the same autoencoder as those in --data-path: {words}" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dataset digits --trust-stamps", "--trust-stamps: has no effect without --dataset latents"),
        (
            "--dataset latents --data-path {images}",
            "--data-path: {images}: holds images, not latents; give --dataset im",
        ),
        (
            "--data-path {latents}",
            "--data-path: {latents}: holds latents of scripts/extract_latents.py; train.py takes",
        ),
        (
            "--dataset latents --data-path {latents} --vae {images}",
            "--vae {images}: has no config.json that names a class",
        ),
        (
            "--dataset latents --data-path {latents} --vae-precision bf16",
            "--vae-precision bf16: has no effect, because these latents were encoded by extract_latents.py",
        ),
    ],
)
def test_a_folder_of_another_kind_is_one_line(
    argv: str, words: str, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/0.png").touch()
    places = {"images": tmp_path / "images", "latents": latents}
    more = "--model DiT-debug/2 --num-classes 2 --device cpu".split()
    assert runs.start(tmp_path / "a", *argv.format(**places).split(), *more) == 2
    assert words.format(**places) in runs.the_error(capsys)


def test_a_run_is_not_resumed_with_latents_of_another_precision(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*DATA, "--data-path", latents, "--num-workers", 0]
    assert runs.start(tmp_path / "a", *argv) == 0
    shutil.rmtree(latents)
    make(latents, precision="bf16")
    assert runs.start(tmp_path / "a", *argv, "--max-steps", 4, "--resume", "auto") == 2
    assert "trained with another autoencoder: the autoencoder 'ema' encodes in bf16" in runs.the_error(capsys)
