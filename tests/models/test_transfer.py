"""Weights of one network as a start for another, and their ranking by magnitude."""

from typing import Any

import pytest
import torch

from models import FAMILIES, Network, create_model
from models.transfer import LABEL_TABLE, adapt_weights, rank_by_magnitude, without_variance
from runtime.checkpoint import load_weights
from runtime.errors import UserError
from tests.golden_data import assert_close
from tests.networks import conditioning, debug_name, debug_network, randomise

SKIP_UNITS = FAMILIES["Skip-DiT"].added_parts


def network(**overrides: Any) -> Network:
    return randomise(create_model("DiT-debug/2", **overrides))


def test_weights_that_fit_are_left_alone() -> None:
    source, target = network(), network()
    weights, notes = adapt_weights(target, source.state_dict())
    assert notes == [] and all(torch.equal(weights[k], v) for k, v in source.state_dict().items())


def test_label_rows_are_kept_by_name_and_the_others_are_initialised() -> None:
    source, target = network(num_classes=3), network(num_classes=4)
    weights, notes = adapt_weights(
        target, source.state_dict(), old_classes=["ant", "bee", "cat"], new_classes=["bee", "cow", "cat", "dog"]
    )
    old, own, new = source.state_dict()[LABEL_TABLE], target.state_dict()[LABEL_TABLE], weights[LABEL_TABLE]
    assert torch.equal(new[0], old[1]) and torch.equal(new[2], old[2]) and torch.equal(new[-1], old[-1])
    assert torch.equal(new[1], own[1]) and torch.equal(new[3], own[3])
    assert notes == ["label rows: 2 kept by name, 2 initialised afresh, null row kept"]
    target.load_state_dict(weights)


def test_the_same_number_of_other_classes_is_not_mistaken_for_the_same_classes() -> None:
    source, target = network(num_classes=2), network(num_classes=2)
    weights, _ = adapt_weights(target, source.state_dict(), old_classes=["a", "b"], new_classes=["b", "c"])
    assert torch.equal(weights[LABEL_TABLE][0], source.state_dict()[LABEL_TABLE][1])
    assert torch.equal(weights[LABEL_TABLE][1], target.state_dict()[LABEL_TABLE][1])


def test_without_names_another_class_count_keeps_the_null_row() -> None:
    source, target = network(num_classes=5), network(num_classes=3)
    weights, notes = adapt_weights(target, source.state_dict(), new_classes=["x", "y", "z"])
    assert torch.equal(weights[LABEL_TABLE][-1], source.state_dict()[LABEL_TABLE][-1])
    assert torch.equal(weights[LABEL_TABLE][:-1], target.state_dict()[LABEL_TABLE][:-1])
    assert notes == ["label rows: 0 kept by name, 3 initialised afresh, null row kept"]


def test_another_resolution_recomputes_positions() -> None:
    source, target = network(), create_model("DiT-debug/2", sample_shape=(4, 16, 16))
    weights, notes = adapt_weights(target, source.state_dict())
    assert torch.equal(weights["pos_embed"], target.pos_embed)
    assert notes == ["positions recomputed for 64 tokens (the weights had 16)"]
    target.load_state_dict(weights)


def test_another_grid_of_as_many_tokens_recomputes_positions() -> None:
    source, target = network(sample_shape=(4, 4, 16)), create_model("DiT-debug/2")
    weights, notes = adapt_weights(target, source.state_dict(), old_shape=(4, 4, 16))
    assert torch.equal(weights["pos_embed"], target.pos_embed) and len(notes) == 1
    assert adapt_weights(target, source.state_dict(), old_shape=(4, 8, 8))[1] == []


def test_a_plain_network_starts_one_with_skip_units_which_are_initialised_and_named() -> None:
    source, target = network(depth=8), create_model("Skip-DiT-debug/2")
    own = {name: value.clone() for name, value in target.state_dict().items()}
    weights, notes = adapt_weights(target, source.state_dict(), added_parts=SKIP_UNITS)
    assert notes == [
        "initialised afresh, because the weights have none: skip_norms.0..3.weight, skip_norms.0..3.bias, "
        "skip_linears.0..3.linear.weight, skip_linears.0..3.linear.bias"
    ]
    load_weights(target, weights, "test")
    for name, value in target.state_dict().items():
        assert torch.equal(value, own[name] if name.startswith("skip_") else source.state_dict()[name])


def test_skip_units_that_are_there_are_kept() -> None:
    source, target = debug_network("Skip-DiT"), create_model("Skip-DiT-debug/2")
    weights, notes = adapt_weights(target, source.state_dict(), added_parts=SKIP_UNITS)
    assert notes == [] and all(torch.equal(weights[name], value) for name, value in source.state_dict().items())


def test_some_missing_skip_units_are_damage_and_not_a_start() -> None:
    source, target = debug_network("Skip-DiT").state_dict(), create_model("Skip-DiT-debug/2")
    del source["skip_norms.2.bias"]
    weights, notes = adapt_weights(target, source, added_parts=SKIP_UNITS)
    assert notes == []
    with pytest.raises(UserError, match=r"do not fit the model in 1 places.*: missing skip_norms\.2\.bias"):
        load_weights(target, weights, "test")


def test_a_network_of_two_layers_names_its_one_skip_unit() -> None:
    target = create_model("Skip-DiT-debug/2", depth=2)
    _, notes = adapt_weights(target, network(depth=2).state_dict(), added_parts=SKIP_UNITS)
    assert notes[0].endswith("skip_linears.0.linear.weight, skip_linears.0.linear.bias")


# ----------------------------------------------------------------------------------------------------------------------
# Ranking: another order, the same function


