"""sample.py and sample_ddp.py end to end."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import models
import sample
import sample_ddp
import train
from diffusion import guided
from models import create_model
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.errors import run
from tests.networks import debug_name, randomise
from tests.processes import run_script


def write_checkpoint(path, **overrides):
    """A checkpoint as train.py writes it, of a small random digits model."""
    network = randomise(create_model("DiT-digits/2", depth=1, hidden_size=32, **overrides))
    meta = {
        "model": {"name": "DiT-digits/2", **dataclasses.asdict(network.config)},
        "process": {"name": "gaussian", "noise_schedule": "linear", "predict_xstart": False, "learn_sigma": False},
        "data": {"vae": "none", "image_shape": [1, 8, 8]},
    }
    other = {name: 1.1 * tensor for name, tensor in network.state_dict().items()}
    save_checkpoint(path, {"ema": network.state_dict(), "model": other}, meta)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "0000001.safetensors")


def draw(ckpt, output, *argv):
    options = ["--ckpt", str(ckpt), "--output", str(output), "--device", "cpu", "--num-fid-samples", "23"]
    options += "--num-sampling-steps 6 --per-proc-batch-size 5".split()
    status = run(sample_ddp.main, "sample_ddp.py", [*options, *argv])
    assert status == 0
    with np.load(output, allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"]


def test_npz_holds_exactly_the_images_and_their_labels(ckpt, tmp_path):
    images, labels = draw(ckpt, tmp_path / "a.npz")
    assert images.shape == (23, 8, 8, 1) and images.dtype == np.uint8
    assert labels.shape == (23,) and labels.dtype == np.int64 and labels.min() >= 0 and labels.max() < 10
    assert len({image.tobytes() for image in images}) == 23
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz"]
    settings = json.loads((tmp_path / "a.json").read_text())
    assert settings["config"]["cfg_scale"] == 1.5 and settings["config"]["model"] == "DiT-digits/2"
    assert settings["run"]["world_size"] == 1


@pytest.mark.parametrize("sampler", [["--sampler", "ddpm"], ["--sampler", "ddim", "--eta", "0.5"]])
def test_one_process_and_two_write_the_same_bytes(ckpt, tmp_path, sampler):
    draw(ckpt, tmp_path / "one.npz", *sampler)
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "two.npz"), "--num-fid-samples", "23", *sampler]
    argv += "--num-sampling-steps 6 --per-proc-batch-size 5".split()
    done = run_script("sample_ddp.py", *argv, ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_batch_size_moves_images_by_rounding_only(ckpt, tmp_path):
    images, labels = draw(ckpt, tmp_path / "a.npz")
    others, same_labels = draw(ckpt, tmp_path / "b.npz", "--per-proc-batch-size", "23")
    assert np.array_equal(labels, same_labels)
    assert np.abs(images.astype(int) - others.astype(int)).max() <= 1


def test_a_prefix_of_a_job_is_the_smaller_job(ckpt, tmp_path):
    images, _ = draw(ckpt, tmp_path / "a.npz", "--balanced-labels")
    fewer, labels = draw(ckpt, tmp_path / "b.npz", "--balanced-labels", "--num-fid-samples", "10")
    assert np.array_equal(fewer, images[:10]) and labels.tolist() == list(range(10))


def test_seed_scale_and_sampler_matter(ckpt, tmp_path):
    base, _ = draw(ckpt, tmp_path / "a.npz")
    for i, argv in enumerate(["--global-seed 1", "--cfg-scale 1", "--sampler ddim", "--weights model"]):
        other, _ = draw(ckpt, tmp_path / f"{i}.npz", *argv.split())
        assert not np.array_equal(base, other), argv


def test_the_default_name_says_the_settings(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--ckpt", str(ckpt), *"--num-fid-samples 2 --num-sampling-steps 3 --device cpu".split()]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    (path,) = (tmp_path / "samples").glob("*.npz")
    assert path.name.startswith("DiT-digits-2-0000001-size-8-vae-none-cfg-1.5-seed-0-ddpm-3-")
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 2, "an existing result is not replaced silently"
    assert run(sample_ddp.main, "sample_ddp.py", [*argv, "--overwrite"]) == 0
    for other in (["--balanced-labels"], ["--weights", "model"], ["--num-fid-samples", "3"]):
        assert run(sample_ddp.main, "sample_ddp.py", [*argv, *other]) == 0
    assert len(list((tmp_path / "samples").glob("*.npz"))) == 4, "other settings, other names"


def test_the_settings_beside_the_samples_can_be_given_back(ckpt, tmp_path):
    draw(ckpt, tmp_path / "a.npz", "--balanced-labels", "--sampler", "ddim", "--eta", "0.3")
    argv = ["--config", str(tmp_path / "a.json"), "--output", str(tmp_path / "b.npz")]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_job_that_fails_leaves_nothing_behind(ckpt, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(sample_ddp.Pipeline, "__call__", fail)
    with pytest.raises(MemoryError):
        draw(ckpt, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def test_sample_writes_a_picture_of_one_of_each_class(ckpt, tmp_path, capsys):
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), *"--num-sampling-steps 3 --device cpu".split()]
    assert run(sample.main, "sample.py", argv) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (10 * 66 + 2, 66 + 2) and picture.mode == "L"
    assert "Saved 10 images" in capsys.readouterr().out
    argv += ["--class-labels", "3", "3", "--columns", "1"]
    assert run(sample.main, "sample.py", argv) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (68, 134)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_goes_from_training_to_samples_with_every_sampler(family, sampler, tmp_path):
    argv = ["--dataset", "digits", "--model", debug_name(family), "--results-dir", str(tmp_path), "--device", "cpu"]
    argv += "--process gaussian --max-steps 2 --global-batch-size 4".split()
    assert run(train.main, "train.py", argv) == 0
    (path,) = tmp_path.glob("*/checkpoints/*")
    images, _ = draw(path, tmp_path / "a.npz", "--sampler", sampler, "--num-sampling-steps", "4")
    assert images.shape == (23, 8, 8, 1) and images.std() > 0


def test_an_official_file_is_sampled_with_flags_and_guides_three_channels(tmp_path, monkeypatch):
    network = randomise(create_model("DiT-debug/2", in_channels=3))
    torch.save({"ema": network.state_dict()}, tmp_path / "official.pt")
    scales = []
    monkeypatch.setattr(sample, "guided", lambda *args: scales.append(args[3:]) or guided(*args))
    argv = ["--ckpt", str(tmp_path / "official.pt"), "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    argv += "--model DiT-debug/2 --vae none --image-size 8 --num-classes 10 --num-sampling-steps 2".split()
    assert run(sample.main, "sample.py", argv) == 0
    assert scales == [(4.0, 3)]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--ckpt: required"),
        ("--ckpt nothing.pt", "--ckpt nothing.pt: no such file"),
        ("--ckpt {ckpt} --cfg-scale 0.5", "--cfg-scale 0.5: must be at least 1"),
        ("--ckpt {ckpt} --num-sampling-steps ddim0", "--num-sampling-steps ddim0: step spec 'ddim0'"),
        ("--ckpt {ckpt} --num-sampling-steps 1001", "--num-sampling-steps 1001: step spec '1001'"),
        ("--ckpt {ckpt} --num-sampling-steps 0", "--num-sampling-steps 0"),
        ("--ckpt {ckpt} --num-sampling-steps ten", "--num-sampling-steps ten"),
        ("--ckpt {ckpt} --eta 0.5", "--eta 0.5"),
        ("--ckpt {ckpt} --cfg-scale nan", "--cfg-scale nan"),
        ("--ckpt . --cfg-scale 2", "--ckpt .: is a folder; give a file in it"),
        ("--ckpt {ckpt} --model DiT-XL/2", "--model DiT-XL/2: --ckpt {ckpt} was trained with DiT-digits/2"),
        ("--ckpt {ckpt} --num-classes 5", "--num-classes 5: --ckpt {ckpt} was trained with 10"),
        ("--ckpt {flat} --vae none --model DiT-debug/2 --image-size 8", "do not fit the model in"),
        ("--ckpt {flat} --vae none --model DiT-nano/2", "--model DiT-nano/2: unknown model"),
        ("--ckpt {flat} --vae none --model DiT-debug/2 --image-size 9", "input_size 9 is not a multiple"),
        ("--ckpt {ckpt} --output {flat}/a.png", "cannot write there"),
    ],
)
@pytest.mark.parametrize("script", [sample, sample_ddp])
def test_a_mistake_is_one_line_and_status_2(argv, words, script, ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flat = tmp_path / "flat.pt"
    torch.save(create_model("DiT-digits/2", hidden_size=32).state_dict(), flat)
    places = {"ckpt": ckpt, "flat": flat}
    name = f"{script.__name__}.py"
    if script is sample_ddp:
        argv = argv.replace("a.png", "a.npz")
    assert run(script.main, name, [*argv.format(**places).split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: error: ") and error.count("\n") == 1
    assert words.format(**places) in error
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output", "picture"], "--output picture: must end in .png"),
        (["--output", "a.xyz"], "must end in .png"),
        (["--columns", "-3"], "--columns -3: must be at least 1"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_sampling(ckpt, argv, words, capsys):
    assert run(sample.main, "sample.py", ["--ckpt", str(ckpt), "--device", "cpu", *argv]) == 2
    assert words in capsys.readouterr().err


def test_labels_out_of_range_are_refused_before_sampling(ckpt, tmp_path, capsys):
    argv = ["--ckpt", str(ckpt), "--class-labels", "3", "10", "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    assert run(sample.main, "sample.py", argv) == 2
    assert "--class-labels 10: the model has classes 0 to 9" in capsys.readouterr().err


def test_a_checkpoint_of_an_unknown_process_is_refused(ckpt, tmp_path, capsys):
    read = read_checkpoint(ckpt)
    path = tmp_path / "0000001.safetensors"
    save_checkpoint(path, {"ema": read.weights}, {**read.meta, "process": {"name": "brownian"}})
    assert run(sample.main, "sample.py", ["--ckpt", str(path), "--device", "cpu"]) == 2
    assert "trained under 'brownian'" in capsys.readouterr().err


def test_guidance_of_a_network_without_null_class_is_refused(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "0000001.safetensors", class_dropout_prob=0.0)
    argv = ["--ckpt", str(path), "--output", str(tmp_path / "a.png"), *"--num-sampling-steps 2 --device cpu".split()]
    assert run(sample.main, "sample.py", argv) == 2
    assert "--cfg-scale 4.0: class_dropout_prob is 0" in capsys.readouterr().err
    assert run(sample.main, "sample.py", [*argv, "--cfg-scale", "1"]) == 0
