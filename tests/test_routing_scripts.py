"""train.py and sample.py with a family that routes: its recipe's flags, its checkpoints, and what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sample
import train
from models import create_model
from runtime.checkpoint import read_checkpoint, read_groups
from runtime.errors import run
from tests.networks import randomise
from tests.processes import run_ranks
from training.config import NETWORK_SETTINGS, RECIPE_SETTINGS, TrainConfig

BASE = (
    "--dataset digits --model DyDiT-debug/2 --device cpu --num-workers 0 --global-batch-size 16 --log-every 1".split()
)
# Gates that are open half of the time, and a target that they are far from
ROUTED = "--width-router-bias 0.5 --token-router-bias 0.5 --flops-target 0.3 --flops-warmup-steps 0".split()
STEPS = 4


def start(results: Path, *argv: Any) -> int:
    return run(train.main, "train.py", [*BASE, "--results-dir", str(results), *map(str, argv)])


def folder(results: Path, number: int = 0) -> Path:
    return results / f"{number:03d}-DyDiT-debug-2"


def metrics(results: Path, number: int = 0) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder(results, number) / "metrics.jsonl").read_text().splitlines()]


def checkpoint(results: Path, step: int) -> Path:
    return folder(results) / "checkpoints" / f"{step:07d}.safetensors"


def state(results: Path, step: int) -> dict[str, Tensor]:
    groups, _ = read_groups(checkpoint(results, step), ["model", "ema", "optimizer"])
    return {f"{g}/{n}": t for g, tensors in groups.items() for n, t in tensors.items()}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is lambda from the first step on."""
    monkeypatch.setattr("models.dydit.HOLD_STEPS", 0)


# ----------------------------------------------------------------------------------------------------------------------
# The global batch decides


def test_micro_batches_change_nothing_but_rounding(at_once: None, tmp_path: Path) -> None:
    for count in (1, 2):
        assert start(tmp_path / str(count), *ROUTED, "--max-steps", STEPS, "--grad-accum", count) == 0
    one, two = (metrics(tmp_path / str(count)) for count in (1, 2))
    for name in ("loss", "flops_ratio", "flops_ratio_penalty", "complete_mse", "grad_norm"):
        assert [m[name] for m in two] == pytest.approx([m[name] for m in one], rel=1e-4), name
    assert all(0.2 < m["flops_ratio"] < 0.8 for m in one) and one[0]["flops_ratio_penalty"] > 1e-3
    assert one[0]["flops_ratio_penalty"] == pytest.approx(2 * (one[0]["flops_ratio"] - 0.3) ** 2, rel=1e-5)


