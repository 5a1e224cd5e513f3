"""Training with features aligned to a vision encoder's: its loss, its projector in checkpoints, mistakes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import create_model
from runtime.checkpoint import read_checkpoint
from runtime.errors import run
from runtime.groups import read_groups
from tests import runs
from tests.processes import run_ranks
from tests.runs import checkpoint, last_checkpoint, metrics, start, state


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes, 32 pixels wide, and a random vision transformer in a file."""
    folder, rng = tmp_path_factory.mktemp("material"), np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(4):
            picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            picture.save(folder / "images" / label / f"{i}.png")
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0)
    save_file(vit.state_dict(), folder / "vit.safetensors")
    return folder


def aligned(material: Path, *argv: Any) -> list[str]:
    """Flags of a run on the material."""
    given = f"--data-path {material / 'images'} --model DDT-debug/2 --vae none --image-size 32 --num-classes 2 --device"
    given += " cpu --num-workers 0 --global-batch-size 4 --log-every 1 --lr 2e-3 --align test_vit --align-ckpt"
    return [*given.split(), str(material / "vit.safetensors"), "--align-block", "3", *map(str, argv)]


@pytest.fixture(scope="module")
def uncut(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 5 steps."""
    results = tmp_path_factory.mktemp("uncut")
    assert start(results, *aligned(material, "--max-steps", 5)) == 0
    return results


def test_aligned_training_resumes_with_its_projector(material: Path, uncut: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "cut", *aligned(material, "--max-steps", 2)) == 0
    assert start(tmp_path / "cut", *aligned(material, "--max-steps", 5, "--resume", "auto")) == 0
    whole, cut = (state(checkpoint(results, 5)) for results in (uncut, tmp_path / "cut"))
    runs.assert_same(whole, cut)
    parts = {f"projector.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert {f"projector/{part}" for part in parts} == {name for name in whole if name.startswith("projector/")}
    assert whole["projector/projector.4.weight"].shape == (64, 64)
    first = state(checkpoint(tmp_path / "cut", 2))
    assert not torch.equal(first["projector/projector.0.weight"], whole["projector/projector.0.weight"])
    line = metrics(uncut)[0]
    assert line["loss"] == pytest.approx(line["mse"] + 0.5 * line["align"], rel=1e-5) and 0.5 < line["align"] < 1.5


def test_the_projector_is_no_part_of_the_model(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path, *aligned(material, "--max-steps", 1, "--align-width", 8)) == 0
    network = create_model("DDT-debug/2", sample_shape=(3, 32, 32), num_classes=2)
    for group in ("ema", "model"):
        assert read_checkpoint(last_checkpoint(tmp_path), group).weights.keys() == network.state_dict().keys()


def test_alignment_is_learned(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path, *aligned(material, "--max-steps", 40, "--align-weight", 2)) == 0
    values = [m["align"] for m in metrics(tmp_path)]
    assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5])


def test_two_processes_align_as_one(material: Path, uncut: Path, tmp_path: Path) -> None:
    argv = [*aligned(material, "--max-steps", 2, "--grad-checkpointing"), "--results-dir", str(tmp_path)]
    done = run_ranks("train.py", *argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(metrics(uncut)[:2], metrics(tmp_path), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)


def test_a_dry_run_predicts_projector_and_encoder(material: Path) -> None:
    from tests.training.test_dry_run import measured_peak, prediction

    argv = aligned(material, "--global-batch-size", 16)
    vit = sum(p.nbytes for p in timm.create_model("test_vit", num_classes=0, img_size=32).parameters())
    predicted = prediction(*argv)["peak"]  # the encoder's weights are among what operations see
    assert predicted == pytest.approx(measured_peak(*argv) + vit, rel=0.1)


def test_weights_of_one_resolution_start_another_as_they_are(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "small", *aligned(material, "--max-steps", 2, "--image-size", 16)) == 0
    small = last_checkpoint(tmp_path / "small")
    argv = aligned(material, "--max-steps", 1, "--lr", 1e-12, "--init-from", small, "--precision", "bf16")
    assert start(tmp_path / "large", *argv) == 0
    old, new = (read_checkpoint(path, "model").weights for path in (small, last_checkpoint(tmp_path / "large")))
    ema = read_checkpoint(small).weights  # what --init-from takes
    assert old.keys() == new.keys()
    assert all(torch.allclose(new[name], ema[name], atol=1e-9) for name in new)
    assert "initialised afresh" not in runs.log(tmp_path / "large")


def test_another_file_of_other_code_under_the_name_of_align_ckpt_is_another_target(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results, weights = tmp_path / "vit.pth", tmp_path / "results", load_file(material / "vit.safetensors")
    argv = aligned(material, "--align-ckpt", path, "--ckpt-every", 1, "--max-steps")
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    first = hashlib.sha256(path.read_bytes()).hexdigest()
    assert start(results, *argv, 1) == 0
    for note in ("unverified: the file has no checksums", f"SHA-256 {first}, compared when the run is resumed"):
        assert f"--align-ckpt: {note}" in runs.log(results)
    moved = path.rename(tmp_path / "moved.pth")
    assert start(results, *argv, 2, "--align-ckpt", moved, "--resume", "auto") == 0
    assert f"Changed since then: --max-steps (1, 2); --align-ckpt ({path}, {moved})" in runs.log(results)
    assert read_groups(checkpoint(results, 2), lambda present: ["model"])[1]["align_sha256"] == first

    torch.save({name: tensor + 0.01 for name, tensor in weights.items()}, path)
    second = hashlib.sha256(path.read_bytes()).hexdigest()
    change = f"--align-ckpt (SHA-256 {first[:12]}..., {second[:12]}...)"
    for resume, where in (("auto", "run 000-DDT-debug-2 differs in"), (checkpoint(results, 2), "has other settings:")):
        assert start(results, *argv, 3, "--resume", resume) == 2
        message = runs.the_error(capsys)
        assert f"{where} {change}; --override align-ckpt resumes all the same" in message
    assert start(results, *argv, 3, "--resume", "auto", "--override", "align-ckpt") == 0
    assert read_groups(checkpoint(results, 3), lambda present: ["model"])[1]["align_sha256"] == second


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--align-block 5", "--align-block 5: DDT-debug/2 has blocks 1 to 4"),
        ("--align-block 0", "--align-block 0: DDT-debug/2 has blocks 1 to 4"),
        ("--align resnet18", "--align resnet18: resnet18 is not a plain vision transformer"),
        ("--align dinov5", "--align dinov5: unknown; give dinov2_vits14"),
        ("--image-size 24", "--align test_vit: needs images with sides of multiples of 16, not 24"),
        ("--align-weight 0", "--align test_vit: the weight must be positive"),
        ("--align-width 0", "--align test_vit: the hidden width must be at least 1, not 0"),
        ("--align-ckpt nothing.pth", "--align-ckpt nothing.pth: no such file"),
        ("--in-channels 1", "--align test_vit: needs RGB images, and these are grey"),
    ],
)
def test_an_alignment_that_cannot_be_is_refused(
    argv: str, words: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "results", *aligned(material, *argv.split())) == 2
    assert words in runs.the_error(capsys)
    assert not (tmp_path / "results").exists()


def test_latents_on_disk_have_no_images_to_align_with(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import AutoencoderKL

    from scripts import extract_latents

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "vae")
    argv = f"--data-path {material / 'images'} --output {tmp_path / 'latents'} --vae {tmp_path / 'vae'} --image-size 32"
    argv += " --device cpu --num-workers 0"
    assert run(extract_latents.main, "extract_latents.py", argv.split()) == 0
    capsys.readouterr()
    given = aligned(material, "--dataset", "latents", "--vae", tmp_path / "vae")
    given[given.index("--data-path") + 1] = str(tmp_path / "latents")
    assert start(tmp_path / "results", *given) == 2
    assert "--align test_vit: needs raw images, which stored latents are not" in runs.the_error(capsys)


@pytest.mark.slow
def test_processes_that_hold_parts_align_alike(material: Path, uncut: Path, tmp_path: Path) -> None:
    options = [*aligned(material, "--max-steps", 5, "--parallel", "fsdp"), "--results-dir", str(tmp_path / "two")]
    done = run_ranks("train.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for step, loss in runs.losses(uncut).items():
        assert runs.losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4)
    whole, parts = (state(checkpoint(results, 5)) for results in (uncut, tmp_path / "two"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-4)
