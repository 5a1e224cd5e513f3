"""What must survive: stops, restarts, other numbers of processes, damaged files, numbers that are not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusion.objective import Objective
from runtime.stopping import INTERRUPTED_STATUS

import train
from runtime.checkpoint import read_groups
from runtime.errors import run
from tests.processes import ROOT, run_script
from training import trainer

BASE = "--dataset digits --model DiT-digits/2 --device cpu --num-workers 0 --global-batch-size 12 --log-every 1".split()
BASE += "--lr 2e-3 --ema-decay 0.9 --keep-last 50".split()


def start(results, *argv):
    return run(train.main, "train.py", [*BASE, "--results-dir", str(results), *map(str, argv)])


def folder(results, number=0):
    return results / f"{number:03d}-DiT-digits-2"


def checkpoint(results, step, number=0):
    return folder(results, number) / "checkpoints" / f"{step:07d}.safetensors"


def state(path):
    """All tensors of a checkpoint, by full name."""
    groups, _ = read_groups(path, ["model", "ema", "optimizer"])
    return {f"{g}/{n}": t for g, tensors in groups.items() for n, t in tensors.items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a) > 100
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def losses(results, number=0):
    lines = (folder(results, number) / "metrics.jsonl").read_text().splitlines()
    return {m["step"]: m["loss"] for m in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    results = tmp_path_factory.mktemp("whole")
    assert start(results, "--max-steps", 12, "--ckpt-every", 4) == 0
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(whole, tmp_path, how):
    assert start(tmp_path, "--max-steps", 7) == 0
    resume = "auto" if how == "auto" else checkpoint(tmp_path, 7)
    assert start(tmp_path, "--max-steps", 12, "--resume", resume) == 0
    assert [p.name for p in tmp_path.iterdir()] == [folder(tmp_path).name], "it goes on in its own folder"
    assert_same(state(checkpoint(tmp_path, 12)), state(checkpoint(whole, 12)))
    assert losses(tmp_path) == losses(whole)


def test_resume_with_flips_workers_and_a_stop_in_mid_epoch(tmp_path):
    flips = ["--flip", "--num-workers", 2]
    assert start(tmp_path / "whole", *flips, "--max-steps", 6) == 0
    assert start(tmp_path / "cut", *flips, "--max-steps", 3) == 0
    assert start(tmp_path / "cut", *flips, "--max-steps", 6, "--resume", "auto") == 0
    assert_same(state(checkpoint(tmp_path / "cut", 6)), state(checkpoint(tmp_path / "whole", 6)))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_two_ranks_resume_bit_by_bit_and_one_rank_goes_on_alike(tmp_path, whole):
    argv = [*BASE, "--results-dir", str(tmp_path), "--resume", "auto", "--ckpt-every", "4"]
    for steps in ("4", "8"):
        done = run_script("train.py", *argv, "--max-steps", steps, ranks=2, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert start(tmp_path, "--resume", "auto", "--max-steps", 12, "--ckpt-every", 4) == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-5)


def test_auto_starts_anew_where_there_is_nothing_or_something_else(tmp_path):
    assert start(tmp_path, "--max-steps", 2, "--resume", "auto") == 0
    assert start(tmp_path, "--max-steps", 2, "--resume", "auto", "--global-seed", 1) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-DiT-digits-2", "001-DiT-digits-2"]


def test_a_finished_run_stays_as_it_is(tmp_path):
    assert start(tmp_path, "--max-steps", 2) == 0
    before = checkpoint(tmp_path, 2).read_bytes()
    assert start(tmp_path, "--max-steps", 2, "--resume", "auto") == 0
    assert checkpoint(tmp_path, 2).read_bytes() == before


def test_a_named_checkpoint_of_other_settings_is_refused(whole, capsys):
    assert start(whole, "--resume", checkpoint(whole, 4), "--lr", 1e-3) == 2
    assert "the run has other settings: --lr was 0.002, now 0.001" in capsys.readouterr().err


def test_the_length_of_a_cosine_cannot_change_on_the_way(tmp_path, capsys):
    cosine = ["--lr-schedule", "cosine", "--max-steps"]
    assert start(tmp_path, *cosine, 4, "--ckpt-every", 2) == 0
    assert start(tmp_path, *cosine, 8, "--resume", checkpoint(tmp_path, 2)) == 2
    assert "--max-steps was 4, now 8" in capsys.readouterr().err
    before = state(checkpoint(tmp_path, 4))
    checkpoint(tmp_path, 4).unlink()
    assert start(tmp_path, *cosine, 4, "--resume", "auto") == 0
    assert_same(state(checkpoint(tmp_path, 4)), before)


def test_a_damaged_newest_checkpoint_is_passed_over_by_auto_and_refused_by_name(whole, tmp_path, capsys):
    assert start(tmp_path, "--max-steps", 8, "--ckpt-every", 4) == 0
    newest = checkpoint(tmp_path, 8)
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1  # a flipped bit in the weights: the file's structure is intact
    newest.write_bytes(bytes(content))
    assert start(tmp_path, "--max-steps", 12, "--resume", newest) == 2
    assert "does not match its checksum" in capsys.readouterr().err
    newest.write_bytes(bytes(content[:1000]))
    assert start(tmp_path, "--max-steps", 12, "--resume", "auto") == 0
    assert f"passed over: --resume {newest}" in capsys.readouterr().err
    assert_same(state(checkpoint(tmp_path, 12)), state(checkpoint(whole, 12)))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    assert start(tmp_path, "--max-steps", 7, "--ckpt-every", 2, "--keep-last", 2) == 0
    kept = sorted(p.name for p in (folder(tmp_path) / "checkpoints").iterdir())
    assert kept == ["0000006.safetensors", "0000007.safetensors"]


def launch(results, *argv):
    """Starts train.py in a process of its own, ready to be killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *BASE, "--results-dir", str(results), *map(str, argv)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(results, step):
    """Returns once the run has logged a step."""
    for _ in range(1200):
        path = folder(results) / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def test_sigterm_saves_and_leaves_with_the_documented_status(tmp_path):
    process = launch(tmp_path, "--max-steps", 100_000)
    wait_for_step(tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED_STATUS == 75
    assert "Stopped by a signal at step" in out
    (saved,) = (folder(tmp_path) / "checkpoints").iterdir()
    stopped = int(saved.stem)
    assert start(tmp_path / "whole", "--max-steps", stopped) == 0
    assert_same(state(saved), state(checkpoint(tmp_path / "whole", stopped)))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_any_moment_do_not_change_the_end(tmp_path, kills):
    steps = 200
    argv = ["--max-steps", steps, "--ckpt-every", 5, "--resume", "auto", "--keep-last", 3]
    generator = torch.Generator().manual_seed(kills)
    for kill in range(kills):
        process = launch(tmp_path / "cut", *argv)
        # step 6 at the earliest: killed before its first checkpoint, a run has nothing to go on with and starts anew
        wait_for_step(tmp_path / "cut", 6 + kill * 150 // kills + int(torch.randint(5, (), generator=generator)))
        time.sleep(0.05 * float(torch.rand((), generator=generator)))
        process.kill()
        process.communicate()
    assert start(tmp_path / "cut", *argv) == 0
    assert start(tmp_path / "whole", "--max-steps", steps) == 0
    assert_same(state(checkpoint(tmp_path / "cut", steps)), state(checkpoint(tmp_path / "whole", steps)))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------------------
# One step


def test_micro_batches_change_nothing_but_rounding(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 12, "--grad-accum", 3) == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-5)


def test_recomputed_activations_change_nothing(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 4, "--grad-checkpointing") == 0
    assert_same(state(checkpoint(tmp_path, 4)), state(checkpoint(whole, 4)))


def test_bf16_trains_close_to_float32_and_keeps_float32_weights(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 12, "--precision", "bf16") == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=2e-2)
    assert losses(tmp_path) != losses(whole)
    assert {t.dtype for t in state(checkpoint(tmp_path, 12)).values()} == {torch.float32}


