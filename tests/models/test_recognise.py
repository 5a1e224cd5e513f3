"""Weights are recognised by names and shapes alone, for every family that opts in."""

import pytest
import torch

import models
from models import create_model, model_config
from models.recognise import check_family, family_of_weights, recognise
from tests.networks import debug_name, sample_shape


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_is_recognised_by_its_weights(name: str) -> None:
    with torch.device("meta"):
        weights = create_model(name).state_dict()
    recognised = recognise(weights)
    assert recognised is not None and recognised == recognise(weights, name)
    assert model_config(recognised.name, **recognised.fields) == model_config(name)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_data_may_differ_from_the_named_config(family: str) -> None:
    fields = models.FAMILIES[family].config.__dataclass_fields__
    other = {"num_classes": 7, "sample_shape": sample_shape(family, 3, 12, 12), "learn_sigma": False}
    network = create_model(debug_name(family), **{k: v for k, v in other.items() if k in fields})
    recognised = recognise(network.state_dict())
    assert recognised is not None and recognised.name == debug_name(family)
    weights = create_model(recognised.name, **recognised.fields).state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_a_rectangle_is_recognised_where_the_named_config_has_it_or_as_a_square_of_as_many_tokens() -> None:
    weights = create_model("DiT-debug/2", sample_shape=(4, 4, 16)).state_dict()
    recognised = recognise(weights)
    assert recognised is not None and recognised.fields["sample_shape"] == (4, 8, 8)  # positions have no shape
    assert recognise(create_model("DiT-debug/2", sample_shape=(4, 6, 10)).state_dict()) is None
    assert family_of_weights(create_model("DiT-debug/2", sample_shape=(4, 6, 10)).state_dict()) == "DiT"


def test_a_network_without_a_null_class_is_taken_for_one_of_fewer_classes() -> None:
    weights = create_model("DiT-debug/2", class_dropout_prob=0.0).state_dict()
    recognised = recognise(weights)
    assert recognised is not None and recognised.fields["num_classes"] == 9  # the table alone cannot tell


def test_other_weights_are_not_recognised() -> None:
    weights = create_model("DiT-debug/2").state_dict()
    assert recognise({**weights, "extra": torch.zeros(1)}) is None
    assert recognise({**weights, "pos_embed": torch.zeros(1, 16, 63)}) is None
    assert recognise({**weights, "x_embedder.proj.weight": torch.zeros(3)}) is None
    assert recognise({"conv.weight": torch.zeros(3, 3)}) is None
    assert recognise(weights, "DiT-S/2") is None
    weights.pop("pos_embed")
    assert recognise(weights) is None


def test_a_family_that_refuses_weights_says_why() -> None:
    weights = create_model("DyDiT-debug/2", num_heads=8).state_dict()
    for only in (None, "DyDiT-debug/2"):
        with pytest.raises(ValueError, match="^weights of DyDiT-debug/2, but routers of 7 gates; 4 heads need 3 or 4$"):
            recognise(weights, only)


# ----------------------------------------------------------------------------------------------------------------------
# Families


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_is_known_by_its_names(family: str) -> None:
    assert family_of_weights(create_model(debug_name(family)).state_dict()) == family


def test_an_undivided_ddt_is_of_its_family() -> None:
    assert family_of_weights(create_model("IDiT-debug/2").state_dict()) == "DDT"


@pytest.mark.parametrize("family", ["DiT", "Skip-DiT"])
def test_depth_does_not_matter(family: str) -> None:
    assert family_of_weights(create_model(debug_name(family), depth=2).state_dict()) == family
    assert family_of_weights(create_model(debug_name(family), depth=14).state_dict()) == family


def test_unknown_names_belong_to_no_family() -> None:
    names = list(create_model("DiT-debug/2").state_dict())
    assert family_of_weights([]) is None
    assert family_of_weights(names[1:]) is None
    assert family_of_weights([*names, "extra.weight"]) is None


@pytest.mark.parametrize("family", models.FAMILIES)
def test_weights_of_the_family_pass_and_unknown_ones_are_left_to_a_strict_load(family: str) -> None:
    weights = create_model(debug_name(family)).state_dict()
    check_family(debug_name(family), weights)
    weights.popitem()
    check_family(debug_name(family), weights)


@pytest.mark.parametrize(
    ("held", "depth", "model", "message"),
    [
        (
            "DiT-S/2", 12, "Skip-DiT-S/2",
            r"weights of a DiT \(without skip_linears, skip_norms\), not of Skip-DiT-S/2; choose DiT-S/2$",
        ),
        (
            "Skip-DiT-S/4", 12, "DiT-S/4",
            r"weights of a Skip-DiT \(with skip_linears, skip_norms\), not of DiT-S/4; choose Skip-DiT-S/4$",
        ),
        ("Skip-DiT-S/2", 12, "DiT-digits-deep/2", r"not of DiT-digits-deep/2; choose Skip-DiT-S/2$"),
        ("Skip-DiT-S/2", 10, "DiT-S/2", r"not of DiT-S/2; choose a Skip-DiT model$"),
    ],
)  # fmt: skip
def test_weights_of_another_family_are_named(held: str, depth: int, model: str, message: str) -> None:
    with torch.device("meta"):
        weights = create_model(held, depth=depth).state_dict()
    with pytest.raises(ValueError, match=message):
        check_family(model, weights)
