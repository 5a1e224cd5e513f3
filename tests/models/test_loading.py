"""Every kind of file becomes the network that it was made with."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import Network, create_model, model_config
from models.loading import load_network, resolve_checkpoint
from runtime import releases
from runtime.errors import UserError
from runtime.releases import Preset, Release
from tests.checkpoints import write_network
from tests.networks import debug_name, debug_network, labelled, randomise, sample_shape


def assert_same(loaded: Network, network: Network) -> None:
    """Same class, config and weights, ready for evaluation."""
    assert type(loaded) is type(network) and loaded.config == network.config
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def official(path: Path, network: Network) -> Path:
    """Write a training checkpoint as the official train.py does."""
    flags = argparse.Namespace(model="DiT-debug/2", global_seed=0)
    torch.save({"model": {}, "ema": network.state_dict(), "opt": {"state": {}}, "args": flags}, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Our own files


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_checkpoint_becomes_the_network_that_it_was_made_with(family: str, tmp_path: Path) -> None:
    shape = sample_shape(family, 4, 6, 10)
    network = debug_network(family, **({"num_classes": 3} if labelled(family) else {}), sample_shape=shape)
    data = {"image_shape": [3, 48, 80], "classes": ["ant", "bee", "cat"]}
    process = {"name": models.FAMILIES[family].process, "shift": 2.0}
    path = write_network(
        tmp_path / "a.safetensors", debug_name(family), network, data=data, process=process, encoder={"name": "mse"}
    )
    for source in (path, str(path)):
        loaded, info = load_network(source)
        assert_same(loaded, network)
    assert (info.path, info.weights, info.model, info.step) == (path, "ema-0.9999", debug_name(family), 7)
    assert (info.process, info.process_settings) == (process["name"], {"shift": 2.0})
    assert (info.encoder, info.image_shape, info.classes) == ("mse", (3, 48, 80), ("ant", "bee", "cat"))
    assert info.config["sample_shape"] == shape and info.release is info.preset is None
    assert info.meta is not None and info.meta["format"] == 2


def test_one_of_several_averages_is_chosen_by_name(tmp_path: Path) -> None:
    network = debug_network("DiT")
    averages = {f"ema-{decay}": randomise(create_model("DiT-debug/2"), seed) for seed, decay in ((1, 0.99), (2, 0.999))}
    path = write_network(tmp_path / "a.safetensors", "DiT-debug/2", network, averages)
    for name, expected in {"model": network, **averages}.items():
        loaded, info = load_network(path, weights=name)
        assert_same(loaded, expected)
        assert info.weights == name
    with pytest.raises(UserError, match="holds several averages; choose by --weights: ema-0.99, ema-0.999"):
        load_network(path)
    with pytest.raises(UserError, match="holds no weights under 'ema-0.5'; it has: "):
        load_network(path, weights="ema-0.5")


def test_what_changes_no_weights_can_be_chosen(tmp_path: Path) -> None:
    plain = write_network(tmp_path / "a.safetensors", "DiT-debug/2", create_model("DiT-debug/2"))
    assert load_network(plain)[0].config.cache_depth is None
    assert load_network(plain, cache_depth=2)[0].config.cache_depth == 2
    skip = create_model("Skip-DiT-debug/2", cache_depth=3)
    path = write_network(tmp_path / "b.safetensors", "Skip-DiT-debug/2", skip)
    assert load_network(path)[0].config.cache_depth == 3
    any_size = write_network(tmp_path / "c.safetensors", "DDT-debug/2", create_model("DDT-debug/2"))
    assert load_network(any_size, sample_shape=(4, 6, 10))[0].sample_shape == (4, 6, 10)


def test_a_network_is_loaded_onto_a_device_and_a_file_is_described_without_one(tmp_path: Path) -> None:
    path = write_network(tmp_path / "a.safetensors", "DiT-debug/2", create_model("DiT-debug/2"))
    assert {p.device.type for p in load_network(path, device="meta")[0].parameters()} == {"meta"}
    info, weights = resolve_checkpoint(path)
    assert info.model == "DiT-debug/2" and "pos_embed" in weights


# ----------------------------------------------------------------------------------------------------------------------
# Files of other code


@pytest.mark.parametrize("name", ["DiT-digits-deep/2", "DyDiT-debug/2", "IDiT-digits/2", "Skip-DiT-digits/2"])
def test_a_foreign_file_is_known_by_names_and_sizes(name: str, tmp_path: Path) -> None:
    network = randomise(create_model(name))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    loaded, info = load_network(tmp_path / "a.pt")
    assert_same(loaded, network)
    assert (info.model, info.process, info.process_settings) == (name, models.family_of(name).process, {})
    assert (info.encoder, info.image_shape, info.classes, info.step, info.meta) == ("ema", None, None, None, None)


def test_an_official_training_checkpoint_tells_about_its_data(tmp_path: Path) -> None:
    network = debug_network("DiT", sample_shape=(3, 12, 12), num_classes=7, learn_sigma=False)
    path = official(tmp_path / "0050000.pt", network)
    for model in (None, "DiT-debug/2"):
        assert_same(load_network(path, model=model)[0], network)


def test_layouts_of_routers_are_read_from_the_weights(tmp_path: Path) -> None:
    network = debug_network("DyDiT", router_layout="all_heads")
    assert_same(load_network(official(tmp_path / "a.pt", network))[0], network)


def test_a_named_model_fits_where_another_is_recognised_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of two models with the same shapes: a patch of 2 and 16 channels, or of 4 and 4."""
    row = models.FAMILIES["DDT"]
    configs = {f"patch {patch}": {**row.configs["DDT-debug/2"], "patch_size": patch} for patch in (2, 4)}
    monkeypatch.setitem(models.FAMILIES, "DDT", row._replace(configs=configs))
    network = randomise(create_model("patch 2", sample_shape=(16, 8, 8)))
    path = official(tmp_path / "a.pt", network)
    assert load_network(path)[1].model == "patch 4"
    assert_same(load_network(path, model="patch 2")[0], network)


