"""LatteT2V and Skip-LatteT2V against recorded outputs of the official code, diffusers' network, names and costs."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.costs import reused_cost
from models import LatteT2V, SkipLatteT2V, create_model, list_models, model_config
from models.latte_t2v import LatteT2VConfig, SkipLatteT2VConfig
from models.loading import load_network
from runtime.errors import UserError
from tests.golden_data import arrays, assert_close, table
from tests.golden_latte_t2v import (
    UNREAD,
    golden,
    modulate_unfused,
    multiply_add_unfused,
    plain_network,
    recorded_network,
    recorded_weights,
    without_frame_positions,
)
from tests.networks import debug_network, inputs

GOLDEN = golden()
X, T, TEXT = (GOLDEN[f"fwd.{name}"] for name in ("x", "t", "encoder_hidden_states"))
MASK = GOLDEN["fwd.encoder_attention_mask"].float()


# ----------------------------------------------------------------------------------------------------------------------
# Recorded numbers


@torch.no_grad()
def test_forward_and_intermediate_values_equal_the_recorded_ones() -> None:
    network, seen = recorded_network(), dict[str, Tensor]()

    def keep(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, args, out: seen.update({name: out, f"{name}.in": args[0]}))

    spatial, temporal = network.transformer_blocks, network.temporal_transformer_blocks
    modules = {"spatial0": spatial[0], "spatial27": spatial[27], "temporal0": temporal[0], "temporal27": temporal[27]}
    for name, module in {**modules, "skip0": network.skip_linears[0], "time": network.adaln_single}.items():
        keep(name, module)
    keep("caption_projection", network.caption_projection)
    assert_close(network(X, T, text=TEXT).sample, GOLDEN["fwd.out_skip"])
    seen["timestep_embedding"], seen["adaln_single"] = seen["time"].split([16, 96], dim=1)
    seen["pos_embed"] = seen["spatial0.in"]
    for name in (*modules, "skip0", "timestep_embedding", "adaln_single", "caption_projection", "pos_embed"):
        recorded = GOLDEN[f"fwd.{name}"]
        assert_close(seen[name].reshape_as(recorded), recorded)


@torch.no_grad()
def test_masks_single_frames_and_other_sizes_equal_the_recorded_ones() -> None:
    network = recorded_network()
    assert_close(network(X, T, text=TEXT, text_mask=MASK).sample, GOLDEN["fwd.out_mask"])
    assert_close(network(GOLDEN["fwd.x_frame"], T, text=TEXT).sample, GOLDEN["fwd.out_frame"])
    assert_close(network(GOLDEN["fwd.x_wide"], T, text=TEXT).sample, GOLDEN["fwd.out_wide"])
    other = recorded_network(sample_shape=(5, 4, 12, 16))  # computed positions do not follow the config's shape
    assert_close(other(GOLDEN["fwd.x_wide"], T, text=TEXT).sample, GOLDEN["fwd.out_wide"])


@torch.no_grad()
def test_without_its_skip_units_it_is_the_plain_network() -> None:
    assert_close(plain_network()(X, T, text=TEXT).sample, GOLDEN["fwd.out_plain"])


@torch.no_grad()
def test_without_temporal_blocks_frames_are_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    network = without_frame_positions(recorded_network())
    for block in network.temporal_transformer_blocks:
        monkeypatch.setattr(block, "forward", lambda x, *_: x)
    assert_close(network(X, T, text=TEXT).sample, GOLDEN["fwd.out_no_temporal"])
    alone = network(X[:, 1:2], T, text=TEXT).sample
    assert_close(alone, GOLDEN["fwd.out_no_temporal"][:, 1:2])


@torch.no_grad()
def test_plain_weights_compute_what_diffusers_does_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With multiplication and addition rounded separately; fused, as always here, the results are closer to exact."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.LatteTransformer3DModel(**table("latte_t2v/config")["model"]).eval()
    ours = plain_network()
    theirs.load_state_dict(ours.state_dict())
    for x in (X, GOLDEN["fwd.x_frame"], GOLDEN["fwd.x_wide"]):
        expected = theirs(x.transpose(1, 2), T, encoder_hidden_states=TEXT).sample.transpose(1, 2)
        assert_close(ours(x, T, text=TEXT).sample, expected, 1e-6)
        with monkeypatch.context() as patch:
            for module in ("models.latte_t2v", "models.pixart_layers"):
                patch.setattr(f"{module}.modulate", modulate_unfused)
            patch.setattr("models.pixart_layers.multiply_add", multiply_add_unfused)
            # Positions of other sizes are computed in float32 there, in float64 here
            assert torch.equal(ours(x, T, text=TEXT).sample, expected) or x.shape[-2:] != X.shape[-2:]


# ----------------------------------------------------------------------------------------------------------------------
# Names, sizes, costs


def official_size(name: str, **overrides: object) -> LatteT2V:
    with torch.device("meta"):
        network = create_model(name, **overrides)
    assert isinstance(network, LatteT2V)
    return network


def official_shapes(*, skip: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official network, from its description."""
    d, k = 1152, 4096

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {"pos_embed.proj.weight": (d, 4, 2, 2), "pos_embed.proj.bias": (d,)}
    shapes |= {"scale_shift_table": (2, d)} | linear("adaln_single.linear", 6 * d, d) | linear("proj_out", 32, d)
    shapes |= linear("adaln_single.emb.timestep_embedder.linear_1", d, 256)
    shapes |= linear("adaln_single.emb.timestep_embedder.linear_2", d, d)
    shapes |= linear("caption_projection.linear_1", d, k) | linear("caption_projection.linear_2", d, d)
    for i in range(28):
        for kind, attentions in (("", ("attn1", "attn2")), ("temporal_", ("attn1",))):
            block = f"{kind}transformer_blocks.{i}"
            shapes |= {f"{block}.scale_shift_table": (6, d)}
            for attention in attentions:
                for part in ("to_q", "to_k", "to_v", "to_out.0"):
                    shapes |= linear(f"{block}.{attention}.{part}", d, d)
            shapes |= linear(f"{block}.ff.net.0.proj", 4 * d, d) | linear(f"{block}.ff.net.2", d, 4 * d)
    for i in range(14 if skip else 0):
        shapes |= {f"skip_norms.{i}.{part}": (2 * d,) for part in ("weight", "bias")}
        shapes |= linear(f"skip_linears.{i}.linear", d, 2 * d)
    return shapes


