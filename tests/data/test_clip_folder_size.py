"""A folder of many long videos: opened by its listing at once, and read in bounded memory."""

import os
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data import GlobalBatches
from data.clip_folder import ClipFolder
from tests import video_files

VIDEOS, FRAMES, BATCHES = 1000, 10_000, 200


def megabytes() -> float:
    """Memory of this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


@pytest.mark.slow
def test_a_thousand_videos_of_ten_thousand_frames(tmp_path: Path) -> None:
    one = tmp_path / "one"
    video_files.write_frames(one, [0], name="frame_{:05d}.png", size=(64, 64))
    for number in range(1, FRAMES):
        os.link(one / "frame_00000.png", one / f"frame_{number:05d}.png")
    root = tmp_path / "videos"
    for number in range(VIDEOS):
        (root / f"class{number % 10}").mkdir(parents=True, exist_ok=True)
        (root / f"class{number % 10}/{number:04d}").symlink_to(one)
    ClipFolder(root, 32)  # makes the listing
    before, started = megabytes(), time.perf_counter()
    data = ClipFolder(root, 32)
    assert len(data) == VIDEOS and time.perf_counter() - started < 10
    keys = GlobalBatches(len(data), 4, rank=0, world=1, seed=0, steps=range(BATCHES))
    peak = max(megabytes() for _ in DataLoader(data, batch_sampler=keys))  # type: ignore[arg-type]
    assert peak - before < 300
