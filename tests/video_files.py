"""Folders of videos for tests: frames whose grey level tells their number, as images or in video files."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

STEP, VIDEO_STEP = 4, 12  # grey levels from a frame to the next; compressed ones need more


def write_frames(
    folder: Path, numbers: Sequence[int], *, name: str = "frame_{:04d}.png", size: tuple[int, int]
) -> None:
    """Write frames of (H, W), those whose number is n with the grey level 4 n."""
    folder.mkdir(parents=True)
    for number in numbers:
        pixels = np.full((*size, 3), STEP * number % 256, np.uint8)
        Image.fromarray(pixels).save(folder / name.format(number))


def write_video(
    path: Path, count: int, *, codec: str = "libx264", size: tuple[int, int] = (24, 32), times: Sequence[int] = ()
) -> None:
    """Write a video of (H, W) with the grey level 12 n in frame n, at 10 frames a second or at the given times."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
        if codec == "libx264":
            stream.options = {"g": "7", "crf": "4"}
        for number in range(count):
            pixels = np.full((*size, 3), VIDEO_STEP * number % 256, np.uint8)
            pixels[: size[0] // 2, : size[1] // 2] = 255  # the upper left corner is white
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbers_in(clip: Tensor) -> list[int]:
    """Numbers of the frames of a clip (F, C, H, W) uint8 of a video file."""
    return [round(float(frame[0, -1, -1]) / VIDEO_STEP) for frame in clip]


def write_sound(path: Path) -> None:
    """Write a file with sound alone."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rotate(path: Path) -> None:
    """Note a quarter turn clockwise in an mp4 file, as cameras do."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # version 0: the matrix of the track
    content[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
