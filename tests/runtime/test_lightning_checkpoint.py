"""Lightning checkpoints of the official DDT trainer: two networks, a projector and training state in one file."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import create_model
from runtime.checkpoint import load_weights, read_checkpoint
from runtime.errors import UserError
from tests.golden_data import table

OFFICIAL = table("ddt/official_xl_22en6de_256_keys")["checkpoint"]
EMA, ONLINE = (OFFICIAL["prefixes"][key] for key in ("EMA weights (use these for sampling)", "online weights"))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return create_model("DDT-debug/2").state_dict()


def write(path: Path, *groups: tuple[str, dict[str, Tensor]], extra: object = None) -> Path:
    """A file as Lightning writes it."""
    state_dict = {prefix + name: value for prefix, members in groups for name, value in members.items()}
    state_dict |= {name: torch.zeros(shape) for name, shape in OFFICIAL["projector_keys"].items()}
    content = {
        "epoch": 3, "global_step": 40, "pytorch-lightning_version": "2.5.0", "state_dict": state_dict, "loops": {},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [], OFFICIAL["state_dict_key"]: state_dict, "hparams": extra,
    }  # fmt: skip
    torch.save(content, path)
    return path


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
def test_average_and_network_are_told_apart(weights: dict[str, Tensor], tmp_path: Path, compiled: str) -> None:
    online = {name: value + 1 for name, value in weights.items()}
    path = write(tmp_path / "last.ckpt", (EMA + compiled, weights), (ONLINE + compiled, online))
    for group, expected in (("ema", weights), ("model", online)):
        found = read_checkpoint(path, group).weights
        network = create_model("DDT-debug/2")
        load_weights(network, found, "x")
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("prefix", [EMA, ONLINE])
@pytest.mark.parametrize("group", ["ema", "model"])
def test_where_there_is_one_network_it_is_taken(
    weights: dict[str, Tensor], tmp_path: Path, prefix: str, group: str
) -> None:
    found = read_checkpoint(write(tmp_path / "last.ckpt", (prefix, weights)), group).weights
    assert found.keys() == weights.keys()


def test_a_missing_key_is_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Only the average lacks it: nothing is taken from the other network in its place."""
    partial = {name: value for name, value in weights.items() if name != "s_embedder.proj.bias"}
    path = write(tmp_path / "last.ckpt", (EMA, partial), (ONLINE, weights))
    with pytest.raises(UserError, match=r"x: the weights do not fit .* missing s_embedder.proj.bias"):
        load_weights(create_model("DDT-debug/2"), read_checkpoint(path).weights, "x")


def test_a_mistyped_prefix_does_not_load_as_fresh_weights(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt", ("denoizer.", weights))
    with pytest.raises(UserError, match="the weights do not fit"):
        load_weights(create_model("DDT-debug/2"), read_checkpoint(path).weights, "x")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return Path.touch, (self.target,)


def test_pickled_code_does_not_run(weights: dict[str, Tensor], tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    path = write(tmp_path / "last.ckpt", (EMA, weights), extra=Bomb(target))
    with pytest.raises(UserError, match="refused"):
        read_checkpoint(path)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "it would have run"


def test_the_official_names_are_those_of_the_model() -> None:
    """All 349 of them, in the 256-pixel and the 512-pixel file alike."""
    official = table("ddt/official_xl_22en6de_256_keys")
    for side in (32, 64):
        with torch.device("meta"):
            network = create_model("DDT-XL/2", sample_shape=(4, side, side))
        assert {name: list(value.shape) for name, value in network.state_dict().items()} == official["keys"]
    assert OFFICIAL["same_keys_for_512"]
