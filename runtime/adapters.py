"""Low-rank updates (LoRA) in the weights of a run, by the names of the library peft, and weights without them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

BASE, DOWN, UP = "base_layer.", "lora_A.default.weight", "lora_B.default.weight"


def has_adapters(weights: Mapping[str, Tensor]) -> bool:
    """True for weights with low-rank updates next to them."""
    return any(name.endswith(f".{DOWN}") for name in weights)


def merge_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add low-rank updates to the weights of their layers, which get their own names.

    Args:
        weights: Name -> tensor. LAYER.base_layer.weight (outputs, inputs) becomes LAYER.weight, with the product of
            LAYER.lora_B (outputs, rank) and LAYER.lora_A (rank, inputs) added in float32; others stay as they are.

    Raises:
        ValueError: If one of both factors is missing.
    """
    if not has_adapters(weights):
        return dict(weights)
    merged: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith((f".{DOWN}", f".{UP}")):
            continue
        merged[name.replace(f".{BASE}", ".")] = tensor
        layer, is_base, rest = name.rpartition(BASE)
        if is_base and rest == "weight" and f"{layer}{DOWN}" in weights:
            if f"{layer}{UP}" not in weights:
                raise ValueError(f"{layer}{UP} is missing; the low-rank updates are damaged")
            update = weights[f"{layer}{UP}"].float() @ weights[f"{layer}{DOWN}"].float()
            merged[f"{layer}weight"] = (tensor.float() + update).to(tensor.dtype)
    return merged
