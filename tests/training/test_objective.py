"""train.py with either process and with alignment: runs, checkpoints, resuming, mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from models import create_model
from runtime.checkpoint import read_checkpoint, read_groups
from runtime.errors import run
from tests.processes import run_script

SHORT = "--dataset digits --device cpu --num-workers 0 --global-batch-size 12 --log-every 1 --lr 2e-3".split()
FLOW = {"name": "flow", "times": "logit_normal", "shift": 1.0, "weight": "constant", "direction": 0.0}


def start(results: Path, *argv: Any) -> int:
    return run(train.main, "train.py", [*map(str, argv), "--results-dir", str(results)])


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(results: Path) -> Path:
    return sorted(results.glob("*/checkpoints/*"))[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.parametrize(
    ("model", "flags", "process"),
    [
        ("DDT-digits/2", "", FLOW),
        ("IDiT-digits/2", "", FLOW),
        ("DiT-digits/2", "--process flow", FLOW),
        ("DiT-debug/2", "--process flow", FLOW),  # which predicts a variance elsewhere
        ("DDT-digits/2", "--process gaussian", {
            "name": "gaussian", "noise_schedule": "linear", "predict_xstart": False, "learn_sigma": False,
        }),
        ("DDT-digits/2", "--flow-times uniform --flow-shift 2 --flow-weight ratio_at_most_5 --flow-direction 1", {
            "name": "flow", "times": "uniform", "shift": 2.0, "weight": "ratio_at_most_5", "direction": 1.0,
        }),
    ],
)  # fmt: skip
def test_a_checkpoint_says_how_its_images_were_noised(
    model: str, flags: str, process: dict[str, Any], tmp_path: Path
) -> None:
    argv = [*SHORT, "--model", model, "--max-steps", "2", *flags.split()]
    assert start(tmp_path, *argv) == 0
    meta = read_checkpoint(last_checkpoint(tmp_path)).meta
    assert meta is not None and meta["process"] == process
    assert meta["train"]["process"] == process["name"] and not meta["train"]["learn_sigma"]
    assert ("direction" in metrics(last_checkpoint(tmp_path).parents[1])[0]) == bool(process.get("direction"))


def test_a_resolved_config_given_back_repeats_the_run(tmp_path: Path) -> None:
    argv = [*SHORT, "--model", "DDT-digits/2", "--max-steps", "3", "--flow-shift", "2", "--encoder-depth", "5"]
    assert start(tmp_path / "a", *argv) == 0
    (first,) = (tmp_path / "a").iterdir()
    assert start(tmp_path / "b", "--config", first / "config.json") == 0
    (second,) = (tmp_path / "b").iterdir()
    assert [m["loss"] for m in metrics(first)] == [m["loss"] for m in metrics(second)]
    meta = read_checkpoint(last_checkpoint(tmp_path / "b")).meta
    assert meta is not None and meta["model"]["encoder_depth"] == 5 and meta["process"]["shift"] == 2


def test_a_flow_is_learned(tmp_path: Path) -> None:
    argv = "--dataset digits --device cpu --num-workers 0 --global-batch-size 32 --log-every 20 --lr 2e-3".split()
    assert start(tmp_path, *argv, "--model", "DDT-digits/2", "--max-steps", "60") == 0
    losses = [m["loss"] for m in metrics(tmp_path / "000-DDT-digits-2")]
    assert losses[-1] < 0.7 * losses[0]


def test_a_flow_resumes_bit_by_bit(tmp_path: Path) -> None:
    argv = [*SHORT, "--model", "DDT-digits/2"]
    assert start(tmp_path / "whole", *argv, "--max-steps", 6) == 0
    for steps in (3, 6):
        assert start(tmp_path / "cut", *argv, "--max-steps", steps, "--resume", "auto") == 0
    whole, cut = (read_groups(last_checkpoint(tmp_path / name), ["model", "ema"])[0] for name in ("whole", "cut"))
    for group in whole:
        assert all(torch.equal(value, cut[group][name]) for name, value in whole[group].items())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            "--model DDT-digits/2 --noise-schedule squaredcos_cap_v2",
            "--noise-schedule squaredcos_cap_v2: has no effect",
        ),
        ("--model DDT-digits/2 --predict-xstart", "--predict-xstart True: has no effect with --process flow"),
        ("--model DiT-digits/2 --flow-times uniform", "--flow-times uniform: has no effect with --process gaussian"),
        ("--model DiT-digits/2 --flow-shift 1", "--flow-shift 1.0: has no effect with --process gaussian"),
        ("--model DDT-digits/2 --flow-shift 0", "--flow-shift 0.0: the time shift must be positive"),
        ("--model DDT-digits/2 --flow-direction -1", "--flow-direction -1.0: the weight of the direction"),
        ("--model DDT-digits/2 --flow-weight min_snr", "--flow-weight: invalid choice: 'min_snr'"),
        ("--model DDT-digits/2 --process jump", "--process: invalid choice: 'jump'"),
        ("--model DiT-digits/2 --process flow --learn-sigma", "--learn-sigma: a flow has no variance"),
        ("--model DDT-digits/2 --learn-sigma", "--learn-sigma True: has no effect on DDT-digits/2"),
        ("--model DDT-digits/2 --encoder-depth 6", "--model DDT-digits/2: encoder_depth must lie in 1..5"),
        ("--model DDT-digits/2 --encoder-depth 0", "--model DDT-digits/2: encoder_depth must lie in 1..5"),
        ("--model DiT-digits/2 --encoder-depth 2", "--encoder-depth 2: has no effect on DiT-digits/2"),
        ("--model DDT-digits/2 --align test_vit", "--align test_vit: needs RGB images, and these are grey"),
        ("--model DDT-digits/2 --align-block 3", "--align-block 3: has no effect without --align"),
        ("--model DDT-digits/2 --align-ckpt x.pth", "--align-ckpt x.pth: has no effect without --align"),
        ("--model DDT-digits/2 --init-from {missing}", "--init-from {missing} as DDT-digits/2: the weights do not fit"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.pth"
    network = create_model("DDT-digits/2")
    torch.save({k: v for k, v in network.state_dict().items() if "s_embedder" not in k}, missing)
    argv, words = argv.format(missing=missing), words.format(missing=missing)
    assert start(tmp_path / "results", *SHORT, *argv.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "results").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Alignment


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


def test_aligned_training_resumes_with_its_projector(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "whole", *aligned(material, "--max-steps", 5)) == 0
    for steps in (2, 5):
        assert start(tmp_path / "cut", *aligned(material, "--max-steps", steps, "--resume", "auto")) == 0
    names = ["model", "ema", "optimizer", "alignment"]
    whole, cut = (read_groups(last_checkpoint(tmp_path / name), names)[0] for name in ("whole", "cut"))
    for group in names:
        assert all(torch.equal(value, cut[group][name]) for name, value in whole[group].items()), group
    assert whole["alignment"].keys() == {f"projector.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert whole["alignment"]["projector.4.weight"].shape == (64, 64)
    first, _ = read_groups(sorted((tmp_path / "cut").glob("*/checkpoints/*"))[0], ["alignment"])
    assert not torch.equal(first["alignment"]["projector.0.weight"], whole["alignment"]["projector.0.weight"])
    line = metrics(next((tmp_path / "whole").iterdir()))[0]
    assert line["loss"] == pytest.approx(line["mse"] + 0.5 * line["align"], rel=1e-5) and 0.5 < line["align"] < 1.5


def test_the_projector_is_no_part_of_the_model(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path, *aligned(material, "--max-steps", 1, "--align-width", 8)) == 0
    network = create_model("DDT-debug/2", input_size=32, in_channels=3, num_classes=2)
    for group in ("ema", "model"):
        assert read_checkpoint(last_checkpoint(tmp_path), group).weights.keys() == network.state_dict().keys()


def test_alignment_is_learned(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path, *aligned(material, "--max-steps", 40, "--align-weight", 2)) == 0
    values = [m["align"] for m in metrics(next(tmp_path.iterdir()))]
    assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5])


def test_two_processes_align_as_one(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "one", *aligned(material, "--max-steps", 2)) == 0
    argv = [*aligned(material, "--max-steps", 2), "--results-dir", str(tmp_path / "two")]
    done = run_script("train.py", *argv, ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (metrics(next((tmp_path / name).iterdir())) for name in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)


def test_weights_of_one_resolution_start_another_as_they_are(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "small", *aligned(material, "--max-steps", 2, "--image-size", 16)) == 0
    small = last_checkpoint(tmp_path / "small")
    argv = aligned(material, "--max-steps", 1, "--lr", 1e-12, "--init-from", small, "--precision", "bf16")
    assert start(tmp_path / "large", *argv) == 0
    old, new = (read_checkpoint(path, "model").weights for path in (small, last_checkpoint(tmp_path / "large")))
    ema = read_checkpoint(small).weights  # what --init-from takes
    assert old.keys() == new.keys()
    assert all(torch.allclose(new[name], ema[name], atol=1e-9) for name in new)
    assert "drawn anew" not in (tmp_path / "large" / "000-DDT-debug-2" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--align-block 5", "--align-block 5: DDT-debug/2 has blocks 1 to 4"),
        ("--align-block 0", "--align-block 0: DDT-debug/2 has blocks 1 to 4"),
        ("--align resnet18", "--align resnet18: resnet18 is no plain vision transformer"),
        ("--align dinov5", "--align dinov5: unknown; give dinov2_vits14"),
        ("--image-size 24", "--align test_vit: needs images whose side is a multiple of 16, not 24"),
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
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "results").exists()


def test_latents_on_disk_have_no_images_to_align_with(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import AutoencoderKL

    from scripts import extract_latents

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "vae")
    argv = f"--data-path {material / 'images'} --output {tmp_path / 'latents'} --vae {tmp_path / 'vae'} --image-size 32"
    assert (
        run(extract_latents.main, "extract_latents.py", [*argv.split(), "--device", "cpu", "--num-workers", "0"]) == 0
    )
    capsys.readouterr()
    given = aligned(material, "--dataset", "latents", "--vae", tmp_path / "vae")
    given[given.index("--data-path") + 1] = str(tmp_path / "latents")
    assert start(tmp_path / "results", *given) == 2
    assert "--align test_vit: needs raw images, which latents on disk are not" in capsys.readouterr().err
