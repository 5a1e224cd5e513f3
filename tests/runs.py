"""Training runs in this process, and what they leave in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from models import FAMILIES
from runtime.distributed import World
from runtime.errors import run
from runtime.groups import read_groups
from tests.networks import labelled
from training.config import parse_settings
from training.setup import Setup, set_up

CPU = World(0, 1, torch.device("cpu"))
DIGITS = "--dataset digits --device cpu --num-workers 0 --log-every 1".split()

MOVING_DIGITS = ["--dataset", "moving-digits", *DIGITS[2:], *"--num-frames 4 --image-size 12".split()]
CAPTIONED_DIGITS = ["--dataset", "captioned-digits", *DIGITS[2:], *"--num-frames 4 --image-size 16".split()]


def data_for(family: str) -> list[str]:
    """Flags of the digits, moving for families whose samples are clips, and of a short run on the CPU."""
    if not labelled(family):
        return CAPTIONED_DIGITS
    if "frames" not in getattr(FAMILIES[family].config, "axes", ()):
        return DIGITS
    return [*MOVING_DIGITS, "--num-classes", "40"]  # digits and directions


def start(results: Path, *argv: object) -> int:
    """Run train.py; returns its exit status."""
    return run(train.main, "train.py", [*map(str, argv), "--results-dir", str(results)])


def open_setup(*argv: object, **options: Any) -> Setup:
    """The setup of a run, which does not begin."""
    return set_up(parse_settings([*map(str, argv)]), CPU.device, **options)


def run_folder(results: Path, number: int = 0) -> Path:
    """The folder of a run."""
    (folder,) = results.glob(f"{number:03d}-*")
    return folder


def checkpoint(results: Path, step: int, number: int = 0) -> Path:
    """The checkpoint of a step."""
    return run_folder(results, number) / "checkpoints" / f"{step:07d}.safetensors"


def last_checkpoint(results: Path) -> Path:
    """The newest checkpoint of the newest run."""
    return max(results.glob("*/checkpoints/*"))


def state(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their full names."""
    groups, _ = read_groups(path, lambda present: present)
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two states are equal bit by bit."""
    assert a.keys() == b.keys() and len(a) > 100
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def metrics(results: Path, number: int = 0) -> list[dict[str, float]]:
    """The lines that a run logged."""
    return [json.loads(line) for line in (run_folder(results, number) / "metrics.jsonl").read_text().splitlines()]


def losses(results: Path, number: int = 0) -> dict[int, float]:
    """The losses that a run logged, by step."""
    return {int(line["step"]): line["loss"] for line in metrics(results, number) if "loss" in line}


def log(results: Path, number: int = 0) -> str:
    """The log of a run."""
    return (run_folder(results, number) / "log.txt").read_text()


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that train.py printed as an error."""
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and error.count("\n") == 1, error
    return error
