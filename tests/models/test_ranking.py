"""Ranking by magnitude: another order, the same function."""

import pytest
import torch
from models.ranking import rank_by_magnitude

from models import create_model
from tests.golden_data import assert_close
from tests.networks import debug_network, randomise


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
