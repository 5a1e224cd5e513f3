"""What runs on Apple's GPUs, which have no float64: draws are made on the CPU, and nothing else needs float64."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from diffusion import SAMPLERS, ImageNoise, evaluations, guided, make_sampler, sample_loop
from diffusion.loss import Batch, row_noise
from evaluator.settings import EvaluatorConfig
from runtime.devices import slow_bf16
from tests import runs
from tests.networks import conditioning, debug_name, unconditional
from training.optimization import FiniteGuard


class Float64Operations(TorchDispatchMode):
    """Records operations with a result in float64; arrays that become tensors are on the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            self.seen |= {str(func)} - {"aten.lift_fresh.default"}
        return out


@pytest.mark.parametrize("family", models.FAMILIES)
def test_after_the_draws_nothing_is_computed_in_float64(family):
    flags = ["--global-batch-size", 4, "--max-steps", 2]
    setup = runs.open_setup(*runs.data_for(family), "--model", debug_name(family), *flags)
    network, loss = setup.network, setup.loss
    draws, noise = loss.draw(0, 4), ImageNoise(0, range(4), network.sample_shape)
    cond, null = conditioning(network, range(4)), unconditional(network, 4)
    batch = Batch(torch.randn(4, *network.sample_shape), cond, torch.arange(4), null=null)
    with Float64Operations() as operations:
        loss(batch, draws, 0, loss.shared([(batch, draws)], 0))["loss"].mean().backward()
    for name, row in SAMPLERS.items():
        if row.process == setup.owners["process"][0]:
            sampler = make_sampler(name, loss.process, row.steps if name == "dpm++" else "3", row.settings())
            with torch.no_grad(), operations:
                denoise = guided(network, cond, null, times=sampler.time_convention)
                sample_loop(denoise, sampler, noise.initial(), evaluations(sampler.times, 1.5), noise_fn=noise)
    assert operations.seen == set()


def test_draws_for_mps_are_the_cpu_s(monkeypatch):
    setup = runs.open_setup(*runs.DIGITS, *"--model DiT-debug/2 --global-batch-size 4 --num-classes 10".split())
    targets = []

    def to(tensor, device):
        targets.append(torch.device(device))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)  # this build has no MPS to move to
    noise, same = (ImageNoise(3, range(2), (1, 4, 4), device) for device in ("mps", "cpu"))
    x = torch.empty(2, 1, 4, 4)
    assert torch.equal(noise.initial(), same.initial()) and torch.equal(noise(x), same(x))
    a, b = (row_noise("encoder", 1, 2, range(2), (3,), device) for device in ("mps", "cpu"))
    assert torch.equal(a, b)
    first, second = (setup.loss.draw(0, 4, device=device) for device in ("mps", "cpu"))
    assert torch.equal(first.t, second.t) and torch.equal(first.noise, second.noise)
    assert targets.count(torch.device("mps")) >= 5


class Careless(torch.optim.SGD):
    """An optimizer that ignores `found_inf`, as MPS's fused AdamW does."""

    def step(self, closure=None):
        del self.found_inf
        super().step(closure)


def test_a_step_that_is_skipped_on_mps_is_skipped_by_the_host():
    weight = torch.nn.Parameter(torch.ones(3))
    guard = FiniteGuard(Careless([weight], lr=0.1), torch.device("cpu"))
    guard._reads_decision = True
    for gradient, moves in ((float("nan"), False), (5.0, False), (0.5, True)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), gradient)
        guard.watch(0, torch.tensor(1.0), weight.grad.norm(), limit=2.0)
        guard.step()
        assert torch.equal(weight, before) is not moves


def test_scores_are_refused_on_mps():
    with pytest.raises(ValueError, match="--device mps: scores need float64"):
        EvaluatorConfig(ref_batch=Path("a.npz"), sample_batch=Path("b.npz"), device="mps")


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        ("flags\t\t: fpu avx2\nmodel name: x\nflags: fpu avx2", True),
        ("flags\t\t: fpu avx2 avx512_bf16", False),
        ("Features\t: fp asimd", True),
        ("Features\t: fp asimd bf16", False),
        ("processor: 0", False),  # says nothing
        (None, False),
    ],
)
def test_bf16_is_called_slow_on_a_cpu_without_units_for_it(monkeypatch, cpuinfo, slow):
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    assert (slow_bf16("cpu") is not None) == slow
    assert slow_bf16("cuda") is None
