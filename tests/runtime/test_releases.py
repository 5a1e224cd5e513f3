"""The table of released checkpoints is consistent with itself, with the registry of models, and with the samplers."""

from pathlib import Path

import pytest
import torch

import models
from runtime.errors import UserError
from runtime.releases import RELEASES, Release, close_names, find_release, release_of_model

COPIES = {
    "weights": 1,
    "ema": 1,
    "averaged": 2,
    "training": 4,
}  # of the parameters: weights, average, and Adam's two moments
released = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)


def test_names_and_files_are_unique() -> None:
    assert len({release.name for release in RELEASES}) == len({release.file for release in RELEASES}) == len(RELEASES)
    assert len({release.address for release in RELEASES}) == len(RELEASES)


@released
def test_a_release_is_found_by_its_name_and_by_its_file(release: Release) -> None:
    assert find_release(release.name) is find_release(release.file) is release
    assert find_release(f"{release.name}x") is None and find_release(f"./{release.file}") is None


@released
def test_a_release_says_where_it_is(release: Release) -> None:
    assert release.address.startswith("https://") and "//" not in release.address.removeprefix("https://")
    if release.remote_name is None:
        assert release.address.endswith(f"/{release.file}")
    if release.hub is not None:
        repository, path = release.hub
        assert repository.count("/") == 1 and repository in release.address
        assert Path(path).suffix == Path(release.file).suffix


def test_wrong_official_links_are_put_right() -> None:
    skip, video, sky = (find_release(name) for name in ("DiT-XL-2-skip", "Latte-skip", "skytimelapse-skip"))
    assert skip and video and sky
    assert skip.address.endswith("/DiT-XL-2-skip.pt") and skip.model == "Skip-DiT-XL/2"
    assert video.address.endswith("/Latte-skip.pt") and video.family == "Skip-LatteT2V"
    assert sky.address.endswith("/skytimelapse-skip.pt")


@released
def test_values_are_possible(release: Release) -> None:
    assert release.layout in {*COPIES, "lightning"} and release.image_size in (256, 512)
    assert release.fid is None or 1 < release.fid < 10
    assert release.sha256 is None or len(release.sha256) == 64
    preset = release.preset
    assert preset.cfg_scale >= 1 and preset.vae in ("ema", "mse")
    assert preset.interval is None or 0 <= preset.interval[0] < preset.interval[1] <= 1000


@released
def test_a_release_of_a_registered_family_fits_its_model_and_its_file_s_size(release: Release) -> None:
    """Rows of other families are checked as soon as they are in the registry."""
    if release.family not in models.FAMILIES:
        assert release.model not in models.list_models()
        return
    assert release.model in models.FAMILIES[release.family].configs
    with torch.device("meta"):
        side = release.image_size // 8
        frames = models.model_config(release.model).sample_shape[:-3]
        network = models.create_model(release.model, **{"sample_shape": (*frames, 4, side, side), **release.config})
    assert network.sample_shape == (*frames, 4, side, side)
    if release.gigabytes is not None:
        numbers = sum(parameter.numel() for parameter in network.parameters())
        assert release.gigabytes * 1e9 == pytest.approx(4 * numbers * COPIES[release.layout], rel=0.005)


def test_weights_of_another_process_stand_for_no_model() -> None:
    """SiT's have DiT's names and shapes, and are no DiT."""
    sit = find_release("SiT-XL-2-256x256")
    assert sit is not None and (sit.model, sit.process) == ("DiT-XL/2", "flow")
    assert sit.address.startswith("https://www.dl.dropboxusercontent.com/") and sit.address.endswith("&dl=0")
    assert close_names("SiT-XL-2-256x255.pt", models.FAMILIES)[0] == sit.name


def test_a_model_s_release_is_found_by_model_and_size() -> None:
    assert release_of_model("DiT-XL/2", None, models.FAMILIES).file == "DiT-XL-2-256x256.pt"
    assert release_of_model("DiT-XL/2", 512, models.FAMILIES).file == "DiT-XL-2-512x512.pt"
    with pytest.raises(UserError, match=r"--model DiT-S/2: no checkpoint of it for 256 pixels .* DiT-XL/2 \(256 pix"):
        release_of_model("DiT-S/2", 256, models.FAMILIES)
    with pytest.raises(UserError, match=r"several .* dydit_0\.7, new_dydit0\.7, new_dydit0\.5$"):
        release_of_model("DyDiT-XL/2", None, models.FAMILIES)


@pytest.mark.parametrize(("model", "size"), [("DiT-S/2", 256), ("Skip-LatteT2V-XL/2", 512)])
def test_a_release_of_a_family_without_code_is_not_offered(model: str, size: int) -> None:
    families = [family for family in models.FAMILIES if family != "Skip-LatteT2V"]
    with pytest.raises(UserError, match="no checkpoint of it .*DDT-XL/2") as error:
        release_of_model(model, size, families)
    offered = str(error.value).split("released: ")[1]
    assert "LatteT2V" not in offered and "Skip-DiT-XL/2 (256 pixels)" in offered


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("DiT-XL-2-265x256", "DiT-XL-2-256x256"),
        ("dit-xl-2-512.pt", "DiT-XL-2-512x512"),
        ("dydit0.7.pth", "dydit_0.7"),
        ("new_dydit0.6", "new_dydit0.5"),
        ("ucf101-skip2", "ucf101-skip"),
    ],
)
def test_a_misspelt_release_is_close_to_the_one_that_was_meant(name: str, close: str) -> None:
    assert close in close_names(name, models.FAMILIES)


@pytest.mark.parametrize("name", ["nothing.pt", "results/000-DiT-XL-2/checkpoints/0400000.pt", "imagenet2", "a.pt"])
def test_other_names_are_close_to_none(name: str) -> None:
    assert close_names(name, models.FAMILIES) == []
