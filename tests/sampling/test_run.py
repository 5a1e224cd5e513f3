"""What a prepared run computes: the table, precision, compiled and recorded evaluations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Network, create_model
from models.acceleration import GraphedNetwork
from models.layers import TimestepEmbedder
from runtime.errors import UserError
from sampling import run as run_module
from sampling.pipeline import Pipeline
from tests.checkpoints import write_network
from tests.golden_data import relative_error
from tests.models.test_acceleration import rerun


@pytest.fixture(scope="module")
def pipeline(ckpt: Path) -> Pipeline:
    return Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=4, cfg_scale=2.0)


def sampled(pipeline: Pipeline, rows: int = 2, **settings: Any) -> Tensor:
    return pipeline.denoise(pipeline.prepare(**settings), 0, range(rows), {"y": torch.arange(rows)})


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_timesteps_are_embedded_in_one_call_for_all_batches(
    pipeline: Pipeline, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [], TimestepEmbedder.forward
    monkeypatch.setattr(TimestepEmbedder, "forward", lambda self, t: calls.append(t) or forward(self, t))  # type: ignore[func-returns-value]
    for _ in range(2):
        sampled(pipeline, sampler=sampler, num_sampling_steps=6)
    assert [len(t) for t in calls] == [6]


def test_an_interval_evaluates_both_rows_only_where_guidance_acts(pipeline: Pipeline) -> None:
    run, rows = pipeline.prepare(sampler="ddim", num_sampling_steps="ddim10", guidance_interval=(250.0, 650.0)), []
    run.network.register_forward_pre_hook(lambda _, args: rows.append((args[1], len(args[0]))))
    pipeline.denoise(run, 0, range(2), {"y": torch.arange(2)})
    assert rows == [(t, 4 if 250 < t < 650 else 2) for t in range(900, -1, -100)]


def test_an_interval_in_timesteps_is_that_of_the_flow(tmp_path: Path) -> None:
    path = write_network(tmp_path / "a.safetensors", "DDT-debug/2", create_model("DDT-debug/2"))
    run = Pipeline.from_pretrained(path, device="cpu").prepare(num_sampling_steps=10, guidance_interval=(0, 700))
    assert [evaluation.guided for evaluation in run.table] == [evaluation.t > 0.3001 for evaluation in run.table]


def test_guidance_gets_what_the_settings_say(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    given, guided = [], run_module.guided
    monkeypatch.setattr(run_module, "guided", lambda *args, **k: given.append((args, k)) or guided(*args, **k))  # type: ignore[func-returns-value]
    sampled(pipeline, guidance_channels=1)
    ((_, cond, null), options) = given[0]
    assert cond["y"].tolist() == [0, 1] and null["y"].tolist() == [10, 10]
    assert options == {"times": "index", "channels": 1, "mix": None}


def test_bf16_is_float32_within_its_precision(pipeline: Pipeline) -> None:
    plain, half = sampled(pipeline), sampled(pipeline, precision="bf16")
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().mean() < 0.05 * plain.abs().mean()
    run = pipeline.prepare(precision="bf16")
    out = run.evaluate(torch.randn(1, 1, 8, 8), run.sampler.times[0], y=torch.tensor([0]))
    assert out.sample.dtype == torch.bfloat16


def test_compiled_blocks_are_asked_for_by_a_flag(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_blocks, compiled = Network.compile_blocks, []
    monkeypatch.setattr("sampling.config.can_compile", lambda device_type: True)
    monkeypatch.setattr(
        Network,
        "compile_blocks",
        lambda self, backend: compiled.append(len(self.blocks)) or compile_blocks(self, "eager"),
    )
    assert relative_error(sampled(pipeline, compile=True), sampled(pipeline)) < 1e-5
    assert compiled == [2]
    assert all(block._compiled_call_impl is None for block in pipeline.network.blocks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_was_compiled_samples_compiled(ckpt: Path, precision: str) -> None:
    """In bf16 a copy is sampled, and PyTorch copies modules uncompiled."""
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=3)  # its network stays compiled
    pipeline.network.compile_blocks("eager")
    prepared = pipeline.prepare(precision=precision).network
    assert all(block._compiled_call_impl is not None for block in prepared.blocks)


def test_compiling_without_a_compiler_is_refused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"--compile: on a CPU it needs a C\+\+ compiler"):
        pipeline.prepare(compile=True)


def test_recordings_are_asked_for_by_a_flag(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=4)
    object.__setattr__(pipeline._given.general.compute, "device", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sampling.run.GraphedNetwork", lambda evaluate: GraphedNetwork(evaluate, rerun))
    graphed = pipeline.prepare(cuda_graphs=True)
    for _ in range(2):
        assert torch.equal(sampled(pipeline, cuda_graphs=True), sampled(pipeline))
    assert isinstance(graphed.evaluate, GraphedNetwork) and graphed.evaluate.recordings == 1, "of all four steps"


@pytest.mark.parametrize(
    ("precision", "tf32", "allowed"), [("tf32", True, True), ("tf32", False, False), ("fp32", True, False)]
)
def test_tf32_is_allowed_inside_a_run_alone(pipeline: Pipeline, precision: str, tf32: bool, allowed: bool) -> None:
    flags, seen = torch.backends.cuda.matmul, []
    before = flags.allow_tf32
    pipeline.sample([1], precision=precision, tf32=tf32, on_step=lambda *_: seen.append(flags.allow_tf32))
    assert seen == [allowed] * 4 and flags.allow_tf32 == before


def test_a_warning_says_where_bf16_is_slow(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sampling.run.slow_bf16", lambda device: f"slow on {device}")
    with pytest.warns(UserWarning, match="slow on cpu"):
        pipeline.prepare(precision="bf16", num_sampling_steps="2")
