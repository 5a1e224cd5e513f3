import argparse
import pickle
from pathlib import Path

import pytest
import torch

from models import create_model
from runtime.checkpoint import load_weights, read_checkpoint, save_checkpoint
from runtime.errors import UserError


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_ours_comes_back_as_it_was(tmp_path, weights):
    path = tmp_path / "0000001.safetensors"
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    meta = {"model": {"name": "DiT-debug/2"}, "step": 1}
    save_checkpoint(path, {"model": weights, "ema": doubled}, meta)
    ema = read_checkpoint(path)
    assert same(ema.weights, doubled) and ema.meta == meta
    assert same(read_checkpoint(path, "model").weights, weights)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path, weights):
    path = tmp_path / "0000001.safetensors"
    save_checkpoint(path, {"ema": weights}, {})
    with pytest.raises(TypeError):
        save_checkpoint(path, {"ema": weights}, {"not json": object()})
    assert same(read_checkpoint(path).weights, weights)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("group", [None, "ema", "model", "state_dict"])
def test_official_layouts(tmp_path, weights, group):
    path = tmp_path / "official.pt"
    torch.save(weights if group is None else {group: weights, "step": 3}, path)
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.weights, weights) and checkpoint.meta is None


def test_official_training_checkpoint_with_pickled_flags_and_wrapper_prefixes(tmp_path, weights):
    path = tmp_path / "0050000.pt"
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    other = {name: -tensor for name, tensor in weights.items()}
    torch.save({"model": other, "ema": wrapped, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}, path)
    assert same(read_checkpoint(path).weights, weights)
    assert same(read_checkpoint(path, "model").weights, other)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, weights, plain_pickle):
    path, target = tmp_path / "evil.pt", tmp_path / "exploded"
    content = {"ema": weights, "args": Bomb(target)}
    if plain_pickle:
        path.write_bytes(pickle.dumps({"args": Bomb(target)}))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="refused"):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path, weights, suffix):
    path = tmp_path / f"half{suffix}"
    if suffix == ".pt":
        torch.save({name: t.repeat(50, 1) if t.ndim > 1 else t for name, t in weights.items()}, path)
    else:
        save_checkpoint(path, {"ema": weights}, {})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{path.name}.*truncated"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["foreign.pt", "foreign.safetensors", "empty.pt", "empty.safetensors"])
def test_a_foreign_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"" if name.startswith("empty") else b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(UserError, match=path.name):
        read_checkpoint(path)


def test_a_pickle_without_weights_is_named(tmp_path):
    path = tmp_path / "numbers.pt"
    torch.save([1, 2, 3], path)
    with pytest.raises(UserError, match="not one of weights by name"):
        read_checkpoint(path)


def test_a_missing_file_and_a_missing_group_are_named(tmp_path, weights):
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pt")
    path = tmp_path / "0000001.safetensors"
    save_checkpoint(path, {"model": weights}, {})
    with pytest.raises(UserError, match="no weights under 'ema'; it has: model"):
        read_checkpoint(path)


def test_a_plain_safetensors_file_of_weights_loads(tmp_path, weights):
    from safetensors.torch import save_file

    path = tmp_path / "plain.safetensors"
    save_file(weights, path)
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.weights, weights) and checkpoint.meta is None


def test_weights_of_another_architecture_are_diagnosed_in_one_line():
    small, deep = create_model("DiT-debug/2"), create_model("DiT-debug/2", depth=5, hidden_size=32)
    with pytest.raises(UserError) as error:
        load_weights(small, deep.state_dict(), "--ckpt x as DiT-debug/2")
    message = str(error.value)
    assert message.startswith("--ckpt x as DiT-debug/2: the weights do not fit") and "\n" not in message
    assert message.count(";") == 2 and "unexpected blocks.4." in message


def test_a_shape_mismatch_says_both_shapes():
    model = create_model("DiT-debug/2")
    weights = model.state_dict()
    weights["pos_embed"] = torch.zeros(1, 4, 64)
    with pytest.raises(UserError, match="pos_embed is 1 x 4 x 64, expected 1 x 16 x 64"):
        load_weights(model, weights, "x")
