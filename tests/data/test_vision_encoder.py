"""Vision encoders from files: loading, positions, inputs and outputs."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.vision_encoder import OFFICIAL_ENCODERS, VisionEncoder
from runtime.errors import UserError
from tests.golden_data import arrays, assert_close
from tests.golden_ddt import FORWARD, assert_within

SMALL = "test_vit"  # of timm: width 64, patch 16, made for 160 pixels


def write(path: Path, name: str = SMALL, **settings: Any) -> Any:
    """A randomly initialised transformer of timm, its weights saved in a file."""
    torch.manual_seed(0)
    vit = timm.create_model(name, **settings).eval()
    with torch.no_grad():
        vit.pos_embed.normal_()
        vit.cls_token.normal_()
    if path.suffix == ".safetensors":
        save_file(vit.state_dict(), path)
    else:
        torch.save(vit.state_dict(), path)
    return vit


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write(tmp_path / "vit.safetensors", num_classes=0)
    return tmp_path / "vit.safetensors"


@torch.no_grad()
def test_tokens_are_the_transformers_own(weights: Path) -> None:
    """At the size it was made for, nothing is resampled: 160 pixels are 10 x 10 tokens."""
    vit, encoder = write(weights, num_classes=0), VisionEncoder(SMALL, 160, weights)
    assert (encoder.width, encoder.grid) == (64, (10, 10))
    images = torch.rand(2, 3, 160, 160)
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert_close(encoder.prepare(images), (images - mean) / std, 1e-6)
    tokens = encoder(images)
    assert tokens.shape == (2, 100, 64)
    assert_close(tokens, vit.forward_features((images - mean) / std)[:, 1:])


@pytest.mark.parametrize("size", [32, 64, 256])
def test_every_token_covers_sixteen_pixels(weights: Path, size: int) -> None:
    encoder = VisionEncoder(SMALL, size, weights)
    assert encoder(torch.rand(1, 3, size, size)).shape == (1, (size // 16) ** 2, 64)


def test_images_need_not_be_square(weights: Path) -> None:
    encoder = VisionEncoder(SMALL, (32, 64), weights)
    assert encoder.grid == (2, 4) and encoder(torch.rand(1, 3, 32, 64)).shape == (1, 8, 64)


@torch.no_grad()
def test_positions_are_resampled_to_the_grid(weights: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    vit, encoder = write(weights, num_classes=0), VisionEncoder(SMALL, 64, weights)
    assert_close(encoder._vit.pos_embed, resample_abs_pos_embed(vit.pos_embed, [4, 4]), 1e-6)


def test_a_pytorch_file_with_a_head_is_loaded_too(tmp_path: Path, weights: Path) -> None:
    write(tmp_path / "vit.pth", num_classes=1000)
    images = torch.rand(1, 3, 64, 64)
    from_pth, from_safetensors = (VisionEncoder(SMALL, 64, p)(images) for p in (tmp_path / "vit.pth", weights))
    assert from_pth.shape == from_safetensors.shape


def test_the_release_of_dinov2_sees_what_was_recorded(tmp_path: Path) -> None:
    """Its own file has a mask token besides timm's weights. At 64 pixels it takes 56: its patches are 14 wide."""
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    torch.save({**vit.state_dict(), "mask_token": torch.zeros(1, vit.embed_dim)}, tmp_path / "dinov2_vits14.pth")
    encoder, golden = VisionEncoder("dinov2_vits14", 64, tmp_path / "dinov2_vits14.pth"), arrays("ddt/train/ddt_a_repa")
    assert_within(encoder.prepare(golden["raw"]), golden["dino_input"], FORWARD)
    assert encoder(golden["raw"]).shape == (4, 16, 384)


@pytest.mark.parametrize("name", OFFICIAL_ENCODERS)
def test_official_names_are_timms(name: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model(OFFICIAL_ENCODERS[name], num_classes=0)
    assert vit.patch_embed.patch_size == (14, 14)
    assert vit.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_nothing_learns_and_nothing_is_random(weights: Path) -> None:
    encoder = VisionEncoder(SMALL, 64, weights)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    first: Tensor = encoder(images)
    assert not first.requires_grad and torch.equal(encoder(images), first)
    assert not any(p.requires_grad for p in encoder._vit.parameters())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("dinov3", 64, "unknown; give dinov2_vits14, .*, or a vision transformer of timm"),
        ("resnet18", 64, "resnet18 is not a plain vision transformer"),
        (SMALL, 8, "needs images with sides of multiples of 16, not 8"),
        (SMALL, 250, "needs images with sides of multiples of 16, not 250"),
    ],
)
def test_what_cannot_be_aligned_with_is_said(name: str, size: int, message: str, weights: Path) -> None:
    with pytest.raises(ValueError, match=message):
        VisionEncoder(name, size, weights)


def test_weights_of_another_network_are_refused(weights: Path) -> None:
    with pytest.raises(
        UserError, match=r"--align-ckpt .*vit.safetensors as vit_tiny_patch16_224: the weights do not fit"
    ):
        VisionEncoder("vit_tiny_patch16_224", 64, weights)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--align-ckpt .*nothing.pth: no such file"):
        VisionEncoder(SMALL, 64, tmp_path / "nothing.pth")


def test_without_network_and_cache_the_flag_for_a_file_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="cannot load the weights of test_vit from cache or hub; .* --align-ckpt"):
        VisionEncoder(SMALL, 64)
