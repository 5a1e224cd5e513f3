"""Heads and MLP channels in order of magnitude: another order of the same weights, and the same function.

Where groups of heads or channels can be switched off, and one of them cannot, it should be the most important one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

BLOCKS = re.compile(r"(blocks\.\d+\.)attn\.qkv\.weight")


def rank_by_magnitude(weights: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Sorts the heads and the MLP channels of every block, largest first.

    A head's magnitude is the norm of its rows of q, k and v and its columns of the output's map; a channel's, that of
    its row of the first map and its column of the second. Groups of neighbouring channels then hold channels alike.

    Args:
        weights: parameter name -> tensor, of a DiT or a family with its blocks.
        num_heads: H.

    Returns:
        The weights, permuted; without routing they compute what they did, but for rounding.

    Source: arXiv 2410.03456, section 3, which ranks before training; the criterion is ours, the paper leaves it open.
    """
    ranked = dict(weights)
    for block in [found[1] for found in map(BLOCKS.fullmatch, weights) if found]:
        _rank_heads(ranked, f"{block}attn.", num_heads)
        _rank_channels(ranked, f"{block}mlp.")
    return ranked


def _rank_heads(weights: dict[str, Tensor], prefix: str, num_heads: int) -> None:
    qkv = weights[f"{prefix}qkv.weight"].unflatten(0, (3, num_heads, -1))  # (3, H, D / H, D)
    proj = weights[f"{prefix}proj.weight"].unflatten(1, (num_heads, -1))  # (D, H, D / H)
    order = torch.argsort(_energy(qkv, 1) + _energy(proj, 1), descending=True, stable=True)
    weights[f"{prefix}qkv.weight"] = qkv[:, order].flatten(0, 2)
    weights[f"{prefix}qkv.bias"] = weights[f"{prefix}qkv.bias"].unflatten(0, (3, num_heads, -1))[:, order].flatten()
    weights[f"{prefix}proj.weight"] = proj[:, order].flatten(1)


def _rank_channels(weights: dict[str, Tensor], prefix: str) -> None:
    fc1, fc2 = weights[f"{prefix}fc1.weight"], weights[f"{prefix}fc2.weight"]
    order = torch.argsort(_energy(fc1, 0) + _energy(fc2, 1), descending=True, stable=True)
    weights[f"{prefix}fc1.weight"], weights[f"{prefix}fc2.weight"] = fc1[order], fc2[:, order]
    weights[f"{prefix}fc1.bias"] = weights[f"{prefix}fc1.bias"][order]


def _energy(weight: Tensor, dim: int) -> Tensor:
    """Sum of squares over everything but one dimension."""
    return weight.double().square().movedim(dim, 0).flatten(1).sum(1)
