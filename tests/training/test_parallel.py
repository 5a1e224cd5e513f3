"""Strategies of several processes: the same training whatever each of them holds, from the start to a checkpoint."""

import ast
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

import models
from tests import runs
from tests.networks import debug_name
from tests.parallel_steps import train
from tests.processes import folder_by_rank, run_ranks, run_script
from tests.runs import CPU, DIGITS, checkpoint, state
from training.dry_run import divide, predict_memory

BATCH = ["--global-batch-size", "8", "--lr", "1e-3", "--ema-decay", "0.9"]
MORE = {  # what else a strategy has to go with, by family
    "DiT": ["--grad-clip", "0.5", "--grad-accum", "2"],
    "DyDiT": ["--grad-accum", "2", "--width-router-bias", "0.5", "--token-router-bias", "0.5"],
    "DDT": ["--grad-checkpointing"],
    "Latte": ["--joint-images", "1", "--grad-accum", "2"],
}
SHARDED = {"fsdp": ["--parallel", "fsdp"], "hsdp": ["--parallel", "hsdp", "--shard-ranks", "2"], "ddp": []}


def flags(family: str) -> list[str]:
    return [*runs.data_for(family), "--model", debug_name(family), *BATCH, *MORE.get(family, [])]


def on_ranks(folder: Path, family: str, strategies: Sequence[str], ranks: int, doubles: Sequence[bool]) -> None:
    """Train a family under every strategy in one group of processes; results are in `folder`."""
    cases = [
        {"name": f"{strategy}-{double}", "argv": [*flags(family), *SHARDED[strategy]], "double": double}
        for strategy in strategies
        for double in doubles
    ]
    done = run_ranks("tests/parallel_steps.py", str(folder), json.dumps(cases), ranks=ranks, folder=folder)
    assert done.returncode == 0, done.stderr


def assert_equal_training(one: dict[str, Tensor], several: dict[str, Tensor]) -> None:
    """Assert equality of losses and weights to the rounding of their type."""
    assert one.keys() == several.keys()
    assert len(one["losses"]) == 20 and one["losses"][0] != one["losses"][-1]
    double = next(t for name, t in one.items() if name.startswith("model/")).dtype == torch.float64
    torch.testing.assert_close(several["losses"], one["losses"], rtol=0, atol=1e-10 if double else 1e-5)
    torch.testing.assert_close(several["norms"], one["norms"], rtol=1e-8 if double else 1e-4, atol=0)
    for name, tensor in one.items():
        if double and "/" in name:
            torch.testing.assert_close(
                several[name], tensor, rtol=0, atol=1e-8, msg=lambda text, name=name: name + text
            )


def compare(folder: Path, family: str, strategies: Sequence[str], ranks: int, doubles: Sequence[bool]) -> None:
    on_ranks(folder, family, strategies, ranks, doubles)
    for double in doubles:
        one = train(CPU, flags(family), double=double)
        for strategy in strategies:
            several = load_file(folder / f"{strategy}-{double}.safetensors")
            assert_equal_training(one, several)
            predicted = predicted_bytes(family, {"ddp": 1, "hsdp": 2, "fsdp": ranks}[strategy]) * (2 if double else 1)
            assert several["held"].tolist() == pytest.approx([predicted] * ranks, rel=0.1), (family, strategy)


# Weights are gathered in float32, and autocast rounds them where they are used
GATHERED_IN_FLOAT32 = """
from training.parallel import Sharded
shard = Sharded._shard
Sharded._shard = lambda self, root, fill, lower: shard(self, root, fill, None)
"""


def under_autocast(folder: Path, families: Sequence[str], fault: str = "") -> dict[str, dict[str, Tensor]]:
    """Results of each family in bf16, divided over two ranks."""
    folder.mkdir()
    fsdp = ["--precision", "bf16", *SHARDED["fsdp"]]
    more = {"DyDiT": ["--complete-loss-steps", "0"]}  # one forward pass a step, as of the others
    cases = [
        {"name": family, "argv": [*flags(family), *fsdp, *more.get(family, [])], "double": False} for family in families
    ]
    done = run_ranks("tests/parallel_steps.py", str(folder), json.dumps(cases), folder=folder, fault=fault)
    assert done.returncode == 0, done.stderr
    return {family: load_file(folder / f"{family}.safetensors") for family in families}


