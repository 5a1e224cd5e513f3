"""The two analyses of deep features, on networks small enough to check them by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import AncestralSampler, create_diffusion, skip_cache
from models import create_model
from runtime.errors import run
from runtime.groups import save_checkpoint
from scripts import feature_smoothness
from scripts.feature_smoothness import (
    TrainedModel,
    between_steps,
    block_outputs,
    cosine,
    random_direction,
    relative_change,
    reused_error,
    surface,
    trajectory,
)
from tests.networks import debug_network, randomise


@pytest.fixture
def model() -> TrainedModel:
    network = debug_network("Skip-DiT")
    return TrainedModel("Skip-DiT", network, AncestralSampler(create_diffusion(), "6"), torch.tensor([1, 2]), 6)


def test_measures_of_known_vectors() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert cosine(a, b) == pytest.approx((0.5**0.5 + 1) / 2)
    assert relative_change(a, b) == pytest.approx((0.5**0.5 + 1) / 2)
    assert cosine(a, 3 * a) == pytest.approx(1) and relative_change(a, a) == 0


def test_a_direction_has_rows_as_long_as_the_weights_and_leaves_vectors_and_positions_alone(
    model: TrainedModel,
) -> None:
    weights = dict(model.network.named_parameters())
    generator = torch.Generator().manual_seed(0)
    first, second = (random_direction(model.network, generator) for _ in range(2))
    assert first.keys() == {name for name, p in weights.items() if p.ndim > 1} - {"pos_embed"}
    for name, moved in first.items():
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1))
        assert not torch.equal(moved, second[name])


def test_a_surface_is_one_in_the_middle_and_falls_with_strength(model: TrainedModel) -> None:
    before = [p.clone() for p in model.network.parameters()]
    x = torch.randn(2, 4, 8, 8)
    weak, strong = (surface(model, x, 500.0, points=3, strength=s, seed=0) for s in (0.01, 0.3))
    assert weak.shape == (3, 3) and weak[1, 1] == strong[1, 1] == pytest.approx(1, abs=1e-12)
    assert (strong < weak + 1e-12).all() and strong[0, 0] < weak[0, 0] < 1
    assert strong[0, 2] != strong[2, 0]  # alpha and beta are two directions
    assert all(torch.equal(a, b) for a, b in zip(before, model.network.parameters(), strict=True))


def test_a_surface_looks_at_the_tokens_that_are_remembered(model: TrainedModel) -> None:
    """What comes behind them may be moved without effect."""
    network, x = model.network, torch.randn(2, 4, 8, 8)
    for parameter in (*network.blocks[6].parameters(), *network.final_layer.parameters()):
        parameter.data.fill_(float("nan"))
    assert np.isfinite(surface(model, x, 500.0, points=2, strength=0.1, seed=0)).all()
    deeper = model._replace(depth=7)
    assert not np.isfinite(surface(deeper, x, 500.0, points=2, strength=0.1, seed=0)).any()


@torch.no_grad()
def test_blocks_are_compared_with_themselves_one_step_before(model: TrainedModel) -> None:
    path = trajectory(model, seed=0)
    assert len(path) == 6 and path[0].shape == (2, 4, 8, 8)
    outputs = list(block_outputs(model, path))
    similar, change = between_steps(model, path)
    assert similar.shape == change.shape == (8, 5)
    for block, step in ((0, 0), (5, 2), (7, 4)):
        assert similar[block, step] == cosine(outputs[step + 1][block], outputs[step][block])
        difference = (outputs[step + 1][block] - outputs[step][block]).double().norm(dim=-1)
        size = outputs[step + 1][block].double().norm(dim=-1)
        assert change[block, step] == pytest.approx(float((difference / size).mean()), rel=1e-5)
    direct = model.network(path[3], model.sampler.times[3], y=model.y, features_at=(6,)).features[6]
    assert torch.equal(outputs[3][5], direct)
    assert not any(block._forward_hooks for block in model.network.blocks)


@torch.no_grad()
def test_reused_outputs_are_compared_where_state_is_reused(model: TrainedModel) -> None:
    path, network, y = trajectory(model, seed=0), model.network, model.y
    times = model.sampler.times
    for interval in (1, 2, 3):
        errors = reused_error(model, path, interval)
        assert np.array_equal(np.isnan(errors), skip_cache(network, model.sampler, interval))
    state = network(path[0], times[0], y=y).state  # of interval 3's last refresh before step 2
    full, reused = network(path[2], times[2], y=y).sample, network(path[2], times[2], y=y, state=state).sample
    assert errors[2] == pytest.approx(relative_change(reused.flatten(1), full.flatten(1))) and errors[2] > 0


def checkpoint(folder: Path, name: str) -> Path:
    """A file of ours with random weights."""
    network = randomise(create_model(name, sample_shape=(1, 8, 8), learn_sigma=False))
    meta = {
        "format": 2,
        "model": {"name": name, **dataclasses.asdict(network.config)},
        "process": {"name": "gaussian", "noise_schedule": "linear", "prediction": "epsilon"},
        "encoder": {"name": "none"},
        "data": {"image_shape": [1, 8, 8]},
        "averages": {"ema-0.99": {"decay": 0.99}},
    }
    path = folder / f"{name.split('-debug')[0]}.safetensors"
    save_checkpoint(path, {"ema-0.99": network.state_dict()}, meta)
    return path


def main(*argv: str | Path) -> int:
    return run(feature_smoothness.main, "feature_smoothness.py", list(map(str, argv)))


SHORT = "--num-sampling-steps 6 --at 2 6 --points 3 --num-images 2 --cache-interval 2 3 --device cpu".split()


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [checkpoint(tmp_path, name) for name in ("DiT-debug/2", "Skip-DiT-debug/2")]
    foreign = tmp_path / "official.pt"
    torch.save({"ema": debug_network("Skip-DiT").state_dict()}, foreign)
    assert main("--ckpt", *paths, foreign, *SHORT, "--output-dir", tmp_path / "out") == 0
    actual = json.loads((tmp_path / "out" / "smoothness.json").read_text())["networks"]
    assert list(actual) == ["DiT-debug/2", "Skip-DiT-debug/2", "Skip-DiT-debug/2 (2)"]
    for name, depth in zip(actual, (4, 8, 8), strict=True):
        one = actual[name]
        assert list(one["surfaces"]) == ["2", "6"] and np.shape(one["surfaces"]["2"]) == (3, 3)
        assert np.shape(one["between_steps"]) == np.shape(one["change"]) == (depth, 5)
        assert [error is None for error in one["reused"]["2"]] == [True, False] * 3
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 3 + 1 and len({line.count("|") for line in printed[:5]}) == 1
    for picture in ("surfaces.png", "similarity.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--ckpt: required"),
        ("--ckpt nothing.pt", "--ckpt nothing.pt: no such file"),
        ("--ckpt FILE --at 0 5", "--at 0: there are steps 1 to 6"),
        ("--ckpt FILE --at 2 7", "--at 7: there are steps 1 to 6"),
        ("--ckpt FILE --points 1", "--points 1: must be at least 2"),
        ("--ckpt FILE --strength 0", "--strength 0.0: must be positive and finite"),
        ("--ckpt FILE --cache-interval 0", "--cache-interval 0: the refresh interval must be at least 1, not 0"),
        ("--ckpt FILE --cache-depth 3", "cache_depth 3 must lie in 1..2, half the depth"),
    ],
)
def test_mistakes_are_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path, "DiT-debug/2")
    assert main(*SHORT, *[str(path) if word == "FILE" else word for word in argv.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
