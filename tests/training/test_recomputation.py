"""Recomputed activations (--grad-checkpointing): the same gradients from less memory, in every family."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from runtime.live_memory import LiveMemory
from tests import runs
from tests.networks import debug_name, debug_network, inputs, randomise
from tests.processes import run_ranks
from tests.runs import CPU, DIGITS, assert_same, checkpoint, open_setup, state
from training.trainer import Trainer, batches, recompute_activations

ROUTED = "--width-router-bias 0.5 --token-router-bias 0.5 --flops-target 0.3 --flops-warmup-steps 0".split()


def step(family: str, *argv: str) -> tuple[Trainer, dict[str, Tensor], int]:
    """The trainer after a step from random weights, the gradients, and the peak of memory above the start."""
    own = ROUTED if family == "DyDiT" else []
    setup = open_setup(
        *runs.data_for(family), "--model", debug_name(family), "--global-batch-size", 24, "--depth", 8, *own, *argv
    )
    randomise(setup.network).train()
    trainer = Trainer(setup, CPU)
    number, pieces = next(batches(setup, CPU, 0))
    memory = LiveMemory()
    with nullcontext() if "--compile" in argv else memory:  # compiled code cannot be watched
        trainer.train_step(number, pieces)
    gradients = {name: p.grad for name, p in setup.network.named_parameters() if p.grad is not None}
    return trainer, gradients, memory.peak


@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradients_are_the_same_bit_by_bit_and_memory_is_less(family: str) -> None:
    kept, gradients, memory = step(family)
    recomputed, again, less = step(family, "--grad-checkpointing")
    assert gradients.keys() == again.keys() and len(gradients) > 50
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, again[name])] == []
    assert less < 0.6 * memory
    network, average = recomputed.setup.network, recomputed.state.ema.network
    assert network.state_dict().keys() == average.state_dict().keys() == kept.setup.network.state_dict().keys()
    assert all(block._forward_pre_hooks for block in network.blocks)
    assert not any(block._forward_pre_hooks for block in average.blocks), "the average is evaluated as it was"


def test_ranks_and_micro_batches_recompute_alike(tmp_path: Path) -> None:
    argv = [*DIGITS, *"--model DyDiT-debug/2 --global-batch-size 16 --grad-accum 2 --max-steps 2".split(), *ROUTED]
    for name, flags in (("kept", []), ("recomputed", ["--grad-checkpointing"])):
        options = [*argv, *flags, "--results-dir", str(tmp_path / name)]
        done = run_ranks("train.py", *options, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same(*(state(checkpoint(tmp_path / name, 2)) for name in ("kept", "recomputed")))
    assert runs.losses(tmp_path / "kept") == runs.losses(tmp_path / "recomputed")


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_compiled_blocks_recompute_too(family: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, gradients, _ = step(family, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    _, again, _ = step(family, "--compile", "--grad-checkpointing")
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


def test_blocks_that_are_recomputed_are_compiled_without_their_hooks() -> None:
    """And leave autocast as it was: else its cache would keep the weights of this step for the next one."""
    torch._dynamo.reset()
    network = debug_network("DiT").train()
    recompute_activations(network)
    network.compile_blocks("aot_eager")  # "eager" leaves autocast contexts open where recomputation stops early
    x, t, conditioning = inputs(network)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, torch.full((len(x),), float(t)), **conditioning).sample
    out.float().sum().backward()
    assert all(p.grad is not None for p in network.blocks.parameters())
    nested = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    assert nested == 1
    torch._dynamo.reset()
