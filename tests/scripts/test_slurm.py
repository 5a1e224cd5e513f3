"""The SLURM scripts with stand-ins of sbatch, srun and scontrol: requeue, arrays, merge after the array."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import slurm
from tests.checkpoints import write_network
from tests.inception_files import make_images, write_graph, write_npz
from tests.networks import debug_name, debug_network, randomise
from tests.processes import ROOT
from tests.runs import assert_same, state

# In place of torchrun: notes its arguments; the first time it runs until SIGTERM and ends with the given status.
UNTIL_STOPPED = """
printf '%s\\n' "$*" >> "$HERE/started"
[ "$(wc -l < "$HERE/started")" -gt 1 ] && exit 0
trap 'sleep 0.2; touch "$HERE/saved"; exit {status}' TERM
touch "$HERE/running"
while :; do sleep 0.02; done
"""
NOTES = 'printf "%s\\n" "${0##*/} $*" >> "$HERE/started"'
RUN = 'exec "{python}" {module} "$@"'
TRAIN = "scripts/slurm_train.sh"


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1])  # of the launcher; with 0 the last step was done when the signal came
def test_a_preempted_training_saves_is_requeued_and_resumes(tmp_path: Path, status: int) -> None:
    environment = slurm.install(tmp_path, torchrun=UNTIL_STOPPED.format(status=status)) | {"HERE": str(tmp_path)}
    environment[slurm.PREEMPT] = str(tmp_path / "running")
    job = slurm.submit(environment, TRAIN, "--data-path", "a folder", "--model", "DiT-XL/2")
    statuses, output = slurm.outcome(environment, job)
    assert statuses == [0], output
    assert (tmp_path / "saved").exists(), "the script waits for the save"
    requeued = [argv for argv in slurm.calls(environment, "scontrol") if argv[0] == "requeue"]
    assert requeued == ([["requeue", job]] if status else [])
    assert len(set(started(tmp_path))) == 1 and len(started(tmp_path)) == (2 if status else 1)
    assert "--nnodes 1 --nproc-per-node 1" in started(tmp_path)[0]
    assert started(tmp_path)[0].endswith("train.py --resume auto --data-path a folder --model DiT-XL/2")


@pytest.mark.parametrize(("status", "requeued"), [(2, False), (75, True)])
def test_only_status_75_requeues_without_a_signal(tmp_path: Path, status: int, requeued: bool) -> None:
    launcher = f'[ -e "$HERE/once" ] && exit 0; touch "$HERE/once"; exit {status}'
    environment = slurm.install(tmp_path, torchrun=launcher) | {"HERE": str(tmp_path)}
    statuses, _ = slurm.outcome(environment, slurm.submit(environment, TRAIN))
    assert any(argv[0] == "requeue" for argv in slurm.calls(environment, "scontrol")) == requeued
    assert statuses == [0 if requeued else status]


def test_tasks_of_an_array_are_shards_and_the_merge_follows(tmp_path: Path) -> None:
    environment = slurm.install(tmp_path, python=NOTES, torchrun=NOTES) | {"HERE": str(tmp_path)}
    job = slurm.submit(environment, "--array=1-3", "scripts/slurm_array.sh", "sample_ddp.py", "--output", "a b.npz")
    for name in ("a b.1-of-3.npz", "a b.2-of-3.npz"):
        (tmp_path / name).touch()
    merge = ["scripts/slurm_merge.sh", str(tmp_path / "a b.*-of-3.npz"), "--output", "a b.npz"]
    slurm.submit(environment, f"--dependency=afterok:{job}", *merge)
    parts = [f"python sample_ddp.py --output a b.npz --shard {i}/3" for i in (1, 2, 3)]
    assert slurm.outcome(environment, job)[0] == [0, 0, 0] and started(tmp_path)[:3] == parts
    assert started(tmp_path)[3].endswith("a b.2-of-3.npz --output a b.npz")
    slurm.submit(environment | {"SHARDS": "9"}, "--array=2,5", "scripts/slurm_array.sh", "sample_ddp.py")
    assert [line.split()[-1] for line in started(tmp_path)[4:]] == ["2/9", "5/9"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--array=2,3"], "slurm_array: --array is not 1-n; to make some of n parts, set SHARDS=n"),
        ([], "slurm_array: no array: give sbatch --array=1-n for n parts"),
    ],
)
def test_no_merge_after_an_array_that_cannot_be(tmp_path: Path, options: list[str], words: str) -> None:
    environment = slurm.install(tmp_path, python=NOTES) | {"HERE": str(tmp_path)}
    job = slurm.submit(environment, *options, "scripts/slurm_array.sh", "sample_ddp.py")
    statuses, output = slurm.outcome(environment, job)
    assert set(statuses) == {2} and set(output.splitlines()) == {words}
    merge = slurm.submit(environment, f"--dependency=afterok:{job}", "scripts/slurm_merge.sh", "*", "--output", "a")
    assert slurm.outcome(environment, merge) == ([], "") and not (tmp_path / "started").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Real processes


def installed(tmp_path: Path) -> dict[str, str]:
    """Stand-ins with this Python and its torchrun; a free port."""
    programs = {name: RUN.format(python=sys.executable, module=module) for name, module in REAL.items()}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        more = {"RDZV_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return slurm.install(tmp_path, **programs) | more


REAL = {"python": "", "torchrun": "-m torch.distributed.run"}


@pytest.mark.slow
def test_a_training_on_two_nodes_that_is_preempted_ends_with_the_same_bytes(tmp_path: Path) -> None:
    flags = "--dataset digits --device cpu --num-workers 0 --model DiT-debug/2 --global-batch-size 8".split()
    flags += "--max-steps 240 --ckpt-every 20 --keep-last 1".split()
    ends = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        environment, results = installed(tmp_path / name), tmp_path / name / "results"
        if name == "cut":
            environment[slurm.PREEMPT] = str(results / "*/checkpoints/*.safetensors")
        job = slurm.submit(environment, "--nodes", "2", TRAIN, *flags, "--results-dir", str(results))
        statuses, output = slurm.outcome(environment, job)
        assert statuses == [0], output
        assert len(slurm.calls(environment, "srun")) == (2 if name == "cut" else 1), output
        assert ("Stopped by a signal at step" in output) == (name == "cut")
        (end,) = results.glob("000-*/checkpoints/0000240.safetensors")
        ends.append(end)
    assert_same(state(ends[1]), state(ends[0]))


@pytest.mark.slow
def test_an_array_and_its_merge_equal_one_run(tmp_path: Path) -> None:
    ckpt = write_network(tmp_path / "0000001.safetensors", debug_name("DiT"), randomise(debug_network("DiT")))
    environment, work = installed(tmp_path), tmp_path / "work"
    work.mkdir()
    for number, name in enumerate(("ref", "images")):
        write_npz(work / f"{name}.npz", make_images(14, seed=number))
    graph = write_graph(work / "narrow.pb")
    sample = f"sample_ddp.py --ckpt {ckpt} --num-fid-samples 13 --num-sampling-steps 2 --per-proc-batch-size 2"
    score = f"evaluator/evaluator.py {work}/ref.npz {work}/images.npz --weights {graph} --cache-dir {work}/cache"
    score += " --batch-size 2 --metrics is,fid,pr"
    for command, flag, whole, parted, suffix in (
        (sample, "--output", "whole.npz", "parted.npz", ".npz"),
        (score, "--json", "one.json", "three.json", ""),
    ):
        command += " --device cpu"
        script, *words = f"{command} {flag} {work}/{whole}".split()
        run = subprocess.run([sys.executable, ROOT / script, *words], env=environment, capture_output=True)
        assert run.returncode == 0, run.stderr
        shutil.rmtree(work / "cache", ignore_errors=True)
        job = slurm.submit(
            environment, "--array=1-3", "scripts/slurm_array.sh", *f"{command} {flag} {work}/{parted}".split()
        )
        merge = ["scripts/slurm_merge.sh", f"{work}/{Path(parted).stem}.*-of-3{suffix}", "--output", str(work / parted)]
        merged = slurm.submit(environment, f"--dependency=afterok:{job}", *merge)
        assert slurm.outcome(environment, job)[0] == [0, 0, 0], slurm.outcome(environment, job)[1]
        assert slurm.outcome(environment, merged)[0] == [0], slurm.outcome(environment, merged)[1]
    assert (work / "parted.npz").read_bytes() == (work / "whole.npz").read_bytes()
    one, three = (json.loads((work / f"{name}.json").read_text()) for name in ("one", "three"))
    assert three["scores"] == one["scores"]
