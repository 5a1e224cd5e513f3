import json

import numpy as np
import pytest
import torch
from PIL import Image
from runtime.config import parse_config

import train
from runtime.checkpoint import read_checkpoint
from runtime.errors import run
from tests.processes import run_script
from training import trainer
from training.config import TrainConfig

DIGITS = "--dataset digits --model DiT-digits/2 --num-workers 0 --device cpu".split()
SHORT = [*DIGITS, *"--max-steps 6 --global-batch-size 12 --log-every 1 --ckpt-every 4 --lr 2e-3".split()]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    assert run(train.main, "train.py", [*SHORT, "--results-dir", str(results)]) == 0
    return results / "000-DiT-digits-2"


def test_a_run_leaves_log_metrics_config_and_checkpoints(trained):
    assert sorted(p.name for p in trained.iterdir()) == ["checkpoints", "config.json", "log.txt", "metrics.jsonl"]
    names = sorted(p.name for p in (trained / "checkpoints").iterdir())
    assert names == ["0000004.safetensors", "0000006.safetensors"]
    assert [m["step"] for m in metrics(trained)] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(m["loss"]) and m["steps_per_sec"] > 0 and m["lr"] == 2e-3 for m in metrics(trained))


def test_log_lines_are_the_official_ones(trained):
    text = (trained / "log.txt").read_text()
    assert "DiT Parameters: 725,380" in text and "Dataset contains 1,297 images (digits)" in text
    first = metrics(trained)[0]
    assert f"(step=0000001) Train Loss: {first['loss']:.4f}, Train Steps/Sec: {first['steps_per_sec']:.2f}" in text
    assert "Saved checkpoint to" in text and text.rstrip().endswith("Done!")


def test_loss_falls(tmp_path):
    argv = [*DIGITS, *"--max-steps 60 --global-batch-size 32 --log-every 20 --lr 2e-3".split()]
    assert run(train.main, "train.py", [*argv, "--results-dir", str(tmp_path)]) == 0
    losses = [m["loss"] for m in metrics(tmp_path / "000-DiT-digits-2")]
    assert losses[-1] < 0.6 * losses[0]


def test_checkpoint_holds_everything_sample_needs(trained):
    checkpoint = read_checkpoint(trained / "checkpoints" / "0000006.safetensors")
    assert checkpoint.meta["model"]["name"] == "DiT-digits/2" and checkpoint.meta["model"]["depth"] == 4
    assert checkpoint.meta["process"] == {
        "name": "gaussian", "noise_schedule": "linear", "predict_xstart": False, "learn_sigma": False,
    }  # fmt: skip
    assert checkpoint.meta["data"]["image_shape"] == [1, 8, 8] and checkpoint.meta["step"] == 6
    model = read_checkpoint(trained / "checkpoints" / "0000006.safetensors", "model").weights
    assert model.keys() == checkpoint.weights.keys()
    assert not torch.equal(model["final_layer.linear.weight"], checkpoint.weights["final_layer.linear.weight"])


def test_a_resolved_config_given_back_repeats_the_run(trained, tmp_path):
    argv = ["--config", str(trained / "config.json"), "--results-dir", str(tmp_path)]
    assert run(train.main, "train.py", argv) == 0
    again = tmp_path / "000-DiT-digits-2"
    for ours, theirs in zip(metrics(trained), metrics(again), strict=True):
        assert ours["loss"] == theirs["loss"]
    first, second = (json.loads((f / "config.json").read_text()) for f in (trained, again))
    assert {**first, "results_dir": ""} == {**second, "results_dir": ""}
    assert first["num_classes"] == 10 and first["vae"] == "none" and first["image_size"] == 8


def test_one_process_and_two_train_alike(trained, tmp_path):
    done = run_script("train.py", *SHORT, "--results-dir", str(tmp_path), ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "000-DiT-digits-2"
    for one, two in zip(metrics(trained), metrics(folder), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    name = "checkpoints/0000006.safetensors"
    one, two = (read_checkpoint(f / name, "model").weights for f in (trained, folder))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-4), key  # Adam turns rounding of tiny gradients into lr


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
                tmp_path / "images" / label / f"{i}.png"
            )
    return tmp_path / "images"


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder_in_pixel_space_with_learned_variance(image_folder, tmp_path, channels):
    argv = f"--data-path {image_folder} --model DiT-debug/2 --vae none --image-size 16 --num-classes 2 --max-steps 2"
    argv += f" --global-batch-size 4 --log-every 1 --num-workers 1 --in-channels {channels} --results-dir {tmp_path}"
    assert run(train.main, "train.py", argv.split()) == 0
    values = metrics(tmp_path / "000-DiT-debug-2")[-1]
    assert values["loss"] == pytest.approx(values["mse"] + values["vb"])
    meta = read_checkpoint(tmp_path / "000-DiT-debug-2" / "checkpoints" / "0000002.safetensors").meta
    assert meta["model"]["in_channels"] == channels and meta["data"]["classes"] == ["a", "b"]