@pytest.mark.parametrize("skip", [False, True])
def test_state_dict_has_the_official_names_and_shapes(skip: bool) -> None:
    network = official_size("Skip-LatteT2V-XL/2" if skip else "LatteT2V-XL/2")
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == official_shapes(skip=skip)
    added = [name for name in network.state_dict() if name.startswith("skip_")]
    assert added and sorted(added) == sorted(table("latte_t2v/stage1")) if skip else not added
    assert network.sample_shape == (16, 4, 64, 64) and network.out_channels == 8


def test_costs_equal_the_published_ones_but_for_texts_that_are_mapped_once_a_clip() -> None:
    """The official code makes keys and values of the text anew for each of 16 frames."""
    plain, skip = official_size("LatteT2V-XL/2"), official_size("Skip-LatteT2V-XL/2")

    def officially(cost: dict[str, int], pairs: int) -> int:
        return round((sum(cost.values()) + pairs * 15 * 2 * 120 * 1152**2) / 1e9)

    assert (officially(plain.cost(), 28), officially(skip.cost(), 28)) == (17_200, 17_808)
    assert officially(reused_cost(skip), 2) == 1_274


def test_all_sizes_of_dit_are_there() -> None:
    plain = {name.removeprefix("DiT-") for name in list_models("DiT-*") if not name.startswith("DiT-d")}
    for family in ("LatteT2V", "Skip-LatteT2V"):
        names = {name.removeprefix(f"{family}-") for name in list_models(f"{family}-*")}
        assert names == plain | {"debug/2", "digits/4"}
    assert [model_config(f"LatteT2V-XL/{p}").base_size for p in (2, 4, 8)] == [32, 16, 8]


# ----------------------------------------------------------------------------------------------------------------------
# What depends on what


