"""Our DiT against diffusers' DiTTransformer2DModel, through a map of parameter names.

Two things keep the same weights from giving the same numbers there, and no saved config holds both:
diffusers' timestep frequencies end at 1/10000 (`downscale_freq_shift` 1; the official ones would reach it one place
later), and its layer norms default to another epsilon. diffusers' pipeline differs further, outside the network: its
null class is always 1000 and it guides all latent channels (issue 13616 of its repository).
"""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from models import DiT, model_config
from models.diffusers_format import correct_timesteps, diffusers_config, diffusers_network, to_diffusers
from tests.golden_data import assert_close, relative_error
from tests.networks import debug_network


def converted_with(network: DiT, *, norm_eps: float = 1e-6, freq_shift: int = 0) -> DiTTransformer2DModel:
    """diffusers' network with the weights of ours; its own defaults are norm_eps 1e-5 and freq_shift 1."""
    converted = DiTTransformer2DModel(**{**diffusers_config(network), "norm_eps": norm_eps}).eval()
    converted.load_state_dict(to_diffusers(network.state_dict(), network.config.depth))
    for block in correct_timesteps(converted).transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift += freq_shift
    return converted


@pytest.fixture(scope="module")
def network() -> DiT:
    network = debug_network("DiT")
    assert isinstance(network, DiT)
    with torch.no_grad():
        # diffusers computes its positions; ours are random, as everything else.
        network.pos_embed.copy_(DiT(network.config).pos_embed)
        # Small tokens, so that the epsilon of the layer norms shows.
        network.pos_embed.mul_(0.02)
        network.x_embedder.proj.weight.mul_(0.02)
        network.x_embedder.proj.bias.mul_(0.02)
        for block in network.blocks:
            block.adaLN_modulation[1].weight.mul_(0.02)
            block.adaLN_modulation[1].bias.mul_(0.02)
    return network


def both(network: DiT, converted: DiTTransformer2DModel) -> tuple[Tensor, Tensor]:
    """diffusers' output and ours; the null class is among the labels."""
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 20, 500, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        converted.pos_embed.pos_embed.copy_(network.pos_embed)
        return converted(x, timestep=t, class_labels=y).sample, network(x, t, y=y).sample


def test_the_same_weights_give_the_same_output(network: DiT) -> None:
    assert_close(*both(network, diffusers_network(network)), 1e-6)


def test_positions_are_the_same() -> None:
    network = DiT(debug_network("DiT").config)
    torch.testing.assert_close(converted_with(network).pos_embed.pos_embed, network.pos_embed.data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trap", [{"freq_shift": 1}, {"norm_eps": 1e-5}])
def test_diffusers_defaults_give_another_output(network: DiT, trap: dict[str, float]) -> None:
    assert relative_error(*both(network, converted_with(network, **trap))) > 1e-4


def test_a_rectangle_is_refused() -> None:
    with pytest.raises(ValueError, match="diffusers' DiT is for squares, not 6 x 10"):
        diffusers_config(DiT(model_config("DiT-debug/2", sample_shape=(4, 6, 10))))
