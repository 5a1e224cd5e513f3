"""Training on captions: rows, dropping, the checkpoint's record, and what does not go together."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.words import Words
from runtime.checkpoint import read_checkpoint
from tests import captions, runs
from tests.captions import CAPTIONED, NAME, RUN
from tests.runs import CPU, last_checkpoint, open_setup, start, the_error
from training.trainer import batches
from training.validation import Validation


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    with captions.registered():
        yield


def test_batches_have_encoded_captions_and_the_empty_one_as_null() -> None:
    setup = open_setup(*RUN)
    assert (setup.network.config.text_width, setup.network.config.text_length) == (Words.width, Words.length)
    (batch, draws), *_ = next(batches(setup, CPU, 0))[1]
    assert batch.conditioning["text"].shape == (8, 8, 32) and batch.conditioning["text_mask"].shape == (8, 8)
    empty = Words().encode([""])
    assert all(torch.equal(leaf[k], empty[name][0]) for name, leaf in batch.null.items() for k in range(8))
    for row, index in zip(batch.conditioning["text"], batch.index.tolist(), strict=True):
        epoch_0 = setup.dataset[0, index][1]
        assert isinstance(epoch_0, dict) and torch.equal(row, epoch_0["text"])
    assert draws.dropped is None, "the published recipe drops none"


def test_dropped_rows_get_text_and_mask_of_the_empty_caption() -> None:
    setup = open_setup(*RUN, "--caption-dropout-prob", 0.5)
    (batch, draws), *_ = next(batches(setup, CPU, 0))[1]
    seen = {}
    setup.network.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    setup.loss(batch, draws, 0, {})
    (dropped,) = draws.dropped
    assert 0 < dropped.sum() < 8
    for row, is_dropped in enumerate(dropped.tolist()):
        expected = batch.null if is_dropped else batch.conditioning
        assert torch.equal(seen["text"][row], expected["text"][row])
        assert torch.equal(seen["text_mask"][row], expected["text_mask"][row])


def test_the_share_of_dropped_captions_is_the_one_asked_for() -> None:
    setup = open_setup(*RUN, "--caption-dropout-prob", 0.2)
    assert abs(float(setup.loss.draw(0, 5000).dropped.float().mean()) - 0.2) < 0.02
    assert open_setup(*RUN).loss.draw(0, 10).dropped is None


def test_a_checkpoint_remembers_the_encoder_and_a_run_resumes_bit_by_bit(tmp_path: Path) -> None:
    argv = [*RUN, "--caption-dropout-prob", 0.1, "--ckpt-every", 2]
    assert start(tmp_path / "a", *argv) == 0
    assert "clips (captioned-digits)" in runs.log(tmp_path / "a")
    assert start(tmp_path / "b", *argv, "--max-steps", 2) == start(tmp_path / "b", *argv, "--resume", "auto") == 0
    meta = read_checkpoint(last_checkpoint(tmp_path / "a")).meta
    assert meta is not None and meta["text"] == Words().describe() and meta["data"]["classes"] == []
    states = [runs.state(last_checkpoint(tmp_path / name)) for name in "ab"]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_the_loss_depends_on_the_caption() -> None:
    setup = open_setup(*RUN)
    (batch, draws), *_ = next(batches(setup, CPU, 0))[1]
    other = replace(batch, conditioning={name: leaf.flip(0) for name, leaf in batch.conditioning.items()})
    own, exchanged = (setup.loss(each, draws, 0, {})["loss"] for each in (batch, other))
    assert not torch.allclose(own, exchanged)


def test_validations_sample_captions_of_the_test_split(tmp_path: Path) -> None:
    argv = [*RUN, *"--eval-every 3 --eval-samples 3 --eval-steps 2 --eval-images 8 --caption-dropout-prob 0.1".split()]
    assert start(tmp_path, *argv) == 0
    assert "val_loss" in runs.metrics(tmp_path)[-1] and list(tmp_path.glob("*/samples/0000003.png"))
    setup = open_setup(*argv)
    assert setup.validation is not None
    rows = Validation(setup, setup.validation, setup.network, CPU).preview_conditioning()
    assert torch.equal(rows["text"][1], setup.validation.held_out[0, 1][1]["text"])


def test_a_dry_run_predicts_memory_and_warns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert start(tmp_path, *RUN, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "kept for the backward pass" in out and "Warning: --caption-dropout-prob 0: guidance needs" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*CAPTIONED, "--model", "Latte-debug/2"], "Latte-debug/2: takes labels, and --dataset captioned-digits"),
        ([*runs.MOVING_DIGITS, "--model", NAME], "takes text, and --dataset moving-digits has no captions; give"),
        ([*runs.MOVING_DIGITS, "--model", "Latte-digits/4", "--caption-dropout-prob", 0.1],
         "--caption-dropout-prob 0.1: has no effect: --model Latte-digits/4 takes no text"),
        ([*RUN, "--text-length", 120], "--text-length 120: the captions of --dataset captioned-digits have 8"),
        ([*RUN, "--caption-dropout-prob", 1], "--caption-dropout-prob 1.0: must lie in [0, 1)"),
        ([*CAPTIONED, "--model", NAME, "--data-path", "x"], "--data-path x: has no effect with --dataset captioned"),
    ],
)  # fmt: skip
def test_text_and_labels_are_told_apart(
    argv: list[object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, *argv) == 2
    assert words in the_error(capsys) and not list(tmp_path.iterdir())


def test_unconditional_networks_take_captioned_data() -> None:
    argv = [*CAPTIONED, "--model", "Latte-debug/2", "--num-classes", 0, "--patch-size", 2, "--global-batch-size", 4]
    setup = open_setup(*argv)
    (batch, draws), *_ = next(batches(setup, CPU, 0))[1]
    assert setup.loss(batch, draws, 0, {})["loss"].shape == (4,)
