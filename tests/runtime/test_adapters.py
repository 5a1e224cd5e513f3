"""Merging of low-rank updates: the closed form, names, and factors that are missing."""

import pytest
import torch

from runtime.adapters import DOWN, UP, has_adapters, merge_adapters

LAYER = "blocks.0.attn.qkv."


def weights() -> dict[str, torch.Tensor]:
    return {
        f"{LAYER}base_layer.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        f"{LAYER}base_layer.bias": torch.tensor([7.0, 8.0]),
        f"{LAYER}{DOWN}": torch.tensor([[1.0, 0.0, 2.0]]),
        f"{LAYER}{UP}": torch.tensor([[10.0], [100.0]]),
        "blocks.0.other.weight": torch.ones(1),
    }


def test_the_product_of_the_factors_is_added_and_layers_get_their_names_back() -> None:
    merged = merge_adapters(weights())
    assert [*merged] == [f"{LAYER}weight", f"{LAYER}bias", "blocks.0.other.weight"]
    assert merged[f"{LAYER}weight"].tolist() == [[11.0, 2.0, 23.0], [104.0, 5.0, 206.0]]
    assert merged[f"{LAYER}bias"].tolist() == [7.0, 8.0]
    assert weights().keys() != merged.keys() and has_adapters(weights()) and not has_adapters(merged)


def test_other_weights_stay_as_they_are() -> None:
    plain = {"a.base_layer.weight": torch.ones(2, 2)}
    assert merge_adapters(plain) == plain


def test_merged_weights_keep_their_precision() -> None:
    halves = {name: tensor.bfloat16() for name, tensor in weights().items()}
    assert merge_adapters(halves)[f"{LAYER}weight"].dtype == torch.bfloat16


def test_a_missing_factor_is_named() -> None:
    damaged = weights()
    del damaged[f"{LAYER}{UP}"]
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.lora_B\.default\.weight is missing"):
        merge_adapters(damaged)
