"""Our DiT against diffusers' DiTTransformer2DModel, through a map of parameter names.

Two things keep the same weights from giving the same numbers there, and neither is part of a saved config in full:
diffusers' timestep frequencies end at 1/10000 (`downscale_freq_shift` 1; the official ones would reach it one place
later), and its layer norms default to another epsilon. diffusers' pipeline differs further, outside the network: its
null class is always 1000 and it guides all latent channels (issue 13616 of its repository).
"""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from models import DiT
from tests.golden_data import assert_close, relative_error
from tests.networks import debug_network


def to_diffusers(state_dict: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our parameter names -> diffusers': embedders copied into every block, qkv cut in three, positions dropped."""
    mapped = {f"pos_embed.proj.{kind}": state_dict[f"x_embedder.proj.{kind}"] for kind in ("weight", "bias")}
    names = {
        "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
        "adaLN_modulation.1": "norm1.linear",
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        mapped[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = state_dict[
            "y_embedder.embedding_table.weight"
        ]
        for kind in ("weight", "bias"):
            for name, other in names.items():
                source = name if name.startswith("t_embedder") else f"{ours}.{name}"
                mapped[f"{theirs}.{other}.{kind}"] = state_dict[f"{source}.{kind}"]
            thirds = state_dict[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip("qkv", thirds, strict=True):
                mapped[f"{theirs}.attn1.to_{part}.{kind}"] = value
    for kind in ("weight", "bias"):
        mapped[f"proj_out_1.{kind}"] = state_dict[f"final_layer.adaLN_modulation.1.{kind}"]
        mapped[f"proj_out_2.{kind}"] = state_dict[f"final_layer.linear.{kind}"]
    return mapped


def diffusers_twin(network: DiT, *, norm_eps: float = 1e-6, freq_shift: int = 0) -> DiTTransformer2DModel:
    """diffusers' network with the weights of ours; its own defaults are norm_eps 1e-5 and freq_shift 1."""
    config = network.config
    twin = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=network.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=norm_eps,
    ).eval()
    twin.load_state_dict(to_diffusers(network.state_dict(), config.depth))
    for block in twin.transformer_blocks:
        # Fixed in their code, and so absent from a saved config: no export of ours can carry it.
        block.norm1.emb.time_proj.downscale_freq_shift = freq_shift
    return twin


@pytest.fixture(scope="module")
def network() -> DiT:
    network = debug_network("DiT")
    assert isinstance(network, DiT)
    with torch.no_grad():
        # diffusers computes its positions; ours were drawn at random with everything else.
        network.pos_embed.copy_(DiT(network.config).pos_embed)
        # Small tokens, so that the epsilon of the layer norms shows.
        network.pos_embed.mul_(0.02)
        network.x_embedder.proj.weight.mul_(0.02)
        network.x_embedder.proj.bias.mul_(0.02)
        for block in network.blocks:
            block.adaLN_modulation[1].weight.mul_(0.02)
            block.adaLN_modulation[1].bias.mul_(0.02)
    return network


def both(network: DiT, twin: DiTTransformer2DModel) -> tuple[Tensor, Tensor]:
    """diffusers' output and ours; the null class is among the labels."""
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 20, 500, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        twin.pos_embed.pos_embed.copy_(network.pos_embed)
        return twin(x, timestep=t, class_labels=y).sample, network(x, t, y).sample


def test_the_same_weights_give_the_same_output(network: DiT) -> None:
    assert_close(*both(network, diffusers_twin(network)), 1e-6)


def test_positions_are_the_same() -> None:
    network = DiT(debug_network("DiT").config)
    torch.testing.assert_close(diffusers_twin(network).pos_embed.pos_embed, network.pos_embed.data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trap", [{"freq_shift": 1}, {"norm_eps": 1e-5}])
def test_diffusers_defaults_give_another_output(network: DiT, trap: dict[str, float]) -> None:
    assert relative_error(*both(network, diffusers_twin(network, **trap))) > 1e-4