def predicted_bytes(family: str, holders: int) -> int:
    """Weights, average and moments of a process in float32, as the dry run predicts them."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    setup = runs.open_setup(*flags(family), fake=fake)
    parts = divide(setup, predict_memory(setup, CPU, fake), holders)
    return sum(parts[name] for name in ("weights", "averaged weights", "optimizer"))


def test_sharded_processes_train_as_one_does_in_float64(tmp_path: Path) -> None:
    compare(tmp_path, "DiT", ["fsdp"], 2, [True])


@pytest.mark.parametrize("families", [["DDT"], pytest.param(list(models.FAMILIES), marks=pytest.mark.slow)])
def test_weights_gathered_in_the_precision_of_autocast_change_no_bit(tmp_path: Path, families: list[str]) -> None:
    rounded = under_autocast(tmp_path / "rounded", families)
    for family, exact in under_autocast(tmp_path / "float32", families, GATHERED_IN_FLOAT32).items():
        for name, tensor in exact.items():
            if name not in ("norms", "held"):
                assert torch.equal(rounded[family][name], tensor), (family, name)
        torch.testing.assert_close(rounded[family]["norms"], exact["norms"], rtol=1e-6, atol=0)


def test_runs_go_on_under_another_strategy_from_one_file(tmp_path: Path) -> None:
    argv = [*DIGITS, *"--model DiT-digits/2 --global-batch-size 12 --lr 2e-3 --ema-decay 0.9 --ckpt-every 3".split()]
    argv += "--eval-every 3 --eval-images 70 --eval-samples 6 --eval-steps 2 --depth 2".split()
    fsdp = ["--parallel", "fsdp", "--grad-checkpointing"]
    assert runs.start(tmp_path / "first", *argv, "--max-steps", 1, "--global-seed", 1) == 0
    argv += ["--init-from", str(checkpoint(tmp_path / "first", 1))]
    assert runs.start(tmp_path / "one", *argv, "--max-steps", 6) == 0

    def two(name: str, *more: str) -> None:
        done = run_ranks("train.py", *argv, *fsdp, "--results-dir", str(tmp_path / name), *more, folder=tmp_path)
        assert done.returncode == 0, done.stderr

    two("begun", "--max-steps", "3")
    assert runs.start(tmp_path / "begun", *argv, "--max-steps", 6, "--resume", "auto") == 0
    assert "--parallel (fsdp, ddp)" in runs.log(tmp_path / "begun")
    copied = shutil.copy(checkpoint(tmp_path / "one", 3), tmp_path / "0000003.safetensors")
    two("continued", "--max-steps", "6", "--resume", str(copied))
    expected, one = state(checkpoint(tmp_path / "one", 6)), runs.metrics(tmp_path / "one")
    for name in ("begun", "continued"):
        lines = runs.metrics(tmp_path / name)
        for line, other in zip(lines, one[-len(lines) :], strict=True):
            for key in line.keys() - {"steps_per_sec"}:
                assert line[key] == pytest.approx(other[key], rel=1e-4), (name, key)
        actual = state(checkpoint(tmp_path / name, 6))
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(actual[key], tensor, rtol=0, atol=2e-5)


def test_processes_without_a_common_disk_resume_what_rank_0_has(tmp_path: Path) -> None:
    argv = [*DIGITS, *"--model DiT-digits/2 --depth 2 --global-batch-size 12 --lr 2e-3 --ema-decay 0.9".split()]
    argv += ["--ckpt-every", "2", "--resume", "auto"]

    def two(*names: str, steps: int) -> None:
        places = [tmp_path / name for name in names]
        fault = folder_by_rank("--results-dir", places)
        done = run_ranks("train.py", *argv, "--max-steps", str(steps), folder=tmp_path, fault=fault)
        assert done.returncode == 0, done.stderr

    two("whole", "whole", steps=4)
    two("first", "second", steps=2)
    two("first", "third", steps=4)
    assert "at step 2" in runs.log(tmp_path / "first")
    runs.assert_same(state(checkpoint(tmp_path / "first", 4)), state(checkpoint(tmp_path / "whole", 4)))
    assert runs.losses(tmp_path / "first") == runs.losses(tmp_path / "whole")


COUNT = """
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from diffusion import PROCESSES
from diffusion.loss import Batch, DiffusionLoss
from models import create_model
from training.parallel import Sharded