def test_the_log_tells_the_share_and_a_warm_up_that_is_too_long(tmp_path: Path) -> None:
    assert start(tmp_path, "--flops-target", "0.3", "--max-steps", 1) == 0
    log = (folder(tmp_path) / "log.txt").read_text()
    assert "Warning: --flops-warmup-steps 1000: after 1 steps the target is still 1.00, not 0.3" in log
    assert f", flops ratio: {metrics(tmp_path)[0]['flops_ratio']:.3f}\n" in log


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_are_one_but_for_rounding(at_once: None, tmp_path: Path, micro_batches: int) -> None:
    """Gate noise and quarters of the time belong to rows of the global batch; the penalty sees all of it."""
    argv = [*ROUTED, "--stratified-t", "--max-steps", STEPS]
    assert start(tmp_path / "1", *argv) == 0
    program = tmp_path / "train_at_once.py"
    program.write_text(
        "import sys, models.dydit, train\nfrom runtime.errors import run\n"
        "models.dydit.HOLD_STEPS = 0\nsys.exit(run(train.main, 'train.py'))\n"
    )
    options = [*BASE, *map(str, argv), "--grad-accum", str(micro_batches), "--results-dir", str(tmp_path / "2")]
    done = run_ranks(program, *options, ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (metrics(tmp_path / str(ranks)) for ranks in (1, 2))
    for name in ("loss", "flops_ratio", "flops_ratio_penalty", "mse", "complete_mse", "grad_norm"):
        assert [m[name] for m in two] == pytest.approx([m[name] for m in one], rel=1e-4), name
    assert one[-1]["flops_ratio_penalty"] > 1e-3
    weights = {n: read_checkpoint(checkpoint(tmp_path / str(n), STEPS), "model").weights for n in (1, 2)}
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, rtol=0, atol=2e-5)


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(at_once: None, tmp_path: Path) -> None:
    """Also over the end of the complete loss, whose steps are counted from the beginning."""
    argv = [*ROUTED, "--complete-loss-steps", 3, "--stratified-t", "--grad-norm-mode", "skip", "--grad-clip", 50]
    assert start(tmp_path / "whole", *argv, "--max-steps", 5) == 0
    assert start(tmp_path / "cut", *argv, "--max-steps", 2) == 0
    assert start(tmp_path / "cut", *argv, "--max-steps", 5, "--resume", "auto") == 0
    whole, cut = state(tmp_path / "whole", 5), state(tmp_path / "cut", 5)
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, cut[name])] == []
    assert ["complete_mse" in m for m in metrics(tmp_path / "cut")] == [True, True, True, False, False]
    assert start(tmp_path / "cut", *argv, "--max-steps", 6, "--resume", "auto", "--flops-target", 0.4) == 0
    assert folder(tmp_path / "cut", 1).exists(), "another target is another run"


def test_losses_that_end_are_averaged_over_the_steps_that_have_them(tmp_path: Path) -> None:
    assert start(tmp_path, "--max-steps", 4, "--complete-loss-steps", 1, "--log-every", 4) == 0
    (line,) = metrics(tmp_path)
    assert line["complete_mse"] == pytest.approx(line["mse"], rel=0.5)  # not a quarter of it


def test_recomputed_blocks_route_as_they_did(at_once: None, tmp_path: Path) -> None:
    for name, flags in (("kept", []), ("recomputed", ["--grad-checkpointing"])):
        assert start(tmp_path / name, *ROUTED, "--max-steps", 2, *flags) == 0
    kept, recomputed = state(tmp_path / "kept", 2), state(tmp_path / "recomputed", 2)
    assert [name for name, tensor in kept.items() if not torch.equal(tensor, recomputed[name])] == []


# ----------------------------------------------------------------------------------------------------------------------
# Gradients that are too large


def test_updates_with_too_large_a_gradient_are_skipped_on_request(tmp_path: Path) -> None:
    argv = ["--max-steps", 3, "--ckpt-every", 1, "--grad-norm-mode", "skip", "--lr", 1e-3]
    assert start(tmp_path / "none", *argv, "--grad-clip", 1e-3) == 0
    one, three = state(tmp_path / "none", 1), state(tmp_path / "none", 3)
    assert all(torch.equal(three[name], tensor) for name, tensor in one.items())
    assert [m["updates_skipped"] for m in metrics(tmp_path / "none")] == [1, 1, 1]
    assert all(m["grad_norm"] > 1e-3 for m in metrics(tmp_path / "none"))
    assert start(tmp_path / "all", *argv, "--grad-clip", 1e3) == 0
    assert start(tmp_path / "free", *argv[:4], "--lr", 1e-3) == 0
    assert [m["updates_skipped"] for m in metrics(tmp_path / "all")] == [0, 0, 0]
    ours, plain = state(tmp_path / "all", 3), state(tmp_path / "free", 3)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.items())


# ----------------------------------------------------------------------------------------------------------------------
# Starting points and layouts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of the digits' shape, trained for a moment."""
    results = tmp_path_factory.mktemp("plain")
    argv = [word.replace("DyDiT", "DiT") for word in BASE]
    assert run(train.main, "train.py", [*argv, "--results-dir", str(results), "--max-steps", "2", "--lr", "1e-2"]) == 0
    (path,) = results.glob("*/checkpoints/*")
    return path


