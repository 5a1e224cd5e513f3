import pytest
import torch
from runtime.config import parse_config

import models
import train
from runtime.distributed import World
from runtime.errors import run
from tests.live_memory import LiveMemory
from training import trainer
from training.config import TrainConfig
from training.dry_run import predict_memory
from training.setup import set_up

CPU = World(0, 1, torch.device("cpu"))
BASE = "--dataset digits --model DiT-digits/2 --device cpu --num-workers 0".split()


@pytest.fixture
def deep(monkeypatch):
    """A model whose memory is spread over its blocks as in the large ones, not over a handful of tensors."""
    shape = {"depth": 12, "hidden_size": 64, "num_heads": 4, "input_size": 8, "in_channels": 1, "num_classes": 10}
    monkeypatch.setitem(models.FAMILIES["DiT"].configs, "DiT-deep/2", {**shape, "patch_size": 2})
    return ["--model", "DiT-deep/2", "--no-learn-sigma"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--global-batch-size", "64"],
        ["--global-batch-size", "64", "--precision", "bf16"],
        ["--global-batch-size", "64", "--grad-checkpointing"],
        ["--global-batch-size", "64", "--grad-accum", "4"],
        ["--global-batch-size", "1"],  # gradients outweigh activations
    ],
    ids=lambda argv: "-".join(argv[1:]).replace("--", ""),
)
def test_the_predicted_peak_is_that_of_a_real_step_within_a_tenth(deep, argv):
    config = parse_config(TrainConfig, [*BASE, *deep, *argv], program="train.py", description="")
    setup = set_up(config, CPU.device)
    predicted = predict_memory(setup, CPU)["peak"]
    training = trainer.Trainer(setup, CPU, None, None)
    steps = trainer.batches(setup, CPU, 0)
    training.train_step(*next(steps))  # the optimizer's moments appear
    groups = training.state.groups().values()
    with LiveMemory(tensor for group in groups for tensor in group.values()) as memory:
        training.state.optimizer.zero_grad(set_to_none=True)
        step, pieces = next(steps)
        training.train_step(step, pieces)
    assert predicted == pytest.approx(memory.peak, rel=0.1)


def test_it_says_what_would_be_trained_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "results"
    argv = [*BASE, "--global-batch-size", "12", "--dry-run", "--results-dir", str(folder)]
    assert run(train.main, "train.py", argv) == 0
    out = capsys.readouterr().out
    assert not folder.exists()
    network = models.create_model("DiT-digits/2")
    assert f"parameters          {sum(p.numel() for p in network.parameters()):,}" in out
    assert f"forward: {sum(network.multiply_adds().values()) / 1e9:.4f} G" in out
    assert "1,297 images, 10 classes" in out and "12 x (1, 8, 8) uint8 from the data" in out
    assert '"num_classes": 10' in out and "peak of a step, predicted" in out


def test_a_dry_run_leaves_the_network_as_it_was(deep):
    config = parse_config(TrainConfig, [*BASE, *deep, "--grad-checkpointing"], program="train.py", description="")
    setup = set_up(config, CPU.device)
    before = {name: tensor.clone() for name, tensor in setup.network.state_dict().items()}
    predict_memory(setup, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.network.state_dict().items())
    assert setup.network.grad_checkpointing and "run_block" not in vars(setup.network)
    assert all(p.grad is None for p in setup.network.parameters())


def test_several_processes_hold_room_for_gradients_all_the_time(deep):
    config = parse_config(TrainConfig, [*BASE, *deep], program="train.py", description="")
    setup = set_up(config, CPU.device)
    one, two = (predict_memory(setup, World(0, size, CPU.device)) for size in (1, 2))
    assert two["kept for the backward pass"] == pytest.approx(one["kept for the backward pass"] / 2, rel=0.05)
    beside = one["peak"] - one["kept for the backward pass"] - one["inside a block"]
    assert two["peak"] > beside / 2 + two["gradients"] + two["kept for the backward pass"]


def test_mistakes_are_still_mistakes(tmp_path, capsys):
    assert run(train.main, "train.py", [*BASE, "--dry-run", "--num-classes", "3"]) == 2
    assert "--num-classes 3: the data has 10 classes" in capsys.readouterr().err