# ----------------------------------------------------------------------------------------------------------------------
# Releases


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A release in the table, and its file among the downloads."""
    preset = Preset("ddim", "ddim5", 3.0, channels=2, interval=(100, 900), vae="mse")
    row = Release("tiny.pt", "DiT", "DiT-debug/2", 64, "ema", "http://127.0.0.1:1", None, None, preset)
    monkeypatch.setattr(releases, "RELEASES", (row,))
    official(tmp_path / row.file, debug_network("DiT", num_classes=5))
    return row


@pytest.mark.parametrize("how", ["tiny", "tiny.pt", "a path"])
def test_a_release_is_found_by_name_or_file(how: str, release: Release, tmp_path: Path) -> None:
    source = tmp_path / "tiny.pt" if how == "a path" else how
    loaded, info = load_network(source, download_dir=tmp_path)
    assert_same(loaded, debug_network("DiT", num_classes=5))
    assert (info.path, info.release, info.preset) == (tmp_path / "tiny.pt", release, release.preset)
    assert (info.encoder, info.image_shape, info.process) == ("mse", (3, 64, 64), "gaussian")


def test_a_model_with_one_release_of_256_pixels_stands_for_it(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "RELEASES", (release._replace(image_size=256),))
    assert load_network("DiT-debug/2", download_dir=tmp_path)[1].image_shape == (3, 256, 256)


def test_a_release_may_know_more_than_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset("euler", "5", 3.0, channels=None)
    row = Release("a.ckpt", "DDT", "DDT-debug/2", 128, "ema", "http://127.0.0.1:1", None, None, preset,
                  {"sample_shape": (4, 16, 16)})  # fmt: skip
    monkeypatch.setattr(releases, "RELEASES", (row,))
    official(tmp_path / row.file, debug_network("DDT"))
    assert load_network("a", download_dir=tmp_path)[0].sample_shape == (4, 16, 16)
    large = next(row for row in releases.RELEASES if row.file == "a.ckpt")
    assert large.config["sample_shape"] == (4, 16, 16)


def test_every_release_of_a_family_here_has_a_model_of_its_size() -> None:
    for row in releases.RELEASES:
        if row.family in models.FAMILIES:
            config = model_config(row.model, **row.config)
            if "sample_shape" in row.config:
                assert config.sample_shape[-1] * 8 == row.image_size


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("tinny", None, r"^--ckpt tinny: no such file; released, and close to it: tiny$"),
        ("nothing.pt", None, r"^--ckpt nothing.pt: no such file$"),
        ("DiT-S/2", None, r"^--model DiT-S/2: no checkpoint of it for 256 pixels was released; give one with --ckpt"),
        ("tiny", "DiT-S/2", r"^--model DiT-S/2: --ckpt tiny was trained with DiT-debug/2; leave --model out$"),
        ("tiny", "DiT-XXL/2", r"^--model DiT-XXL/2: unknown model 'DiT-XXL/2'; close to it: DiT-XL/2"),
    ],
)
def test_a_source_that_cannot_be_had_is_one_line(
    source: str, model: str | None, message: str, release: Release, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_network(source, model=model, download_dir=tmp_path)


def test_a_family_that_is_not_here_yet_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(models.FAMILIES, "Skip-LatteT2V")
    with pytest.raises(
        UserError, match="^--ckpt Latte-skip: is of the family Skip-LatteT2V, which is not here yet; here: "
    ):
        load_network("Latte-skip")


@pytest.mark.parametrize(
    ("name", "fields", "model", "overrides", "message"),
    [
        (
            "DiT-debug/2", {"depth": 2}, None, {},
            r"^--ckpt FILE: weights of a DiT, but their sizes are those of no model in the registry$",
        ),
        (
            "DyDiT-digits/2", {"num_heads": 6}, None, {},
            r"^--ckpt FILE: weights of DyDiT-digits/2, but routers of 5 gates; 4 heads need 3 or 4$",
        ),
        (
            "DyDiT-digits/2", {"num_heads": 6}, "DyDiT-digits/2", {},
            r"^--ckpt FILE: weights of DyDiT-digits/2, but routers of 5 gates; 4 heads need 3 or 4$",
        ),
        (
            "DyDiT-digits/2", {"num_heads": 6, "depth": 2}, "DyDiT-digits/2", {},
            r"^--ckpt FILE as DyDiT-digits/2: routers of 5 gates; 4 heads need 3 or 4$",
        ),
        (
            "DiT-debug/2", {}, "Skip-DiT-debug/2", {},
            r"^--ckpt FILE: weights of a DiT \(without skip_linears, skip_norms\), not of Skip-DiT-debug/2; "
            r"choose DiT-debug/2$",
        ),
        (
            "Skip-DiT-digits/2", {}, "Skip-DiT-debug/2", {},
            r"^--ckpt FILE as Skip-DiT-debug/2: the weights do not fit .*found those of Skip-DiT-digits/2, ",
        ),
        ("DiT-debug/2", {}, None, {"num_classes": 5}, r"^--ckpt FILE as DiT-debug/2: the weights do not fit the model"),
        ("DiT-debug/2", {}, None, {"cache_depth": 3}, r"^--ckpt FILE: cache_depth 3 must lie in 1\.\.2"),
        ("DiT-debug/2", {}, None, {"width": 3}, r"^--ckpt FILE: DiT-debug/2 has no setting 'width'; it has: "),
        ("DiT-debug/2", {}, None, {"sample_shape": (4, 9, 8)}, r"^--ckpt FILE: sample_shape \(4, 9, 8\): .*; nearest"),
    ],
)  # fmt: skip
def test_a_foreign_file_that_does_not_fit_is_one_line(
    name: str, fields: dict[str, int], model: str | None, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    torch.save(create_model(name, **fields).state_dict(), path)
    with pytest.raises(UserError, match=message.replace("FILE", str(path))):
        load_network(path, model=model, **overrides)


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("DiT-S/2", {}, r"^--model DiT-S/2: --ckpt FILE was trained with DiT-debug/2; leave --model out$"),
        (None, {"num_classes": 5}, r"^--num-classes 5: --ckpt FILE was trained with 10$"),
        (None, {"cache_depth": 3}, r"^--ckpt FILE: cache_depth 3 must lie in 1\.\.2"),
    ],
)
def test_a_file_of_ours_that_does_not_fit_is_one_line(
    model: str | None, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_network(tmp_path / "a.safetensors", "DiT-debug/2", create_model("DiT-debug/2"))
    with pytest.raises(UserError, match=message.replace("FILE", str(path))):
        load_network(path, model=model, **overrides)


@pytest.mark.parametrize("layout", [".pt", "release", ".safetensors"])
@pytest.mark.parametrize("classes", [0, 101])
def test_weights_with_labels_and_without_are_not_confused(
    classes: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the released file of UCF101 bears the name of SkyTimelapse's, or a flag asks for the other kind."""
    network, other = create_model("Skip-Latte-debug/2", num_classes=classes), 101 - classes
    if layout == ".safetensors":
        path = write_network(tmp_path / "a.safetensors", "Skip-Latte-debug/2", network)
    else:
        path = official(tmp_path / "a.pt", network)
    assert load_network(path)[0].config.num_classes == classes
    kind = "class-conditional" if classes else "unconditional"
    message = (
        rf"^--ckpt {path}: {kind} weights .* num_classes is {other}; leave out --num-classes, or choose another file$"
    )
    if layout == ".safetensors":
        message = rf"^--num-classes {other}: --ckpt {path} was trained with {classes}$"
    if layout == "release":
        preset = Preset("ddpm", "250", 1.0, None)
        row = Release(
            "a.pt", "Skip-Latte", "Skip-Latte-debug/2", 256, "ema", "", None, None, preset, {"num_classes": other}
        )
        monkeypatch.setattr(releases, "RELEASES", (row,))
        its = "unconditional" if classes else "class-conditional"
        message = (
            rf"num_classes is {other}; by its name the file is the release a, which is {its}: give that one, or rename"
        )
    with pytest.raises(UserError, match=message):
        load_network(path, **({} if layout == "release" else {"num_classes": other}))


def test_names_that_belong_to_no_model_are_said_to(tmp_path: Path) -> None:
    torch.save({"blocks.0.weight": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="^--init-from .*: its names and sizes are those of no model in the registry$"):
        load_network(tmp_path / "a.pt", flag="--init-from")
