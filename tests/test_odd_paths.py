"""Paths whose bytes are not UTF-8: images are read from them, checkpoints are refused in one line."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample_ddp
import train
from runtime.errors import UserError, run
from runtime.files import check_folder
from tests import runs

ODD = os.fsdecode(b"caf\xe9")
TINY = "--model DiT-debug/2 --vae none --image-size 16 --num-classes 2 --global-batch-size 4 --max-steps 2 --device cpu"


def test_images_are_read_from_any_folder(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # it refuses other bytes
    monkeypatch.setattr(sys, "stdout", terminal)
    for name in (ODD, "other"):
        folder = tmp_path / ODD / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / os.fsdecode(b"\xff%d.png" % i))
    argv = [*TINY.split(), "--data-path", str(tmp_path / ODD), "--num-workers", "0", "--log-every", "1"]
    results = tmp_path / "results"
    assert run(train.main, "train.py", [*argv, "--results-dir", str(results)]) == 0
    assert "0000002.safetensors" in runs.log(results)
    assert run(train.main, "train.py", [*argv, "--results-dir", str(results), "--resume", "auto"]) == 0
    assert len(list(results.iterdir())) == 1  # the class names of the checkpoint are those of the folder
    assert run(train.main, "train.py", [*argv, "--dry-run"]) == 0
    terminal.flush()
    assert b"\\udce9" in terminal.buffer.getvalue()


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (train.main, "--dataset digits --results-dir {}"),
        (train.main, "--dataset digits --num-classes 10 --model DiT-debug/2 --resume {}/0000001.safetensors"),
        (train.main, "--dataset digits --num-classes 10 --model DiT-debug/2 --init-from {}/x.pt"),
        (sample_ddp.main, "--ckpt {}/0000001.safetensors"),
        (sample_ddp.main, "--ckpt {}/x.pt --model DiT-XL/2"),
    ],
)
def test_checkpoints_are_not(main, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ODD).mkdir()
    for name in ("0000001.safetensors", "x.pt"):
        (tmp_path / ODD / name).touch()
    assert run(main, "program", [*flags.format(ODD).split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not UTF-8" in error and not list(tmp_path.glob("results/*/checkpoints/*"))


def test_other_alphabets_are_no_odd_paths(tmp_path):
    check_folder(tmp_path / "données" / "データ", "--results-dir")
    with pytest.raises(UserError, match="--results-dir .*: not UTF-8"):
        check_folder(Path(ODD), "--results-dir")
