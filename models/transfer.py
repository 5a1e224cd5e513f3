"""Weights of one network as a start for another: other classes, another resolution, a family that grew from theirs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from models.contract import Network
from models.frame_positions import FramePositions, resample_frame_positions

LABEL_TABLE = "y_embedder.embedding_table.weight"
POSITIONS, FRAME_POSITIONS = "pos_embed", "temp_embed"
# Layers from and to patches, in DiTs and in networks of texts
FIRST_AND_LAST = (("x_embedder.proj", "final_layer.linear"), ("pos_embed.proj", "proj_out"))
QKV = re.compile(r"(blocks\.\d+\.)attn\.qkv\.weight")


def adapt_weights(
    network: Network,
    weights: Mapping[str, Tensor],
    *,
    added_parts: Collection[str] = (),
    old_classes: Sequence[str] | None = None,
    new_classes: Sequence[str] | None = None,
    old_shape: Sequence[int] | None = None,
    frame_positions: FramePositions | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Make foreign weights fit a fresh network where that has a meaning; a strict load checks the rest.

    Args:
        network: Fresh network; its own values replace what the weights lack.
        weights: Parameter name -> tensor.
        added_parts: Modules of the network's family that the weights may lack altogether.
        old_classes: Names of the classes in the weights' label table, if known.
        new_classes: Names of the network's classes, if known.
        old_shape: `sample_shape` of the network that had the weights, if known.
        frame_positions: How positions of frames become those of another number (`models.frame_positions`).

    Returns:
        The weights, and a sentence for each change made.

    Raises:
        ValueError: If the weights have another number of frames and `frame_positions` is missing, or has no effect.
    """
    adapted, notes = dict(weights), []
    own = network.state_dict()
    if POSITIONS in own and POSITIONS in adapted:
        other_grid = old_shape is not None and tuple(old_shape)[-2:] != network.sample_shape[-2:]
        if other_grid or adapted[POSITIONS].shape != own[POSITIONS].shape:
            counts = own[POSITIONS].shape[1], adapted[POSITIONS].shape[1]
            notes.append(f"positions recomputed for {counts[0]} tokens (the weights had {counts[1]})")
            adapted[POSITIONS] = own[POSITIONS]
    if FRAME_POSITIONS in own and FRAME_POSITIONS not in weights and frame_positions is None:
        notes.append(f"positions computed for {own[FRAME_POSITIONS].shape[1]} frames (the weights had none)")
        adapted[FRAME_POSITIONS] = own[FRAME_POSITIONS]
    for name, table in fit_frames(network, weights, frame_positions).items():
        counts = table.shape[1], adapted[name].shape[1]
        notes.append(
            f"positions of {counts[0]} frames from those of {counts[1]} by --frame-positions {frame_positions}"
        )
        adapted[name] = table
    same_names = old_classes is None or new_classes is None or list(old_classes) == list(new_classes)
    if {LABEL_TABLE} <= adapted.keys() & own.keys():
        if adapted[LABEL_TABLE].shape != own[LABEL_TABLE].shape or not same_names:
            table, note = _relabelled(own[LABEL_TABLE], adapted[LABEL_TABLE], old_classes, new_classes)
            adapted[LABEL_TABLE] = table
            notes.append(note)
    added = [name for name in own if not {*added_parts}.isdisjoint(name.split("."))]
    if added and not any(name in adapted for name in added):  # if only some are missing, the weights are damaged
        adapted.update((name, own[name]) for name in added)
        notes.append(f"initialised afresh, because the weights have none: {', '.join(_grouped(added))}")
    return adapted, notes


def fit_frames(network: Network, weights: Mapping[str, Tensor], how: FramePositions | None) -> dict[str, Tensor]:
    """Return the weights that change for a network of another number of frames, by name.

    Raises:
        ValueError: If the numbers differ and `how` is missing; if it has no effect.
    """
    own, given = network.state_dict().get(FRAME_POSITIONS), weights.get(FRAME_POSITIONS)
    if own is None or given is None or own.shape[2:] != given.shape[2:]:
        if how is not None:
            raise ValueError(f"--frame-positions {how}: has no effect, because the weights have no frames")
        return {}
    table = resample_frame_positions(given, own.shape[1], how)
    return {} if table is given else {FRAME_POSITIONS: table}


def without_variance(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the outputs of the last layer that predict a variance: the second half of its channels."""
    first, last = next(names for names in FIRST_AND_LAST if f"{names[0]}.weight" in weights)
    channels = weights[f"{first}.weight"].shape[1]
    cut = dict(weights)
    for kind in ("weight", "bias"):
        values = weights[f"{last}.{kind}"]  # rows: (p, p, 2 C)
        rows = values.reshape(-1, 2 * channels, *values.shape[1:])[:, :channels]
        cut[f"{last}.{kind}"] = rows.reshape(-1, *values.shape[1:]).clone()
    return cut


def _grouped(names: Sequence[str]) -> list[str]:
    """Group parameter names by the numbers of their layers: "skip_norms.0..3.weight"."""
    layers: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(re.sub(r"\.\d+\.", ".{}.", name, count=1), []).append(number[1] if number else "")
    return [pattern.format("..".join(dict.fromkeys((each[0], each[-1])))) for pattern, each in layers.items()]


def _relabelled(
    own: Tensor, table: Tensor, old_classes: Sequence[str] | None, new_classes: Sequence[str] | None
) -> tuple[Tensor, str]:
    """Copy into the network's label table the weights' rows of classes with the same names."""
    if own.shape[1] != table.shape[1]:
        return table, "label table left alone: another width"
    rows = own.clone()
    kept = 0
    if old_classes is not None and new_classes is not None:
        index = {name: i for i, name in enumerate(old_classes)}
        for i, name in enumerate(new_classes):
            if name in index:
                rows[i] = table[index[name]]
                kept += 1
        has_null = len(own) == len(new_classes) + 1 and len(table) == len(old_classes) + 1
    else:
        has_null = True  # releases have one, as their last row
    if has_null:
        rows[-1] = table[-1]
    fresh = len(own) - kept - has_null
    null = ", null row kept" if has_null else ""
    return torch.as_tensor(rows), f"label rows: {kept} kept by name, {fresh} initialised afresh{null}"


def rank_by_magnitude(weights: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Sort the heads and the MLP channels of every block, largest first: the first one may be always on.

    The magnitude of a head is the norm of its rows of q, k and v and its columns of the output's map; that of a channel
    is the norm of its row of the first map and its column of the second. Groups of neighbouring channels then hold
    channels of similar magnitude. Without routing the function of the permuted weights is the same, up to rounding.

    Source: arXiv 2410.03456, section 3, which ranks before training; the criterion is ours, the paper leaves it open.
    """
    ranked = dict(weights)
    for block in [match[1] for match in map(QKV.fullmatch, weights) if match]:
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
    """Sum of squares over all dimensions but one."""
    return weight.double().square().movedim(dim, 0).flatten(1).sum(1)
