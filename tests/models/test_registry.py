"""The registry: names, overrides, and what it says to a mistake."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models import DiT, ModelOutput, Network, create_model, family_name, family_of, list_models, model_config
from models.loading import load_network
from models.recognise import family_of_weights, recognise
from runtime.errors import UserError

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
    assert (config.sample_shape, config.num_classes) == ((4, 32, 32), 1000)
    assert (config.mlp_ratio, config.class_dropout_prob, config.learn_sigma) == (4.0, 0.1, True)


def test_the_digits_config_predicts_noise_alone_on_grey_images() -> None:
    config = model_config("DiT-digits/2")
    assert (config.sample_shape, config.num_classes, config.learn_sigma) == ((1, 8, 8), 10, False)


def test_create_model_builds_the_named_family_with_overrides() -> None:
    network = create_model("DiT-debug/2", sample_shape=(3, 16, 12), num_classes=3, learn_sigma=False)
    assert type(network) is DiT and network.training
    assert (network.sample_shape, network.config.num_classes, network.out_channels) == ((3, 16, 12), 3, 3)
    assert network.pos_embed.shape == (1, 48, 64)
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
    named = []
    for item in re.split(r", (?=[A-Z])", str(error.value).split("known: ")[1]):
        sizes, patches = (part.strip("{}").split(",") for part in re.sub(r"^.*?(?=[^-]*/)", "", item).split("/"))
        kind = item.split("/")[0].rsplit("-", 1)[0]
        named += [f"{kind}-{size}/{patch}" for size in sizes for patch in patches]
    assert sorted(named) == sorted(list_models())


def test_an_unknown_setting_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"DiT-S/2 has no setting 'width'; it has: .*hidden_size"):
        model_config("DiT-S/2", width=64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"sample_shape": (4, 33, 32)},
            r"sample_shape \(4, 33, 32\): height and width must be multiples of patch_size 2",
        ),
        ({"sample_shape": (4, 33, 32)}, r"; nearest: \(4, 32, 32\) or \(4, 34, 32\)$"),
        ({"sample_shape": (4, 1, 5)}, r"; nearest: \(4, 2, 4\) or \(4, 2, 6\)$"),
        ({"patch_size": 3}, r"patch_size 3; nearest: \(4, 6, 6\) or \(4, 9, 9\)$"),
        (
            {"sample_shape": (4, 8)},
            r"sample_shape \(4, 8\) must be three numbers of at least 1: channels, height, width",
        ),
        ({"sample_shape": (0, 8, 8)}, r"sample_shape \(0, 8, 8\) must be three numbers of at least 1"),
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
def test_values_that_do_not_fit_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("DiT-debug/2", **overrides)


@pytest.mark.parametrize(
    ("former", "shape"),
    [
        ({"input_size": 16}, (4, 16, 16)),
        ({"in_channels": 3}, (3, 8, 8)),
        ({"input_size": 4, "in_channels": 1}, (1, 4, 4)),
    ],
)
def test_the_former_size_and_channels_become_a_shape_with_a_warning(
    former: dict[str, int], shape: tuple[int, ...]
) -> None:
    with pytest.warns(FutureWarning, match=re.escape(f"use sample_shape={shape}")):
        assert create_model("DiT-debug/2", **former).sample_shape == shape
    with pytest.raises(ValueError, match=r"sample_shape \(4, 8, 8\) replaces "):
        model_config("DiT-debug/2", sample_shape=(4, 8, 8), **former)


def test_a_shape_from_json_is_a_tuple() -> None:
    assert model_config("DDT-debug/2", sample_shape=[4, 6, 10]) == model_config("DDT-debug/2", sample_shape=(4, 6, 10))


def test_every_field_has_a_sentence_of_help_the_same_in_every_family() -> None:
    texts: dict[str, str] = {}
    for family in models.FAMILIES.values():
        for field in dataclasses.fields(family.config):
            if field.name not in {"sample_shape", "text_width", "text_length"}:  # these follow from the data
                assert texts.setdefault(field.name, field.metadata["help"]) == field.metadata["help"] != ""
                assert field.metadata["sampling"] == (field.name in {"cache_depth", "temporal_blocks"})


# ----------------------------------------------------------------------------------------------------------------------
# A family of one's own, with the least that is needed


@dataclass(frozen=True)
class ToyConfig:
    width: int = 3


class Toy(Network):
    """Scales x; no labels, no patches, no null rows."""

    conditioning = ()
    sample_shape, out_channels = (2, 3, 4, 8, 12), 4

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, self.blocks = config, nn.ModuleList([nn.Linear(12, 12)])

    def forward(self, x: Tensor, t: float | Tensor, *, state: Any = None, features_at: Any = ()) -> ModelOutput:
        return ModelOutput(self.blocks[0](x))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(models.FAMILIES, "Toy", models.Family(Toy, ToyConfig, {"toy family": {}}))
    return "toy family"


def test_a_name_may_be_any_string(toy: str) -> None:
    assert family_name(toy) == "Toy" and list_models("toy*") == [toy]
    network = create_model(toy, width=4)
    assert isinstance(network, Toy) and network.config == ToyConfig(4)
    with pytest.raises(ValueError, match=r"unknown model 'ResNet-50'; known: .*, toy family$"):
        create_model("ResNet-50")
    with pytest.raises(ValueError, match="toy family has no setting 'input_size'; it has: width"):
        create_model(toy, input_size=8)


def test_what_the_base_class_does_for_a_family(toy: str) -> None:
    network = create_model(toy)
    assert network.for_sampling([999, 0]) is network and not network.keeps_state
    assert network.time_convention == "index"
    with pytest.raises(ValueError, match="Toy has no unconditional rows and cannot be guided"):
        network.null_conditioning(1)
    with pytest.raises(TypeError, match="Toy does not state its cost"):
        network.cost()
    before = network.blocks[0].weight.clone()
    network.reset_parameters()
    assert not torch.equal(network.blocks[0].weight, before)


def test_weights_of_a_family_that_does_not_opt_in_are_not_recognised_but_load_by_name(toy: str, tmp_path: Path) -> None:
    network = create_model(toy)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    assert recognise(network.state_dict()) is None and family_of_weights(network.state_dict()) == "Toy"
    with pytest.raises(UserError, match="weights of a Toy, but their sizes are those of no model"):
        load_network(tmp_path / "a.pt")
    loaded, info = load_network(tmp_path / "a.pt", model=toy)
    assert (info.model, info.process) == (toy, "gaussian")
    assert torch.equal(loaded.blocks[0].weight, network.blocks[0].weight)
