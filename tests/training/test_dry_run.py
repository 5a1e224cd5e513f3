"""The dry run: what it prints, and its prediction of memory against real steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch._subclasses import FakeTensorMode

import models
import train
from runtime.distributed import World
from runtime.errors import run
from runtime.live_memory import LiveMemory
from tests import runs
from tests.inception_files import make_images
from tests.processes import ROOT, run_ranks
from tests.runs import CPU, open_setup, start
from training import trainer
from training.dry_run import predict_memory

BASE = "--dataset digits --model DiT-digits/2 --device cpu --num-workers 0".split()
BATCH = ["--global-batch-size", "64"]


def prediction(*argv: object, world: World = CPU) -> dict[str, int]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return predict_memory(open_setup(*argv, fake=fake), world, fake)


def measured_peak(*argv: object) -> int:
    """Bytes alive at the peak of a real step, its preparation included."""
    setup = open_setup(*argv)
    training = trainer.Trainer(setup, CPU)
    steps = trainer.batches(setup, CPU, 0)
    training.train_step(*next(steps))  # the optimizer's moments appear
    known = [tensor for group in training.state.groups().values() for tensor in group.values()]
    training.state.optimizer.zero_grad(set_to_none=True)
    with LiveMemory(known) as memory:
        training.train_step(*next(steps))
    return memory.peak


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models whose memory is spread over their blocks as in the large ones, not over a handful of tensors."""
    shape = {"depth": 12, "hidden_size": 64, "num_heads": 4, "patch_size": 2, "num_classes": 10}
    for family, row in models.FAMILIES.items():
        monkeypatch.setitem(row.configs, f"{family}-deep/2", shape | ({"encoder_depth": 9} if family == "DDT" else {}))
    return ["--model", "DiT-deep/2", "--no-learn-sigma"]


@pytest.mark.parametrize(
    "argv",
    [
        BATCH,
        [*BATCH, "--precision", "bf16"],
        [*BATCH, "--grad-checkpointing"],
        [*BATCH, "--grad-checkpointing", "--precision", "bf16"],
        [*BATCH, "--grad-accum", "4"],
        ["--global-batch-size", "1"],  # gradients outweigh activations
        [*BATCH, "--model", "DyDiT-deep/2"],
        [*BATCH, "--model", "DyDiT-deep/2", "--grad-accum", "2", "--grad-checkpointing"],
        [*BATCH, "--model", "Skip-DiT-deep/2"],
    ],
    ids=lambda argv: "-".join(argv[1:]).replace("--", ""),
)
def test_the_predicted_peak_is_that_of_a_real_step_within_a_tenth(deep: list[str], argv: list[str]) -> None:
    assert prediction(*BASE, *deep, *argv)["peak"] == pytest.approx(measured_peak(*BASE, *deep, *argv), rel=0.1)


