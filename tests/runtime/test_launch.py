"""Variables of launchers: what is taken from them, and the one line about what cannot be meant."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import train
from runtime import distributed
from runtime.devices import choose_device, float64_device
from runtime.errors import RankError, RankTimeout, UserError, run
from runtime.launch import OTHER_LAUNCHERS, Launch, read_launch
from sample_ddp import main as sample_ddp

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """Sets variables of launchers, and no others of them."""
    for name in (*TORCHRUN, *OTHER_LAUNCHERS, *sum(OTHER_LAUNCHERS.values(), ())):
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Launch(0, 1, None)),
        ({"WORLD_SIZE": "1"}, Launch(0, 1, None)),
        ({"RANK": "0"}, Launch(0, 1, None)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **HERE}, Launch(3, 4, 1)),
        # torchrun under a scheduler; one task; leftovers of a finished one in an interactive shell.
        ({"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", **HERE}, Launch(3, 4, None)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch(0, 1, None)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, Launch(0, 1, None)),
        ({"SLURM_NTASKS": "8"}, Launch(0, 1, None)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, Launch(0, 1, None)),
    ],
)
def test_what_torchrun_announces_is_taken(variables, values, expected):
    variables(**values)
    assert read_launch() == expected


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "1.0"}, "WORLD_SIZE='1.0'"),
        ({"WORLD_SIZE": "\u00b2"}, "WORLD_SIZE="),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE="),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK=''"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", **HERE}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1: must be below WORLD_SIZE, which is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "MASTER_ADDR: not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT: not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", **HERE, "MASTER_PORT": "70000"}, "MASTER_PORT: 70000"),
        ({"RANK": "0", "WORLD_SIZE": "2", **HERE, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK='first'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_PROCID=0"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, "scripts/slurm_train.sh"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=0"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK=1"),
    ],
)
@pytest.mark.parametrize("entry", [train.main, sample_ddp], ids=["train", "sample_ddp"])
def test_what_cannot_be_meant_is_one_line_of_every_process(variables, values, named, entry, tmp_path, capsys):
    variables(**values)
    ckpt = tmp_path / "absent.safetensors"
    flags = ["--model", "DiT-debug/2", *(["--ckpt", str(ckpt)] if entry is sample_ddp else ["--dataset", "digits"])]
    assert run(entry, "program", [*flags, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("program: error: ") and error.count("\n") == 1 and named in error
    assert not (tmp_path / "results").exists()


def test_other_errors_are_printed_once_and_not_lost(variables, capsys):
    for rank, lines in (("0", 1), ("1", 0), ("x", 1), ("", 1), ("-1", 1)):
        variables(RANK=rank)
        assert run(refuse, "program", []) == 2
        assert capsys.readouterr().err.count("\n") == lines


def refuse(argv):
    raise UserError("--flag 3: no")


def test_others_that_cannot_be_reached_are_one_line(variables, monkeypatch, capsys):
    variables(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="9")

    def fail(*args, **options):
        raise dist.DistNetworkError("The client socket has timed out\nC++ trace")

    monkeypatch.setattr(dist, "rendezvous", fail)
    with pytest.raises(RankTimeout, match=r"^rank 1: cannot join the others at localhost:9 .*timed out$"):
        with distributed.world("cpu"):
            pass


# ----------------------------------------------------------------------------------------------------------------------
# Devices


def test_a_process_has_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.choose_gpu(Launch(3, 4, 1)) == torch.device("cuda", 1)
    assert distributed.choose_gpu(Launch(0, 1, None)) == torch.device("cuda", 0)
    with pytest.raises(RankError, match="LOCAL_RANK=2: this machine has 2 CUDA devices"):
        distributed.choose_gpu(Launch(2, 4, 2))
    with pytest.raises(RankError, match="LOCAL_RANK: not set, so processes would share a GPU"):
        distributed.choose_gpu(Launch(1, 2, None))


@pytest.mark.parametrize(("gpus", "shared"), [(["a", "b", "c"], None), (["a", "b", "a"], "ranks 0 and 2")])
def test_no_two_ranks_share_a_gpu(gpus, shared):
    store, messages = dist.HashStore(), {}

    def check(rank):
        try:
            distributed.check_gpus(store, rank, len(gpus), gpus[rank], timedelta(seconds=20))
        except UserError as error:
            messages[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages) == (0 if shared is None else len(gpus))
    assert all(shared in message for message in messages.values())


def test_mps_where_torch_has_none_is_one_line(variables, capsys):
    assert run(train.main, "train.py", ["--dataset", "digits", "--device", "mps"]) == 2
    assert capsys.readouterr().err == "train.py: error: --device mps: PyTorch finds no Apple GPU; use --device cpu\n"


def test_mps_is_chosen_for_one_process_only(variables, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps") and choose_device(None).type != "mps"
    assert float64_device("mps") == torch.device("cpu") and float64_device("cuda:1") == torch.device("cuda:1")
    with distributed.world("mps") as world:
        assert world.device.type == "mps"
    variables(RANK="0", WORLD_SIZE="2", **HERE)
    with pytest.raises(UserError, match="--device mps: for one process, not for WORLD_SIZE=2"):
        with distributed.world("mps"):
            pass


@pytest.mark.parametrize(
    ("entry", "flags", "named"),
    [
        (train.main, "--dataset digits --precision bf16", "--precision bf16"),
        (train.main, "--dataset digits --compile", "--compile"),
        (sample_ddp, "--ckpt x.pt --precision bf16", "--precision bf16"),
        (sample_ddp, "--ckpt x.pt --vae-precision bf16", "--vae-precision bf16"),
        (sample_ddp, "--ckpt x.pt --cuda-graphs", "--cuda-graphs"),
    ],
)
def test_what_mps_cannot_do_is_refused_by_its_flag(entry, flags, named, capsys):
    assert run(entry, "program", [*flags.split(), "--device", "mps"]) == 2
    assert capsys.readouterr().err.startswith(f"program: error: {named}: not with --device mps")
