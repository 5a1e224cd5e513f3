"""train.py end to end: what a run leaves, data of every kind, one process and two, mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import open_digits
from runtime.checkpoint import read_checkpoint
from runtime.errors import run
from tests import runs
from tests.processes import run_ranks
from tests.runs import checkpoint, last_checkpoint, metrics, run_folder, start

SHORT = [
    *runs.DIGITS,
    *"--model DiT-digits/2 --max-steps 6 --global-batch-size 12 --ckpt-every 4 --lr 2e-3".split(),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    assert start(results, *SHORT) == 0
    return results


def test_a_run_leaves_log_metrics_config_and_checkpoints(trained):
    folder = run_folder(trained)
    assert folder.name == "000-DiT-digits-2"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "log.txt",
        "metrics.jsonl",
    ]
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["0000004.safetensors", "0000006.safetensors"]
    assert [m["step"] for m in metrics(trained)] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(m["loss"]) and m["steps_per_sec"] > 0 and m["lr"] == 2e-3 for m in metrics(trained))


def test_log_lines_are_the_official_ones(trained):
    text = runs.log(trained)
    assert "DiT Parameters: 725,380" in text and "Dataset contains 1,297 images (digits)" in text
    first = metrics(trained)[0]
    assert f"(step=0000001) Train Loss: {first['loss']:.4f}, Train Steps/Sec: {first['steps_per_sec']:.2f}" in text
    assert "Saved checkpoint to" in text and text.rstrip().endswith("Done!")


def test_loss_falls(tmp_path):
    argv = "--model DiT-digits/2 --max-steps 60 --global-batch-size 32 --log-every 20 --lr 2e-3".split()
    assert start(tmp_path, *runs.DIGITS, *argv) == 0
    losses = [m["loss"] for m in metrics(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_checkpoint_holds_everything_that_sampling_needs(trained):
    path = checkpoint(trained, 6)
    average = read_checkpoint(path)
    assert average.group == "ema-0.9999" and average.meta["averages"] == {"ema-0.9999": {"decay": 0.9999}}
    meta = average.meta
    assert meta["format"] == 2 and meta["step"] == 6
    assert meta["model"]["name"] == "DiT-digits/2" and meta["model"]["depth"] == 4
    assert meta["model"]["sample_shape"] == [1, 8, 8] and meta["model"]["learn_sigma"] is False
    assert meta["process"] == {
        "name": "gaussian", "noise_schedule": "linear", "prediction": "epsilon", "loss_weight": "constant",
        "min_snr_gamma": 5.0,
    }  # fmt: skip
    assert meta["loss"] == {"name": "diffusion", "route_tokens": 0.0, "route_blocks": None}
    assert meta["optimizer"]["name"] == "adamw"
    assert meta["encoder"] == {"name": "none"}
    classes = [str(k) for k in range(10)]
    assert meta["data"] == {
        "image_shape": [1, 8, 8],
        "classes": classes,
        "images": 1297,
        "digest": open_digits("train").digest(),
    }
    model = read_checkpoint(path, "model").weights
    assert model.keys() == average.weights.keys()
    assert not torch.equal(model["final_layer.linear.weight"], average.weights["final_layer.linear.weight"])


def test_a_resolved_config_given_back_repeats_the_run(trained, tmp_path):
    assert start(tmp_path, "--config", run_folder(trained) / "config.json") == 0
    assert runs.losses(tmp_path) == runs.losses(trained)
    first, second = (json.loads((run_folder(f) / "config.json").read_text()) for f in (trained, tmp_path))
    assert first["run"].pop("results_dir") != second["run"].pop("results_dir")
    assert first == second
    assert first["model"]["num_classes"] == 10 and first["data"]["vae"] == "none" and first["data"]["image_size"] == 8


def test_one_process_and_two_train_alike(trained, tmp_path):
    done = run_ranks("train.py", *SHORT, "--results-dir", str(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(trained), metrics(tmp_path), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    one, two = (read_checkpoint(checkpoint(f, 6), "model").weights for f in (trained, tmp_path))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-4), key  # Adam turns rounding of tiny gradients into lr


COUNT_COLLECTIVES = """
import os
import torch.distributed as dist

calls = []
def recorded(name, call):
    def record(*args, **options):
        calls.append(f"{name} {options.get('async_op', False)}")
        return call(*args, **options)
    return record
for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
    setattr(dist, name, recorded(name, getattr(dist, name)))
import training.trainer
step = training.trainer.Trainer.train_step
def train_step(self, number, pieces):
    if number == 5 and os.environ["RANK"] == "0":
        open("calls", "w").write("; ".join(calls))
    calls.append(f"step {number}")
    return step(self, number, pieces)