@pytest.mark.parametrize("ranked", [False, True])
def test_a_plain_network_starts_one_with_routers_and_they_are_named(plain: Path, tmp_path: Path, ranked: bool) -> None:
    flags = ["--rank-by-magnitude"] if ranked else []
    assert start(tmp_path, "--init-from", plain, "--max-steps", 1, "--lr", 1e-12, "--no-learn-sigma", *flags) == 2
    assert start(tmp_path, "--init-from", plain, "--max-steps", 1, "--lr", 1e-12, *flags) == 0
    log = (folder(tmp_path) / "log.txt").read_text()
    assert "--init-from: drawn anew, because the weights have none: blocks.0..3.attn_rate.router.weight" in log
    assert "token_selection.mlp_head.2.bias" in log
    assert ("ranked by magnitude" in log) == ranked
    ours, theirs = state(tmp_path, 1), read_checkpoint(plain).weights
    moved = [n for n, t in theirs.items() if not torch.allclose(ours[f"model/{n}"], t, atol=1e-6)]
    assert bool(moved) == ranked and all(".attn." in name or ".mlp." in name for name in moved)
    assert (ours["model/blocks.0.attn_rate.router.bias"] == 15).all()


def official_file(path: Path, layout: str) -> dict[str, Tensor]:
    """An official checkpoint of a debug-size network, with what the released trainer puts in it."""
    import argparse

    network = randomise(create_model("DyDiT-debug/2", router_layout=layout, in_channels=3))
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


def test_training_goes_on_from_the_layout_of_the_file_and_resumes_in_it(tmp_path: Path) -> None:
    network = randomise(create_model("DyDiT-debug/2", router_layout="all_heads", in_channels=1))
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
        ("--model DiT-debug/2 --flops-target 0.5", "--flops-target 0.5: has no effect on DiT-debug/2"),
        ("--model DiT-debug/2 --stratified-t", "--stratified-t True: has no effect on DiT-debug/2"),
        ("--model DiT-debug/2 --width-router-bias 3", "--width-router-bias 3.0: has no effect on DiT-debug/2"),
        ("--router-layout two_heads", "router_layout 'two_heads' is none of first_always_on, all_heads"),
        (
            "--stratified-t --global-batch-size 6",
            "--stratified-t: 6 images per process do not cover 4 parts of the schedule evenly; choose "
            "--global-batch-size as a multiple of 4",
        ),
        ("--stratified-t --global-batch-size 2", "--stratified-t: 2 images per process"),
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
    network = create_model("DyDiT-debug/2", router_layout="all_heads", in_channels=1)
    torch.save(network.state_dict(), places["v1"])
    torch.save(
        create_model("DyDiT-debug/2", hidden_size=96, num_heads=6).state_dict()
        | {"blocks.0.attn_rate.router.weight": torch.zeros(6, 64)},
        places["six"],
    )
    assert start(tmp_path / "runs", *argv.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and error.count("\n") == 1
    assert words.format(**places) in error
    assert not list((tmp_path / "runs").glob("*")), "a refused run must leave nothing behind"


def test_too_few_rows_per_process_for_the_quarters_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert start(tmp_path, "--stratified-t") == 2
    assert "--stratified-t: 2 images per process do not cover 4 parts" in capsys.readouterr().err


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
    torch.save(create_model(held, in_channels=3).state_dict(), tmp_path / "file.pt")
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


def test_every_setting_of_every_recipe_has_a_flag() -> None:
    fields = TrainConfig.__dataclass_fields__
    assert {"flops_target", "complete_loss_steps"} <= {*RECIPE_SETTINGS} <= fields.keys()
    assert all(fields[name].default is None for name in (*RECIPE_SETTINGS, *NETWORK_SETTINGS))
