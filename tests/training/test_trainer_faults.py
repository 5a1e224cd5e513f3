"""Faults that need several processes: a rank that hangs, dies, or sees a loss that is not finite."""

import textwrap

import pytest

from tests.processes import run_script
from tests.training.test_trainer import BASE, assert_same, checkpoint, losses, start, state

# Runs train.py with a fault planted in one rank; argv[1] says which.
FAULTY = """
    import os, signal, sys, time
    from pathlib import Path
    import train
    from training import trainer
    from runtime.errors import run

    fault, rank = sys.argv[1], int(os.environ["RANK"])
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
    sys.exit(run(train.main, "train.py", sys.argv[2:]))
"""


@pytest.fixture
def faulty(tmp_path):
    (tmp_path / "faulty.py").write_text(textwrap.dedent(FAULTY))

    def launch(fault, *argv, restarts=0):
        options = [fault, *BASE, "--results-dir", str(tmp_path / "results"), *argv]
        return run_script(tmp_path / "faulty.py", *options, ranks=2, folder=tmp_path, restarts=restarts)

    return launch


@pytest.mark.slow  # torchrun waits 30 seconds before it kills the hung rank
def test_a_hung_rank_ends_the_run_with_a_message(faulty):
    done = faulty("hang", "--max-steps", "8", "--dist-timeout", "5")
    assert done.returncode != 0
    assert "rank 0: a peer is hung or gone (--dist-timeout)" in done.stderr


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(faulty, tmp_path):
    done = faulty("die", "--max-steps", "8", "--ckpt-every", "2", "--resume", "auto", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "at step 4" in done.stdout and (tmp_path / "died").exists()
    honest = faulty("none", "--max-steps", "8", "--results-dir", str(tmp_path / "honest"))
    assert honest.returncode == 0, honest.stderr
    assert_same(state(checkpoint(tmp_path / "results", 8)), state(checkpoint(tmp_path / "honest", 8)))
    assert losses(tmp_path / "results") == losses(tmp_path / "honest")


def test_a_non_finite_loss_on_one_rank_is_skipped_on_all(faulty, tmp_path):
    done = faulty("nan", "--max-steps", "7", "--ckpt-every", "1", "--non-finite", "skip")
    assert done.returncode == 0, done.stderr
    assert "non-finite loss at step 6 on rank 1; 1 optimizer step skipped" in done.stdout
    before, skipped, after = (state(checkpoint(tmp_path / "results", step)) for step in (5, 6, 7))
    weights = {n: t for n, t in skipped.items() if not n.startswith("ema/")}
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
