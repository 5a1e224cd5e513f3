"""Training on folders of videos: ranks that see others, runs that are resumed on others or with other clips."""

from pathlib import Path
from typing import Any

import pytest

from data.clip_folder import ClipFolder
from data.dataset import check_same_data
from runtime import distributed
from runtime.errors import UserError
from tests import runs
from tests.video_files import write_frames


def test_ranks_with_other_videos_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for label in ("cat", "dog"):
            write_frames(tmp_path / name / label / "v", range(6), size=(8, 8))
    here, there = tmp_path / "a", tmp_path / "b"
    for change, message in [
        (lambda: (there / "dog/v/frame_0005.png").unlink(), "rank 1 has other files than rank 0; is"),
        (lambda: (there / "dog/v").rename(there / "dog/w"), "rank 1 has other files than rank 0; is"),
        (lambda: (there / "dog").rename(there / "eel"), "rank 1 has other classes than rank 0"),
        (lambda: write_frames(there / "cat/x", range(6), size=(8, 8)), r"has other images than rank 0 \(2 and 3\)"),
    ]:
        change()
        second = ClipFolder(there, 8, frames=4)
        other = {"images": len(second), "classes": second.classes, "files": second.digest()}
        monkeypatch.setattr(distributed, "objects_from_all_ranks", lambda facts, other=other: [facts, other])
        with pytest.raises(UserError, match=message):
            check_same_data(ClipFolder(here, 8, frames=4))


def of_videos(results: Path, root: Path, *argv: object) -> int:
    flags = "--dataset videofolder --model Latte-debug/2 --num-classes 2 --image-size 4 --num-frames 2 --vae none"
    flags += " --device cpu --num-workers 0 --log-every 1 --global-batch-size 2"
    return runs.start(results, *flags.split(), "--data-path", root, *argv)


def test_joint_training_is_resumed_as_it_was(tmp_path: Path, capsys: Any) -> None:
    results, root = tmp_path / "results", tmp_path / "videos"
    for label in ("cat", "dog"):
        write_frames(root / label / "v", range(6), size=(8, 8))
    assert of_videos(results, root, "--max-steps", 1, "--joint-images", 1) == 0
    for argv, message in {
        "": "differs in --joint-images (1, 0)",
        "--joint-images 2": "differs in --joint-images (1, 2); --override joint-images resumes",
        "--joint-images 1 --frame-interval 2": "differs in --frame-interval (1, 2); --override frame-interval resumes",
        "--joint-images 1 --clip-window strided": "differs in --clip-window (every, strided)",
        "--joint-images 1 --lr-schedule linear": "--lr-schedule (constant, linear)",
    }.items():
        assert of_videos(results, root, "--max-steps", 2, "--resume", "auto", *argv.split()) == 2
        assert message in runs.the_error(capsys)
    (root / "dog/v/frame_0005.png").unlink()
    assert of_videos(results, root, "--max-steps", 2, "--joint-images", 1, "--resume", "auto") == 0
    assert "the data has as many images as before, but not the same" in runs.log(results)
    (root / "cat").rename(root / "eel")
    assert of_videos(results, root, "--max-steps", 3, "--joint-images", 1, "--resume", "auto") == 2
    assert "class 0 was 'cat' and is 'dog' in the data" in runs.the_error(capsys)
