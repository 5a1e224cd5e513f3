"""A checkpoint of a small network on digits, as train.py writes it."""

from pathlib import Path

import pytest

from models import create_model
from tests.checkpoints import write_network
from tests.networks import randomise


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = randomise(create_model("DiT-digits/2", depth=2, hidden_size=32))
    return write_network(tmp_path_factory.mktemp("run") / "0000001.safetensors", "DiT-digits/2", network)