@torch.no_grad()
def test_a_change_in_one_place_of_one_frame_reaches_its_frame_then_its_place() -> None:
    network = debug_network("LatteT2V")
    x, t, conditioning = inputs(network, 1)
    other = x.clone()
    other[0, 1, :, :2, :2] += 1.0  # the first token of the second frame

    def changed(number: int) -> Tensor:
        a, b = (network(v, t, **conditioning, features_at=(number,)).features[number] for v in (x, other))
        return (a - b).abs().amax(-1).view(4, 16) > 1e-6

    assert changed(1).any(1).tolist() == [False, True, False, False] and changed(1)[1].all()
    assert changed(2).all()


@torch.no_grad()
def test_masked_words_are_not_read_and_a_mask_of_ones_is_none() -> None:
    network = debug_network("Skip-LatteT2V")
    x, t, conditioning = inputs(network)
    text, mask = conditioning["text"], torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    changed = text + 5 * torch.randn_like(text) * (1 - mask)[..., None]
    assert_close(network(x, t, text=changed, text_mask=mask).sample, network(x, t, text=text, text_mask=mask).sample)
    short = network(x[:1], t, text=text[:1, :3]).sample
    assert_close(network(x[:1], t, text=text[:1], text_mask=mask[:1]).sample, short)
    assert_close(network(x, t, text=text, text_mask=torch.ones(2, 5)).sample, network(x, t, text=text).sample)
    nothing = network(x, t, text=text, text_mask=torch.zeros(2, 5)).sample
    assert nothing.isfinite().all()


@torch.no_grad()
def test_pictures_do_not_change_their_clip_nor_each_other_and_have_texts_of_their_own() -> None:
    network = debug_network("Skip-LatteT2V")
    x, t, conditioning = inputs(network, 2)
    pictures, texts, masks = torch.randn(2, 3, *x.shape[2:]), torch.randn(2, 3, 5, 12), torch.ones(2, 3, 5)
    masks[:, 1, 3:] = 0

    def joint(pictures: Tensor, texts: Tensor, masks: Tensor) -> Tensor:
        both = {"image_text": texts, "image_text_mask": masks}
        sample: Tensor = network(torch.cat([x, pictures], 1), t, **conditioning, **both).sample
        return sample

    out = joint(pictures, texts, masks)
    assert out.shape == (2, 7, 8, 8, 8)
    assert_close(out[:, :4], network(x, t, **conditioning).sample)
    order = torch.tensor([2, 0, 1])
    assert_close(joint(pictures[:, order], texts[:, order], masks[:, order])[:, 4:], out[:, 4:][:, order])
    other = joint(pictures, texts.flip(1), masks)
    assert_close(other[:, :4], out[:, :4])
    assert not torch.allclose(other[:, 4], out[:, 4], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["LatteT2V", "Skip-LatteT2V"])
