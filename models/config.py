"""Fields and checks that the configs of all families have in common."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size of a class-conditional transformer on patches.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    sample_shape: tuple[int, int, int] = (4, 32, 32)  # (C, H, W) of a latent; no flag, because it follows from the data
    patch_size: int = setting(2, "side of a patch in latent pixels")
    hidden_size: int = setting(1152, "width of the tokens")
    depth: int = setting(28, "number of transformer blocks")
    num_heads: int = setting(16, "number of attention heads")
    mlp_ratio: float = setting(4.0, "width of the MLP relative to the tokens")
    class_dropout_prob: float = setting(0.1, "share of labels dropped in training; 0 means no null class, no guidance")
    num_classes: int = setting(1000, "number of classes")

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "sample_shape", tuple(self.sample_shape))  # JSON has lists
        for name in ("patch_size", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_sample_shape(self.sample_shape, self.patch_size)
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), not {self.class_dropout_prob}")
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP without channels")

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, height, width = self.sample_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> int:
        """T, the number of tokens of a sample."""
        return self.grid[0] * self.grid[1]


def check_sample_shape(shape: tuple[int, ...], patch: int) -> None:
    """Raise a ValueError, naming the nearest shapes that fit, unless patches cover a sample of shape (C, H, W)."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"sample_shape {shape} must be three numbers of at least 1: channels, height, width")
    channels, *sides = shape
    if sides[0] % patch or sides[1] % patch:
        below = tuple(max(patch, side // patch * patch) for side in sides)
        above = tuple(-(-side // patch) * patch for side in sides)
        nearest = " or ".join(str((channels, *fitting)) for fitting in dict.fromkeys((below, above)))
        raise ValueError(
            f"sample_shape {shape}: height and width must be multiples of patch_size {patch}; nearest: {nearest}"
        )
