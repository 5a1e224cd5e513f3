"""Weights of one network as a start for another: other classes, another resolution, a family that grew from theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.contract import Network

LABEL_TABLE = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"


def adapt_weights(
    network: Network,
    weights: Mapping[str, Tensor],
    *,
    old_classes: Sequence[str] | None = None,
    new_classes: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Makes foreign weights fit a freshly built network where that has a meaning; all else is left to a strict load.

    Args:
        network: freshly built; its own rows and positions fill what the weights lack.
        weights: parameter name -> tensor.
        old_classes: names of the classes behind the label table's rows, if known.
        new_classes: names of the network's classes, if known.

    Returns:
        The weights, and a sentence for each change made.
    """
    adapted, notes = dict(weights), []
    own = network.state_dict()
    if POSITIONS in own and POSITIONS in adapted and adapted[POSITIONS].shape != own[POSITIONS].shape:
        notes.append(
            f"positions recomputed for {own[POSITIONS].shape[1]} tokens (the weights had {adapted[POSITIONS].shape[1]})"
        )
        adapted[POSITIONS] = own[POSITIONS]
    same_names = old_classes is None or new_classes is None or list(old_classes) == list(new_classes)
    if LABEL_TABLE in adapted and (adapted[LABEL_TABLE].shape != own[LABEL_TABLE].shape or not same_names):
        adapted[LABEL_TABLE], note = _relabelled(own[LABEL_TABLE], adapted[LABEL_TABLE], old_classes, new_classes)
        notes.append(note)
    added = [name for name in own if not {*network.added_parts}.isdisjoint(name.split("."))]
    if added and not any(name in adapted for name in added):  # where some are there, others are missing: damaged
        adapted.update((name, own[name]) for name in added)
        notes.append(f"drawn anew, because the weights have none: {', '.join(_counted(added))}")
    return adapted, notes


def _counted(names: Sequence[str]) -> list[str]:
    """Parameter names with the numbers of their layers drawn together: "skip_norms.0..3.weight"."""
    layers: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(re.sub(r"\.\d+\.", ".{}.", name, count=1), []).append(number[1] if number else "")
    return [pattern.format("..".join(dict.fromkeys((found[0], found[-1])))) for pattern, found in layers.items()]


def _relabelled(
    own: Tensor, table: Tensor, old_classes: Sequence[str] | None, new_classes: Sequence[str] | None
) -> tuple[Tensor, str]:
    """The network's label table with the rows that both know, by name, taken from the weights."""
    if own.shape[1] != table.shape[1]:
        return table, "label table left alone: another width"
    rows = own.clone()
    kept = 0
    if old_classes is not None and new_classes is not None:
        places = {name: i for i, name in enumerate(old_classes)}
        for i, name in enumerate(new_classes):
            if name in places:
                rows[i] = table[places[name]]
                kept += 1
        has_null = len(own) == len(new_classes) + 1 and len(table) == len(old_classes) + 1
    else:
        has_null = True  # releases have one, as their last row
    if has_null:
        rows[-1] = table[-1]
    drawn = len(own) - kept - has_null
    null = ", null row kept" if has_null else ""
    return torch.as_tensor(rows), f"label rows: {kept} kept by name, {drawn} drawn anew{null}"
