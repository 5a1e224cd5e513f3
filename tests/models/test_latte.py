"""Latte and Skip-Latte against the recorded outputs, losses, names and costs of the official implementation."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.costs import reused_cost
from diffusion import Batch, DiffusionLoss, Draws, Evaluation, create_diffusion, guided
from models import Latte, SkipLatte, create_model, list_models, model_config
from models.latte import LatteConfig, SkipLatteConfig, frame_position_table
from models.recognise import recognise
from tests.golden_data import arrays, assert_close, assert_close_elementwise, table
from tests.golden_latte import CASES, plain_network, recorded_network
from tests.networks import debug_network, inputs

OFFICIAL = table("latte/official_latte_xl2_skip_ucf101_keys")


def labels(golden: dict[str, Tensor], name: str = "fwd.y") -> dict[str, Tensor]:
    """Labels of a recorded batch; none if the network is unconditional."""
    return {"y": golden[name]} if name in golden else {}


# ----------------------------------------------------------------------------------------------------------------------
# Recorded numbers


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_forward_and_what_enters_blocks_equal_the_recorded_ones(case: str) -> None:
    golden, network = arrays(f"latte/{case}/io"), recorded_network(case)
    entered: dict[int, Tensor] = {}
    for i, block in enumerate(network.blocks):
        block.register_forward_pre_hook(lambda _, arguments, i=i: entered.update({i: arguments[0]}))
    assert_close(network(golden["fwd.x"], golden["fwd.t"], **labels(golden)).sample, golden["fwd.out_skip"])
    recorded = sorted({int(n) for name in golden for n in re.findall(r"^fwd\.block(\d+)", name)})
    assert len(recorded) == 5
    for i in recorded:  # (N F, T, D) or (N T, F, D) in the official code
        assert_close(entered[i].reshape_as(golden[f"fwd.block{i}.in"]), golden[f"fwd.block{i}.in"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_without_its_skip_units_it_is_the_plain_network(case: str) -> None:
    golden, network = arrays(f"latte/{case}/io"), plain_network(case)
    assert_close(network(golden["fwd.x"], golden["fwd.t"], **labels(golden)).sample, golden["fwd.out_plain_latte"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_clips_with_images_behind_them_equal_the_recorded_ones(case: str) -> None:
    golden, network = arrays(f"latte/{case}/io"), recorded_network(case)
    given = labels(golden)
    if given:
        given |= {"image_labels": golden["img.y_image"]} | labels(golden, "img.y")
    assert_close(network(golden["img.x"], golden["fwd.t"], **given).sample, golden["img.out"])


@torch.no_grad()
def test_guidance_equals_the_recorded_one() -> None:
    """The official batch is doubled beforehand; its second half carries the null rows' variance along."""
    golden, network = arrays("latte/c2v_cond/io"), recorded_network("c2v_cond")
    (x, _), (t, _), (y, y_null) = (golden[f"cfg.{name}"].chunk(2) for name in "xty")
    for channels in (4, None):  # all channels of the noise, or by default as many
        denoise = guided(network, {"y": y}, {"y": y_null}, channels=channels)
        out = denoise(x, Evaluation(t, 7.0, guided=True)).sample
        assert_close(out[:, :, :4], golden["cfg.out_skip"].chunk(2)[0][:, :, :4])
        if channels == 4:
            assert_close(out, golden["cfg.out_skip"].chunk(2)[0])


@torch.no_grad()
@pytest.mark.parametrize("case", ["c2v_cond", "c2v_uncond"])
def test_training_losses_equal_the_recorded_ones(case: str) -> None:
    golden, network = arrays(f"latte/{case}/io"), recorded_network(case)
    batch = Batch(golden["fwd.x"], labels(golden), torch.arange(len(golden["fwd.x"])))
    losses = DiffusionLoss(network, create_diffusion())(batch, Draws(golden["fwd.t"], golden["train.noise"]), 0, {})
    for name in ("loss", "mse", "vb"):
        assert_close_elementwise(losses[name], golden[f"train.{name}"])


