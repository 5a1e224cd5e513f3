"""Weights are told by names and shapes alone, for every family."""

import pytest
import torch

import models
from models.recognise import recognise
from tests.networks import debug_name


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_is_recognised_by_its_weights(name: str) -> None:
    with torch.device("meta"):
        network = models.create_model(name)
    found = recognise(network.state_dict())
    assert found is not None
    with torch.device("meta"):
        assert models.create_model(found.name, **found.config).config == network.config


@pytest.mark.parametrize("family", models.FAMILIES)
def test_data_may_differ_from_the_named_config(family: str) -> None:
    fields = models.FAMILIES[family].network.config_class.__dataclass_fields__
    other = {"num_classes": 7, "in_channels": 3, "learn_sigma": False, "input_size": 12}
    network = models.create_model(debug_name(family), **{k: v for k, v in other.items() if k in fields})
    found = recognise(network.state_dict())
    assert found is not None and found.name == debug_name(family)
    weights = models.create_model(found.name, **found.config).state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_a_network_without_a_null_class_is_taken_for_one_of_fewer_classes() -> None:
    weights = models.create_model("DiT-debug/2", class_dropout_prob=0.0).state_dict()
    found = recognise(weights)
    assert found is not None and found.config["num_classes"] == 9  # the table alone cannot tell


def test_what_is_no_model_of_ours_is_not_recognised() -> None:
    weights = models.create_model("DiT-debug/2").state_dict()
    assert recognise({**weights, "extra": torch.zeros(1)}) is None
    assert recognise({**weights, "pos_embed": torch.zeros(1, 16, 63)}) is None
    assert recognise({"conv.weight": torch.zeros(3, 3)}) is None
    weights.pop("pos_embed")
    assert recognise(weights) is None


def test_a_family_that_knows_why_not_says_so() -> None:
    weights = models.create_model("DyDiT-debug/2", num_heads=8).state_dict()
    with pytest.raises(ValueError, match="^weights of DyDiT-debug/2, but routers of 7 gates; 4 heads need 3 or 4$"):
        recognise(weights)
