"""Whose weights these are."""

import pytest

import models
from models import create_model
from models.detection import check_family, family_of_weights
from tests.networks import debug_name


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_is_known_by_its_names(family: str) -> None:
    assert family_of_weights(create_model(debug_name(family)).state_dict()) == family


@pytest.mark.parametrize("family", ["DiT", "Skip-DiT"])
def test_depth_does_not_matter(family: str) -> None:
    assert family_of_weights(create_model(debug_name(family), depth=2).state_dict()) == family
    assert family_of_weights(create_model(debug_name(family), depth=14).state_dict()) == family


def test_unknown_names_are_nobody_s() -> None:
    names = list(create_model("DiT-debug/2").state_dict())
    assert family_of_weights([]) is None
    assert family_of_weights(names[1:]) is None
    assert family_of_weights([*names, "extra.weight"]) is None


@pytest.mark.parametrize("family", models.FAMILIES)
def test_weights_of_the_family_pass_and_unknown_ones_are_left_to_a_strict_load(family: str) -> None:
    names = list(create_model(debug_name(family)).state_dict())
    check_family(debug_name(family), names)
    check_family(debug_name(family), names[1:])


@pytest.mark.parametrize(
    ("held", "model", "message"),
    [
        (
            "DiT-S/2",
            "Skip-DiT-S/2",
            r"weights of a DiT \(without skip_linears, without skip_norms\), not of Skip-DiT-S/2; choose DiT-S/2",
        ),
        (
            "Skip-DiT-S/4",
            "DiT-S/4",
            r"weights of a Skip-DiT \(with skip_linears, with skip_norms\), not of DiT-S/4; choose Skip-DiT-S/4",
        ),
        ("Skip-DiT-S/2", "DiT-digits-deep/2", r"not of DiT-digits-deep/2; choose a Skip-DiT model"),
    ],
)
def test_weights_of_another_family_are_named(held: str, model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_family(model, create_model(held).state_dict())
