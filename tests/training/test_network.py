"""Weights to start from: what they decide, what is said of them, and what does not fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from models import create_model
from runtime.errors import run
from tests import runs
from tests.checkpoints import write_network
from tests.runs import DIGITS, checkpoint, log, start

MODEL = "--model DiT-debug/2 --global-batch-size 4 --device cpu --num-workers 0 --log-every 1 --max-steps 1".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of photos, and a run of one step on them: grey pixels, 8 x 8."""
    root = tmp_path_factory.mktemp("trained")
    for number, name in enumerate(("birds", "cats")):
        (root / "photos" / name).mkdir(parents=True)
        Image.fromarray(np.full((12, 12, 3), 90 * number, np.uint8)).save(root / "photos" / name / "0.png")
    argv = ["--data-path", root / "photos", *"--vae none --image-size 8 --in-channels 1 --num-classes 2".split()]
    assert start(root / "runs", *MODEL, *argv) == 0
    return root


def again(trained: Path, *argv: object) -> list[object]:
    return [*MODEL, "--num-classes", 2, "--data-path", trained / "photos", "--init-from", argv[0], *argv[1:]]


def test_autoencoder_and_image_size_are_those_of_the_weights(trained: Path, tmp_path: Path) -> None:
    ckpt = checkpoint(trained / "runs", 1)
    assert start(tmp_path, *again(trained, ckpt)) == 0
    first, rest = "--init-from: --vae none --image-size 8 --in-channels 1, as the weights were trained", log(tmp_path)
    assert first in rest and "--init-from: DiT-debug/2, process gaussian, step 1, weights 'ema-0.9999'" in rest
    assert "the average still holds 100% of the weights it started from" in rest
    assert start(tmp_path, *again(trained, ckpt, "--resume", "auto", "--max-steps", 2)) == 0
    assert log(tmp_path).count(first) == 1 and "at step 1" in log(tmp_path)


def test_a_flag_decides_otherwise(trained: Path) -> None:
    setup = runs.open_setup(*again(trained, checkpoint(trained / "runs", 1), "--image-size", 16))
    assert setup.config.data.vae == "none" and setup.network.sample_shape == (1, 16, 16)
    assert "--init-from: positions recomputed for 64 tokens (the weights had 16)" in setup.start_notes


@pytest.mark.parametrize("dry", [False, True])
def test_a_dry_run_shows_the_start_and_another_process(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).symlink_to(trained / "photos" / "cats")
    ckpt = checkpoint(trained / "runs", 1)
    argv = [*again(trained, ckpt, "--data-path", tmp_path / "photos"), "--prediction", "v", *(["--dry-run"] * dry)]
    assert start(tmp_path / "runs", *argv) == 0
    out = capsys.readouterr().out
    assert "--init-from: label rows: 1 kept by name, 1 initialised afresh, null row kept" in out
    assert f"Warning: --prediction v: --init-from {ckpt} was trained with --prediction epsilon" in out


@pytest.mark.parametrize("dry", [False, True])
def test_another_number_of_frames_is_said_before_work_and_made_as_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    network = create_model("Latte-debug/2", sample_shape=(5, 1, 12, 12), learn_sigma=False, num_classes=40)
    ckpt = write_network(tmp_path / "a.safetensors", "Latte-debug/2", network, process={"name": "flow"})
    argv = [*"--model Latte-debug/2 --process flow --num-classes 40 --global-batch-size 2".split(), "--init-from", ckpt]
    argv += [*runs.MOVING_DIGITS, "--max-steps", 1, *["--dry-run"] * dry]  # of 4 frames
    assert start(tmp_path / "runs", *argv) == 2
    error = runs.the_error(capsys)
    assert (
        f"--init-from {ckpt}: made for 5 frames, not 4; give --frame-positions" in error and "--num-frames 5" in error
    )
    assert not (tmp_path / "runs").exists()
    assert start(tmp_path / "runs", *argv, "--frame-positions", "interpolate") == 0
    out = capsys.readouterr().out
    assert "--init-from: positions of 4 frames from those of 5 by --frame-positions interpolate" in out
    if not dry:
        made = runs.state(checkpoint(tmp_path / "runs", 1))["model/temp_embed"]
        assert torch.equal(made[0, 0], network.temp_embed[0, 0])
        torch.testing.assert_close(made[0, 3], network.temp_embed[0, 4], rtol=0, atol=1e-4)
        more = [*argv, "--max-steps", 2, "--resume", checkpoint(tmp_path / "runs", 1), "--frame-positions"]
        assert start(tmp_path / "runs", *more, "extend") == 2
        assert "--frame-positions (interpolate, extend)" in runs.the_error(capsys)
        assert start(tmp_path / "runs", *more, "interpolate") == 0


