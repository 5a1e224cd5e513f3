"""Runs, checkpoints, configs, latent stores and sampling jobs of commit 3528681 (format 1) still work."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import sample
import sample_ddp
import train
from runtime.errors import run
from sampling.pipeline import Pipeline
from scripts import extract_latents
from tests import format1
from tests.golden_data import assert_close

MANIFEST = format1.manifest()
RUNS = list(MANIFEST["runs"])
OTHER_DRAWS = re.compile(r"\bdraws?\b.*\b(changed?|differ(s|ent)?)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Rebuild each run's checkpoint once; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("format1")
    return {name: format1.write_checkpoint(name, folder / name / "0000002.safetensors") for name in RUNS}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Change to a folder with the data that recorded settings name by relative paths."""
    monkeypatch.chdir(tmp_path)
    format1.write_autoencoder(tmp_path / "vae")
    format1.copy_folder("latent_store", tmp_path / "store")
    return tmp_path


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def images(path):
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"].astype(int), file["arr_1"]


def assert_same_images(path, recorded):
    (ours, labels), (theirs, wanted) = images(path), images(format1.FOLDER / recorded)
    assert np.array_equal(labels, wanted) and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1


def the_error(capsys, program):
    """The one line that says why a program ended; warnings about renamed settings may come first."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith(f"{program}: error: "))
    assert line == lines[-1] and not any("Traceback" in line for line in lines)
    return line


@pytest.mark.parametrize("name", RUNS)
def test_rebuilt_checkpoints_have_the_recorded_bytes(name, written):
    assert sha256(written[name]) == format1.layout(name).sha256


def test_recorded_files_are_those_of_the_manifest(tmp_path):
    recorded = {name: sha256(format1.FOLDER / name) for name in MANIFEST["files"]}
    assert recorded == {name: entry["sha256"] for name, entry in MANIFEST["files"].items()}
    weights = format1.write_autoencoder(tmp_path) / "diffusion_pytorch_model.safetensors"
    assert sha256(weights) == format1.layout("autoencoder").sha256


def assert_resumed(name, checkpoint):
    """Steps 3 and 4 were made from the state in the checkpoint, at the recorded learning rates."""
    folder, recorded = checkpoint.parent.parent, format1.metrics(name)
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([line["lr"] for line in recorded], rel=1e-12)
    assert lines[:2] == recorded[:2] and all(np.isfinite(line["loss"]) for line in lines)
    assert sha256(checkpoint) == format1.layout(name).sha256, "the old checkpoint stays as it was"
    before, after = load_file(checkpoint), load_file(checkpoint.with_name("0000004.safetensors"))
    steps = [tensor for key, tensor in after.items() if key.endswith("/step")]
    assert steps and all(step == format1.LAST_STEP for step in steps)
    averages = {key.split("/")[0] for key in after if key.startswith("ema")}
    assert len(averages) == 1
    for group, theirs in (("model", "model"), ("ema", averages.pop())):
        moved = [abs(after[f"{theirs}/{key[len(group) + 1 :]}"] - before[key]).max() for key in before
                 if key.startswith(f"{group}/") and not key.endswith("pos_embed")]  # fmt: skip
        assert 0 < max(moved) < 0.05


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_with_its_config(name, workplace):
    checkpoint = format1.write_run(name, workplace / "results")
    config = (checkpoint.parent.parent / "config.json").read_bytes()
    argv = ["--config", str(checkpoint.parent.parent / "config.json"), "--resume", str(checkpoint)]
    assert run(train.main, "train.py", argv) == 0
    assert_resumed(name, checkpoint)
    assert (checkpoint.parent.parent / "config.json").read_bytes() == config
    assert "at step 2" in (checkpoint.parent.parent / "log.txt").read_text()


@pytest.mark.parametrize("name", ["dit-cosine", "dit-flow", "dydit"])
def test_a_run_resumes_by_the_command_that_began_it(name, workplace):
    checkpoint = format1.write_run(name, workplace / "results")
    assert run(train.main, "train.py", [*MANIFEST["runs"][name]["argv"].split(), "--resume", "auto"]) == 0
    assert_resumed(name, checkpoint)


def test_a_resumed_run_says_that_draws_changed(workplace):
    checkpoint = format1.write_run("dit", workplace / "results")
    argv = ["--config", str(format1.config_path("dit")), "--resume", str(checkpoint)]
    assert run(train.main, "train.py", argv) == 0
    log = checkpoint.parent.parent / "log.txt"
    new = log.read_text()[len((format1.FOLDER / "dit" / "log.txt").read_text()) :]
    assert sum(bool(OTHER_DRAWS.search(line)) for line in new.splitlines()) == 1
    argv[-1] = str(checkpoint.with_name("0000004.safetensors"))
    assert run(train.main, "train.py", [*argv, "--max-steps", "5"]) == 0
    resumed_again = log.read_text().split("at step 4")[1]
    assert not OTHER_DRAWS.search(resumed_again), "a checkpoint of the new format has the new draws"


def test_a_resumed_run_with_other_settings_is_refused_by_flag(workplace, capsys):
    checkpoint = format1.write_run("dit", workplace / "results")
    argv = ["--config", str(format1.config_path("dit")), "--resume", str(checkpoint), "--lr", "0.5"]
    assert run(train.main, "train.py", argv) == 2
    error = the_error(capsys, "train.py")
    assert "--lr" in error and "0.5" in error


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_config_starts_the_run_again(name, workplace):
    assert run(train.main, "train.py", ["--config", str(format1.config_path(name))]) == 0
    (folder,) = (workplace / "results").iterdir()
    lines, recorded = metrics(folder), format1.metrics(name)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([line["lr"] for line in recorded], rel=1e-12)
    # Predictions are still nearly 0, so only draws move the mean loss; a lost setting of the loss would show.
    ours, theirs = (np.mean([line["loss"] for line in run_metrics]) for run_metrics in (lines, recorded))
    assert theirs / 1.6 < ours < theirs * 1.6


@pytest.mark.parametrize("name", RUNS)
def test_latents_are_those_of_the_old_code(name, written, workplace, monkeypatch):
    """All but those of `dpm++`, which took too long a last step at second order."""
    sampled, decode = [], Pipeline.decode
    monkeypatch.setattr(Pipeline, "decode", lambda self, x, *run: sampled.append(x) or decode(self, x, *run))
    recorded = load_file(format1.FOLDER / name / "latents.safetensors")
    cases = {case: flags for case, flags in MANIFEST["runs"][name]["cases"].items() if case != "dpm++"}
    assert cases
    for case, flags in cases.items():
        argv = ["--ckpt", str(written[name]), *MANIFEST["sample_argv"].split(), *flags.split()]
        assert run(sample.main, "sample.py", argv) == 0, case
        assert_close(sampled[-1].float().cpu(), torch.from_numpy(recorded[case]), 1e-4)
    assert (workplace / "sample.png").stat().st_size > 0


@pytest.fixture
def unfinished(workplace, written):
    """A sampling job of 3 chunks, killed after the first, in the current folder; returns its folder.

    Its settings name the installed PyTorch, because another one is a reason of its own to refuse the job.
    """
    shutil.copy(written["dit"], workplace / "0000002.safetensors")
    partial = format1.copy_folder("sample_job", workplace / "job") / "a.partial"
    partial = partial.rename(workplace / "a.partial")
    settings = json.loads((partial / "settings.json").read_text())
    (partial / "settings.json").write_text(json.dumps({**settings, "torch": torch.__version__}, indent=2) + "\n")
    return partial


def test_a_half_finished_job_is_continued(unfinished, workplace, capsys):
    assert run(sample_ddp.main, "sample_ddp.py", MANIFEST["job_argv"].split()) == 0
    assert "Continuing a.partial: 1 of 3 chunks are there" in capsys.readouterr().out
    made, recorded = images(workplace / "a.npz"), images(format1.FOLDER / "sample_job_finished" / "a.npz")
    assert np.array_equal(made[0][:2], recorded[0][:2]), "the finished chunk is kept"
    assert not unfinished.exists()
    assert_same_images(workplace / "a.npz", "sample_job_finished/a.npz")


@pytest.mark.parametrize(
    ("flags", "was"),
    [
        ("--global-seed 1", "--global-seed was 0, now 1"),
        ("--no-clip-denoised", "--clip-denoised was True, now False"),
        ("--sampler dpm++", "those of another version"),
    ],
)
def test_a_half_finished_job_is_not_continued_with_other_settings(unfinished, capsys, flags, was):
    before = (unfinished / "samples.npz").read_bytes()
    if "dpm++" in flags:  # its images differ between the versions
        settings = json.loads((unfinished / "settings.json").read_text())
        (unfinished / "settings.json").write_text(json.dumps({**settings, "--sampler": "dpm++"}))
    assert run(sample_ddp.main, "sample_ddp.py", [*MANIFEST["job_argv"].split(), *flags.split()]) == 2
    error = the_error(capsys, "sample_ddp.py")
    assert "a.partial" in error and was in error and "--overwrite" in error
    assert (unfinished / "samples.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "folder", "result"), [("dit", "sample_job_finished", "a"), ("ddt", "shared_job", "ddt")]
)
def test_the_settings_of_a_result_make_it_again(name, folder, result, written, workplace):
    argv = ["--config", str(format1.FOLDER / folder / f"{result}.json"), "--ckpt", str(written[name])]
    assert run(sample_ddp.main, "sample_ddp.py", [*argv, "--output", "again.npz"]) == 0
    assert_same_images(workplace / "again.npz", f"{folder}/{result}.npz")


def test_a_measured_calibration_is_used(written, workplace):
    """The similarities in the file, which are not those of the network, decide the images."""
    format1.write_similarities(workplace / "late", format1.late_similarities())
    argv = ["--config", str(format1.FOLDER / "shared_job" / "ddt.json"), "--ckpt", str(written["ddt"])]
    argv += ["--sharing-dir", "late", "--output", "late.npz"]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    assert_same_images(workplace / "late.npz", "shared_job/late.npz")


def test_stored_latents_train_and_their_autoencoder_is_the_one_they_know(workplace):
    argv = "--dataset latents --data-path store --model DiT-debug/2 --num-classes 2 --max-steps 2 --device cpu"
    argv += " --global-batch-size 4 --log-every 1 --num-workers 0 --eval-every 2 --eval-samples 1 --eval-steps 2"
    assert run(train.main, "train.py", argv.split()) == 0
    (folder,) = (workplace / "results").iterdir()
    assert all(np.isfinite(line["loss"]) for line in metrics(folder) if "loss" in line)
    assert (folder / "samples" / "0000002.png").exists()


def test_an_unfinished_extraction_is_completed(workplace):
    format1.write_images(workplace / "images")
    (workplace / "store" / "00001.npy").unlink()
    kept = sha256(workplace / "store" / "00000.npy")
    assert run(extract_latents.main, "extract_latents.py", MANIFEST["extract_argv"].split()) == 0
    assert sha256(workplace / "store" / "00000.npy") == kept
    ours, theirs = (np.load(folder / "00001.npy") for folder in (workplace / "store", format1.FOLDER / "latent_store"))
    assert ours.dtype == theirs.dtype and np.allclose(ours, theirs, rtol=2**-9, atol=2**-10)


@pytest.mark.parametrize("model", ["DiT-debug/2", "DyDiT-debug/2"])
def test_training_starts_from_old_weights(model, written, workplace):
    argv = f"--dataset digits --model {model} --init-from {written['dit']} --max-steps 1 --global-batch-size 4"
    assert run(train.main, "train.py", [*argv.split(), *"--num-workers 0 --lr 1e-6 --device cpu".split()]) == 0
    (path,) = workplace.glob("results/*/checkpoints/*")
    before, after = load_file(written["dit"]), load_file(path)
    name = "blocks.0.mlp.fc1.weight"
    assert np.allclose(after[f"model/{name}"], before[f"ema/{name}"], atol=1e-5)
