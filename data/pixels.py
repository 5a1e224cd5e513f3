"""Conversions between tensors and 8-bit images, and image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from runtime.files import atomic_path

Images = npt.NDArray[np.uint8]  # (N, H, W, C), or clips (N, F, H, W, C)
GAP = 2  # white pixels between tiles
TEXT_SIZE, TEXT_LINE = 10, 12  # pixels of the letters under a tile, and of a line
SOFTWARE_TAG, NOTE_TAG = 0x0131, 0x010E  # of EXIF
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # of pictures with notes
LONGEST_NOTE = 60_000  # bytes; a JPEG holds no longer EXIF


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 of any shape to float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_unit_range(images: Tensor) -> Tensor:
    """Map uint8, or float32 in [-1, 1], of any shape to float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else (images + 1) / 2


def to_uint8(x: Tensor) -> Tensor:
    """Map (..., C, H, W) in [-1, 1] to (..., H, W, C) uint8, rounded as in the official 50,000-image sampler."""
    return (127.5 * x).add_(128.0).clamp_(0, 255).movedim(-3, -1).to(torch.uint8)


def to_picture(x: Tensor) -> Tensor:
    """Map (..., C, H, W) in [-1, 1] to (..., H, W, C) uint8, rounded as in torchvision's `save_image`.

    Latte's and Skip-DiT's samplers of clips round in the same way, to the bit.
    """
    unit = (x.clamp(-1, 1) + 1) / 2
    return torch.clamp(unit * 255 + 0.5, 0, 255).movedim(-3, -1).to(torch.uint8)


def grid(images: Images, columns: int, *, gap: int = GAP, background: int = 255) -> Images:
    """Tile images row by row: (..., H, W, C) -> (1, H', W', C); missing tiles of the last row stay background."""
    images = images.reshape(-1, *images.shape[-3:])  # frames of clips become tiles
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), background, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet[None]


def strips(texts: Sequence[str], width: int, channels: int) -> Images:
    """Write texts in black on white strips of one size (N, H', W, C), in as many lines as the longest needs."""
    font = ImageFont.load_default(TEXT_SIZE)
    wrapped = [_wrapped(text, font, width - 2) for text in texts]
    height = TEXT_LINE * max(map(len, wrapped)) + TEXT_LINE // 3
    pictures = [Image.new("L", (width, height), 255) for _ in texts]
    for picture, lines in zip(pictures, wrapped, strict=True):
        for number, line in enumerate(lines):
            ImageDraw.Draw(picture).text((1, number * TEXT_LINE), line, fill=0, font=font)
    return np.repeat(np.stack([np.asarray(picture) for picture in pictures])[..., None], channels, axis=-1)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of a text that are no wider than `width` pixels; words that are wider are broken."""
    lines = [""]
    for word in text.split():
        while font.getlength(f"{lines[-1]} {word}".strip()) > width and len(word) > 1:
            if not lines[-1]:
                fitting = max((n for n in range(1, len(word)) if font.getlength(word[:n]) <= width), default=1)
                lines[-1], word = word[:fitting], word[fitting:]
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def enlarge(images: Images, factor: int) -> Images:
    """Repeat pixels, to show tiny images: (..., H, W, C) -> (..., H f, W f, C)."""
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def save_png(image: Images, path: Path, software: str = "", note: str = "") -> None:
    """Write one image (H, W, C), whole or not at all.

    Args:
        image: The image, with 1 or 3 channels.
        path: The file.
        software: Noted in the file.
        note: Further ASCII text in the file, such as settings; left out if it is too long.
    """
    picture, exif = _picture(image), Image.Exif()
    if software:
        exif[SOFTWARE_TAG] = software
    if 0 < len(note) <= LONGEST_NOTE:
        exif[NOTE_TAG] = note
    with atomic_path(path) as temporary:
        picture.save(temporary, exif=exif)


def written_by(path: Path, software: str) -> bool:
    """True for a picture, or a video where PyAV is installed, that notes this software."""
    if path.suffix.lower() == ".mp4":
        return _video_comment(path) == software
    noted = _noted(path)
    return noted is not None and noted[0] == software


def note_in(path: Path) -> str:
    """Note that `save_png` or `save_gif` wrote into a file; "" if it has none, or is no picture."""
    return (_noted(path) or ("", ""))[1]


def is_picture(path: Path) -> bool:
    """True for a whole PNG, JPEG, WEBP or GIF."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _noted(path: Path) -> tuple[str, str] | None:
    """Software and note in a picture; None if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            exif, comment = picture.getexif(), picture.info.get("comment", b"")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    text = comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)
    software, _, note = text.partition("\n")
    return str(exif.get(SOFTWARE_TAG, software)), str(exif.get(NOTE_TAG, note))


def save_gif(
    images: Sequence[Images], path: Path, durations: Sequence[int], software: str = "", note: str = ""
) -> None:
    """Write images (H, W, C) as a repeating animation, whole or not at all.

    Args:
        images: Frames of one size, with 1 or 3 channels.
        path: The file.
        durations: Milliseconds for which each is shown; a multiple of ten.
        software: Noted in the file.
        note: As for `save_png`.
    """
    comment = f"{software}\n{note}" if 0 < len(note) <= LONGEST_NOTE else software
    pictures = [_picture(image) for image in images]
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=[*durations], loop=0, comment=comment
        )


def save_mp4(images: Sequence[Images], path: Path, fps: int, software: str = "") -> None:
    """Write images (H, W, C) as a video (H.264), whole or not at all; needs PyAV.

    Pixels are slightly changed by the compression. Odd sides are made even, as the format asks for, by repeating the
    last row or column. One thread encodes, so that equal images make equal bytes.

    Args:
        images: Frames of one size, with 1 or 3 channels.
        path: The file, ending in .mp4.
        fps: Frames a second.
        software: Noted in the file.
    """
    import av

    frames = [_even_rgb(image) for image in images]
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as file:
        file.metadata["comment"] = software
        stream = file.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))


def _picture(image: Images) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _even_rgb(image: Images) -> Images:
    """Image (H, W, 1 or 3) with three channels and even sides."""
    height, width, _ = image.shape
    padded = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(np.broadcast_to(padded, (*padded.shape[:2], 3)))


def _video_comment(path: Path) -> str | None:
    """Comment in a video; None if it has none, cannot be read, or PyAV is not installed."""
    try:
        import av
    except ImportError:
        return None
    try:
        with av.open(str(path)) as file:
            return file.metadata.get("comment")
    except (OSError, ValueError, av.FFmpegError):
        return None
