"""Faults around resuming: other data, other settings, damaged and foreign files, two jobs at once."""

import hashlib
import json
import os
import re
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.digits import load_digits
from runtime.errors import UserError
from runtime.groups import read_groups, save_checkpoint
from runtime.locks import locked
from tests import runs
from tests.runs import DIGITS, checkpoint, log, metrics, run_folder
from training.run import create_run_folder, cut_metrics
from training.run_files import ASIDE, run_of, set_aside, thin

B = [*DIGITS, *"--model DiT-debug/2 --num-classes 10 --global-batch-size 12 --image-size 8".split()]
start = partial(runs.start)


def digits(results: Path, *argv: object) -> int:
    return start(results, *B, *argv)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint at every one."""
    results = tmp_path_factory.mktemp("four") / "results"
    assert digits(results, "--max-steps", 4, "--ckpt-every", 1) == 0
    return results


@pytest.fixture
def trained(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(four_steps, tmp_path / "results"))


def names(results: Path) -> list[str]:
    return sorted(path.name for path in (run_folder(results) / "checkpoints").iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints that are kept


def test_thinning_after_a_rewind_keeps_what_was_just_written(trained: Path) -> None:
    newest = checkpoint(trained, 4)
    newest.write_bytes(newest.read_bytes()[:1000])
    assert digits(trained, "--max-steps", 4, "--ckpt-every", 1, "--keep-last", 1, "--resume", "auto") == 0
    assert names(trained) == ["0000004.safetensors", f"0000004.safetensors{ASIDE}"]
    assert runs.state(checkpoint(trained, 4)) and "Set aside" in log(trained)


def test_a_shorter_run_after_a_rewind_sets_later_checkpoints_aside(trained: Path) -> None:
    argv = "--max-steps 3 --ckpt-every 1 --keep-last 1 --resume".split()
    assert digits(trained, *argv, checkpoint(trained, 2)) == 0
    assert names(trained) == ["0000003.safetensors", *(f"000000{step}.safetensors{ASIDE}" for step in (3, 4))]


def test_thinning_counts_readable_files_up_to_the_present_step(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in range(1, 7):
        save_file({"a": torch.zeros(8)}, folder / f"{step:07d}.safetensors")
    for step in (4, 3):
        (folder / f"{step:07d}.safetensors").write_bytes(b"cut")
    (folder / "best.safetensors").touch()
    thin(tmp_path, 5, 2)
    kept = sorted(path.stem for path in folder.iterdir())
    assert kept == ["0000002", "0000003", "0000004", "0000005", "0000006", "best"]
    assert len(set_aside(tmp_path, 5)) == 1 and not (folder / "0000006.safetensors").exists()


def test_names_beyond_seven_digits_are_ordered_by_number(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (9_999_999, 10_000_000):
        save_file({"a": torch.zeros(1)}, tmp_path / "checkpoints" / f"{step:07d}.safetensors")
    thin(tmp_path, 10_000_000, 1)
    assert [path.stem for path in (tmp_path / "checkpoints").iterdir()] == ["10000000"]


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_checkpoint_outside_of_a_run_starts_a_new_one(trained: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "ckpts").mkdir(parents=True)
    (home / "metrics.jsonl").write_text('{"step": 9, "mine": 1}\n')
    copy = home / "ckpts" / "best.safetensors"
    copy.write_bytes(checkpoint(trained, 2).read_bytes())
    assert digits(tmp_path / "new", "--max-steps", 4, "--resume", copy) == 0
    assert (home / "metrics.jsonl").read_text() == '{"step": 9, "mine": 1}\n'
    assert sorted(path.name for path in home.rglob("*")) == ["best.safetensors", "ckpts", "metrics.jsonl"]
    assert "best.safetensors at step 2" in log(tmp_path / "new")
    runs.assert_same(runs.state(checkpoint(tmp_path / "new", 4)), runs.state(checkpoint(trained, 4)))


@pytest.mark.parametrize("name", ["checkpoints/best.safetensors", "0000002.safetensors", "ckpt/0000002.safetensors"])
def test_a_run_is_known_by_its_layout(trained: Path, name: str) -> None:
    assert run_of(run_folder(trained) / name) is None
    assert run_of(checkpoint(trained, 2)) == run_folder(trained)


@pytest.mark.parametrize(
    ("taken", "expected"), [("999-x", "1000-a"), ("1000-x", "1001-a"), ("12-x", "000-a"), ("x-999", "000-a")]
)
def test_any_number_of_runs_and_odd_names(tmp_path: Path, taken: str, expected: str) -> None:
    (tmp_path / taken).mkdir()
    assert create_run_folder(tmp_path, "a").name == expected


def test_auto_finds_a_run_beyond_the_thousandth(trained: Path) -> None:
    run_folder(trained).rename(trained / "1000-DiT-debug-2")
    (trained / "999-notes").touch()
    assert digits(trained, "--max-steps", 5, "--resume", "auto") == 0
    assert (trained / "1000-DiT-debug-2" / "checkpoints" / "0000005.safetensors").exists()


def test_a_full_disk_at_the_config_leaves_nothing(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert digits(tmp_path / "results", "--max-steps", 1) == 2
    assert "cannot write there (No space left)" in runs.the_error(capsys)
    assert list((tmp_path / "results").iterdir()) == []


def test_two_jobs_do_not_write_one_run(trained: Path, capsys: Any) -> None:
    before = sorted(path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != ".lock")
    for resume in ("auto", checkpoint(trained, 4)):
        with locked(run_folder(trained), "first"):
            assert digits(trained, "--max-steps", 6, "--resume", resume) == 2
        message = runs.the_error(capsys)
        assert f"--resume {resume}: " in message and f"in use by process {os.getpid()}" in message
    assert sorted(path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != ".lock") == before


def test_leftovers_of_killed_processes_are_swept(trained: Path) -> None:
    folder = run_folder(trained) / "checkpoints"
    (folder / ".0000009.4999999.tmp.safetensors").touch()
    (folder.parent / ".metrics.4999999.tmp.jsonl").touch()
    (folder / ".mine").touch()
    assert digits(trained, "--max-steps", 5, "--resume", "auto") == 0
    assert sorted(path.name for path in folder.parent.rglob(".*")) == [".lock", ".mine"]


@pytest.mark.parametrize("last", ["checkpoints", "config.json", "checkpoint"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(trained: Path, last: str) -> None:
    """Whatever was written last: the same command takes its folder, another one does not."""
    folder = run_folder(trained)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    (folder / "checkpoints" / ".0000001.4999999.tmp.safetensors").mkdir()
    if last == "checkpoints":
        for name in ("config.json", "log.txt", "metrics.jsonl"):
            (folder / name).unlink()
    elif last == "config.json":
        (folder / "metrics.jsonl").unlink()
    assert digits(trained, "--max-steps", 1, "--lr", 0.01, "--resume", "auto") == 0
    is_other = last != "checkpoints"  # it has settings, and they are others
    assert len(list(trained.iterdir())) == 1 + is_other
    shutil.rmtree(run_folder(trained, int(is_other)))
    assert digits(trained, "--max-steps", 4, "--ckpt-every", 1, "--resume", "auto") == 0
    assert [path.name for path in trained.iterdir()] == [folder.name]
    assert names(trained) == [f"{step:07d}.safetensors" for step in range(1, 5)]
    assert [line["step"] for line in metrics(trained)] == sorted({line["step"] for line in metrics(trained)})


def test_checkpoints_have_the_umasks_permissions(trained: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (checkpoint(trained, 4), run_folder(trained) / "config.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_damaged_metrics_are_cut_without_a_word(tmp_path: Path) -> None:
    good = '{"step": 1, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + b'5\n[1]\n{"loss": 1}\n{"step": "x"}\n\xff\n{"step": 2')
    cut_metrics(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_text() == good


@pytest.mark.parametrize("damage", ["zeros", "no end of line", "edited", "gone"])
def test_metrics_of_any_state_are_continued(trained: Path, damage: str) -> None:
    path = run_folder(trained) / "metrics.jsonl"
    content, before = path.read_bytes(), [line["step"] for line in metrics(trained)]
    changed = {
        "zeros": content + bytes(4096),  # as file systems leave them after a power failure
        "no end of line": content.rstrip(b"\n"),
        "edited": b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"),
    }
    path.write_bytes(changed[damage]) if damage in changed else path.unlink()
    assert digits(trained, "--max-steps", 6, "--ckpt-every", 1, "--log-every", 1, "--resume", "auto") == 0
    assert [line["step"] for line in metrics(trained)] == [*(before if damage != "gone" else []), 5, 6]


def test_a_folder_in_the_place_of_metrics_is_one_line(trained: Path, capsys: Any) -> None:
    path = run_folder(trained) / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    assert digits(trained, "--max-steps", 6, "--resume", "auto") == 2
    assert f"--resume: {path}: Is a directory" in runs.the_error(capsys) and len(names(trained)) == 4


def test_a_disk_too_full_for_a_log_does_not_end_the_training(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "a":
            raise OSError(28, "No space left on device")
        return usual(path, mode, *args, **options)

    usual = Path.open
    monkeypatch.setattr(Path, "open", full)
    assert digits(tmp_path, "--max-steps", 2, "--log-every", 1) == 0 and names(tmp_path) == ["0000002.safetensors"]
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(set(warned)) == 1 and len(warned) <= 2  # before and in the training
    assert "log.txt: cannot be written (No space left on device); training continues" in warned[0]


# ----------------------------------------------------------------------------------------------------------------------
# Settings and data


def test_settings_are_changed_on_purpose_and_logged(trained: Path, capsys: Any) -> None:
    argv = "--max-steps 6 --lr 0.003 --grad-clip 1.0 --resume auto".split()
    assert digits(trained, *argv) == 2 and "--override lr grad-clip resumes" in runs.the_error(capsys)
    assert digits(trained, *argv, "--override", "lr") == 2
    assert "--grad-clip (None, 1.0)" in runs.the_error(capsys)
    assert digits(trained, *argv, "--override", "lr", "grad_clip") == 0
    assert "Changed since then: " in log(trained) and "--lr (0.0001, 0.003)" in log(trained)
    assert [line["lr"] for line in metrics(trained)] == [1e-4] * 4 + [0.003] * 2
    again = "--max-steps 8 --lr 0.003 --grad-clip 1.0 --resume auto".split()
    assert digits(trained, *again) == 0, "the changed run is now of these settings"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--override lr", "--override lr: has no effect without --resume"),
        ("--override learning-rate --resume auto", "--override learning-rate: there is no flag of this name"),
        ("--override ema-decay --resume auto", "--override ema-decay: weights, optimizer or data depend on it"),
        ("--override process --resume auto", "--override process: weights, optimizer or data depend on it"),
    ],
)
def test_what_cannot_be_overridden_is_one_line(tmp_path: Path, capsys: Any, argv: str, message: str) -> None:
    assert digits(tmp_path / "results", "--max-steps", 1, *argv.split()) == 2
    assert message in runs.the_error(capsys) and not (tmp_path / "results").exists()


def photos(root: Path, classes: str, count: int = 3) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((8, 8, 3), 20 * number + i, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def of_photos(results: Path, root: Path, *argv: object) -> int:
    flags = "--vae none --model DiT-debug/2 --num-classes 3 --image-size 8 --device cpu --num-workers 0 --log-every 1"
    return start(results, *flags.split(), "--global-batch-size", 3, "--data-path", root, *argv)


@pytest.mark.parametrize("named", [False, True])
def test_other_classes_are_refused_by_name(tmp_path: Path, capsys: Any, named: bool) -> None:
    results, root = tmp_path / "results", photos(tmp_path / "photos", "abc")
    assert of_photos(results, root, "--max-steps", 1) == 0
    (root / "b").rename(root / "z")  # a, c, z: labels 1 and 2 mean other pictures
    resume = checkpoint(results, 1) if named else "auto"
    assert of_photos(results, root, "--max-steps", 2, "--resume", resume) == 2
    message = runs.the_error(capsys)
    assert "class 1 was 'b' and is 'c' in the data" in message and f"--resume {resume}" in message
    if not named:  # all of them renamed, and the same images
        for old, new in zip("acz", "xyw", strict=True):
            (root / old).rename(root / new)
        assert of_photos(results, root, "--max-steps", 2, "--resume", "auto") == 2
        assert "class 0 was 'a' and is 'w'" in runs.the_error(capsys)


def grow(path: Path) -> None:
    """Replace a picture by the same one in more bytes."""
    path.write_bytes(path.read_bytes() + b"x")


def test_files_of_other_sizes_are_said_and_a_digest_of_paths_alone_is_compared_as_such(tmp_path: Path) -> None:
    results, root = tmp_path / "results", photos(tmp_path / "photos", "abc")
    assert of_photos(results, root, "--max-steps", 1) == 0
    grow(root / "b" / "0.png")
    assert of_photos(results, root, "--max-steps", 2, "--resume", "auto") == 0
    assert log(results).count("as many images as before, but not the same") == 1

    groups, meta = read_groups(checkpoint(results, 2), lambda present: present)
    paths = "".join(f"{name}/{i}.png\n" for name in "abc" for i in range(3))
    meta["data"]["digest"] = hashlib.sha256(paths.encode()).hexdigest()
    save_checkpoint(checkpoint(results, 2), groups, meta)  # as version 0.1 wrote it
    assert of_photos(results, root, "--max-steps", 3, "--resume", "auto") == 0
    assert log(results).count("as many images as before, but not the same") == 1
    (root / "b" / "0.png").rename(root / "b" / "7.png")
    save_checkpoint(checkpoint(results, 3), groups, {**meta, "step": 3})
    assert of_photos(results, root, "--max-steps", 4, "--resume", "auto") == 0
    assert log(results).count("as many images as before, but not the same") == 2


def test_other_arrays_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images, labels), note = load_digits("train"), "as many images as before, but not the same"
    assert digits(tmp_path, "--resume", "auto", "--max-steps", 1) == 0
    assert digits(tmp_path, "--resume", "auto", "--max-steps", 2) == 0
    assert note not in log(tmp_path)
    monkeypatch.setattr("data.digits.load_digits", lambda split: (255 - images, labels))
    assert digits(tmp_path, "--resume", "auto", "--max-steps", 3) == 0
    assert log(tmp_path).count(note) == 1
    groups, meta = read_groups(checkpoint(tmp_path, 3), lambda present: present)
    meta["data"]["digest"] = None  # as earlier versions wrote it
    save_checkpoint(checkpoint(tmp_path, 3), groups, meta)
    assert digits(tmp_path, "--resume", "auto", "--max-steps", 4) == 0
    assert log(tmp_path).count(note) == 1


def test_another_number_of_images_is_said(tmp_path: Path) -> None:
    results, root = tmp_path / "results", photos(tmp_path / "photos", "abc")
    assert of_photos(results, root, "--max-steps", 1) == 0
    (root / "b" / "0.png").rename(root / "b" / "7.png")
    assert of_photos(results, root, "--max-steps", 2, "--resume", "auto") == 0
    assert log(results).count("as many images as before, but not the same") == 1
    (root / "b" / "7.png").unlink()
    assert of_photos(results, root, "--max-steps", 3, "--resume", "auto") == 0
    assert "Note: the data has 8 images; it had 9" in log(results)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    "argv",
    [
        "--lr 1e39", "--lr 1e-60", "--lr 1e-39", "--weight-decay inf", "--weight-decay 1e39", "--grad-clip 1e300",
        "--grad-clip 1e-50", "--skip-updates-above 1e-46", "--eval-cfg-scale 1e39",
    ],
)  # fmt: skip
def test_numbers_beyond_float32_are_refused(tmp_path: Path, capsys: Any, argv: str) -> None:
    """A tiny one is 0 there: nothing would be learned, and nobody told."""
    assert digits(tmp_path, "--max-steps", 1, *argv.split()) == 2
    error = runs.the_error(capsys)
    assert argv.split()[0] in error and "finite in float32" in error  # or "neither 0 nor infinite"
    assert not list(tmp_path.iterdir())


def test_weights_that_overflow_are_not_saved(tmp_path: Path, capsys: Any) -> None:
    assert digits(tmp_path, "--max-steps", 8, "--ckpt-every", 1, "--lr", 3e38, "--non-finite", "skip") != 0
    assert "not saved" in capsys.readouterr().err
    for path in tmp_path.glob("*/checkpoints/*"):
        assert all(tensor.isfinite().all() for tensor in runs.state(path).values())


@pytest.mark.parametrize(("group", "value"), [("optimizer", torch.nan), ("ema", torch.inf), ("model", torch.nan)])
def test_a_state_that_is_not_finite_is_not_resumed(trained: Path, capsys: Any, group: str, value: float) -> None:
    """As from a program without our checks: the checksums are those of its numbers."""
    path = checkpoint(trained, 4)
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith(group) and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, _metadata_without_checksums(path))
    assert digits(trained, "--max-steps", 5, "--resume", path) == 2
    assert re.search(rf"0000004.safetensors: {group}[^ ]* has NaN or infinity", runs.the_error(capsys))
    assert digits(trained, "--max-steps", 5, "--resume", "auto") == 0
    assert "skipped: " in capsys.readouterr().err and "at step 3" in log(trained)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer, not the file"),
        (b"<!doctype html><html>", "a web page, not a checkpoint"),
        (b"", "damaged or truncated safetensors file"),
        (b"\0" * 4000, "damaged or truncated safetensors file"),
        (None, "is a folder; give a file in it"),
    ],
)
def test_any_damage_of_the_newest_falls_back_to_the_one_before(
    trained: Path, capsys: Any, content: bytes | None, message: str
) -> None:
    newest = checkpoint(trained, 4)
    newest.unlink()
    newest.mkdir() if content is None else newest.write_bytes(content)
    assert digits(trained, "--max-steps", 4, "--resume", newest) == 2 and message in runs.the_error(capsys)
    newest.rename(newest.with_name("0000009.safetensors"))
    assert digits(trained, "--max-steps", 3, "--resume", "auto") == 0
    assert message in capsys.readouterr().err and "at step 3" in log(trained)


def _metadata_without_checksums(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata: dict[str, str] = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    document = json.loads(metadata["dit_family"])
    del document["crc32"], document["header_crc32"]
    return {"dit_family": json.dumps(document)}


def test_ranks_with_other_data_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from data.dataset import check_same_data
    from data.image_folder import ImageFolder
    from runtime import distributed

    here, there = photos(tmp_path / "a", "abc"), photos(tmp_path / "b", "abc")
    for change, message in [
        (lambda: grow(there / "a" / "0.png"), "rank 1 has other files than rank 0; is"),
        (lambda: (there / "a" / "0.png").rename(there / "a" / "9.png"), "rank 1 has other files than rank 0; is"),
        (lambda: (there / "a" / "9.png").unlink(), r"rank 1 has other images than rank 0 \(9 and 8\)"),
        (lambda: (there / "a").rename(there / "0"), "rank 1 has other"),
    ]:
        change()
        second = ImageFolder(there, 8)

        def both(facts: Any, second: ImageFolder = second) -> list[Any]:
            return [facts, {"images": len(second), "classes": second.classes, "files": second.digest()}]

        monkeypatch.setattr(distributed, "objects_from_all_ranks", both)
        with pytest.raises(UserError, match=message):
            check_same_data(ImageFolder(here, 8))
