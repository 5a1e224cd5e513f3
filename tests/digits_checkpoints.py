"""Checkpoints of networks for the digits, as train.py leaves them, without training."""

from __future__ import annotations

from pathlib import Path

from runtime.groups import save_checkpoint
from runtime.settings import flag_name
from tests.networks import randomise
from tests.runs import DIGITS, open_setup
from training.state import checkpoint_meta


def save_digits_checkpoint(
    path: Path, model: str, process: str = "gaussian", seed: int = 0, **settings: object
) -> Path:
    """Write the average of a run with these settings, of random weights."""
    flags = [word for name, value in settings.items() for word in (flag_name(name), value)]
    schedule = ["--noise-schedule", "squaredcos_cap_v2"] if process == "gaussian" else []
    setup = open_setup(*DIGITS, "--model", model, "--process", process, "--global-seed", seed, *schedule, *flags)
    meta, weights = checkpoint_meta(setup, 1), randomise(setup.network, seed).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, dict.fromkeys(meta["averages"], weights), meta)
    return path
