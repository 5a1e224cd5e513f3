"""Validation while training: loss by quarter, samples, scores; and that it changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.digits import load_digits
from tests import runs
from tests.networks import randomise
from tests.processes import run_ranks
from tests.runs import CPU, DIGITS, assert_same, checkpoint, losses, metrics, open_setup, run_folder, state
from training.optimization import EMA
from training.validation import Validation

BASE = [*DIGITS, *"--model DiT-digits/2 --global-batch-size 12".split()]
EVAL = "--max-steps 4 --eval-every 2 --eval-images 100 --eval-samples 12 --eval-steps 3".split()


def start(results, *argv):
    return runs.start(results, *BASE, *argv)


def validations(results):
    return [m for m in metrics(results) if "val_loss" in m]


def validate(*argv):
    """A validation of a network with random weights."""
    setup = open_setup(*BASE, *EVAL, *argv)
    randomise(setup.network)
    return Validation(setup, setup.validation, EMA(setup.network, 0.9).network, CPU)


def pixels(validation, count):
    """Images of the first classes, of a single process."""
    validation.settings = replace(validation.settings, eval_samples=count)
    return torch.cat([images for _, images in validation.sample(validation.data.sampler, {"y": torch.arange(count)})])[
        :count
    ]


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    results = tmp_path_factory.mktemp("validated")
    assert start(results, *EVAL) == 0
    return results


def test_a_run_reports_loss_by_quarter_scores_and_pictures(validated):
    found = validations(validated)
    assert [m["step"] for m in found] == [2, 4]
    names = {"step", "val_loss", "val_loss_q1", "val_loss_q2", "val_loss_q3", "val_loss_q4"}
    assert found[0].keys() == names | {"frechet_distance", "accuracy"}
    assert f"(step=0000004) val loss: {found[1]['val_loss']:.4f}" in runs.log(validated)
    pictures = sorted((run_folder(validated) / "samples").iterdir())
    assert [p.name for p in pictures] == ["0000002.png", "0000004.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (4 * 66 + 2, 3 * 66 + 2)


def test_validation_changes_nothing(validated, tmp_path):
    assert start(tmp_path, "--max-steps", 4) == 0
    assert_same(state(checkpoint(validated, 4)), state(checkpoint(tmp_path, 4)))
    assert losses(validated) == losses(tmp_path)


def test_a_resumed_run_says_the_same(validated, tmp_path):
    assert start(tmp_path, *EVAL, "--max-steps", 3) == 0
    assert start(tmp_path, *EVAL, "--resume", "auto") == 0
    assert validations(tmp_path)[-1] == validations(validated)[-1]


def test_two_processes_say_the_same(validated, tmp_path):
    done = run_ranks("train.py", *BASE, *EVAL, "--results-dir", str(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for one, two in zip(validations(validated), validations(tmp_path), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    name = "000-DiT-digits-2/samples/0000004.png"
    with Image.open(validated / name) as one, Image.open(tmp_path / name) as two:
        difference = np.asarray(one).astype(int) - np.asarray(two)
    assert np.abs(difference).max() <= 1


def test_the_loss_is_that_of_the_held_out_images_by_quarter():
    found = validate()
    seen = []
    forward = found.loss.forward

    def record(batch, draws, step, shared):
        losses = forward(batch, draws, step, shared)
        assert draws.dropped is None
        seen.append((batch.x_start, draws.t, losses["loss"]))
        return losses

    found.loss.forward = record
    values = found.losses(found.data.held_out)
    x, t, loss = (torch.cat(column) for column in zip(*seen, strict=True))
    images, _ = load_digits("test")
    assert torch.equal(x, torch.from_numpy(images[:100]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert values["val_loss"] == pytest.approx(float(loss.mean()))
    for quarter in range(4):
        inside = (t >= 250 * quarter) & (t < 250 * (quarter + 1))
        assert values[f"val_loss_q{quarter + 1}"] == pytest.approx(float(loss[inside].mean())), quarter
    assert len({*values.values()}) == 5


def test_pictures_depend_on_the_weights_and_not_on_how_many_there_are():
    found = validate()
    ten, five = (pixels(found, n) for n in (10, 5))
    assert ten.shape == (10, 1, 8, 8) and torch.allclose(ten[:5], five, atol=1e-4)
    with torch.no_grad():
        next(p for p in found.network.parameters() if p.ndim > 1).mul_(2)
    assert not torch.allclose(pixels(found, 5), five, atol=1e-2)


def test_guidance_needs_a_null_class_and_does_without():
    guided, plain = (pixels(validate("--eval-cfg-scale", scale), 3) for scale in ("3", "1"))
    assert not torch.allclose(guided, plain, atol=1e-2)
    unguided = [pixels(validate("--class-dropout-prob", "0", "--eval-cfg-scale", s), 3) for s in "31"]
    assert torch.equal(*unguided)


def test_held_out_folders_of_the_same_classes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, labels in {"train": "ab", "val": "ab", "other": "ac"}.items():
        for label in labels:
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                noise = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / split / label / f"{i}.png")
    argv = f"--data-path {tmp_path / 'train'} --model DiT-debug/2 --vae none --image-size 16 --num-classes 2"
    argv += " --device cpu --max-steps 1 --global-batch-size 2 --num-workers 1 --eval-every 1 --eval-samples 0"
    results = tmp_path / "results"
    assert runs.start(results, *argv.split(), "--eval-data-path", tmp_path / "other") == 2
    assert "its 2 classes are not the 2 of --data-path, by name" in runs.the_error(capsys)
    assert runs.start(results, *argv.split()) == 2
    assert "--eval-every 1: nothing to do; give --eval-data-path or --eval-samples" in runs.the_error(capsys)
    assert runs.start(results, *argv.split(), "--eval-data-path", tmp_path / "val") == 0
    (line,) = metrics(results)
    assert line["val_loss"] > 0
    assert not (run_folder(results) / "samples").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    cases = {
        ("--eval-every", "0"): "--eval-every 0: must be at least 1",
        ("--eval-data-path", "x"): "--eval-data-path x: has no effect without --eval-every",
        ("--eval-every", "1", "--eval-data-path", "x"): "the digits have a test split of their own",
        ("--eval-every", "1", "--eval-samples", "-1"): "--eval-samples -1: must not be negative",
        ("--eval-every", "1", "--eval-cfg-scale", "0.5"): "--eval-cfg-scale 0.5: must be at least 1",
        ("--eval-every", "1", "--eval-samples", "3"): "--eval-samples 3: the scores need at least 4",
        ("--eval-every", "1", "--eval-steps", "1001"): "--eval-steps 1001",
    }
    for argv, words in cases.items():
        assert start(tmp_path, *argv) == 2
        assert words in runs.the_error(capsys)
    assert not list(tmp_path.iterdir())
