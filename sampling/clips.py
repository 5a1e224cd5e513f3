"""Settings of clips, which networks of images do not take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec

from data.writers import FPS, Writer, writer_of
from runtime.errors import UserError
from runtime.settings import flag_name, setting

FASTEST = 50  # frames a second; viewers slow down a GIF that is faster


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Files of clips, for networks of clips."""

    fps: int | None = setting(None, "frames a second of GIF and mp4", shown=str(FPS), free=True)
    save_mp4: bool = setting(False, "write clips as mp4, too; needs PyAV (pip install av)", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.fps is not None and not 1 <= self.fps <= FASTEST:
            raise ValueError(f"--fps {self.fps}: must lie in 1..{FASTEST}, as animations are shown at")
        if self.save_mp4 and find_spec("av") is None:
            raise ValueError("--save-mp4: needs PyAV, which is not installed (pip install av); GIF needs no package")

    def given(self) -> dict[str, object]:
        """Values by flag of what differs from the defaults."""
        return {
            flag_name(field.name): getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def writer(self, shape: Sequence[int], source: object) -> Writer:
        """Writer for a network's samples.

        Args:
            shape: (C, H, W) of an image, or (F, C, H, W) of a clip, in pixels.
            source: Path of the checkpoint, for messages.

        Raises:
            UserError: If the network makes images and there are settings of clips.
        """
        if len(shape) == 3:
            for flag, value in self.given().items():
                flag = flag if value is True else f"{flag} {value}"
                raise UserError(f"{flag}: is a setting of clips; the network of --ckpt {source} makes images")
        return writer_of(shape, self.fps or FPS)