class Gathered(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "allgather" in str(operation):
            self.total += args[0].nbytes
        return operation(*args, **(kwargs or {}))

dist.init_process_group("fake", rank=1, world_size=8, store=FakeStore())
found = {}
for autocast in (None, torch.bfloat16):
    with torch.device("meta"):
        network = create_model("DiT-XL/2", sample_shape=(4, 2, 2))
    loss = DiffusionLoss(network, PROCESSES["gaussian"]().make(True), autocast=autocast)
    blocks = sum(parameter.numel() for block in network.blocks for parameter in block.parameters())
    rest = sum(parameter.numel() for parameter in network.parameters()) - blocks
    strategy = Sharded(torch.device("cpu"), 8)
    strategy.place(loss)
    batch = Batch(torch.randn(1, 4, 2, 2), {"y": torch.tensor([1])}, torch.arange(1))
    with CommDebugMode() as mode, Gathered() as gathered, strategy.backward(last=True):
        loss(batch, loss.draw(0, 1), 0, {})["loss"].mean().backward()
    counts = {str(operation): count for operation, count in mode.get_comm_counts().items()}
    found[str(autocast)] = counts, gathered.total, blocks, rest
print(found)
"""


@pytest.mark.slow
def test_a_block_of_xl_is_gathered_twice_and_its_gradient_reduced_once(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(COUNT)
    done = run_script(tmp_path / "count.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    units = 28 + 1  # blocks, and the rest of the network
    for autocast, (counts, gathered, blocks, rest) in ast.literal_eval(done.stdout).items():
        assert counts == {"c10d._allgather_base_": 2 * units, "c10d._reduce_scatter_base_": units}
        size = 2 if "bfloat16" in autocast else 4  # bytes a weight; those outside of blocks are float32
        assert gathered == pytest.approx(2 * (size * blocks + 4 * rest), rel=1e-3)  # rows are padded


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs.start(tmp_path, *flags("DiT"), "--parallel", "fsdp") == 2
    assert "--parallel fsdp: there is one process, and nothing to divide; start several" in runs.the_error(capsys)
    assert runs.start(tmp_path, *flags("DiT"), "--shard-ranks", "2") == 2
    assert "--shard-ranks 2: has no effect without --parallel hsdp" in runs.the_error(capsys)
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert runs.start(tmp_path, *flags("DiT"), "--parallel", "fsdp", "--train-only", "labels") == 2
    assert "--parallel fsdp: does not go with --train-only labels, which masks rows" in runs.the_error(capsys)
    for more in (["--shard-ranks", "3"], []):
        assert runs.start(tmp_path, *flags("DiT"), "--parallel", "hsdp", *more) == 2
        assert "--shard-ranks 3: does not divide the 4 processes; choose a divisor" in runs.the_error(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_trains_alike_under_every_strategy(tmp_path: Path, family: str, ranks: int) -> None:
    compare(tmp_path, family, ["ddp", "fsdp", *(["hsdp"] if ranks == 4 else [])], ranks, [True, False])


# Code is traced whole, as by any backend, but not translated to C++
QUICK_COMPILER = """
from models.contract import Network
from models.skip_dit import SkipUnits
Network.compile_blocks.__defaults__ = SkipUnits.compile_blocks.__defaults__ = ("aot_eager",)
"""


@pytest.mark.slow
def test_frozen_and_compiled_parts_are_divided_too(tmp_path: Path) -> None:
    argv = [*DIGITS, *"--global-batch-size 12 --lr 2e-3 --ema-decay 0.9 --depth 4 --model".split()]
    assert runs.start(tmp_path / "first", *argv, "DiT-digits/2", "--max-steps", 2) == 0
    argv += ["Skip-DiT-digits/2", *"--train-only added --max-steps 4 --init-from".split()]
    argv += [str(checkpoint(tmp_path / "first", 2))]
    assert runs.start(tmp_path / "one", *argv) == 0
    options = [*argv, "--parallel", "fsdp", "--compile", "--grad-checkpointing", "--results-dir", str(tmp_path / "two")]
    done = run_ranks("train.py", *options, folder=tmp_path, fault=QUICK_COMPILER)
    assert done.returncode == 0, done.stderr
    for step, loss in runs.losses(tmp_path / "one").items():
        assert runs.losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4)
    one, two = (state(checkpoint(tmp_path / name, 4)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all("skip" in name for name in one if name.startswith("optimizer/")), "the others have no moments"
    frozen = [name for name in one if name.startswith("model/") and "skip" not in name]
    assert all(torch.equal(one[name], two[name]) for name in frozen) and len(frozen) > 30
