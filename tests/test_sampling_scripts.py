"""sample.py and sample_ddp.py end to end."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import models
import sample
import sample_ddp
import train
from data.sample_file import SampleFile
from diffusion import guided, sample_loop
from models import create_model
from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError, run
from runtime.groups import save_checkpoint
from runtime.json_file import read_json, write_json
from sampling import pipeline
from sampling import run as sampling_run
from sampling.config import SAMPLERS, CachingSettings
from sampling.job import auto_batch_size
from sampling.pipeline import Pipeline
from sampling.plan import JobSettings, plan_job
from tests.checkpoints import write_network
from tests.golden_data import assert_close
from tests.jobs import fail_after
from tests.networks import debug_name, labelled, randomise, small_autoencoder
from tests.processes import run_script
from tests.runs import data_for
from tests.runtime.test_checkpoint import Bomb


def write_checkpoint(path, **overrides):
    """A checkpoint as train.py writes it, of a small random digits model."""
    network = randomise(create_model("DiT-digits/2", depth=1, hidden_size=32, **overrides))
    meta = {
        "format": 2,
        "model": {"name": "DiT-digits/2", **dataclasses.asdict(network.config)},
        "process": {"name": "gaussian", "noise_schedule": "linear", "prediction": "epsilon"},
        "encoder": {"name": "none"},
        "data": {"image_shape": [1, 8, 8]},
        "step": 7,
    }
    other = {name: 1.1 * tensor for name, tensor in network.state_dict().items()}
    save_checkpoint(path, {"ema-0.999": network.state_dict(), "model": other}, meta)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "0000001.safetensors")


def draw(ckpt, output, *argv):
    options = ["--ckpt", str(ckpt), "--output", str(output), "--device", "cpu"]
    options += [] if "--class-seeds" in argv else ["--num-fid-samples", "23"]
    options += "--num-sampling-steps 6 --per-proc-batch-size 5".split()
    status = run(sample_ddp.main, "sample_ddp.py", [*options, *argv])
    assert status == 0
    with np.load(output, allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"] if "arr_1" in file else None


def test_npz_holds_exactly_the_images_and_their_labels(ckpt, tmp_path):
    images, labels = draw(ckpt, tmp_path / "a.npz")
    assert images.shape == (23, 8, 8, 1) and images.dtype == np.uint8
    assert labels.shape == (23,) and labels.dtype == np.int64 and labels.min() >= 0 and labels.max() < 10
    assert len({image.tobytes() for image in images}) == 23
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz"]
    settings = json.loads((tmp_path / "a.json").read_text())
    config, checkpoint = settings["config"], settings["checkpoint"]
    names = (config["model"]["name"], config["sampler"]["name"], config["guidance"]["cfg_scale"])
    assert names == ("DiT-digits/2", "ddpm", 1.5)
    assert checkpoint["sha256"] == hashlib.sha256(ckpt.read_bytes()).hexdigest() and checkpoint["step"] == 7
    assert settings["versions"]["torch"] == torch.__version__
    assert settings["run"]["world_size"] == 1 and settings["run"]["images"] == 23
    assert settings["run"]["images_per_second"] > 0


OPTIONS = "--num-fid-samples 23 --num-sampling-steps 6 --per-proc-batch-size 5".split()


@pytest.mark.parametrize(
    ("ranks", "sampler"),
    [
        pytest.param(2, ["--sampler", "ddim", "--eta", "0.5"], marks=pytest.mark.slow),
        (3, ["--sampler", "ddim", "--eta", "0.5"]),
        pytest.param(3, ["--sampler", "dpm++"], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_writes_the_same_bytes(ckpt, tmp_path, ranks, sampler):
    draw(ckpt, tmp_path / "one.npz", *sampler)
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "many.npz"), *OPTIONS, *sampler]
    done = run_script("sample_ddp.py", *argv, ranks=ranks, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "many.npz").read_bytes()
    assert json.loads((tmp_path / "many.json").read_text())["run"]["world_size"] == ranks


KILLED = """
import os, signal, sys
import sample_ddp
from data.sample_file import SampleFile

def kill_in(chunk, before_the_record):
    write, npz_write, calls = SampleFile.write, None, []
    def dying(self, number, images):
        calls.append(number)
        if len(calls) < chunk:
            return write(self, number, images)
        if before_the_record:
            self._finished = self.partial / "nowhere" / "finished"  # the data is written, its record is not
            try:
                write(self, number, images)
            except Exception:
                pass
        os.kill(os.getpid(), signal.SIGKILL)
    SampleFile.write = dying

