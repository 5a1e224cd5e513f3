"""Faults that need several processes: a rank that hangs, dies, or sees a loss that is not finite."""

import textwrap

import pytest

from tests.processes import run_ranks, run_script
from tests.runs import assert_same, checkpoint, losses, state
from tests.training.test_trainer import BASE, start

# Put before train.py: a fault in one rank.
FAULTY = """
    import os, signal, sys, time
    from pathlib import Path
    from training import trainer

    fault, rank = "{fault}", int(os.environ["RANK"])
    honest = trainer.Trainer.train_step

    def train_step(self, step, pieces):
        if step == 5 and rank == 1:
            if fault == "hang":
                time.sleep(3600)
            if fault == "die" and not Path("died").exists():
                Path("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "nan":
                pieces[0][0].x_start.fill_(float("nan"))
        return honest(self, step, pieces)

    trainer.Trainer.train_step = train_step
"""
MAIN = """
    import train
    from runtime.errors import run

    sys.exit(run(train.main, "train.py"))
"""


def code(fault, more=""):
    return textwrap.dedent(FAULTY.replace("{fault}", fault)) + textwrap.dedent(more)


def under_torchrun(fault, folder, *argv, restarts=0):
    (folder / "faulty.py").write_text(code(fault, MAIN))
    options = [*BASE, "--results-dir", str(folder / "results"), *argv]
    return run_script(folder / "faulty.py", *options, ranks=2, folder=folder, restarts=restarts)


@pytest.mark.slow  # torchrun waits 30 seconds before it kills the hung rank
def test_a_hung_rank_ends_the_run_with_a_message(tmp_path):
    done = under_torchrun("hang", tmp_path, "--max-steps", "8", "--dist-timeout", "5")
    assert done.returncode != 0
    assert "rank 0: another rank hangs or is gone (--dist-timeout)" in done.stderr


def test_torchrun_restarts_a_killed_rank_and_the_run_resumes(tmp_path):
    argv = ["--max-steps", "8", "--ckpt-every", "2", "--resume", "auto"]
    done = under_torchrun("die", tmp_path, *argv, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "at step 4" in done.stdout and (tmp_path / "died").exists()
    argv = [*BASE, "--max-steps", "8", "--results-dir", str(tmp_path / "honest")]
    honest = run_ranks("train.py", *argv, folder=tmp_path)
    assert honest.returncode == 0, honest.stderr
    assert_same(state(checkpoint(tmp_path / "results", 8)), state(checkpoint(tmp_path / "honest", 8)))
    assert losses(tmp_path / "results") == losses(tmp_path / "honest")


def test_a_non_finite_loss_on_one_rank_is_skipped_on_all(tmp_path):
    argv = [*BASE, "--max-steps", "7", "--ckpt-every", "1", "--non-finite", "skip"]
    argv += ["--results-dir", str(tmp_path / "results")]
    done = run_ranks("train.py", *argv, folder=tmp_path, fault=code("nan"))
    assert done.returncode == 0, done.stderr
    assert "non-finite loss at step 6 on rank 1; 1 optimizer step skipped" in done.stdout
    before, skipped, after = (state(checkpoint(tmp_path / "results", step)) for step in (5, 6, 7))
    weights = {n: t for n, t in skipped.items() if not n.startswith("ema-0.9/")}
    assert_same(weights, {n: before[n] for n in weights})
    assert all(t.isfinite().all() for t in after.values())


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, capsys, monkeypatch):
    import resource

    assert start(tmp_path, "--max-steps", 2) == 0
    before = state(checkpoint(tmp_path, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("signal.SIGXFSZ", None, raising=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a checkpoint is 11 MB
    try:
        status = start(tmp_path, "--max-steps", 4, "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    error = capsys.readouterr().err
    assert "0000004.safetensors: could not write" in error and "earlier checkpoints are intact" in error
    assert_same(state(checkpoint(tmp_path, 2)), before)
    assert [p.name for p in checkpoint(tmp_path, 2).parent.iterdir()] == ["0000002.safetensors"]