def test_clipping_bounds_the_step_and_the_log_tells_the_norm(tmp_path):
    assert start(tmp_path, "--max-steps", 1, "--grad-clip", 1e-3) == 0
    (line,) = (folder(tmp_path) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["grad_norm"] > 0.1
    moments = state(checkpoint(tmp_path, 1))
    total = sum(float((t / 0.1).square().sum()) for n, t in moments.items() if n.endswith("exp_avg"))
    assert total**0.5 == pytest.approx(1e-3, rel=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# Non-finite numbers


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of step 3 (the fourth) is NaN."""
    original = Objective.forward

    def forward(self, batch, step, *more):
        losses = original(self, batch, step, *more)
        return {k: v * float("nan") if step == 3 else v for k, v in losses.items()}

    monkeypatch.setattr(Objective, "forward", forward)


def test_a_non_finite_loss_is_fatal_and_never_enters_weights(poisoned, whole, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "--max-steps", 8, "--ckpt-every", 3)
    assert stop.value.code == 1
    assert "non-finite loss at step 4 on rank 0; 1 optimizer step skipped" in capsys.readouterr().out
    assert all(t.isfinite().all() for t in state(checkpoint(tmp_path, 3)).values())


def test_a_skipped_step_leaves_weights_and_moments_alone(poisoned, tmp_path, capsys):
    assert start(tmp_path, "--max-steps", 5, "--ckpt-every", 1, "--non-finite", "skip") == 0
    assert "non-finite loss at step 4 on rank 0" in capsys.readouterr().out
    before, skipped, after = (state(checkpoint(tmp_path, step)) for step in (3, 4, 5))
    for name, tensor in skipped.items():
        assert tensor.isfinite().all() and after[name].isfinite().all()
        if not name.startswith("ema/"):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(after["model/final_layer.linear.weight"], skipped["model/final_layer.linear.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# Starting from other weights


def test_init_from_takes_the_averaged_weights(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 1, "--init-from", checkpoint(whole, 12), "--lr", 1e-12) == 0
    ours, theirs = state(checkpoint(tmp_path, 1)), state(checkpoint(whole, 12))
    for name in (n for n in theirs if n.startswith("ema/")):
        assert torch.allclose(ours[name.replace("ema/", "model/")], theirs[name], atol=1e-6)


def test_mistakes_are_one_line(whole, tmp_path, capsys):
    cases = {
        ("--resume", "nothing.safetensors"): "--resume nothing.safetensors: no such file",
        ("--init-from", "nothing.pt"): "--init-from nothing.pt: no such file",
        ("--init-from", "x", "--resume", "y"): "--init-from x: has no effect with --resume y",
        ("--init-from", str(checkpoint(whole, 12)), "--model", "DiT-debug/2", "--num-classes", "10"): "do not fit",
        ("--grad-accum", "5"): "--global-batch-size 12: not divisible by the 1 processes times 5 micro-batches",
        ("--grad-clip", "0"): "--grad-clip 0.0: must be positive",
        ("--keep-last", "0"): "--keep-last 0",
        ("--precision", "fp8"): "--precision",
    }
    for argv, words in cases.items():
        assert start(tmp_path, *argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_compile_without_a_compiler_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert start(tmp_path, "--compile") == 2
    assert "--compile: on a CPU it needs a C++ compiler" in capsys.readouterr().err


def test_meter_averages_over_steps():
    meter = trainer.LossMeter()
    meter.add({"loss": torch.tensor([1.0, 3.0])})
    meter.add({"loss": torch.tensor([4.0, 4.0])})
    assert meter.read()["loss"] == 3.0
    meter.add({"loss": torch.tensor([7.0])})
    assert meter.read()["loss"] == 7.0


@pytest.mark.slow
def test_compiled_blocks_train_alike(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 12, "--compile") == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-4)
    assert state(checkpoint(tmp_path, 12)).keys() == state(checkpoint(whole, 12)).keys(), "the names stay the same"