@torch.no_grad()
@pytest.mark.parametrize("family", ["DiT", "DyDiT"])
def test_the_complete_model_computes_what_it_did(family: str) -> None:
    network = debug_network(family)
    ranked = create_model(f"{family}-debug/2").eval()
    ranked.load_state_dict(rank_by_magnitude(network.state_dict(), 4))
    options = {"complete_model": True} if family == "DyDiT" else {}
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 999]), torch.tensor([1, 2, 10])
    assert_close(ranked(x, t, y=y, **options).sample, network(x, t, y=y, **options).sample, 1e-6)
    changed = [n for n, w in ranked.state_dict().items() if not torch.equal(w, network.state_dict()[n])]
    parts = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight")
    assert {name.split(".", 2)[2] for name in changed} == {*parts}


@torch.no_grad()
def test_heads_and_channels_come_largest_first() -> None:
    network = debug_network("DiT")
    block = network.blocks[2]
    block.attn.qkv.weight.view(3, 4, 16, 64)[:, 2] *= 10  # the third head
    block.attn.proj.weight.view(64, 4, 16)[:, :, :][:, 1] *= 5  # then the second
    block.mlp.fc1.weight[77] *= 9
    block.mlp.fc2.weight[:, 200] *= 12
    ranked = rank_by_magnitude(network.state_dict(), 4)
    qkv, old = (w["blocks.2.attn.qkv.weight"].view(3, 4, 16, 64) for w in (ranked, network.state_dict()))
    assert torch.equal(qkv[:, 0], old[:, 2]) and torch.equal(qkv[:, 1], old[:, 1])
    channels = [
        ranked["blocks.2.mlp.fc1.weight"].square().sum(1) + ranked["blocks.2.mlp.fc2.weight"].square().sum(0),
        ranked["blocks.0.mlp.fc1.weight"].square().sum(1) + ranked["blocks.0.mlp.fc2.weight"].square().sum(0),
    ]
    for energy in channels:
        assert (energy.diff() <= 1e-6 * energy[:-1]).all()
    assert {*ranked["blocks.2.mlp.fc1.bias"][:2].tolist()} == {*block.mlp.fc1.bias[[77, 200]].tolist()}


def test_equal_magnitudes_keep_their_order() -> None:
    network = randomise(create_model("DiT-debug/2"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
        network.blocks[0].mlp.fc1.bias.copy_(torch.arange(256.0))
    ranked = rank_by_magnitude(network.state_dict(), 4)
    assert torch.equal(ranked["blocks.0.mlp.fc1.bias"], torch.arange(256.0))


def test_ranking_twice_is_ranking_once() -> None:
    once = rank_by_magnitude(debug_network("DiT").state_dict(), 4)
    twice = rank_by_magnitude(once, 4)
    assert all(torch.equal(twice[name], tensor) for name, tensor in once.items())


# ----------------------------------------------------------------------------------------------------------------------
# Clips


@pytest.mark.parametrize(("source", "target"), [("DiT", "Latte"), ("DiT", "Skip-Latte"), ("Latte", "Skip-Latte")])
def test_a_network_of_clips_starts_from_one_of_images_or_without_skip_units(source: str, target: str) -> None:
    """All blocks are taken over, spatial and temporal ones; what is not in the weights is named."""
    overrides = {"depth": 8} | ({} if source == "DiT" else {"sample_shape": (4, 4, 8, 8)})
    weights = randomise(create_model(f"{source}-debug/2", **overrides)).state_dict()
    network = create_model(f"{target}-debug/2", depth=8)
    adapted, notes = adapt_weights(network, weights, added_parts=FAMILIES[target].added_parts)
    network.load_state_dict(adapted)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in weights.items())
    said = " ".join(notes)
    assert ("positions computed for 4 frames (the weights had none)" in said) == (source == "DiT")
    assert ("initialised afresh, because the weights have none: skip_norms.0..1.weight" in said) == ("Skip" in target)
    assert network.temp_embed.std() > 0.05


def test_another_number_of_frames_needs_to_be_told_how() -> None:
    weights, network = (
        create_model("Latte-debug/2", sample_shape=(7, 4, 8, 8)).state_dict(),
        create_model("Latte-debug/2"),
    )
    with pytest.raises(ValueError, match=r"^made for 7 frames, not 4; .*interpolate .*or --num-frames 7$"):
        adapt_weights(network, weights)
    for how, rows in (("extend", slice(0, 4)), ("interpolate", slice(0, 7, 2))):
        adapted, notes = adapt_weights(network, weights, frame_positions=how)
        network.load_state_dict(adapted)
        assert notes == [f"positions of 4 frames from those of 7 by --frame-positions {how}"]
        assert_close(network.temp_embed[0], weights["temp_embed"][0, rows], 1e-6)
    for same in (network.state_dict(), create_model("DiT-debug/2", depth=4).state_dict()):
        with pytest.raises(ValueError, match="--frame-positions extend: has no effect"):
            adapt_weights(network, same, frame_positions="extend")


@pytest.mark.parametrize("family", ["DiT", "Skip-Latte", "LatteT2V"])
def test_outputs_without_a_variance_are_those_of_the_other_channels(family: str) -> None:
    whole = debug_network(family, learn_sigma=True)
    name, shape = debug_name(family), whole.sample_shape
    cut = create_model(name, **{**vars(whole.config), "learn_sigma": False})
    cut.load_state_dict(without_variance(whole.state_dict()))
    x, rows = torch.randn(2, *shape), conditioning(whole, range(2))
    expected = whole(x, 5.0, **rows).sample[..., : shape[-3], :, :]
    assert torch.allclose(cut(x, 5.0, **rows).sample, expected, atol=1e-6) and bool(expected.std() > 0)