kill_in(int(sys.argv[1]), sys.argv[2] == "True")
sample_ddp.main(sys.argv[3:])
"""


@pytest.mark.parametrize(("ranks", "before_the_record"), [(1, True), (2, False)])
def test_a_killed_job_goes_on_by_the_same_command(ckpt, tmp_path, ranks, before_the_record, monkeypatch, capsys):
    """SIGKILL at 60 %, between data and record or before both; then on any number of processes."""
    draw(ckpt, tmp_path / "whole.npz")
    (tmp_path / "killed.py").write_text(KILLED)
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), *OPTIONS, "--device", "cpu"]
    # of five chunks, one process dies in its fourth; of two, the one with three dies in its second
    done = run_script(
        tmp_path / "killed.py", str(4 // ranks), str(before_the_record), *argv, ranks=ranks, folder=tmp_path
    )
    assert done.returncode in (-9, 1) and not (tmp_path / "a.npz").exists()
    finished = {
        int(line.split()[0])
        for path in (tmp_path / "a.partial").glob("finished.*")
        for line in path.read_text().splitlines()
        if line
    }
    assert 0 < len(finished) <= 3

    made, denoise = [], pipeline.Pipeline.denoise
    monkeypatch.setattr(
        pipeline.Pipeline,
        "denoise",
        lambda self, run, seed, indices, cond, **more: (
            made.append(indices[0] // 5) or denoise(self, run, seed, indices, cond, **more)
        ),
    )
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    assert made == sorted(set(range(5)) - finished)
    assert f"{len(finished)} of 5 chunks are there" in capsys.readouterr().out
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["run"]["images"] == sum(3 if k == 4 else 5 for k in made)
    assert not (tmp_path / "a.partial").exists()


def interrupted(ckpt, path, monkeypatch, *argv):
    """A job that fails after two of its five chunks, in this process."""
    fail_after(2, lambda: draw(ckpt, path, *argv), monkeypatch)


def test_a_job_that_fails_leaves_what_is_finished_for_the_next_try(ckpt, tmp_path, monkeypatch):
    interrupted(ckpt, tmp_path / "a.npz", monkeypatch)
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial"]
    images, _ = draw(ckpt, tmp_path / "a.npz")
    assert np.array_equal(images, draw(ckpt, tmp_path / "b.npz")[0])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cfg-scale", "2"], "--cfg-scale was 1.5, now 2.0"),
        (["--sampler", "dpm++"], "--sampler was 'ddpm', now 'dpm++'"),
        (["--weights", "model"], "--weights was 'ema', now 'model'"),
        (["--ckpt", "{other}"], "--ckpt was '"),
    ],
)
def test_other_settings_do_not_go_on_with_a_job(ckpt, tmp_path, monkeypatch, capsys, argv, words):
    interrupted(ckpt, tmp_path / "a.npz", monkeypatch)
    other = write_checkpoint(tmp_path / ckpt.name, class_dropout_prob=0.2)
    options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), "--device", "cpu", *OPTIONS]
    options += [word.format(other=other) for word in argv]
    assert run(sample_ddp.main, "sample_ddp.py", options) == 2
    error = capsys.readouterr().err
    assert words in error and "--overwrite" in error and error.count("\n") == 1
    assert run(sample_ddp.main, "sample_ddp.py", [*options, "--overwrite"]) == 0


def test_another_cache_depth_does_not_go_on_with_a_job(tmp_path, monkeypatch, capsys):
    """A setting of the network, not of the sampler; the finished result names it."""
    network = randomise(create_model("DiT-digits/2", hidden_size=32))
    ckpt = write_network(tmp_path / "0000001.safetensors", "DiT-digits/2", network)
    flags = ["--cache-interval", "2", "--cache-depth"]
    interrupted(ckpt, tmp_path / "a.npz", monkeypatch, *flags, "1")
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), "--device", "cpu", *OPTIONS, *flags]
    assert run(sample_ddp.main, "sample_ddp.py", [*argv, "2"]) == 2
    assert "started with other settings (--cache-depth was 1, now 2);" in capsys.readouterr().err
    assert run(sample_ddp.main, "sample_ddp.py", [*argv, "1"]) == 0
    assert "2 of 5 chunks are there" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["config"]["model"] == {
        "name": "DiT-digits/2",
        "cache_depth": 1,
    }


def test_a_changed_autoencoder_does_not_go_on_with_a_job(tmp_path, monkeypatch, capsys):
    small_autoencoder(tmp_path / "vae")
    network = randomise(create_model("DiT-debug/2", sample_shape=(4, 4, 4), num_classes=10))
    meta = {"data": {"image_shape": [3, 8, 8], "classes": None}}
    ckpt = write_network(tmp_path / "1.safetensors", "DiT-debug/2", network, **meta)
    flags = ["--vae", str(tmp_path / "vae")]
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), "--device", "cpu", *OPTIONS, *flags]
    interrupted(ckpt, tmp_path / "a.npz", monkeypatch, *flags)
    assert f"--vae {tmp_path / 'vae'}: unverified: no digest of its weights is known" in capsys.readouterr().out
    path, settings = tmp_path / "vae/diffusion_pytorch_model.safetensors", tmp_path / "a.partial/settings.json"
    weights = load_file(path)
    save_file({**weights, "decoder.conv_in.bias": weights["decoder.conv_in.bias"] + 1}, path, {"format": "pt"})
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 2
    assert re.search(r"other settings \(content of --vae was '\w{16}', now '\w{16}'\)", capsys.readouterr().err)

    recorded = read_json(settings)
    assert recorded.pop("content of --vae")  # as it was before it was recorded
    write_json(settings, recorded)
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    assert "2 of 5 chunks are there" in capsys.readouterr().out
    described = json.loads((tmp_path / "a.json").read_text())["autoencoder"]
    assert len(described["sha256"]) == len(described["decoder_sha256"]) == 64


def test_a_job_of_a_folder_of_weights_knows_all_its_files(tmp_path, monkeypatch, capsys):
    weights, folder = create_model("DiT-debug/2", num_classes=10).state_dict(), tmp_path / "dit"
    folder.mkdir()
    names = sorted(weights)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for part, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "dit.safetensors.index.json").write_text(json.dumps(index))
    flags = ["--vae", "none", "--image-size", "8"]
    argv = ["--ckpt", str(folder), "--output", str(tmp_path / "a.npz"), "--device", "cpu", *OPTIONS, *flags]
    interrupted(folder, tmp_path / "a.npz", monkeypatch, *flags)
    changed = {name: weights[name] + 1 for name in parts["b.safetensors"]}
    save_file(changed, folder / "b.safetensors")
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 2
    assert "started with other settings (--ckpt was '" in capsys.readouterr().err


def test_images_can_be_written_as_png_too(ckpt, tmp_path):
    images, _ = draw(ckpt, tmp_path / "a.npz", "--save-png")
    paths = sorted((tmp_path / "a").iterdir())
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(23)]
    for path, image in zip(paths, images, strict=True):
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), image[..., 0])


@pytest.mark.parametrize("name", ["a.json", "a.partial/mine.txt", "a/mine.png"])
def test_a_job_leaves_files_that_it_did_not_write(ckpt, tmp_path, capsys, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), "--device", "cpu", "--save-png", *OPTIONS]
    for flags in ([], ["--overwrite"]):
        assert run(sample_ddp.main, "sample_ddp.py", [*argv, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sample_ddp.py: error: --output: {tmp_path / 'a'}") and error.count("\n") == 1
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [name]


def test_a_second_job_with_the_same_output_is_one_line_and_status_2(ckpt, tmp_path, capsys):
    other = SampleFile(tmp_path / "a.npz", (23, 8, 8, 1), 5)
    other.open({"--ckpt": "of another process"})
    before = (other.partial / "settings.json").read_bytes()
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), "--device", "cpu", *OPTIONS]
    for flags in ([], ["--overwrite"], ["--save-png"]):
        assert run(sample_ddp.main, "sample_ddp.py", [*argv, *flags]) == 2
        error = capsys.readouterr().err
        assert f"{other.partial}: in use by process {os.getpid()} on " in error and error.count("\n") == 1
    assert (other.partial / "settings.json").read_bytes() == before and not (tmp_path / "a").exists()
    other.close()


def test_a_job_with_pngs_is_repeated_on_request(ckpt, tmp_path):
    draw(ckpt, tmp_path / "a.npz", "--save-png")
    draw(ckpt, tmp_path / "a.npz", "--save-png", "--overwrite", "--num-fid-samples", "5")
    assert len(list((tmp_path / "a").iterdir())) == 5


@pytest.mark.parametrize(("script", "name"), [(sample_ddp, "a.npz"), (sample, "a.png")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused_by_the_name_of_the_checkpoint(
    ckpt, tmp_path, monkeypatch, capsys, script, name, value
):
    """Of a model on pixels, by any script; weights that are not finite are refused earlier."""
    monkeypatch.setattr(
        sampling_run,
        "sample_loop",
        lambda network, sampler, x, *args, **options: sample_loop(network, sampler, value * x, *args, **options),
    )
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / name), "--num-sampling-steps", "2", "--device", "cpu"]
    assert run(script.main, f"{script.__name__}.py", argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert f"--ckpt {ckpt}: its images have NaN or infinity" in line
    assert not (tmp_path / name).exists()


def test_a_decoder_that_overflows_is_named(ckpt, monkeypatch):
    made = Pipeline.from_pretrained(ckpt, device="cpu")
    monkeypatch.setattr(made.encoder, "decode_rows", lambda z: z * torch.inf)
    with pytest.raises(UserError, match="--vae none: its images have NaN or infinity"):
        made.decode(torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize(("macs", "size"), [(118_621_000_000, 64), (524_500_000_000, 8), (10**15, 1), (10, 256)])
def test_the_automatic_batch_size_follows_from_the_network_alone(macs, size):
    assert auto_batch_size(macs) == size


def test_the_automatic_batch_size_is_noted_as_a_number(ckpt, tmp_path):
    draw(ckpt, tmp_path / "a.npz", "--per-proc-batch-size", "auto")
    assert json.loads((tmp_path / "a.json").read_text())["config"]["job"]["per_proc_batch_size"] == 256


def test_batch_size_moves_images_by_rounding_only(ckpt, tmp_path):
    images, labels = draw(ckpt, tmp_path / "a.npz")
    for size in ("1", "7", "32"):
        others, same_labels = draw(ckpt, tmp_path / f"{size}.npz", "--per-proc-batch-size", size)
        assert np.array_equal(labels, same_labels)
        assert np.abs(images.astype(int) - others.astype(int)).max() <= 1


def test_latents_do_not_depend_on_the_batch_beyond_rounding(ckpt):
    made = Pipeline.from_pretrained(ckpt, device="cpu")
    prepared, labels = made.prepare(num_sampling_steps=6), torch.arange(23) % 10
    whole = made.denoise(prepared, 0, range(23), {"y": labels})
    for size in (1, 7, 32):
        starts = range(0, 23, size)
        rows = [range(i, min(i + size, 23)) for i in starts]
        parts = [made.denoise(prepared, 0, own, {"y": labels[own.start : own.stop]}) for own in rows]
        assert_close(torch.cat(parts), whole)


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


@pytest.mark.parametrize(
    ("suffix", "frames", "size"), [("png", 1, (4 * 66 + 2, 3 * 66 + 2)), ("gif", 4, (3 * 66 + 2, 68))]
)
def test_a_trajectory_is_a_strip_or_an_animation(ckpt, tmp_path, suffix, frames, size):
    path = tmp_path / f"steps.{suffix}"
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), "--trajectory", str(path), "--device", "cpu"]
    argv += "--class-labels 1 2 3 --trajectory-frames 4 --num-sampling-steps 9".split()
    assert run(sample.main, "sample.py", argv) == 0
    with Image.open(tmp_path / "a.png") as whole, Image.open(path) as shown:
        assert getattr(shown, "n_frames", 1) == frames and shown.size == size
        last = np.asarray(whole)
        if suffix == "gif":
            shown.seek(3)
            assert np.array_equal(np.asarray(shown.convert("L")), last)
        else:  # a row an image: the last column is the result
            column = np.concatenate([last[2:66, 66 * k + 2 : 66 * (k + 1)] for k in range(3)])
            strip = np.concatenate([np.asarray(shown)[66 * k + 2 : 66 * (k + 1), 3 * 66 + 2 : -2] for k in range(3)])
            assert np.array_equal(strip, column)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", f"steps.{suffix}"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_picture_replaces_its_own_kind_only(ckpt, tmp_path, capsys, suffix):
    flag = "--trajectory" if suffix == "gif" else "--output"
    path = tmp_path / f"mine.{suffix}"
    Image.new("RGB", (8, 8)).save(path)
    mine = path.read_bytes()
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), flag, str(path), "--device", "cpu"]
    argv += "--class-labels 1 --num-sampling-steps 2".split()
    assert run(sample.main, "sample.py", argv) == 2
    error = capsys.readouterr().err
    assert f"{flag} {path}: exists, and is no picture of sample.py; --overwrite replaces it" in error
    assert path.read_bytes() == mine and not (tmp_path / "a.png").exists()
    assert run(sample.main, "sample.py", [*argv, "--overwrite"]) == 0
    assert path.read_bytes() != mine
    assert run(sample.main, "sample.py", argv) == 0, "its own"
    path.write_text("notes")
    assert run(sample.main, "sample.py", argv) == 2 and path.read_text() == "notes"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of train.py, each trained once: (family, process) -> file."""

    @functools.cache
    def start(family, process):
        results = tmp_path_factory.mktemp("trained")
        argv = [*data_for(family), "--model", debug_name(family), "--results-dir", str(results)]
        argv += f"--process {process} --max-steps 2 --global-batch-size 4".split()
        assert run(train.main, "train.py", argv) == 0
        (path,) = results.glob("*/checkpoints/*")
        return path

    return start


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_goes_from_training_to_samples_with_every_sampler(trained, family, sampler, tmp_path):
    path = trained(family, SAMPLERS[sampler].process)
    text = [] if labelled(family) else ["--prompt", "a small two", "--prompt", "a large one moving up"]
    argv = ["--sampler", sampler, "--num-sampling-steps", "4", "--num-fid-samples", "6", *text]  # two batches
    images, labels = draw(path, tmp_path / "a.npz", *argv)
    assert len(images) == 6 and images.shape[-1] == 1 and images.std() > 0 and (labels is None) == bool(text)
    side = 16 if text else 12
    assert images.shape[1:-1] == ((4, side, side) if "Latte" in family else (8, 8))


