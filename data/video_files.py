"""Frames of video files by PyAV, an extra with FFmpeg in its wheels; it is imported where a video is opened."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from data.image_folder import UnreadableImageError, check_size

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv",
    ".gif",
)  # fmt: skip
OTHER_VIDEOS = (
    ".asf", ".divx", ".dv", ".f4v", ".h264", ".m2ts", ".m2v", ".mts", ".mxf", ".ogm", ".rm", ".rmvb", ".vob", ".y4m",
)  # fmt: skip
# Containers; FFmpeg would also open playlists, which name other files
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,asf,flv,ogg,gif"
REMEDY = "replace or remove the file"


class VideoInfo(NamedTuple):
    """Frames of a video file.

    Attributes:
        length: Number of frames.
        times: Time of the first frame, and the constant step to the next, in the stream's units; None if it varies.
    """

    length: int
    times: tuple[int, float] | None


def check_pyav() -> None:
    """Raise a ValueError if PyAV is missing."""
    if find_spec("av") is None:
        raise ValueError("reading videos needs PyAV, which is missing: pip install av; or give folders of frames")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Container and stream of the first video track, in one thread.

    Raises:
        UnreadableImageError: Naming the file, if it cannot be decoded.
        OSError: If the file cannot be opened.
    """
    import av
    from av.error import FFmpegError

    av.logging.set_level(av.logging.PANIC)  # what is damaged is said by our own messages
    with path.open("rb") as file:  # the file system's errors, before those of the content
        is_empty = not file.read(1)
    try:
        with av.open(f"file:{path}", options={"protocol_whitelist": "file", "format_whitelist": FORMATS}) as container:
            pictures = av.stream.Disposition.attached_pic
            tracks = [track for track in container.streams.video if not track.disposition & pictures]
            if not tracks:
                raise ValueError("it has sound, and no video" if container.streams.audio else "it has no video")
            if tracks[0].codec_context is None:
                raise ValueError("its codec is unknown to this FFmpeg")
            tracks[0].codec_context.thread_count = 1
            yield container, tracks[0]
    except (FFmpegError, ValueError, ArithmeticError) as error:
        reason = "the file is empty" if is_empty else getattr(error, "strerror", None) or str(error)
        raise UnreadableImageError(f"{path}: cannot be read: {reason}; {REMEDY}", reason) from error


def inspect_video(path: Path) -> VideoInfo:
    """Count the frames of a video without decoding them.

    Raises:
        UnreadableImageError: Naming the file, if it is damaged, has no video, or no frames.
        OSError: If the file cannot be opened.
    """
    with _opened(path) as (container, stream):
        check_size(stream.width, stream.height)
        count, rate = stream.frames, stream.average_rate
        unit = stream.time_base
        if count and rate and unit and rate == stream.base_rate and stream.duration and stream.start_time is not None:
            step = 1 / (rate * unit)
            if abs(stream.duration - count * step) < Fraction(1, 2) * step:
                return VideoInfo(count, (stream.start_time, float(step)))
        times = _packet_times(container, stream)
        if not times:
            raise ValueError("it has no frames")
        steps = np.diff(times)
        mean = float(steps.mean()) if len(steps) else 1.0
        even = times[0] + mean * np.arange(len(times))
        constant = bool((np.abs(np.array(times) - even) < mean / 2).all())
        return VideoInfo(len(times), (times[0], mean) if constant else None)


def _packet_times(container: InputContainer, stream: VideoStream) -> list[int]:
    """Times of all frames in the order in which they are shown."""
    packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
    times = (packet.dts if packet.pts is None else packet.pts for packet in packets)
    return sorted(time for time in times if time is not None)


def read_frames(path: Path, info: VideoInfo, numbers: Sequence[int], channels: int) -> Iterator[Image.Image]:
    """Decode some frames of a video one by one, upright, from the key frame before the first of them.

    Args:
        path: Path of the file.
        info: Its frames.
        numbers: Numbers of frames, not falling.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UnreadableImageError: Naming the file, if it is damaged or ends before the last frame.
        OSError: If the file cannot be opened.
    """
    with _opened(path) as (container, stream):
        wanted, slack = _wanted(container, stream, info, numbers)
    for seeks in (True, False):  # some containers have no index, or one in which frames are found too late
        with _opened(path) as (container, stream):
            frames = _timed(container, stream, wanted[0] if seeks else None)
            first = next(frames, None)
            if first is not None and first[0] <= wanted[0] + slack:
                yield from _chosen(itertools.chain([first], frames), wanted, slack, channels)
                return
    raise UnreadableImageError(f"{path}: cannot be read: frame {numbers[0]} is missing; {REMEDY}", "a frame is missing")


def _counts(container: InputContainer, stream: VideoStream) -> bool:
    """True where the times of frames say nothing: AVI has none, and their order changes where frames look ahead."""
    return bool(container.format.name == "avi" and stream.codec_context.has_b_frames)


def _wanted(
    container: InputContainer, stream: VideoStream, info: VideoInfo, numbers: Sequence[int]
) -> tuple[list[float], float]:
    """Times of some frames, and how far those of decoded ones may be from them."""
    if _counts(container, stream):
        return [*map(float, numbers)], 0.5
    if info.times is not None:
        start, step = info.times
        return [start + number * step for number in numbers], step / 2
    times = _packet_times(container, stream)
    if len(times) != info.length:
        raise ValueError(f"it has {len(times)} frames instead of {info.length}")
    return [float(times[number]) for number in numbers], 0.5


def _timed(container: InputContainer, stream: VideoStream, time: float | None) -> Iterator[tuple[float, VideoFrame]]:
    """Decoded frames with their times: from one at or before a time on, or from the first (None)."""
    if _counts(container, stream):
        yield from enumerate(container.decode(stream))
        return
    if time is not None:
        container.seek(int(time), stream=stream)
    yield from ((frame.pts, frame) for frame in container.decode(stream) if frame.pts is not None)


def _chosen(
    frames: Iterator[tuple[float, VideoFrame]], wanted: Sequence[float], slack: float, channels: int
) -> Iterator[Image.Image]:
    """Pictures of the frames at the wanted times; a ValueError if one is missing."""
    position, shown = 0, None
    for time, frame in frames:
        while position < len(wanted) and time >= wanted[position] - slack:
            if time > wanted[position] + 2 * slack:
                raise ValueError(f"frame {position} of {len(wanted)} in a clip is missing")
            shown = shown if shown is not None and shown[0] == time else (time, _upright(frame, channels))
            yield shown[1]
            position += 1
        if position == len(wanted):
            return
    raise ValueError(f"it ends after {position} of {len(wanted)} frames of a clip; it is truncated or damaged")


def _upright(frame: VideoFrame, channels: int) -> Image.Image:
    check_size(frame.width, frame.height)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
    turns = round(frame.rotation / 90) % 4  # counterclockwise, as the camera noted it
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