training.trainer.Trainer.train_step = train_step
"""


def test_no_step_waits_for_another_rank_but_in_the_gradients(tmp_path):
    argv = "--log-every 100 --ckpt-every 100".split()
    done = run_ranks(
        "train.py", *SHORT, *argv, "--results-dir", str(tmp_path), folder=tmp_path, fault=COUNT_COLLECTIVES
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    steps = calls[calls.index("step 0") :].split("; ")  # DDP's own are not called from Python
    assert steps == [call for number in range(5) for call in (f"step {number}", "all_reduce True")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with images of two classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / label / f"{i}.png")
    return folder


ON_IMAGES = "--model DiT-debug/2 --num-classes 2 --device cpu --log-every 1".split()


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder_in_pixel_space_with_learned_variance(images, tmp_path, channels):
    argv = f"--data-path {images} --vae none --image-size 16 --max-steps 2 --global-batch-size 4 --num-workers 1"
    assert start(tmp_path, *ON_IMAGES, *argv.split(), "--in-channels", channels) == 0
    values = metrics(tmp_path)[-1]
    assert values["loss"] == pytest.approx(values["mse"] + values["vb"])
    meta = read_checkpoint(last_checkpoint(tmp_path)).meta
    assert meta["model"]["sample_shape"] == [channels, 16, 16] and meta["data"]["classes"] == ["a", "b"]


def test_image_folder_through_an_autoencoder(images, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "vae")
    argv = f"--data-path {images} --vae {tmp_path / 'vae'} --image-size 8 --max-steps 1 --global-batch-size 2"
    assert start(tmp_path / "runs", *ON_IMAGES, *argv.split(), "--num-workers", 0) == 0
    meta = read_checkpoint(last_checkpoint(tmp_path / "runs")).meta
    assert meta["model"]["sample_shape"] == [2, 8, 8] and meta["encoder"] == {"name": str(tmp_path / "vae")}


def test_latents_on_disk_train_as_their_images_do(images, tmp_path):
    from diffusers import AutoencoderKL

    from scripts import extract_latents

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    shared = f"--vae {tmp_path / 'vae'} --image-size 8 --num-workers 0".split()
    argv = ["--data-path", str(images), "--output", str(tmp_path / "latents"), "--device", "cpu", *shared]
    assert run(extract_latents.main, "extract_latents.py", argv) == 0
    shared += "--max-steps 3 --global-batch-size 4".split()
    for name, path in (("imagefolder", images), ("latents", tmp_path / "latents")):
        argv = ["--dataset", name, "--data-path", path, *ON_IMAGES, *shared]
        assert start(tmp_path / f"{name}-runs", *argv) == 0
    one, other = (runs.losses(tmp_path / f"{name}-runs") for name in ("imagefolder", "latents"))
    assert other == pytest.approx(one, rel=1e-3)  # the posterior parameters were rounded to float16


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--data-path nowhere --vae none", "--data-path: nowhere: no such folder"),
        ("--vae none", "--data-path: an image folder needs --data-path"),
        ("--data-path {images} --vae none --num-classes 3", "--num-classes 3: the data has 2 classes"),
        (
            "--data-path {images} --num-classes 2 --image-size 15 --vae none",
            "--image-size 15: sample_shape (3, 15, 15): height",
        ),
        ("--data-path {images} --num-classes 2 --image-size 250", "--vae ema: image size 250 is not a multiple"),
        ("--dataset digits --data-path {images}", "--data-path {images}: has no effect"),
        ("--dataset digits --model DiT-digits/2 --image-size 9", "--dataset digits: the digits are 8 pixels"),
        ("--dataset digits --model DiT-debug/2 --num-classes 7", "--num-classes 7: the data has 10"),
        ("--dataset digits --model DiT-tiny/2", "--model DiT-tiny/2: unknown model"),
        (
            "--dataset digits --class-dropout-prob 1.5",
            "--class-dropout-prob 1.5: class_dropout_prob must lie in [0, 1), not 1.5",
        ),
        ("--dataset digits --global-batch-size 0", "--global-batch-size 0"),
        (
            "--dataset digits --max-steps 2",
            "--model DiT-XL/2: made for 1000 classes, but the data has 10; give --model",
        ),
        ("--dataset digits --in-channels 3", "--in-channels 3: 3 for RGB or 1 for grey"),
        ("--data-path {images} --vae none --in-channels 2", "--in-channels 2"),
        ("--data-path {images} --vae nothing --num-classes 2", "--vae nothing: no such folder; give none, ema, mse"),
        ("--dataset digits --lr nan", "--lr nan: must be positive, and neither 0 nor infinite in float32"),
        ("--dataset digits --adam-betas 0.9 1.5", "--adam-betas 0.9 1.5: both must lie in [0, 1)"),
        ("--dataset digits --ema-decay 2", "--ema-decay 2.0"),
        ("--dataset digits --lr -1", "--lr -1.0: must be positive"),
        ("--dataset digits --lr-final-ratio 0.1", "--lr-final-ratio 0.1: has no effect"),
        ("--dataset digits --model DiT-digits/2 --results-dir {file}/x", "--results-dir {file}/x: cannot write"),
        ("--dataset digits --lr-schedule step", "--lr-schedule"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, words, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    places = {"images": images, "file": tmp_path / "file"}
    before = sorted(tmp_path.rglob("*"))
    assert run(train.main, "train.py", [*argv.format(**places).split(), "--device", "cpu"]) == 2
    assert words.format(**places) in runs.the_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before, "a refused run must leave nothing behind"


def test_an_empty_class_folder_is_refused(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    argv = ["--data-path", str(tmp_path), "--vae", "none", "--device", "cpu"]
    assert run(train.main, "train.py", argv) == 2
    assert "expected class folders" in capsys.readouterr().err


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert run(train.main, "train.py", SHORT) == 2
    assert "--global-batch-size 12: not divisible by the 5 processes" in capsys.readouterr().err


def test_cuda_without_cuda_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(train.main, "train.py", [*SHORT, "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no CUDA device" in capsys.readouterr().err
