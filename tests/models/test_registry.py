"""The registry: names, overrides, and what it says to a mistake."""

import re

import pytest
import torch

from models import DiT, create_model, family_of, list_models, model_config

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PUBLISHED = {f"DiT-{size}/{patch}": (*numbers, patch) for size, numbers in SIZES.items() for patch in (2, 4, 8)}


def test_every_published_size_the_debug_size_and_the_digits_are_registered() -> None:
    assert set(list_models("DiT-*")) == {*PUBLISHED, "DiT-debug/2", "DiT-digits/2", "DiT-digits-deep/2"}


def test_list_models_matches_shell_patterns() -> None:
    assert list_models("DiT-XL/*") == ["DiT-XL/2", "DiT-XL/4", "DiT-XL/8"]
    assert list_models("dit-*") == []
    assert len(set(list_models())) == len(list_models())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    config = model_config(name)
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == PUBLISHED[name]
    assert (config.input_size, config.in_channels, config.num_classes) == (32, 4, 1000)
    assert (config.mlp_ratio, config.class_dropout_prob, config.learn_sigma) == (4.0, 0.1, True)


def test_the_digits_config_predicts_noise_alone_on_grey_images() -> None:
    config = model_config("DiT-digits/2")
    assert (config.input_size, config.in_channels, config.num_classes, config.learn_sigma) == (8, 1, 10, False)


def test_create_model_builds_the_named_family_with_overrides() -> None:
    network = create_model("DiT-debug/2", input_size=16, num_classes=3, learn_sigma=False)
    assert type(network) is DiT and network.training
    assert (network.input_size, network.num_classes, network.in_channels, network.out_channels) == (16, 3, 4, 4)
    assert network.pos_embed.shape == (1, 64, 64)
    assert network.y_embedder.embedding_table.num_embeddings == 4


def test_overrides_do_not_leak_into_the_registry() -> None:
    model_config("DiT-debug/2", depth=1)
    assert model_config("DiT-debug/2").depth == 4


def test_create_model_puts_everything_on_the_default_device() -> None:
    with torch.device("meta"):
        network = create_model("DiT-debug/2")
    devices = {name: tensor.device.type for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    assert set(devices.values()) == {"meta"}, devices


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("DiT-XXL/2", "DiT-XL/2"),
        ("DiT-digit/2", "DiT-digits/2"),
        ("SkipDiT-XL/2", "Skip-DiT-XL/2"),
        ("dit-s/4", "DiT-S/4"),
    ],
)
def test_an_unknown_model_is_answered_with_what_is_spelt_like_it(name: str, first: str) -> None:
    with pytest.raises(ValueError, match=f"unknown model '{name}'; close to it: {first}") as error:
        create_model(name)
    close = str(error.value).split("close to it: ")[1].split(", ")
    assert len(close) <= 5 and set(close) <= set(list_models())


def test_names_like_digits_are_offered_from_every_family() -> None:
    with pytest.raises(ValueError) as error:
        family_of("DiT-digit/2")
    assert "DyDiT-digits/2" in str(error.value) and "DiT-S/2" not in str(error.value)


def test_a_name_like_none_is_answered_with_all_models_in_short() -> None:
    with pytest.raises(ValueError, match=r"known: DiT-\{S,B,L,XL\}/\{2,4,8\}, DiT-\{debug,digits\}/2, ") as error:
        family_of("ResNet-50")
    told = []
    for item in re.split(r", (?=[A-Z])", str(error.value).split("known: ")[1]):
        sizes, patches = (part.strip("{}").split(",") for part in re.sub(r"^.*?(?=[^-]*/)", "", item).split("/"))
        kind = item.split("/")[0].rsplit("-", 1)[0]
        told += [f"{kind}-{size}/{patch}" for size in sizes for patch in patches]
    assert sorted(told) == sorted(list_models())


def test_an_unknown_setting_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"DiT-S/2 has no setting 'width'; it has: .*hidden_size"):
        model_config("DiT-S/2", width=64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"input_size": 33}, "input_size 33 is not a multiple of patch_size 2"),
        ({"patch_size": 3}, "input_size 8 is not a multiple of patch_size 3"),
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
        ({"hidden_size": 66, "num_heads": 3}, "hidden_size must be a multiple of 4 for 2-D positions, not 66"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob must lie in \[0, 1\), not 1.0"),
        ({"class_dropout_prob": -0.1}, r"class_dropout_prob must lie in \[0, 1\), not -0.1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0 leaves the MLP without channels"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, not 0"),
        ({"num_classes": -1}, "num_classes must be at least 1, not -1"),
    ],
)
def test_values_that_do_not_fit_are_named(overrides: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("DiT-debug/2", **overrides)