def test_an_official_file_is_sampled_with_flags_and_guides_three_channels(tmp_path, monkeypatch):
    network = randomise(create_model("DiT-debug/2", sample_shape=(3, 8, 8)))
    torch.save({"ema": network.state_dict()}, tmp_path / "official.pt")
    channels = []
    monkeypatch.setattr(
        sampling_run,
        "guided",
        lambda *args, **options: channels.append(options["channels"]) or guided(*args, **options),
    )
    argv = ["--ckpt", str(tmp_path / "official.pt"), "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    argv += "--model DiT-debug/2 --vae none --image-size 8 --num-classes 10 --num-sampling-steps 2".split()
    assert run(sample.main, "sample.py", argv) == 0
    assert channels == [3]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB"


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """Files that cannot be sampled as they are."""
    folder = tmp_path_factory.mktemp("mistaken")
    torch.save({"ema": Bomb(folder / "exploded")}, folder / "evil.pt")
    torch.save({"weight": torch.zeros(1)}, folder / "unknown.pt")
    for name, model, fields in (
        ("flat", "DiT-digits/2", {"hidden_size": 32}),
        ("grey", "DiT-digits/2", {}),
        ("routed", "DyDiT-digits/2", {}),
        ("flow", "IDiT-digits/2", {}),
        ("gates", "DyDiT-digits/2", {"num_heads": 6}),
        ("shallow", "DyDiT-digits/2", {"num_heads": 6, "depth": 2}),
    ):
        torch.save(create_model(model, **fields).state_dict(), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--ckpt: required; give a checkpoint of train.py, an official file, or a released one"),
        ("--model DiT-S/2", "--model DiT-S/2: no checkpoint of it for 256 pixels was released"),
        ("--model DiT-XL/2 --image-size 250", "for 250 pixels was released"),
        ("--image-size 512", "DiT/models/DiT-XL-2-512x512.pt by other means and put it"),
        ("--model DyDiT-XL/2", "several checkpoints of it were released; choose by --ckpt: dydit_0.7"),
        (
            "--ckpt DiT-XL-2-256x256",
            "fetch https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt by other means",
        ),
        ("--ckpt {ckpt} --sampler magic", "argument --sampler: invalid choice: 'magic'"),
        (
            "--ckpt {ckpt} --sampler euler",
            "--sampler euler: --ckpt was trained under 'gaussian'; choose from ddpm, ddim",
        ),
        (
            "--ckpt {ckpt} --time-shift 2",
            "--time-shift 2.0: is a setting of the sampler euler or heun or adams or flow",
        ),
        ("--ckpt {ckpt} --cache-interval 2", "--cache-interval 2: this network keeps nothing to reuse"),
        ("--ckpt {ckpt} --sharing-interval 2", "--sharing-interval 2: this network keeps nothing to reuse"),
        (
            "--ckpt {grey} --vae none --cache-interval 2",
            "--cache-interval 2: this network keeps nothing to reuse; give --cache-depth B",
        ),
        (
            "--ckpt {grey} --vae none --sharing-interval 2",
            "--sharing-interval 2: this network keeps nothing to reuse; give --cache-depth B",
        ),
        (
            "--ckpt {routed} --vae none --cache-interval 2",
            "--cache-interval 2: this network keeps nothing to reuse; no setting makes it; leave this flag out",
        ),
        (
            "--ckpt {routed} --vae none --sharing-interval 2",
            "--sharing-interval 2: this network keeps nothing to reuse; no setting makes it; leave this flag",
        ),
        ("--ckpt {ckpt} --cache-depth 1", "--cache-depth 1: has no effect without --cache-interval or --sharing"),
        (
            "--ckpt {ckpt} --cache-depth 9 --cache-interval 2",
            "--cache-depth 9: cache_depth 9 must lie in 1..0, half the depth",
        ),
        (
            "--ckpt {grey} --vae none --cache-depth 9 --cache-interval 2",
            "error: --cache-depth 9: cache_depth 9 must lie in 1..2, half the depth",
        ),
        (
            "--ckpt {grey} --model DiT-digits/2 --vae none --cache-depth 9 --sharing-interval 2",
            "error: --cache-depth 9: cache_depth 9 must lie in 1..2, half the depth",
        ),
        (
            "--ckpt {routed} --vae none --cache-depth 1 --cache-interval 2",
            "error: --cache-depth 1: cache_depth 1: a DyDiT keeps no state between evaluations",
        ),
        (
            "--ckpt {flow} --model IDiT-digits/2 --vae none --cache-depth 1 --cache-interval 2",
            "error: --cache-depth 1: is a setting of the model DiT or DyDiT or Skip-DiT or Latte or "
            "Skip-Latte or LatteT2V or Skip-LatteT2V; this run uses DDT",
        ),
        ("--ckpt {ckpt} --sharing cheapest", "--sharing cheapest: has no effect without --sharing-interval"),
        ("--ckpt {ckpt} --guidance-interval 700 300", "--guidance-interval 700.0 300.0: must be two timesteps"),
        ("--ckpt {ckpt} --guidance-interval 0 700 --cfg-scale 1", "has no effect with --cfg-scale 1"),
        ("--ckpt {ckpt} --cuda-graphs", "--cuda-graphs: needs a CUDA device"),
        ("--ckpt {ckpt} --vae-batch-size 0", "--vae-batch-size 0: must be at least 1"),
        ("--ckpt nothing.pt", "--ckpt nothing.pt: no such file"),
        (
            "--ckpt DiT-XL-2-265x256",
            "--ckpt DiT-XL-2-265x256: no such file; released, and close to it: DiT-XL-2-256x256",
        ),
        ("--model DiT-XXL/2", "--model DiT-XXL/2: unknown model 'DiT-XXL/2'; close to it: DiT-XL/2"),
        ("--model U-ViT", "--model U-ViT: unknown model 'U-ViT'; known: DiT-{{S,B,L,XL}}/{{2,4,8}}, "),
        ("--ckpt {ckpt} --cfg-scale 0.5", "--cfg-scale 0.5: must be at least 1"),
        ("--ckpt {ckpt} --num-sampling-steps ddim0", "--num-sampling-steps ddim0: step spec 'ddim0'"),
        ("--ckpt {ckpt} --num-sampling-steps 1001", "--num-sampling-steps 1001: step spec '1001' asks for 1001 of"),
        ("--ckpt {ckpt} --sampler ddim --num-sampling-steps 5000", "asks for 5000 of the 1000 timesteps"),
        ("--ckpt {ckpt} --num-sampling-steps 600,600", "--num-sampling-steps 600,600: step spec '600,600' asks for"),
        (
            "--ckpt {flow} --model IDiT-digits/2 --vae none --sampler heun --heun-exact --cache-interval 2",
            "--cache-interval 2: this network keeps nothing to reuse; no setting makes it",
        ),
        ("--ckpt {ckpt} --num-sampling-steps 0", "--num-sampling-steps 0"),
        ("--ckpt {ckpt} --num-sampling-steps ten", "--num-sampling-steps ten"),
        ("--ckpt {ckpt} --eta 0.5", "--eta 0.5"),
        ("--ckpt {ckpt} --cfg-scale nan", "--cfg-scale nan"),
        ("--ckpt . --cfg-scale 2", "--ckpt .: is a folder; give a file in it"),
        ("--ckpt {ckpt} --model DiT-XL/2", "--model DiT-XL/2: --ckpt {ckpt} was trained with DiT-digits/2"),
        ("--ckpt {ckpt} --num-classes 5", "--num-classes 5: --ckpt {ckpt} was trained with 10"),
        (
            "--ckpt {flat} --vae none --model DiT-debug/2 --image-size 8",
            "expected 52 tensors, 4 blocks, width 64, found 52",
        ),
        ("--ckpt {flat} --vae none", "--ckpt {flat}: weights of a DiT, but their sizes are those of no model"),
        ("--ckpt {unknown} --vae none", "--ckpt {unknown}: its names and sizes are those of no model in the registry"),
        ("--ckpt {gates}", "--ckpt {gates}: weights of DyDiT-digits/2, but routers of 5 gates; 4 heads need 3 or 4"),
        (
            "--ckpt {gates} --model DyDiT-digits/2",
            "--ckpt {gates}: weights of DyDiT-digits/2, but routers of 5 gates; 4 heads need 3 or 4",
        ),
        (
            "--ckpt {shallow} --model DyDiT-digits/2 --vae none",
            "--ckpt {shallow} as DyDiT-digits/2: routers of 5 gates; 4 heads need 3 or 4",
        ),
        ("--ckpt {grey}", "--ckpt {grey}: the network's channels are 1, those of stabilityai/sd-vae-ft-"),
        (
            "--ckpt {ckpt} --vae ema",
            "--vae ema: the network's channels are 1, those of stabilityai/sd-vae-ft-ema 4",
        ),
        ("--ckpt {grey} --vae none --image-size 9", "sample_shape (1, 9, 9): height and width must be multiples"),
        ("--ckpt {evil}", "--ckpt {evil}: refused, because it is no PyTorch file of plain tensors"),
        ("--ckpt {flat} --vae none --model DiT-nano/2", "--model DiT-nano/2: unknown model"),
        ("--ckpt {flat} --vae none --model DiT-debug/2 --image-size 9", "sample_shape (4, 9, 9): height and width"),
        ("--ckpt {ckpt} --output {flat}/a.png", "cannot write there"),
    ],
)
@pytest.mark.parametrize("script", [sample, sample_ddp])
def test_a_mistake_is_one_line_and_status_2(argv, words, script, ckpt, mistaken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in mistaken.glob("*.pt"):
        os.link(path, tmp_path / path.name)
    places = {"ckpt": ckpt, **{path.stem: path for path in tmp_path.glob("*.pt")}}
    name = f"{script.__name__}.py"
    if script is sample_ddp:
        argv = argv.replace("a.png", "a.npz")
    assert run(script.main, name, [*argv.format(**places).split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: error: ") and error.count("\n") == 1
    assert words.format(**places) in error
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.png"))
    assert not (mistaken / "exploded").exists()


def test_help_says_where_similarities_are_kept_and_git_leaves_them_alone(capsys):
    with pytest.raises(SystemExit):
        run(sample.main, "sample.py", ["--help"])
    assert "--sharing-dir PATH folder of measured similarities" in " ".join(capsys.readouterr().out.split())
    kept = CachingSettings().sharing_dir / "a.json"
    root = Path(sample.__file__).parent
    assert subprocess.run(["git", "check-ignore", "-q", str(kept)], cwd=root).returncode == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output", "picture"], "--output picture: must end in .png"),
        (["--output", "a.xyz"], "must end in .png"),
        (["--columns", "-3"], "--columns -3: must be at least 1"),
        (["--trajectory", "a.jpg"], "--trajectory a.jpg: must end in .png (a strip) or .gif"),
        (["--output", "a.png", "--trajectory", "a.png"], "--trajectory a.png: is --output, too"),
        (["--trajectory-frames", "1"], "--trajectory-frames 1: must be at least 2"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_sampling(ckpt, argv, words, capsys):
    assert run(sample.main, "sample.py", ["--ckpt", str(ckpt), "--device", "cpu", *argv]) == 2
    assert words in capsys.readouterr().err


def test_labels_out_of_range_are_refused_before_sampling(ckpt, tmp_path, capsys):
    argv = ["--ckpt", str(ckpt), "--class-labels", "3", "10", "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    assert run(sample.main, "sample.py", argv) == 2
    assert "--class-labels 10: the model has classes 0 to 9" in capsys.readouterr().err


def test_classes_are_given_by_name_or_number():
    def labels(*given, names=("birds", "cats", "7")):
        return sample.choose_labels(sample.PictureSettings(class_labels=given or None), 10, names)

    assert labels("cats", "0", "7", "birds") == (1, 0, 7, 0) and labels() == tuple(range(10))
    with pytest.raises(UserError, match=r"--class-labels cat: no class of this name \(close to it, or .*: cats\)"):
        labels("cat")
    with pytest.raises(UserError, match=r"\(the checkpoint has no names\); give a number of 0 to 9"):
        labels("cats", names=None)


def test_a_checkpoint_of_an_unknown_process_is_refused(ckpt, tmp_path, capsys):
    read = read_checkpoint(ckpt)
    path = tmp_path / "0000001.safetensors"
    save_checkpoint(path, {"ema-0.999": read.weights}, {**read.meta, "process": {"name": "brownian"}})
    assert run(sample.main, "sample.py", ["--ckpt", str(path), "--device", "cpu"]) == 2
    assert "trained under 'brownian'" in capsys.readouterr().err


def test_guidance_of_a_network_without_null_class_is_refused(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "0000001.safetensors", class_dropout_prob=0.0)
    argv = ["--ckpt", str(path), "--output", str(tmp_path / "a.png"), *"--num-sampling-steps 2 --device cpu".split()]
    assert run(sample.main, "sample.py", argv) == 2
    assert "--cfg-scale 4.0: class_dropout_prob is 0" in capsys.readouterr().err
    assert run(sample.main, "sample.py", [*argv, "--cfg-scale", "1"]) == 0


@pytest.mark.parametrize("argv", ["--num-fid-samples 5 --class-seeds 0 1", "--num-fid-samples 4 --class-seeds 0 1"])
@pytest.mark.parametrize("classes", ["", "--class-labels 3"])
def test_a_number_of_images_is_not_ignored_for_seeds(argv, classes, ckpt, tmp_path, capsys):
    options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), "--device", "cpu"]
    assert run(sample_ddp.main, "sample_ddp.py", [*options, *argv.split(), *classes.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sample_ddp.py: error: {argv.split(' --class')[0]}: --class-seeds makes one image of each")
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_number_of_images_is_50_000_where_nobody_says(ckpt):
    job = plan_job(JobSettings(), 10)
    assert len(job.labels) == len(job.noise) == 50_000


def test_a_finished_job_s_settings_make_it_again(ckpt, tmp_path):
    """Its JSON holds the number of images beside the seeds that made them."""
    images, _ = draw(ckpt, tmp_path / "a.npz", "--class-labels", "3", "--class-seeds", "0", "1")
    config = ["--config", str(tmp_path / "a.json"), "--output", str(tmp_path / "b.npz")]
    assert run(sample_ddp.main, "sample_ddp.py", config) == 0
    with np.load(tmp_path / "b.npz") as file:
        assert np.array_equal(file["arr_0"], images)


def test_selected_classes_and_seeds_of_each(ckpt, tmp_path):
    chosen = ["--class-labels", "3", "7"]
    _, labels = draw(ckpt, tmp_path / "a.npz", *chosen)
    assert set(labels.tolist()) == {3, 7}
    _, labels = draw(ckpt, tmp_path / "b.npz", *chosen, "--balanced-labels", "--num-fid-samples", "5")
    assert labels.tolist() == [3, 7, 3, 7, 3]
    images, labels = draw(ckpt, tmp_path / "c.npz", *chosen, "--class-seeds", "5", "1", "9")
    assert labels.tolist() == [3, 3, 3, 7, 7, 7]
    reseeded, _ = draw(ckpt, tmp_path / "d.npz", "--class-labels", "7", "--class-seeds", "1", "5")
    assert np.abs(reseeded.astype(int) - images[[4, 3]]).max() <= 1, "a number gives a class the same image in any job"
    assert json.loads((tmp_path / "c.json").read_text())["config"]["job"]["num_fid_samples"] == 6
