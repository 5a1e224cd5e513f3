"""Whose weights a checkpoint holds, and the network that it was made with."""

import dataclasses

import pytest
import torch

import models
from models import create_model, model_config
from models.loading import check_family, family_of_weights, restore, settings_of
from runtime.checkpoint import Checkpoint
from runtime.errors import UserError
from tests.networks import debug_name, debug_network


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
            r"weights of a DiT \(without skip_linears, skip_norms\), not of Skip-DiT-S/2; choose DiT-S/2",
        ),
        (
            "Skip-DiT-S/4",
            "DiT-S/4",
            r"weights of a Skip-DiT \(with skip_linears, skip_norms\), not of DiT-S/4; choose Skip-DiT-S/4",
        ),
        ("Skip-DiT-S/2", "DiT-digits-deep/2", r"not of DiT-digits-deep/2; choose a Skip-DiT model"),
    ],
)
def test_weights_of_another_family_are_named(held: str, model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_family(model, create_model(held).state_dict())


def checkpoint(name: str, **overrides: int) -> Checkpoint:
    """One of ours."""
    network = create_model(name, **overrides)
    return Checkpoint(network.state_dict(), {"model": {"name": name, **dataclasses.asdict(network.config)}})


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_checkpoint_becomes_the_network_that_it_was_made_with(family: str) -> None:
    network = debug_network(family, num_classes=3)
    meta = {"model": {"name": debug_name(family), **dataclasses.asdict(network.config)}}
    restored = restore(Checkpoint(network.state_dict(), meta), "--ckpt x")
    assert type(restored) is type(network) and restored.config == network.config
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), network.parameters(), strict=True))
    assert not restored.training and not any(p.requires_grad for p in restored.parameters())


def test_what_is_kept_can_be_chosen_when_it_is_restored() -> None:
    assert restore(checkpoint("DiT-debug/2"), "x").config.cache_depth is None
    assert restore(checkpoint("DiT-debug/2"), "x", cache_depth=2).config.cache_depth == 2
    assert restore(checkpoint("Skip-DiT-debug/2", cache_depth=3), "x").config.cache_depth == 3


def test_a_foreign_file_is_named_by_the_user() -> None:
    foreign = checkpoint("Skip-DiT-debug/2")._replace(meta=None)
    assert isinstance(restore(foreign, "--ckpt x.pt", "Skip-DiT-debug/2"), models.SkipDiT)


@pytest.mark.parametrize("name", ["DiT-S/4", "DiT-debug/2", "Skip-DiT-B/8", "Skip-DiT-digits/2"])
def test_a_foreign_file_is_known_by_names_and_sizes(name: str) -> None:
    with torch.device("meta"):
        weights = create_model(name).state_dict()
    found, settings = settings_of(Checkpoint(weights, None), "x")
    assert found == name and model_config(found, **settings) == model_config(name)


def test_sizes_of_nobody_are_nobody_s() -> None:
    for weights in (create_model("DiT-debug/2", depth=3).state_dict(), {"blocks.0.weight": torch.zeros(1)}):
        with pytest.raises(UserError, match="no model in the registry"):
            settings_of(Checkpoint(weights, None), "x")


@pytest.mark.parametrize(
    ("held", "meta", "model", "overrides", "message"),
    [
        (
            "unknown",
            False,
            None,
            {},
            r"^--ckpt x: weights of a DiT, but their sizes are those of no model in the registry$",
        ),
        (
            "DyDiT-digits/2 of 6 heads",
            False,
            None,
            {},
            r"^--ckpt x: weights of DyDiT-digits/2, but routers of 5 gates; 4 heads need 3 or 4$",
        ),
        (
            "DyDiT-digits/2 of 6 heads",
            False,
            "DyDiT-digits/2",
            {},
            r"^--ckpt x: weights of DyDiT-digits/2, but routers of 5 gates; 4 heads need 3 or 4$",
        ),
        ("DiT-debug/2", True, "DiT-S/2", {}, r"^--model DiT-S/2: --ckpt x was trained as DiT-debug/2$"),
        (
            "DiT-debug/2",
            False,
            "Skip-DiT-debug/2",
            {},
            r"^--ckpt x: weights of a DiT \(without skip_linears, skip_norms\), not of Skip-DiT-debug/2; "
            r"choose DiT-debug/2$",
        ),
        ("DiT-debug/2", True, None, {"cache_depth": 3}, r"^--ckpt x: cache_depth 3 must lie in 1\.\.2"),
        ("Skip-DiT-S/8", False, "Skip-DiT-B/8", {}, r"^--ckpt x as Skip-DiT-B/8: the weights do not fit the model"),
    ],
)
def test_what_does_not_fit_is_one_line(
    held: str, meta: bool, model: str | None, overrides: dict[str, int], message: str
) -> None:
    odd = {"unknown": ("DiT-debug/2", {"depth": 2}), "DyDiT-digits/2 of 6 heads": ("DyDiT-digits/2", {"num_heads": 6})}
    name, fields = odd.get(held, (held, {}))
    file = checkpoint(name, **fields)
    file = file if meta else file._replace(meta=None)
    with pytest.raises(UserError, match=message):
        restore(file, "--ckpt x", model, **overrides)