def test_image_folder_through_an_autoencoder(image_folder, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "vae")
    argv = f"--data-path {image_folder} --model DiT-debug/2 --vae {tmp_path / 'vae'} --image-size 8 --num-classes 2"
    argv += f" --max-steps 1 --global-batch-size 2 --num-workers 0 --log-every 1 --results-dir {tmp_path}"
    assert run(train.main, "train.py", argv.split()) == 0
    meta = read_checkpoint(tmp_path / "000-DiT-debug-2" / "checkpoints" / "0000001.safetensors").meta
    assert meta["model"]["in_channels"] == 2 and meta["model"]["input_size"] == 8


def test_latents_on_disk_train_as_their_images_do(image_folder, tmp_path):
    from diffusers import AutoencoderKL

    from scripts import extract_latents

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    shared = f"--vae {tmp_path / 'vae'} --image-size 8 --device cpu --num-workers 0".split()
    argv = ["--data-path", str(image_folder), "--output", str(tmp_path / "latents"), *shared]
    assert run(extract_latents.main, "extract_latents.py", argv) == 0
    shared += "--model DiT-debug/2 --num-classes 2 --max-steps 3 --global-batch-size 4 --log-every 1".split()
    runs = {"imagefolder": image_folder, "latents": tmp_path / "latents"}
    for name, path in runs.items():
        argv = ["--dataset", name, "--data-path", str(path), "--results-dir", str(tmp_path / f"{name}-runs"), *shared]
        assert run(train.main, "train.py", argv) == 0
    images, latents = (metrics(tmp_path / f"{name}-runs" / "000-DiT-debug-2") for name in runs)
    for one, other in zip(images, latents, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)  # the moments were rounded to float16


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--data-path nowhere --vae none", "--data-path: nowhere: no such folder"),
        ("--vae none", "--data-path: an image folder needs --data-path"),
        ("--data-path {images} --vae none --num-classes 3", "--num-classes 3: the data has 2 classes"),
        ("--data-path {images} --num-classes 2 --image-size 15 --vae none", "--image-size 15: input_size 15"),
        ("--data-path {images} --num-classes 2 --image-size 250", "--vae ema: image size 250 is not a multiple"),
        ("--dataset digits --data-path {images}", "--data-path {images}: has no effect"),
        ("--dataset digits --model DiT-digits/2 --image-size 9", "--dataset digits: the digits are 8 pixels"),
        ("--dataset digits --model DiT-debug/2 --num-classes 7", "--num-classes 7: the data has 10"),
        ("--dataset digits --model DiT-tiny/2", "--model DiT-tiny/2: unknown model"),
        ("--dataset digits --class-dropout-prob 1.5", "--class-dropout-prob 1.5: must lie in [0, 1)"),
        ("--dataset digits --global-batch-size 0", "--global-batch-size 0"),
        (
            "--dataset digits --max-steps 2",
            "--model DiT-XL/2: made for 1000 classes, but the data has 10; give --model",
        ),
        ("--dataset digits --in-channels 3", "--in-channels 3: 3 for RGB or 1 for grey"),
        ("--data-path {images} --vae none --in-channels 2", "--in-channels 2"),
        ("--data-path {images} --vae nothing --num-classes 2", "--vae nothing: no such folder; give ema, mse, none"),
        ("--dataset digits --lr nan", "--lr nan: must be positive and finite"),
        ("--dataset digits --adam-betas 0.9 1.5", "--adam-betas 0.9 1.5: both must lie in [0, 1)"),
        ("--dataset digits --ema-decay 2", "--ema-decay 2.0"),
        ("--dataset digits --lr -1", "--lr -1.0: must be positive"),
        ("--dataset digits --lr-final-ratio 0.1", "--lr-final-ratio 0.1: has no effect"),
        ("--dataset digits --model DiT-digits/2 --results-dir {file}/x", "--results-dir {file}/x: cannot write"),
        ("--dataset digits --lr-schedule linear", "--lr-schedule"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, words, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    places = {"images": image_folder, "file": tmp_path / "file"}
    before = sorted(tmp_path.rglob("*"))
    assert run(train.main, "train.py", [*argv.format(**places).split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and error.count("\n") == 1
    assert words.format(**places) in error
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


def config(*argv: str) -> TrainConfig:
    return parse_config(TrainConfig, argv, program="train.py", description="")


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    c = config(*"--lr 1 --lr-schedule cosine --lr-warmup-steps 10 --lr-final-ratio 0.1".split())
    rates = [trainer.learning_rate(c, step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_learning_rate_is_constant_by_default():
    assert {trainer.learning_rate(config(), step, 100) for step in range(100)} == {1e-4}


def test_defaults_are_the_official_ones():
    c = config()
    assert (c.model, c.epochs, c.global_batch_size, c.global_seed) == ("DiT-XL/2", 1400, 256, 0)
    assert (c.num_workers, c.log_every, c.ckpt_every) == (4, 100, 50_000)
    assert (c.adam_betas, c.weight_decay, c.ema_decay, str(c.results_dir)) == ((0.9, 0.999), 0.0, 0.9999, "results")