def test_any_number_of_frames_goes_through_and_state_is_of_that_number(family: str) -> None:
    network = debug_network(family, cache_depth=1)
    _, t, conditioning = inputs(network)
    for shape in ((1, 4, 8, 8), (2, 4, 6, 10), (9, 4, 8, 4)):
        x = torch.randn(2, *shape)
        fresh = network(x, t, **conditioning)
        assert fresh.sample.shape == (2, shape[0], 8, *shape[2:])
        assert fresh.state.shape == (2, shape[0], shape[2] * shape[3] // 4, 64)
        assert torch.equal(network(x, t, **conditioning, state=fresh.state).sample, fresh.sample)
    with pytest.raises(ValueError, match=r"state of \(9, 8\) frames and tokens cannot be reused for \(2, 8\)"):
        network(torch.randn(2, 2, 4, 8, 4), t, **conditioning, state=fresh.state)


def test_positions_span_the_base_size_whatever_the_grid() -> None:
    network = debug_network("LatteT2V")
    of_tokens, of_frames = network.positions(3, (4, 6))
    assert of_frames is not None and of_tokens.shape == (24, 64) and of_frames.shape == (3, 64)
    assert network.positions(1, (4, 6))[1] is None
    frequencies = 10_000.0 ** -(np.arange(16) / 16)
    for token in range(24):
        row, column = token // 6 * 4 / 4, token % 6 * 4 / 6
        expected = [f(place * frequencies) for place in (column, row) for f in (np.sin, np.cos)]
        assert np.allclose(of_tokens[token], np.concatenate(expected), atol=1e-6)
    for frame in range(3):
        angles = frame * 10_000.0 ** -(np.arange(32) / 32)
        assert np.allclose(of_frames[frame], np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)


@torch.no_grad()
def test_a_network_in_half_precision_stays_in_it() -> None:
    network = debug_network("Skip-LatteT2V")
    x, t, conditioning = inputs(network)
    expected = network(x, t, **conditioning).sample
    out = network.to(torch.bfloat16)(x.bfloat16(), t, **conditioning)
    assert out.sample.dtype == out.state.dtype == torch.bfloat16
    assert_close(out.sample.float(), expected, 0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_an_official_file_is_recognised_without_the_buffer_that_is_never_read(tmp_path: Any) -> None:
    weights = {**official_debug("Skip-LatteT2V-debug/2"), UNREAD: torch.zeros(120, 12)}
    torch.save({"model": weights, "ema": weights}, tmp_path / "a.pt")
    network, info = load_network(tmp_path / "a.pt")
    assert info.model == "Skip-LatteT2V-debug/2" and isinstance(network, SkipLatteT2V)
    assert network.state_dict().keys() == weights.keys() - {UNREAD}
    recorded = arrays("latte_t2v/state_dict")
    assert recorded.keys() - {UNREAD} == recorded_network().state_dict().keys() == recorded_weights().keys()


def official_debug(name: str) -> dict[str, Tensor]:
    return create_model(name).state_dict()


def test_weights_without_skip_units_are_not_skip_weights(tmp_path: Any) -> None:
    torch.save(official_debug("LatteT2V-debug/2"), tmp_path / "plain.pt")
    message = (
        r"weights of a LatteT2V \(without skip_linears, skip_norms\), not of Skip-LatteT2V-debug/2; choose LatteT2V-"
    )
    with pytest.raises(UserError, match=message) as error:
        load_network(tmp_path / "plain.pt", model="Skip-LatteT2V-debug/2")
    assert "\n" not in str(error.value)
    assert load_network(tmp_path / "plain.pt")[1].model == "LatteT2V-debug/2"


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_arguments_that_do_not_fit_are_named() -> None:
    network = debug_network("Skip-LatteT2V")
    x, t, conditioning = inputs(network)
    text, mask = conditioning["text"], conditioning["text_mask"]
    images = {"image_text": text[:, None]}
    joint = torch.cat([x, x[:, :1]], 1)
    for given, message in (
        ({"x": x[:, 0]}, "x is (2, 4, 8, 8); this network takes (N, F, 4, H, W) with sides that are multiples of 2"),
        ({"x": x[..., :7]}, "x is (2, 4, 4, 8, 7); this network takes"),
        ({"x": x[:, :, :3]}, "x is (2, 4, 3, 8, 8); this network takes"),
        ({"text": text[..., :5]}, "text is (2, 5, 5); for 2 rows this network takes (2, L, 12)"),
        ({"text": text[:1]}, "text is (1, 5, 12); for 2 rows this network takes (2, L, 12)"),
        ({"text_mask": mask[:, :3]}, "text_mask is (2, 3) for texts of (2, 5) words"),
        (
            {"image_text": text},
            "image_text is (2, 5, 12); with x (2, 4, 4, 8, 8) and text (2, 5, 12) it must be",
        ),
        ({"image_text": text[:, None].expand(-1, 4, -1, -1)}, "must be (2, I, 5, 12) for I of 1..3"),
        ({"x": joint, **images}, "text_mask and image_text_mask: give one for each of text and image_text, or none"),
        ({"image_text_mask": mask[:, None]}, "text_mask and image_text_mask: give one for each"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            network(**{"x": x, "t": t, **conditioning, **given})


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LatteT2VConfig, {"depth": 5}, "depth 5 must be even"),
        (SkipLatteT2VConfig, {"depth": 6}, "depth 6 must be a multiple of 4"),
        (LatteT2VConfig, {"depth": 8, "cache_depth": 3}, r"cache_depth 3 must lie in 1\.\.2: it counts pairs"),
        (LatteT2VConfig, {"text_width": 0}, "text_width must be at least 1, not 0"),
        (LatteT2VConfig, {"base_size": 0}, "base_size must be at least 1, not 0"),
        (LatteT2VConfig, {"sample_shape": (4, 32, 32)}, "must be four numbers of at least 1: frames, channels, height"),
    ],
)
def test_values_that_no_network_has_are_refused(config: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)