# ----------------------------------------------------------------------------------------------------------------------
# Names, sizes, costs


def official_size(name: str, **overrides: object) -> Latte:
    with torch.device("meta"):
        network = create_model(name, **overrides)
    assert isinstance(network, Latte)
    return network


def test_state_dict_has_the_official_names_and_shapes() -> None:
    network = official_size("Skip-Latte-XL/2", num_classes=101)
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert shapes == OFFICIAL["keys"] and len(shapes) == 321
    assert sum(p.numel() for p in network.parameters()) == OFFICIAL["params_total"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == OFFICIAL["params_trainable"]
    plain = official_size("Latte-XL/2", num_classes=101)
    assert sum(p.numel() for p in plain.parameters()) == OFFICIAL["params_plain_latte"]
    unconditional = official_size("Skip-Latte-XL/2", num_classes=0)
    assert sum(p.numel() for p in unconditional.parameters()) == OFFICIAL["unconditional_variant"]["params_total"]
    assert shapes.keys() - unconditional.state_dict().keys() == {"y_embedder.embedding_table.weight"}


def test_costs_equal_the_official_ones_but_for_modulation_once_a_clip() -> None:
    """The official code maps every frame's conditioning in spatial blocks, and every place's in temporal ones."""
    macs, square = OFFICIAL["gmacs_per_video_forward"], 1152**2
    plain, skip = official_size("Latte-XL/2", num_classes=101), official_size("Skip-Latte-XL/2", num_classes=101)

    def officially(cost: dict[str, int], pairs: int) -> int:
        more = pairs * 6 * (16 - 1 + 256 - 1) + 2 * (16 - 1)
        return sum(cost.values()) + more * square

    assert officially(plain.cost(), 14) == round(macs["plain_latte"]["total"] * 1e9)
    assert officially(skip.cost(), 14) == round(macs["skip_full"]["total"] * 1e9)
    assert officially(reused_cost(skip), 2) == round(macs["skip_cached_step"]["total"] * 1e9)
    assert skip.cost()["skip_units"] == 7 * round(macs["skip_full"]["skip"] * 1e9)
    assert 0.98 < sum(plain.cost().values()) / (macs["plain_latte"]["total"] * 1e9) < 0.99


def test_all_sizes_of_dit_are_there() -> None:
    plain = {name.removeprefix("DiT-") for name in list_models("DiT-*") if not name.startswith("DiT-d")}
    for family in ("Latte", "Skip-Latte"):
        names = {name.removeprefix(f"{family}-") for name in list_models(f"{family}-*")}
        assert names == plain | {"debug/2", "digits/4"}
        assert model_config(f"{family}-XL/2").sample_shape == (16, 4, 32, 32)


def test_positions_of_frames_are_sines_then_cosines() -> None:
    table = frame_position_table(8, 5)
    assert table.shape == (5, 8) and table.dtype == torch.float64
    for frame in range(5):
        angles = [frame * 10_000 ** (-k / 4) for k in range(4)]
        assert np.allclose(table[frame], [*np.sin(angles), *np.cos(angles)], atol=1e-12)
    assert torch.equal(frame_position_table(8, 3), table[:3])


# ----------------------------------------------------------------------------------------------------------------------
# What attends to what


@torch.no_grad()
@pytest.mark.parametrize("family", ["Latte", "Skip-Latte"])
def test_a_change_in_one_place_of_one_frame_reaches_its_frame_then_its_place(family: str) -> None:
    """After a spatial block nothing has left the frame; the temporal block carries it to all frames."""
    network = debug_network(family)
    x, t, conditioning = inputs(network, 1)
    other = x.clone()
    other[0, 1, :, :2, :2] += 1.0  # the first token of the second frame
    frames, tokens = x.shape[1], network.config.frame_tokens

    def changed(number: int) -> Tensor:
        a, b = (network(v, t, **conditioning, features_at=(number,)).features[number] for v in (x, other))
        return (a - b).abs().amax(-1).view(frames, tokens) > 1e-6

    assert changed(1).any(1).tolist() == [False, True, False, False] and changed(1)[1].all()
    assert changed(2).all()


@torch.no_grad()
def test_images_do_not_change_their_clip_nor_each_other() -> None:
    network = debug_network("Skip-Latte")
    x, t, conditioning = inputs(network, 2)
    images, image_labels = torch.randn(2, 3, *x.shape[2:]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    joint = network(torch.cat([x, images], 1), t, **conditioning, image_labels=image_labels).sample
    assert joint.shape == (2, 7, 8, 8, 8)
    assert_close(joint[:, :4], network(x, t, **conditioning).sample)
    order = torch.tensor([2, 0, 1])
    turned = network(torch.cat([x, images[:, order]], 1), t, **conditioning, image_labels=image_labels[:, order]).sample
    assert_close(turned[:, 4:], joint[:, 4:][:, order])
    relabelled = network(torch.cat([x, images], 1), t, **conditioning, image_labels=image_labels.flip(0)).sample
    assert not torch.allclose(relabelled[:, 4:], joint[:, 4:], atol=1e-3)
    assert_close(relabelled[:, :4], joint[:, :4])


@torch.no_grad()
def test_an_unconditional_network_takes_no_labels_and_images_without_any() -> None:
    network = debug_network("Skip-Latte", num_classes=0)
    assert network.conditioning == () and network.config.class_dropout_prob == 0
    x, t, conditioning = inputs(network)
    assert conditioning == {} and network(x, t).sample.std() > 0.01
    assert network(torch.cat([x, x[:, :1]], 1), t).sample.shape[1] == 5
    with pytest.raises(ValueError, match="y: this network is unconditional"):
        network(x, t, y=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="unconditional: it has no labels, and cannot be guided"):
        network.null_conditioning(2)
    recognised = recognise(network.state_dict())
    assert recognised is not None and recognised.name == "Skip-Latte-debug/2" and recognised.fields["num_classes"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_shapes_and_labels_that_do_not_fit_are_named() -> None:
    network = debug_network("Skip-Latte")
    x, t, conditioning = inputs(network)
    with pytest.raises(ValueError, match="x has 3 frames; this network was made for clips of 4"):
        network(x[:, :3], t, **conditioning)
    with pytest.raises(ValueError, match=r"x is \(2, 4, 8, 8\); this network takes \(N, 4, 4, 8, 8\)"):
        network(x[:, 0], t, **conditioning)
    with pytest.raises(ValueError, match=r"image_labels must be \(2, 1\) for x of .*; given: none"):
        network(torch.cat([x, x[:, :1]], 1), t, **conditioning)
    with pytest.raises(ValueError, match=r"image_labels must be left out for x of .*; given: of shape \(2, 1\)"):
        network(x, t, **conditioning, image_labels=torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LatteConfig, {"depth": 5}, "depth 5 must be even"),
        (SkipLatteConfig, {"depth": 6}, "depth 6 must be a multiple of 4"),
        (LatteConfig, {"depth": 8, "cache_depth": 3}, r"cache_depth 3 must lie in 1\.\.2: it counts pairs"),
        (LatteConfig, {"num_classes": -1}, "num_classes must be at least 0, not -1"),
        (LatteConfig, {"sample_shape": (4, 32, 32)}, "must be four numbers of at least 1: frames, channels, height"),
        (LatteConfig, {"sample_shape": (8, 4, 31, 32)}, r"nearest: \(8, 4, 30, 32\) or \(8, 4, 32, 32\)"),
    ],
)
def test_values_that_no_network_has_are_refused(config: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_depths_that_are_not_28_have_as_many_units_as_a_quarter() -> None:
    assert [SkipLatteConfig(depth=depth).skip_units for depth in (4, 8, 12, 28)] == [1, 2, 3, 7]
    assert LatteConfig().skip_units == 0 and SkipLatteConfig().cache_depth == 1
    assert isinstance(create_model("Skip-Latte-debug/2"), SkipLatte)
