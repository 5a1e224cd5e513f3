"""Checkpoints that every process writes a part of: killed while one is written, resumed anywhere, converted."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from models.loading import load_network
from runtime.errors import run
from scripts import export
from tests import runs
from tests.processes import run_ranks
from tests.runs import DIGITS, assert_same, run_folder, state

BASE = [*DIGITS, *"--model DiT-digits/2 --depth 2 --global-batch-size 12 --lr 2e-3 --ema-decay 0.9".split()]
BASE += "--max-steps 6 --ckpt-every 2 --keep-last 2 --checkpoint-format sharded --resume auto".split()
# The whole job is killed while step 4 is written: rank 0 has written its file, rank 1 has not
KILLED = """
import os, signal, time
from pathlib import Path
import runtime.saver as saver
save = saver.save_part
def killed(folder, number, count, parts, meta):
    if meta["step"] == 4:
        if number == 1:
            while not list(folder.glob("[!.]*.safetensors")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder, number, count, parts, meta)
        time.sleep(60)
    save(folder, number, count, parts, meta)
saver.save_part = killed
"""


# Each rank writes how many bytes of tensors it reads
COUNTED = """
import os
from pathlib import Path
from runtime.tensor_file import StoredTensor
rows = StoredTensor.rows
def counted(self, start, stop):
    found = rows(self, start, stop)
    with Path(f"read-{os.environ['RANK']}.txt").open("a") as file:
        file.write(f"{found.nbytes}\\n")
    return found
StoredTensor.rows = counted
"""


def sharded(results: Path, step: int) -> Path:
    return run_folder(results) / "checkpoints" / f"{step:07d}.sharded"


def train(results: Path, *more: str, ranks: int = 2, fault: str = "") -> subprocess.CompletedProcess[str]:
    results.mkdir(exist_ok=True)
    argv = [*BASE, "--parallel", "fsdp", "--results-dir", str(results), *more]
    return run_ranks("train.py", *argv, ranks=ranks, folder=results, fault=fault)


def two(results: Path, fault: str = "") -> int:
    return train(results, fault=fault).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 steps on two processes."""
    results = tmp_path_factory.mktemp("whole")
    assert two(results) == 0
    return results


def test_a_kill_while_parts_are_written_costs_the_steps_since_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    results = tmp_path / "killed"
    assert two(results, KILLED) != 0
    folder = run_folder(results) / "checkpoints"
    assert [path.name for path in folder.glob("[!.]*")] == ["0000002.sharded"], "the one before is whole"
    assert [path.name for path in folder.glob(".*.tmp.sharded/*")] == ["00000-of-00002.safetensors"]
    assert len(state(sharded(results, 2))) > 100
    assert two(results) == 0
    assert "Resumed" in runs.log(results) and "at step 2" in runs.log(results)
    assert sorted(path.name for path in folder.iterdir()) == ["0000004.sharded", "0000006.sharded"]
    assert_same(state(sharded(results, 6)), state(sharded(whole, 6)))
    assert runs.losses(results) == runs.losses(whole)


def test_each_of_three_processes_reads_its_rows_of_two_parts_and_no_others(whole: Path, tmp_path: Path) -> None:
    copied = tmp_path / "0000004.sharded"
    shutil.copytree(sharded(whole, 4), copied)
    done = train(tmp_path / "three", "--resume", str(copied), ranks=3, fault=COUNTED)
    assert done.returncode == 0, done.stderr
    size = sum(tensor.nbytes for tensor in state(copied).values())
    for rank in range(3):
        read = sum(map(int, (tmp_path / "three" / f"read-{rank}.txt").read_text().split()))
        assert read == pytest.approx(size / 3, rel=0.1), rank
    for name, tensor in state(sharded(whole, 6)).items():
        torch.testing.assert_close(state(sharded(tmp_path / "three", 6))[name], tensor, rtol=0, atol=2e-5)


def test_damage_that_one_process_finds_makes_all_take_the_checkpoint_before(whole: Path, tmp_path: Path) -> None:
    results = tmp_path / "damaged"
    shutil.copytree(whole, results)
    for path in sharded(results, 6).glob("*.safetensors"):
        if path.name.startswith("00001"):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = train(results)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped: ") == 1 and "0000006.sharded: damaged or incomplete checkpoint" in done.stderr
    assert "at step 4" in runs.log(results)
    assert_same(state(sharded(results, 6)), state(sharded(whole, 6)))


def test_one_process_goes_on_from_parts_and_to_one_file(whole: Path, tmp_path: Path) -> None:
    copied = tmp_path / "0000004.sharded"
    shutil.copytree(sharded(whole, 4), copied)
    argv = [*BASE, "--resume", copied, "--checkpoint-format", "one-file"]
    assert runs.start(tmp_path / "one", *argv) == 0
    ours = state(runs.checkpoint(tmp_path / "one", 6))
    for name, tensor in state(sharded(whole, 6)).items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)
    assert runs.losses(tmp_path / "one")[6] == pytest.approx(runs.losses(whole)[6], rel=1e-5)


def test_readers_take_the_folder_and_export_converts_it_and_back(whole: Path, tmp_path: Path) -> None:
    network, info = load_network(sharded(whole, 6))
    assert info.step == 6 and info.weights == "ema-0.9"

    def convert(source: Path, output: str, layout: str) -> Path:
        argv = ["--ckpt", str(source), "--output", str(tmp_path / output), "--format", layout]
        assert run(export.main, "export.py", argv) == 0
        return tmp_path / output

    one = convert(sharded(whole, 6), "one.safetensors", "one-file")
    back = convert(one, "back.sharded", "sharded")
    again = convert(back, "again.safetensors", "one-file")
    assert one.read_bytes() == again.read_bytes()
    assert_same(state(one), state(sharded(whole, 6)))
    for name, tensor in load_network(one)[0].state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
