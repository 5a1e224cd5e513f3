"""Frozen vision transformers for alignment with a network's features: DINOv2, or any vision transformer of timm.

They are loaded from a local file or through timm from the hub's cache; nothing in a file is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from data.dataset import sides
from runtime.checkpoint import load_weights, read_checkpoint

# Names of the releases -> timm's.
OFFICIAL_ENCODERS = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "dinov2_vitg14": "vit_giant_patch14_dinov2",
}
PIXELS_PER_TOKEN = 16  # of the image, for any patch size of the encoder: 16 x 16 tokens at 256 pixels, 32 x 32 at 512


class VisionEncoder:
    """A frozen vision transformer at one image size.

    Images are resized so that each of its patches covers 16 x 16 of their pixels (DINOv2: 224 for 256, 448 for 512).
    Its positions are resampled to that grid once.

    Args:
        name: Key of `OFFICIAL_ENCODERS`, or a vision transformer of timm.
        image_size: Side of square images, or (H, W).
        weights: Local file of timm or the official release; None loads timm's weights from the hub or its cache.
        device: Device of the weights.

    Attributes:
        width: Channels of a token.
        grid: Rows and columns of tokens.
        notes: What was found in the local file, and if its checksums were compared.

    Raises:
        ValueError: For an unknown name, a size without whole tokens, or weights that cannot be loaded.
        UserError: Naming the file, if it is unusable or of another network.
    """

    def __init__(
        self,
        name: str,
        image_size: int | tuple[int, int],
        weights: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        import timm  # heavy, and only alignment needs it
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        architecture = OFFICIAL_ENCODERS.get(name, name)
        if not timm.is_model(architecture):
            raise ValueError(f"unknown; give {', '.join(OFFICIAL_ENCODERS)}, or a vision transformer of timm")
        self.notes: tuple[str, ...] = ()
        rows, columns = self.grid = _token_grid(sides(image_size))
        with torch.device("meta"):
            probe = timm.create_model(architecture, num_classes=0)
        if not isinstance(probe, VisionTransformer):
            raise ValueError(f"{architecture} is not a plain vision transformer")
        patch = probe.patch_embed.patch_size[0]
        self._size = rows * patch, columns * patch
        settings: dict[str, Any] = {"num_classes": 0, "img_size": self._size}
        vit: Any
        if weights is None:
            vit = _from_hub(architecture, settings)
        else:
            vit = timm.create_model(architecture, **settings)
            content = read_checkpoint(weights, flag="--align-ckpt")
            if content.foreign is not None:
                self.notes = (*content.foreign.notes, content.foreign.verification)
            loaded = {key: value for key, value in content.weights.items() if not key.startswith("head.")}
            load_weights(vit, checkpoint_filter_fn(loaded, vit), f"--align-ckpt {weights} as {architecture}")
        self._vit = vit.to(device).eval().requires_grad_(False)
        self.width: int = self._vit.num_features
        self._mean, self._std = (
            torch.tensor(self._vit.pretrained_cfg[key], device=device).view(3, 1, 1) for key in ("mean", "std")
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise images (N, 3, H, W) in [0, 1], then resize them bicubically without antialiasing, as in REPA."""
        normalised = (images - self._mean) / self._std
        return functional.interpolate(normalised, size=self._size, mode="bicubic")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised tokens (N, rows * columns, width) of images (N, 3, H, W) in [0, 1]."""
        return self._vit.forward_features(self.prepare(images))[:, self._vit.num_prefix_tokens :]


def _token_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens for images of (H, W) pixels."""
    for side in size:
        if side % PIXELS_PER_TOKEN or side < PIXELS_PER_TOKEN:
            raise ValueError(f"needs images with sides of multiples of {PIXELS_PER_TOKEN}, not {side}")
    return size[0] // PIXELS_PER_TOKEN, size[1] // PIXELS_PER_TOKEN


def _from_hub(architecture: str, settings: dict[str, Any]) -> Any:
    """A transformer with timm's weights, from its cache or the hub; a ValueError of one line if they are in neither."""
    import timm

    try:
        return timm.create_model(architecture, pretrained=True, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot load the weights of {architecture} from cache or hub; without network give a file by --align-ckpt "
            f"({str(error).splitlines()[0]})"
        ) from error
