"""Checkpoints of both formats and official files: what is read, and what is refused."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch

from models import create_model
from runtime.checkpoint import is_average, load_weights, read_checkpoint
from runtime.errors import UserError
from runtime.groups import read_groups, save_checkpoint
from tests import format1


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_ours_comes_back_as_it_was(tmp_path, weights):
    path = tmp_path / "0000001.safetensors"
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    meta = {"format": 2, "model": {"name": "DiT-debug/2"}, "step": 1, "averages": {"ema-0.9999": {"decay": 0.9999}}}
    save_checkpoint(path, {"model": weights, "ema-0.9999": doubled}, meta)
    ema = read_checkpoint(path)
    assert same(ema.weights, doubled) and ema.meta == meta and ema.group == "ema-0.9999"
    assert same(read_checkpoint(path, "ema-0.9999").weights, doubled)
    model = read_checkpoint(path, "model")
    assert same(model.weights, weights) and model.group == "model"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_equal_content_has_equal_bytes(tmp_path, weights):
    """In whichever order the tensors come; the library alone writes metadata in random order."""
    paths = [tmp_path / f"000000{n}.safetensors" for n in range(8)]
    for number, path in enumerate(paths):
        order = sorted(weights, reverse=bool(number % 2))
        save_checkpoint(path, {"model": {name: weights[name] for name in order}}, {"format": 2, "café\n": "\U0001f600"})
    assert len({path.read_bytes() for path in paths}) == 1
    assert read_groups(paths[0], lambda present: present)[1] == {"format": 2, "café\n": "\U0001f600"}


def test_one_of_several_averages_is_chosen_by_name(tmp_path, weights):
    path = tmp_path / "0000001.safetensors"
    averages = {f"ema-{decay}": {name: decay * tensor for name, tensor in weights.items()} for decay in (0.999, 0.9999)}
    save_checkpoint(path, {"model": weights, **averages}, {"format": 2})
    for name, average in averages.items():
        found = read_checkpoint(path, name)
        assert same(found.weights, average) and found.group == name
    with pytest.raises(
        UserError, match=r"--ckpt .*: holds several averages; choose by --weights: ema-0.999, ema-0.9999$"
    ):
        read_checkpoint(path)
    with pytest.raises(UserError, match="holds no weights under 'ema-0.99'; it has: ema-0.999, ema-0.9999, model"):
        read_checkpoint(path, "ema-0.99")


def test_averages_are_known_by_their_names():
    assert [name for name in ("ema", "ema-0.9", "model", "emanation", "optimizer") if is_average(name)] == [
        "ema",
        "ema-0.9",
    ]


def test_groups_are_chosen_among_those_in_the_file(tmp_path, weights):
    path = tmp_path / "0000001.safetensors"
    groups = {
        "model": weights,
        "optimizer": {"a.weight/step": torch.tensor(3.0)},
        "projector": {"0.weight": torch.ones(2)},
    }
    save_checkpoint(path, groups, {"format": 2, "step": 3})
    seen = []
    read, meta = read_groups(path, lambda present: seen.extend(present) or ["optimizer", "projector"])
    assert sorted(seen) == ["model", "optimizer", "projector"] and meta == {"format": 2, "step": 3}
    assert read.keys() == {"optimizer", "projector"}
    assert all(same(read[name], groups[name]) for name in read)


@pytest.mark.parametrize("run", ["dit", "dit-cosine", "ddt"])
def test_files_of_format_1(tmp_path, run):
    path = format1.write_checkpoint(run, tmp_path / "0000002.safetensors")
    average = "ema-0.99" if run == "dit-cosine" else "ema-0.9999"
    ema, model = read_checkpoint(path), read_checkpoint(path, "model")
    assert ema.group == average and model.group == "model" and ema.meta["format"] == 2
    assert same(ema.weights, read_checkpoint(path, average).weights)
    shapes = {name: shape for name, _, shape in format1.layout(run).tensors}
    for group, found in (("ema", ema), ("model", model)):
        names = [name for name in shapes if name.startswith(f"{group}/")]
        assert found.weights.keys() == {name.removeprefix(f"{group}/") for name in names}
        for name in names:
            expected = torch.from_numpy(format1.numbers(name, shapes[name]))
            assert torch.equal(found.weights[name.removeprefix(f"{group}/")], expected)
    network = create_model(ema.meta["model"]["name"], sample_shape=(1, 8, 8), num_classes=10, **output_of(ema.meta))
    load_weights(network, ema.weights, "x")


def output_of(meta):
    return {"learn_sigma": meta["model"]["learn_sigma"]} if "learn_sigma" in meta["model"] else {}


def test_parameters_of_a_projector_are_renamed_in_format_1(tmp_path):
    """In the projector's group, and in the optimizer's state of its parameters."""
    names = ("model/a", "alignment/0.weight", "optimizer/a/step", "optimizer/alignment.0.weight/step")
    metadata = {
        "format": 1,
        "step": 1,
        "model": {},
        "process": {},
        "train": {},
        "data": {"vae": "ema", "image_shape": None},
    }
    tensors = {name: format1.numbers(name, []) for name in names}
    path = format1.write_safetensors(tmp_path / "a.safetensors", {"dit_family": json.dumps(metadata)}, tensors)
    groups, _ = read_groups(path, lambda present: present)
    assert {(group, name) for group, tensors in groups.items() for name in tensors} == {
        ("model", "a"), ("projector", "0.weight"), ("optimizer", "a/step"), ("optimizer", "projector.0.weight/step")
    }  # fmt: skip


def test_a_file_of_a_later_format_is_refused(tmp_path, weights):
    path = tmp_path / "0000001.safetensors"
    save_checkpoint(path, {"model": weights}, {"format": 3})
    with pytest.raises(UserError, match="of format 3, this version reads up to 2; update it"):
        read_checkpoint(path, "model")


@pytest.mark.parametrize("damage", ["tensor", "document"])
def test_flipped_bits_are_found(tmp_path, weights, damage):
    path = tmp_path / "0000001.safetensors"
    save_checkpoint(path, {"model": weights}, {"format": 2, "step": 1})
    content = bytearray(path.read_bytes())
    if damage == "tensor":
        content[-1] ^= 1
    else:
        content[content.index(b"format") - 2] = ord("x")  # a quotation mark of the JSON document
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path, "model")


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


@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
def test_a_state_dict_that_holds_average_and_network_by_prefix(tmp_path, weights, wrapper):
    other = {name: -tensor for name, tensor in weights.items()}
    content = {f"ema_denoiser.{wrapper}{name}": tensor for name, tensor in weights.items()}
    content |= {f"denoiser.{wrapper}{name}": tensor for name, tensor in other.items()}
    content["trainer.proj.0.weight"] = torch.randn(2)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": content, "epoch": 3, "optimizer_states": [{"state": {0: {"step": 1}}}]}, path)
    assert same(read_checkpoint(path).weights, weights)
    assert same(read_checkpoint(path, "model").weights, other)


@pytest.mark.parametrize("mappable", [True, False])
def test_files_are_mapped_where_their_format_allows(tmp_path, weights, mappable, monkeypatch):
    """A quarter of a training checkpoint of 11 GB is read."""
    path, load, mapped = tmp_path / "0050000.pt", torch.load, []
    torch.save({"model": weights, "ema": weights, "opt": {}}, path, _use_new_zipfile_serialization=mappable)
    monkeypatch.setattr(
        torch, "load", lambda *args, **options: mapped.append(options["mmap"]) or load(*args, **options)
    )
    assert same(read_checkpoint(path).weights, weights)
    assert mapped == [mappable]


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
    assert "expected 52 tensors, 4 blocks, width 64, found 62 tensors, 5 blocks, width 32: " in message
    assert message.count(";") == 3 and "unexpected blocks.4." in message


def test_the_model_that_weights_do_fit_is_named():
    small, other = create_model("DiT-debug/2"), create_model("DiT-digits/2")
    with pytest.raises(UserError, match="found those of DiT-digits/2, 52 tensors, 4 blocks, width 96: "):
        load_weights(small, other.state_dict(), "x", lambda weights: "DiT-digits/2")


def test_a_shape_mismatch_says_both_shapes():
    model = create_model("DiT-debug/2")
    weights = model.state_dict()
    weights["pos_embed"] = torch.zeros(1, 4, 64)
    with pytest.raises(UserError, match="pos_embed is 1 x 4 x 64, expected 1 x 16 x 64"):
        load_weights(model, weights, "x")


def test_finite_weights_of_any_size_are_loaded_and_no_others() -> None:
    largest = torch.finfo(torch.float32).max
    network = torch.nn.Linear(2, 1, bias=False)
    load_weights(network, {"weight": torch.full((1, 2), largest)}, "x")  # their sum overflows
    assert network.weight.tolist() == [[largest, largest]]
    for values in ([torch.inf, -torch.inf], [torch.nan, 0.0], [0.0, torch.inf]):
        with pytest.raises(UserError, match="^x: weight has NaN or infinity"):
            load_weights(network, {"weight": torch.tensor([values])}, "x")
    for dtype, values in (
        (torch.float64, [1e39, 0.0]),
        (torch.float64, [1e39, -1e39]),
        (torch.float16, [torch.inf, 0]),
    ):
        with pytest.raises(UserError, match="^x: weight has NaN or infinity"):
            load_weights(network, {"weight": torch.tensor([values], dtype=dtype)}, "x")
    load_weights(network, {"weight": torch.tensor([[float(largest), 1e-300]], dtype=torch.float64)}, "x")
    assert network.weight.tolist() == [[largest, 0.0]]
