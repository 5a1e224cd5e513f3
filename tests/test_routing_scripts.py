"""DyDiT through the scripts: the global batch decides, resuming, starting points, layouts of routers, mistakes."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sample
from models import create_model
from runtime.checkpoint import read_checkpoint
from runtime.errors import run
from tests import runs
from tests.networks import randomise
from tests.processes import run_ranks
from tests.runs import DIGITS, assert_same, checkpoint, last_checkpoint, metrics, run_folder, state

BASE = [*DIGITS, *"--model DyDiT-debug/2 --global-batch-size 16".split()]
# Gates that are open half of the time, and a target that they are far from
ROUTED = "--width-router-bias 0.5 --token-router-bias 0.5 --flops-target 0.3 --flops-warmup-steps 0".split()
STEPS = 4
AT_ONCE = "import training.losses.dydit\ntraining.losses.dydit.HOLD_STEPS = 0\n"


def start(results: Path, *argv: object) -> int:
    return runs.start(results, *BASE, *argv)


@pytest.fixture(scope="module")
def at_once() -> Iterator[None]:
    """The target is lambda from the first step on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.losses.dydit.HOLD_STEPS", 0)
        yield


@pytest.fixture(scope="module")
def routed(at_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with stratified times on one process, not cut into micro-batches."""
    results = tmp_path_factory.mktemp("routed")
    assert start(results, *ROUTED, "--stratified-t", "--max-steps", STEPS) == 0
    return results


# ----------------------------------------------------------------------------------------------------------------------
# The global batch decides


def assert_alike(results: Path, others: Path) -> None:
    """Assert that two runs differ by rounding, and that the penalty is that of the global batch."""
    one, two = metrics(results), metrics(others)
    for name in ("loss", "flops_ratio", "flops_ratio_penalty", "mse", "complete_mse", "grad_norm"):
        assert [m[name] for m in two] == pytest.approx([m[name] for m in one], rel=1e-4), name
    assert all(0.2 < m["flops_ratio"] < 0.8 for m in one) and one[-1]["flops_ratio_penalty"] > 1e-3
    assert one[0]["flops_ratio_penalty"] == pytest.approx(2 * (one[0]["flops_ratio"] - 0.3) ** 2, rel=1e-5)


def test_micro_batches_change_nothing_but_rounding(routed: Path, tmp_path: Path) -> None:
    assert start(tmp_path, *ROUTED, "--stratified-t", "--max-steps", STEPS, "--grad-accum", 4) == 0
    assert_alike(routed, tmp_path)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_are_one_but_for_rounding(routed: Path, tmp_path: Path, micro_batches: int) -> None:
    """Gate noise and quarters of the time belong to rows of the global batch; the penalty sees all of it."""
    argv = [*BASE, *ROUTED, "--stratified-t", "--max-steps", STEPS, "--grad-accum", micro_batches]
    argv += ["--results-dir", tmp_path]
    done = run_ranks("train.py", *map(str, argv), folder=tmp_path, fault=AT_ONCE)
    assert done.returncode == 0, done.stderr
    assert_alike(routed, tmp_path)
    one, two = (read_checkpoint(checkpoint(results, STEPS), "model").weights for results in (routed, tmp_path))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)


def test_the_log_tells_the_share_and_a_warm_up_that_is_too_long(tmp_path: Path) -> None:
    assert start(tmp_path, "--flops-target", "0.3", "--max-steps", 1) == 0
    log = runs.log(tmp_path)
    assert "Warning: --flops-warmup-steps 1000: after 1 steps the target is still 1.00, not 0.3" in log
    assert f", flops ratio: {metrics(tmp_path)[0]['flops_ratio']:.3f}\n" in log


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(at_once: None, tmp_path: Path) -> None:
    """Also over the end of the complete loss, whose steps are counted from the beginning."""
    argv = [*ROUTED, "--complete-loss-steps", 3, "--stratified-t", "--grad-norm-mode", "skip", "--grad-clip", 50]
    assert start(tmp_path / "whole", *argv, "--max-steps", 5) == 0
    assert start(tmp_path / "cut", *argv, "--max-steps", 2) == 0
    assert start(tmp_path / "cut", *argv, "--max-steps", 5, "--resume", "auto") == 0
    assert_same(*(state(checkpoint(tmp_path / name, 5)) for name in ("whole", "cut")))
    assert ["complete_mse" in m for m in metrics(tmp_path / "cut")] == [True, True, True, False, False]
    assert start(tmp_path / "cut", *argv, "--max-steps", 6, "--resume", "auto", "--flops-target", 0.4) == 2
    assert start(tmp_path / "cut", *argv, "--max-steps", 6, "--flops-target", 0.4) == 0
    assert run_folder(tmp_path / "cut", 1).exists(), "another target is another run"


def test_losses_that_end_are_averaged_over_the_steps_that_have_them(tmp_path: Path) -> None:
    assert start(tmp_path, "--max-steps", 4, "--complete-loss-steps", 1, "--log-every", 4) == 0
    (line,) = metrics(tmp_path)
    assert line["complete_mse"] == pytest.approx(line["mse"], rel=0.5)  # not a quarter of it


# ----------------------------------------------------------------------------------------------------------------------
# Gradients that are too large


def test_updates_with_too_large_a_gradient_are_skipped_on_request(tmp_path: Path) -> None:
    argv = ["--max-steps", 3, "--ckpt-every", 1, "--grad-norm-mode", "skip", "--lr", 1e-3]
    assert start(tmp_path / "none", *argv, "--grad-clip", 1e-3) == 0
    one, three = (state(checkpoint(tmp_path / "none", step)) for step in (1, 3))
    assert all(torch.equal(three[name], tensor) for name, tensor in one.items())
    assert [m["updates_skipped"] for m in metrics(tmp_path / "none")] == [1, 1, 1]
    assert all(m["grad_norm"] > 1e-3 for m in metrics(tmp_path / "none"))
    assert start(tmp_path / "all", *argv, "--grad-clip", 1e3) == 0
    assert start(tmp_path / "free", *argv[:4], "--lr", 1e-3) == 0
    assert [m["updates_skipped"] for m in metrics(tmp_path / "all")] == [0, 0, 0]
    assert_same(*(state(checkpoint(tmp_path / name, 3)) for name in ("all", "free")))


# ----------------------------------------------------------------------------------------------------------------------
# Starting points and layouts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of the digits' shape, trained for a moment."""
    results = tmp_path_factory.mktemp("plain")
    argv = [word.replace("DyDiT", "DiT") for word in BASE]
    assert runs.start(results, *argv, "--max-steps", 2, "--lr", 1e-2) == 0
    return last_checkpoint(results)


@pytest.mark.parametrize("ranked", [False, True])
def test_a_plain_network_starts_one_with_routers_and_they_are_named(plain: Path, tmp_path: Path, ranked: bool) -> None:
    flags = ["--rank-by-magnitude"] if ranked else []
    assert start(tmp_path, "--init-from", plain, "--max-steps", 1, "--lr", 1e-12, "--no-learn-sigma", *flags) == 2
    assert start(tmp_path, "--init-from", plain, "--max-steps", 1, "--lr", 1e-12, *flags) == 0
    log = runs.log(tmp_path)
    assert "--init-from: initialised afresh, because the weights have none: blocks.0..3.attn_rate.router.weight" in log
    assert "token_selection.mlp_head.2.bias" in log
    assert ("ranked by magnitude" in log) == ranked
    ours, theirs = state(checkpoint(tmp_path, 1)), read_checkpoint(plain).weights
    moved = [n for n, t in theirs.items() if not torch.allclose(ours[f"model/{n}"], t, atol=1e-6)]
    assert bool(moved) == ranked and all(".attn." in name or ".mlp." in name for name in moved)
    assert (ours["model/blocks.0.attn_rate.router.bias"] == 15).all()


def official_file(path: Path, layout: str) -> dict[str, Tensor]:
    """An official checkpoint of a debug-size network, with what the released trainer puts in it."""
    network = randomise(create_model("DyDiT-debug/2", router_layout=layout, sample_shape=(3, 8, 8)))
    weights = network.state_dict()
    torch.save({"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    return weights


@pytest.mark.parametrize("layout", ["first_always_on", "all_heads"])
def test_official_files_of_both_layouts_are_sampled_without_a_word_about_it(layout: str, tmp_path: Path) -> None:
    official_file(tmp_path / "dydit.pth", layout)
    argv = ["--ckpt", str(tmp_path / "dydit.pth"), "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    argv += "--model DyDiT-debug/2 --vae none --image-size 8 --num-classes 10 --num-sampling-steps 3".split()
    assert run(sample.main, "sample.py", argv) == 0
    assert (tmp_path / "a.png").exists()


def test_training_keeps_the_layout_of_the_file_and_resumes_in_it(tmp_path: Path) -> None:
    network = randomise(create_model("DyDiT-debug/2", router_layout="all_heads", sample_shape=(1, 8, 8)))
    torch.save(network.state_dict(), tmp_path / "dydit.pth")
    argv = ["--init-from", tmp_path / "dydit.pth", "--resume", "auto"]
    assert start(tmp_path / "runs", *argv, "--max-steps", 1) == 0
    assert start(tmp_path / "runs", *argv, "--max-steps", 2) == 0
    assert [m["step"] for m in metrics(tmp_path / "runs")] == [1, 2]
    found = read_checkpoint(checkpoint(tmp_path / "runs", 2))
    assert found.meta is not None and found.meta["model"]["router_layout"] == "all_heads"
    assert found.weights["blocks.0.attn_rate.router.weight"].shape == (4, 64)
    argv = ["--ckpt", str(checkpoint(tmp_path / "runs", 2)), "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    assert run(sample.main, "sample.py", [*argv, "--num-sampling-steps", "3"]) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--flops-target 0", "--flops-target 0.0: flops_target must lie in (0, 1], not 0.0"),
        ("--flops-target 1.5", "flops_target must lie in (0, 1], not 1.5"),
        ("--flops-warmup-steps -1", "flops_warmup_steps must be finite and not negative, not -1"),
        ("--model DiT-debug/2 --flops-target 0.5", "--flops-target 0.5: is a setting of the loss dydit"),
        ("--model DiT-debug/2 --stratified-t", "--stratified-t: is a setting of the loss dydit"),
        ("--model DiT-debug/2 --width-router-bias 3", "--width-router-bias 3.0: is a setting of the model DyDiT"),
        ("--router-layout two_heads", "--router-layout: invalid choice: 'two_heads' (choose from 'first_alw"),
        (
            "--stratified-t --global-batch-size 6",
            "--stratified-t: 6 images a process do not cover 4 parts of the schedule evenly; choose "
            "--global-batch-size as a multiple of 4",
        ),
        ("--stratified-t --global-batch-size 2", "--stratified-t: 2 images a process"),
        ("--rank-by-magnitude", "--rank-by-magnitude: has no effect without --init-from"),
        ("--grad-norm-mode skip", "--grad-norm-mode skip: needs --grad-clip"),
        (
            "--init-from {v1} --router-layout first_always_on",
            "--router-layout first_always_on: --init-from {v1} has all_",
        ),
        ("--init-from {v1} --model DiT-debug/2", "unexpected blocks.0.attn_rate.router.weight"),
        ("--init-from {v1} --rank-by-magnitude", "rank_by_magnitude is for weights without routers"),
        ("--init-from {six}", "--init-from {six} as DyDiT-debug/2: routers of 6 gates; 4 heads need 3 or 4"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"v1": tmp_path / "v1.pt", "six": tmp_path / "six.pt"}
    network = create_model("DyDiT-debug/2", router_layout="all_heads", sample_shape=(1, 8, 8))
    torch.save(network.state_dict(), places["v1"])
    torch.save(
        create_model("DyDiT-debug/2", hidden_size=96, num_heads=6).state_dict()
        | {"blocks.0.attn_rate.router.weight": torch.zeros(6, 64)},
        places["six"],
    )
    assert start(tmp_path / "runs", *argv.format(**places).split()) == 2
    assert words.format(**places) in runs.the_error(capsys)
    assert not list((tmp_path / "runs").glob("*")), "a refused run must leave nothing behind"


def test_too_few_rows_per_process_for_the_quarters_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert start(tmp_path, "--stratified-t", "--dry-run") == 2
    assert "--stratified-t: 2 images a process do not cover 4 parts" in runs.the_error(capsys)


@pytest.mark.parametrize(
    ("held", "model", "words"),
    [
        (
            "DiT-debug/2",
            "DyDiT-debug/2",
            "weights of a DiT (without blocks.attn_rate",
        ),
        (
            "DyDiT-debug/2",
            "DiT-debug/2",
            "weights of a DyDiT (with blocks.attn_rate",
        ),
    ],
)
def test_a_plain_checkpoint_is_not_sampled_as_a_routed_one_nor_the_other_way_round(
    held: str, model: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(create_model(held, sample_shape=(3, 8, 8)).state_dict(), tmp_path / "file.pt")
    argv = [
        "--ckpt",
        str(tmp_path / "file.pt"),
        "--model",
        model,
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "a.png"),
    ]
    assert run(sample.main, "sample.py", [*argv, *"--vae none --image-size 8 --num-classes 10".split()]) == 2
    error = capsys.readouterr().err
    assert words in error and f"choose {held}" in error and error.count("\n") == 1
