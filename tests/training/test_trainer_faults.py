"""Faults that need several processes: a rank that hangs, dies, has other data, or sees a loss that is not finite."""

import textwrap

import numpy as np
import pytest
from PIL import Image

from tests.processes import folder_by_rank, run_ranks, run_script
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


@pytest.fixture
def disks(tmp_path):
    """The same photos in two places, as on two machines."""
    for place in ("here", "there"):
        for label in ("ant", "bee", "cat"):
            (tmp_path / place / label).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / place / label / f"{i}.png")
    return tmp_path / "here", tmp_path / "there"


PHOTOS = "--vae none --model DiT-debug/2 --num-classes 3 --image-size 8 --device cpu --num-workers 0 --max-steps 1"
PHOTOS += " --global-batch-size 2 --results-dir results"
OTHER_DATA = {
    "less": (lambda there: (there / "cat/1.png").unlink(), "other images than rank 0 (6 and 5)"),
    "renamed": (lambda there: (there / "cat/1.png").rename(there / "cat/9.png"), "other files than rank 0"),
    "class": (lambda there: (there / "cat").rename(there / "dog"), "other classes than rank 0"),
    "other bytes": (lambda there: (there / "cat/1.png").open("ab").write(b"x"), "other files than rank 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER_DATA)
def test_ranks_with_other_data_stop_before_the_first_step(change, disks, tmp_path):
    harm, words = OTHER_DATA[change]
    harm(disks[1])
    done = run_ranks("train.py", *PHOTOS.split(), folder=tmp_path, fault=folder_by_rank("--data-path", disks))
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0].startswith(f"train.py: error: --data-path: rank 1 has {words}")
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.slow
@pytest.mark.parametrize("is_other", [True, False])
def test_torchrun_ends_where_ranks_have_other_data(is_other, disks, tmp_path):
    """And with copies of the same data, under other names of their folders, it trains."""
    if is_other:
        OTHER_DATA["less"][0](disks[1])
    (tmp_path / "ranks.py").write_text("import sys\n" + folder_by_rank("--data-path", disks) + textwrap.dedent(MAIN))
    done = run_script(tmp_path / "ranks.py", *PHOTOS.split(), ranks=2, folder=tmp_path)
    assert done.stderr.count("rank 1 has other images than rank 0 (6 and 5)") == is_other
    assert (done.returncode == 0) is not is_other, done.stderr
    assert len(list(tmp_path.glob("results/*/checkpoints/0000001.safetensors"))) == (not is_other)


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
