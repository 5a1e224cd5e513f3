"""Checkpoints of networks for the digits, as train.py leaves them, without training."""

import dataclasses
from pathlib import Path
from typing import Any

from models import create_model
from runtime.checkpoint import save_checkpoint
from tests.networks import randomise

PROCESSES: dict[str, dict[str, Any]] = {
    "gaussian": {"noise_schedule": "squaredcos_cap_v2", "predict_xstart": False, "learn_sigma": False},
    "flow": {},
}


def save_digits_checkpoint(path: Path, model: str, process: str = "gaussian", seed: int = 0, **train: Any) -> Path:
    """Writes a random network; `train` are settings of its training that readers look at."""
    network = randomise(create_model(model), seed)
    meta = {
        "format": 1,
        "step": 1,
        "model": {"name": model, **dataclasses.asdict(network.config)},
        "process": {"name": process, **PROCESSES[process]},
        "data": {"vae": "none", "image_shape": [1, 8, 8], "classes": [str(k) for k in range(10)]},
        "train": {"global_seed": seed, **train},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"ema": network.state_dict()}, meta)
    return path