@pytest.mark.parametrize(("classes", "theirs"), [(0, 40), (40, 0)])
def test_weights_with_labels_and_without_are_told_apart(
    classes: int, theirs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = create_model("Latte-debug/2", sample_shape=(4, 1, 12, 12), learn_sigma=False, num_classes=theirs)
    torch.save({"ema": network.state_dict()}, tmp_path / "a.pt")
    argv = [*"--model Skip-Latte-debug/2 --depth 4 --process flow --global-batch-size 2".split(), *runs.MOVING_DIGITS]
    argv += ["--num-classes", classes, "--init-from", tmp_path / "a.pt"]
    assert start(tmp_path / "runs", *argv) == 2
    error, kind = runs.the_error(capsys), "class-conditional" if theirs else "unconditional"
    assert f"--init-from {tmp_path / 'a.pt'}: {kind} weights (" in error and f"num_classes is {classes}; give" in error
    assert f"or --num-classes {theirs}" in error


def test_a_dry_run_names_another_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*again(trained, checkpoint(trained / "runs", 1)), "--model", "DiT-digits/2", "--dry-run"]
    assert run(train.main, "train.py", [*map(str, argv)]) == 2
    assert "the weights do not fit the model in" in (error := runs.the_error(capsys))
    assert "found those of DiT-debug/2" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--in-channels 3", "--vae none on 1 channels, and this run has 3 (--vae none); give --in-channels 1"),
        ("--vae {vae} --in-channels 3", "on 1 channels, and this run has 4 (--vae {vae}); give --vae none"),
    ],
)
def test_data_of_other_channels_name_the_flag(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, words: str
) -> None:
    if "vae" in argv:
        from tests.networks import small_autoencoder

        small_autoencoder(tmp_path / "vae")
    ckpt, vae = checkpoint(trained / "runs", 1), tmp_path / "vae"
    assert start(tmp_path / "runs", *again(trained, ckpt, *argv.format(vae=vae).split())) == 2
    assert words.format(vae=vae) in runs.the_error(capsys)


def test_another_process_is_a_warning(trained: Path, tmp_path: Path) -> None:
    argv = [*DIGITS, *"--model DiT-debug/2 --num-classes 10 --global-batch-size 4 --image-size 8".split()]
    assert start(tmp_path / "a", *argv, "--no-learn-sigma", "--max-steps", 1) == 0
    ckpt = checkpoint(tmp_path / "a", 1)
    setup = runs.open_setup(*argv, "--init-from", ckpt, "--process", "flow")
    assert f"--process flow: --init-from {ckpt} was trained with --process gaussian" in setup.warnings()
    same = runs.open_setup(*argv, "--init-from", ckpt, "--no-learn-sigma").warnings()
    assert not any("trained with" in line for line in same)


def test_the_name_of_a_release_says_where_its_file_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, file = [*DIGITS, "--init-from", "DiT-XL-2-256x256"], "pretrained_models/DiT-XL-2-256x256.pt"
    assert start(tmp_path, *argv) == 2
    assert f"give its file: python sample.py --ckpt DiT-XL-2-256x256 downloads it to {file}" in runs.the_error(capsys)
    (tmp_path / "pretrained_models").mkdir()
    torch.save({}, tmp_path / file)
    assert start(tmp_path, *argv) == 2
    assert runs.the_error(capsys).endswith(f"give its file: it is {file}\n")


def test_resuming_a_checkpoint_takes_the_same_command_and_keeps_where_it_began(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = checkpoint(trained / "runs", 1)
    command = again(trained, ckpt)
    assert start(tmp_path, *command) == 0
    first = checkpoint(tmp_path, 1)
    assert start(tmp_path, *command, "--max-steps", 2, "--resume", first) == 0
    without = [*MODEL, *"--num-classes 2 --vae none --image-size 8 --in-channels 1 --data-path".split()]
    argv = [*without, trained / "photos", "--max-steps", 3, "--resume", checkpoint(tmp_path, 2)]
    assert start(tmp_path, *argv) == 0
    assert start(tmp_path, *command, "--max-steps", 3, "--resume", "auto") == 0
    assert "Already at step 3 of 3: nothing to train; a larger --max-steps" in log(tmp_path)
    capsys.readouterr()
    assert start(tmp_path, *command, "--lr", 0.1, "--ema-ramp", "--max-steps", 1) == 0  # a later run
    assert start(tmp_path, *command, "--lr", 0.2, "--max-steps", 4, "--resume", "auto") == 2
    assert "nothing to resume: run 000-DiT-debug-2 differs in --lr (0.0001, 0.2)" in runs.the_error(capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_images_is_in_the_log(trained: Path, tmp_path: Path, workers: int) -> None:
    photos = Path(shutil.copytree(trained / "photos", tmp_path / "photos"))
    (photos / "cats" / "1.png").write_bytes(b"")
    (photos / "cats" / "2.heic").touch()
    argv = ["--data-path", photos, *"--vae none --image-size 8 --num-classes 2 --num-workers".split(), workers]
    assert start(tmp_path / "runs", *MODEL, *argv) == 0
    lines = [line for line in log(tmp_path / "runs").splitlines() if "Warning: " in line]
    formats = "JPEG, PNG, WebP, BMP, TIFF and PPM are read; convert other images to JPEG or PNG"
    assert sum(f"{photos}: left out 1 .heic; {formats}" in line for line in lines) == 1
    assert sum("1.png: cannot be read: the file is empty; replace or remove the file" in line for line in lines) == 1
