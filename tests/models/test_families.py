"""Properties of every family at shapes other than the named ones: rectangles, many channels, any cut of a batch."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._composable import checkpoint

import models
from benchmarks.costs import counted_cost, layer_norm_elements, reused_cost
from models import Network, create_model
from models.ddt import DDT
from tests.golden_data import assert_close
from tests.networks import debug_name, debug_network, inputs, labelled, randomise, sample_shape, variants

RECTANGLE = (4, 6, 10)


@pytest.fixture(params=variants())
def network(request: pytest.FixtureRequest) -> Network:
    family, overrides = variants()[request.param]
    return debug_network(family, **overrides, sample_shape=sample_shape(family, *RECTANGLE))


@torch.no_grad()
def test_a_rectangle_goes_through(network: Network) -> None:
    assert network.sample_shape[-3:] == RECTANGLE
    x, t, conditioning = inputs(network, 3)
    out = network(x, t, **conditioning)
    assert out.sample.shape == (3, *network.sample_shape[:-3], network.out_channels, 6, 10) and out.sample.std() > 0.01
    assert network.out_channels in (4, 8)
    turned = network(x.flip(-1), t, **conditioning).sample  # positions matter along both sides
    assert not torch.allclose(turned.flip(-1), out.sample, rtol=0.01)
    turned = network(x.flip(-2), t, **conditioning).sample
    assert not torch.allclose(turned.flip(-2), out.sample, rtol=0.01)


@torch.no_grad()
def test_results_do_not_depend_on_how_a_batch_is_cut(network: Network) -> None:
    x, t, conditioning = inputs(network, 5)
    prepared = network.for_sampling([t])
    whole = prepared(x, t, **conditioning).sample
    for rows in (slice(0, 3), slice(3, 4), slice(4, 5)):
        part = prepared(x[rows], t, **{name: value[rows] for name, value in conditioning.items()}).sample
        assert_close(part, whole[rows])


@torch.no_grad()
def test_features_of_several_blocks_come_from_one_evaluation(network: Network) -> None:
    x, t, conditioning = inputs(network)
    depth = len(network.blocks)
    outputs: dict[int, Tensor] = {}
    for number, block in enumerate(network.blocks, 1):
        block.register_forward_hook(
            lambda _, args, out, number=number: outputs.update({number: out[0] if isinstance(out, tuple) else out})
        )
    out = network(x, t, **conditioning, features_at=(depth, 1, 3))
    assert sorted(out.features) == sorted({1, 3, depth})
    for number, tokens in out.features.items():
        count, width = network.config.tokens, network.config.hidden_size
        assert tokens.shape == (2, count, width)
        if count == 15 or number % 2:  # temporal blocks of clips have their tokens in another order
            assert torch.equal(tokens, outputs[number].view_as(tokens))
    assert network(x, t, **conditioning).features == {}
    with pytest.raises(ValueError, match=rf"features_at must lie in 1\.\.{depth}, not {depth + 1}"):
        network(x, t, **conditioning, features_at=(1, depth + 1))


@torch.no_grad()
def test_state_is_reused_on_a_rectangle(network: Network) -> None:
    x, t, conditioning = inputs(network)
    fresh = network(x, t, **conditioning)
    assert (fresh.state is not None) == network.keeps_state
    assert torch.equal(network(x, t, **conditioning, state=fresh.state).sample, fresh.sample)


@torch.no_grad()
def test_unconditional_rows_are_those_of_the_last_class(network: Network) -> None:
    if "text" in network.conditioning:
        with pytest.raises(ValueError, match="unconditional rows are the encoded empty text, or a negative one"):
            network.null_conditioning(3)
        return
    null = network.null_conditioning(3)
    assert null.keys() == set(network.conditioning)
    assert null["y"].tolist() == [network.config.num_classes] * 3 and null["y"].dtype == torch.int64
    x, t, conditioning = inputs(network, 3)
    assert not torch.allclose(network(x, t, **null).sample, network(x, t, **conditioning).sample, rtol=0.01)
    assert network.to("meta").null_conditioning(1)["y"].device.type == "meta"


@pytest.mark.parametrize("family", [*filter(labelled, models.FAMILIES)])
def test_without_label_dropout_there_are_no_unconditional_rows(family: str) -> None:
    network = create_model(debug_name(family), class_dropout_prob=0.0)
    with pytest.raises(
        ValueError, match="class_dropout_prob is 0: this network has no null class and cannot be guided"
    ):
        network.null_conditioning(1)


def test_conditioning_is_named(network: Network) -> None:
    x, t, conditioning = inputs(network)
    first = network.conditioning[0]
    with pytest.raises(TypeError, match="positional"):
        network(x, t, conditioning[first])
    with pytest.raises(
        (TypeError, ValueError), match=rf"missing 1 required keyword-only argument: '{first}'|y must be"
    ):
        network(x, t)


@torch.no_grad()
@pytest.mark.parametrize("family", models.FAMILIES)
def test_reset_gives_the_distribution_of_a_fresh_network_from_any_values(family: str) -> None:
    """Also after building without values, as for sharded training."""
    name = debug_name(family)
    torch.manual_seed(0)
    fresh = {key: value.clone() for key, value in create_model(name).named_parameters()}
    with torch.device("meta"):
        empty = create_model(name)
    for network in (randomise(create_model(name)), empty.to_empty(device="cpu")):
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
        network.reset_parameters()
        for key, parameter in network.named_parameters():
            expected = fresh[key]
            if expected.std(correction=0) == 0 or key in ("pos_embed", "temp_embed"):
                assert torch.equal(parameter, expected), key
            elif expected.numel() > 60:
                assert parameter.std() == pytest.approx(float(expected.std()), rel=0.5), key
                assert abs(parameter.mean()) < expected.std(), key
            assert parameter.isfinite().all(), key


@torch.no_grad()
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_fresh_network_predicts_exactly_zero_and_so_does_a_reset_one(family: str) -> None:
    fresh, reset = create_model(debug_name(family)), randomise(create_model(debug_name(family)))
    reset.reset_parameters()
    for network in (fresh, reset):
        x, t, conditioning = inputs(network)
        assert not network(x, t, **conditioning).sample.any()


def test_recomputed_blocks_give_the_same_gradients_under_the_same_names(network: Network) -> None:
    (x, t, conditioning), names, gradients = inputs(network), list(network.state_dict()), []
    for recompute in (False, True):
        network.zero_grad()
        if recompute:
            for block in network.blocks:
                checkpoint(block)
        network(x, t, **conditioning).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(gradients[0]) > 40
    assert list(network.state_dict()) == names


def test_costs_equal_what_pytorch_counts(network: Network) -> None:
    assert all(isinstance(count, int) and count > 0 for count in network.cost().values())
    assert sum(network.cost().values()) == counted_cost(network)
    reused = sum(reused_cost(network).values())
    assert reused == counted_cost(network, reused=network.keeps_state)
    assert (reused < sum(network.cost().values())) == network.keeps_state
    assert layer_norm_elements(network) >= 2 * len(network.blocks) * network.config.tokens * network.config.hidden_size


@pytest.mark.parametrize("family", models.FAMILIES)
def test_sizes_that_do_not_fit_are_answered_with_the_nearest_that_do(family: str) -> None:
    given, below, above = (sample_shape(family, 4, side, 10) for side in (7, 6, 8))
    message = f"sample_shape {given}: height and width must be multiples of patch_size 2; nearest: {below} or {above}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        create_model(debug_name(family), sample_shape=given)


# ----------------------------------------------------------------------------------------------------------------------
# Positions


@torch.no_grad()
@pytest.mark.parametrize("family", ["DiT", "Skip-DiT", "DyDiT"])
def test_positions_of_a_rectangle_are_those_of_a_square_cut_out(family: str) -> None:
    square = create_model(debug_name(family), sample_shape=(4, 10, 10)).pos_embed.view(5, 5, -1)
    rectangle = create_model(debug_name(family), sample_shape=RECTANGLE).pos_embed
    assert torch.equal(rectangle.view(3, 5, -1), square[:3])


@torch.no_grad()
@pytest.mark.parametrize("state", [False, True])
def test_a_ddt_takes_any_size_whatever_its_sample_shape(state: bool) -> None:
    network, (x, t, conditioning) = debug_network("DDT"), inputs(debug_network("DDT", sample_shape=RECTANGLE))
    other = debug_network("DDT", sample_shape=RECTANGLE)
    reused = {"state": network(x, t, **conditioning).state} if state else {}
    assert torch.equal(network(x, 0.3, **conditioning, **reused).sample, other(x, 0.3, **conditioning, **reused).sample)


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, {"encoder_depth": None}])
def test_a_ddt_works_on_latents_of_768_channels(overrides: dict[str, Any]) -> None:
    network = debug_network("DDT", sample_shape=(768, 4, 6), patch_size=1, **overrides)
    assert isinstance(network, DDT) and network.out_channels == 768
    x, t, conditioning = inputs(network)
    out = network(x, t, **conditioning)
    assert out.sample.shape == x.shape and out.sample.std() > 0.01
    assert sum(network.cost().values()) == counted_cost(network)
    assert network.config == dataclasses.replace(network.config, sample_shape=(768, 4, 6))