def test_a_divided_network_and_an_autoencoder_are_predicted_too(deep: list[str], tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.fromarray(make_images(1, (16, 16))[0]).save(tmp_path / "images" / label / "0.png")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    argv = f"--data-path {tmp_path / 'images'} --vae {tmp_path / 'vae'} --image-size 16 --num-classes 2 --device cpu"
    argv += " --model DDT-deep/2 --global-batch-size 8 --num-workers 0"
    predicted = prediction(*argv.split())
    assert predicted["autoencoder"] == sum(p.nbytes for p in vae.parameters())
    others = predicted["peak"] - predicted["autoencoder"]
    assert others == pytest.approx(measured_peak(*argv.split()), rel=0.1)


def test_recomputation_costs_no_memory_but_the_blocks_inputs(deep: list[str]) -> None:
    kept, recomputed = (prediction(*BASE, *deep, *BATCH, *more) for more in ((), ("--grad-checkpointing",)))
    assert recomputed["kept for the backward pass"] < kept["kept for the backward pass"] / 4
    assert recomputed["peak"] < 0.5 * kept["peak"]
    assert measured_peak(*BASE, *deep, *BATCH, "--grad-checkpointing") < 0.5 * measured_peak(*BASE, *deep, *BATCH)


def test_several_processes_keep_gradients_all_the_time(deep: list[str]) -> None:
    one, two = (prediction(*BASE, *deep, *BATCH, world=World(0, size, CPU.device)) for size in (1, 2))
    assert two["kept for the backward pass"] == pytest.approx(one["kept for the backward pass"] / 2, rel=0.05)
    lasting = two["weights"] + two["averaged weights"] + two["optimizer"]
    assert two["peak"] > lasting + two["gradients"] + two["kept for the backward pass"]
    assert one["peak"] < lasting + one["gradients"] + one["kept for the backward pass"]


# ----------------------------------------------------------------------------------------------------------------------
# What it prints


def dry_run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run(train.main, "train.py", [*BASE, *argv, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_it_says_what_would_be_trained_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results"
    out = dry_run(capsys, "--global-batch-size", "12", "--results-dir", str(folder))
    assert not folder.exists()
    network = models.create_model("DiT-digits/2")
    assert f"parameters          {sum(p.numel() for p in network.parameters()):,}" in out
    assert f"forward: {sum(network.cost().values()) / 1e9:.4f} G" in out
    assert "1,297 images, 10 classes" in out and "12 x (1, 8, 8) uint8 from the data" in out
    assert '"num_classes": 10' in out and "peak of a step, predicted: " in out


def test_warnings_are_those_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--model DyDiT-digits/2 --max-steps 1 --flops-target 0.3 --global-batch-size 4".split()
    printed = re.findall("Warning: .*", dry_run(capsys, *argv))
    assert start(tmp_path, *BASE, *argv) == 0
    assert printed == re.findall("Warning: .*", runs.log(tmp_path))
    assert len(printed) == 2 and "--flops-warmup-steps 1000" in printed[0] and "--ema-decay" in printed[1]
    capsys.readouterr()
    assert "Warning" not in dry_run(capsys, "--max-steps", "50", "--ema-ramp")


def test_of_compiled_blocks_it_predicts_the_uncompiled_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.settings.can_compile", lambda device_type: True)
    out = [dry_run(capsys, *argv) for argv in ((), ("--compile",))]
    assert "predicted, uncompiled (compiled blocks keep less): " in out[1]
    peaks = [re.search(r"predicted.*: ([\d.]+) GB", text) for text in out]
    assert peaks[0] is not None and peaks[1] is not None and peaks[0][1] == peaks[1][1]


def test_host_memory_is_that_of_the_process_that_copies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of DiT-S/2: 16 bytes a parameter for weights, average and two moments."""

    def printed(*argv: str) -> dict[str, float]:
        text = dry_run(capsys, "--model", "DiT-S/2", "--num-classes", "10", "--global-batch-size", "8", *argv)
        return {m[1]: float(m[2]) for m in re.finditer(r"host memory of (.+): ([\d.]+) GB", text)}

    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    (copy, whole), *others = printed().items()
    assert not others and copy == "rank 0 for the copy that a checkpoint is written from"
    (copy, part), *others = printed("--checkpoint-format", "sharded").items()
    assert not others and copy.startswith("each process") and part == pytest.approx(whole / 4, abs=0.001)
    (_, one), (start, weights) = printed("--parallel", "fsdp").items()
    assert one == whole and start == "rank 0 for the weights of a new network"
    assert weights == pytest.approx(whole / 4, abs=0.001)
    (_, part), _ = printed("--parallel", "fsdp", "--checkpoint-format", "sharded").items()
    assert part == pytest.approx(whole / 4, rel=0.02), "rows are padded"


def test_under_torchrun_one_rank_prints_and_none_waits(tmp_path: Path) -> None:
    argv = [*BASE, "--model", "DyDiT-digits/2", "--global-batch-size", "8", "--dry-run"]
    done = run_ranks("train.py", *argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predicted") == 1 and "on cpu, 2 processes" in done.stdout
    assert "4 x (1, 8, 8) uint8 from the data" in done.stdout


def test_xl_takes_seconds_and_less_than_a_gigabyte() -> None:
    """In a process of its own, whose peak of memory is known; 675 M parameters alone would be 2.7 GB."""
    program = (
        "import re, resource, sys, train\nfrom runtime.errors import run\n"
        "status = run(train.main, 'train.py')\nseconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime\n"
        "memory = dict(re.findall(r'(\\w+):\\s*(\\d+) kB', open('/proc/self/status').read()))\n"
        "print(status, seconds, int(memory['VmHWM']) - int(memory['RssFile']))"  # without mapped libraries
    )
    argv = "--dataset digits --model DiT-XL/2 --num-classes 10 --device cpu --dry-run".split()
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, timeout=240)
    status, seconds, kilobytes = map(float, done.stdout.splitlines()[-1].split())
    assert status == 0 and seconds < 60 and kilobytes * 1024 < 1e9, (seconds, kilobytes)
    assert "parameters          673,671,176" in done.stdout


def test_mistakes_are_still_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(train.main, "train.py", [*BASE, "--dry-run", "--num-classes", "3"]) == 2
    assert "--num-classes 3: the data has 10 classes" in runs.the_error(capsys)
