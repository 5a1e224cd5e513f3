"""The benchmark of reused state: what runs, in which order, and what follows from the times, which decide no test."""

import dataclasses
import json

import pytest
import torch

from benchmarks.costs import run_cost
from benchmarks.reuse import PipelineRun, count_blocks, results, reuse_case, reuse_runs, table
from benchmarks.sampling import random_pipeline
from benchmarks.timing import measure
from models import create_model
from runtime.errors import run
from scripts import benchmark_reuse
from tests.networks import debug_name, debug_network

ARGV = "--model Skip-DiT-debug/2 --hidden-size 64 --num-heads 4 --input-size 8 --device cpu --rounds 1".split()


def main(*argv: str) -> int:
    return run(benchmark_reuse.main, "benchmark_reuse.py", argv)


def made(intervals: tuple[int, ...], family: str = "Skip-DiT") -> dict[str, PipelineRun]:
    pipeline = random_pipeline(debug_name(family), torch.device("cpu"))
    return reuse_runs(pipeline, 12, (1, *intervals), images=2, precision="fp32")


def test_blocks_are_counted_while_they_run_and_not_after() -> None:
    network = debug_network("Skip-DiT")
    assert count_blocks(network.blocks, lambda: network(torch.randn(1, 4, 8, 8), 5.0, y=torch.tensor([1]))) == 8
    assert not any(block._forward_hooks for block in network.blocks)


def test_a_cached_step_runs_twice_the_cache_depth() -> None:
    runs = made((2, 3))
    assert list(runs) == ["N = 1", "N = 2", "N = 3"]
    for name, one in runs.items():
        network, refresh = one.pipeline.network, one.refresh
        cached = 2 * network.config.cache_depth * (12 - sum(refresh))
        assert count_blocks(network.blocks, one.latents) == 8 * sum(refresh) + cached
        assert reuse_case(name, one).flop == 2 * 2 * run_cost(network, refresh)
    assert [sum(one.refresh) for one in runs.values()] == [12, 6, 4]


def test_of_a_divided_network_the_encoder_runs_every_so_often() -> None:
    runs = made((4, 6), "DDT")
    config = runs["R = 1"].pipeline.network.config
    decoder = 12 * (config.depth - config.encoder_depth)
    assert [sum(one.refresh) for one in runs.values()] == [12, 3, 2]
    blocks = [count_blocks(one.blocks, one.latents) for one in runs.values()]
    assert blocks == [n * config.encoder_depth + decoder for n in (12, 3, 2)]


def test_the_bounds_of_ddt_xl_at_width_192_are_the_stated_ones() -> None:
    """22 + 6 blocks, 64 tokens; at full width and 256 tokens it is 2.13 and 2.76."""
    with torch.device("meta"):
        network = create_model("DDT-XL/2", hidden_size=192, num_heads=3, sample_shape=(4, 16, 16))
    full = run_cost(network, [True] * 100)
    bounds = [full / run_cost(network, [i % n == 0 for i in range(100)]) for n in (4, 10)]
    assert bounds == pytest.approx([2.14, 2.78], abs=0.005)


def test_runs_take_turns_and_ratios_are_those_of_neighbours() -> None:
    runs = made((2,))
    order: list[int] = []
    readings = iter([100.0, 100.0, 2.0, 1.0, 30.0, 10.0, 8.0, 2.0])  # the first two are the warm-up's

    def clock(work) -> float:
        work()
        return next(readings)

    cases = [reuse_case(*item) for item in runs.items()]
    noted = [dataclasses.replace(case, run=lambda run: order.append(sum(run.refresh))) for case in cases]
    every, second = results(measure("reuse", noted, 3, clock), list(runs.values()))
    assert order == [12, 6] * 5
    assert (every["rounds"], second["rounds"]) == ([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (every["seconds"], every["speedup"], every["bound"]) == (8.0, 1.0, 1.0)
    assert (second["seconds"], second["speedup"]) == (2.0, 3.0)  # of 2, 3 and 4
    assert second["bound"] == every["macs"] / second["macs"] == cases[0].flop / cases[1].flop
    assert second["share_of_bound"] == 3.0 / second["bound"]
    assert (second["full_steps"], second["cached_steps"]) == (6, 6)
    assert "3.000 x" in table([every, second])


def test_smoke(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "result.json"
    argv = ["--num-sampling-steps", "12", "--intervals", "2", "3", "--batch-size", "2"]
    assert main(*ARGV, *argv, "--output", str(output)) == 0
    document, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert [(r["full_steps"], r["cached_steps"], r["blocks"]) for r in document["rows"]] == [
        (12, 0, 96),
        (6, 6, 6 * 8 + 6 * 4),
        (4, 8, 4 * 8 + 8 * 4),
    ]
    assert all(r["name"] in printed and r["seconds"] > 0 and len(r["rounds"]) == 1 for r in document["rows"])
    assert document["machine"]["clock"] == "wall time" and str(tmp_path) not in output.read_text()


@pytest.mark.parametrize(("share", "status"), [(0.96, 0), (0.94, 1)])
def test_check_fails_below_the_goal(share: float, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_) -> list:
        runs = made((2,))
        cases = [reuse_case(*item) for item in runs.items()]
        seconds = iter([1.0, 1.0, 1.0, cases[1].flop / cases[0].flop / share])
        return results(measure("reuse", cases, 1, lambda work: next(seconds)), list(runs.values()))

    monkeypatch.setattr(benchmark_reuse, "measure_runs", measured)
    if status:
        with pytest.raises(SystemExit) as leaving:
            main(*ARGV, "--check", "0.95")
        assert leaving.value.code == status
    else:
        assert main(*ARGV, "--check", "0.95") == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--intervals", "0"], "--intervals 0: must lie in 1..250"),
        (["--intervals", "251"], "--intervals 251: must lie in 1..250"),
        (["--model", "DiT-debug/2"], "--model DiT-debug/2: this network keeps nothing to reuse"),
        (["--model", "DiT-debug/3"], "--model DiT-debug/3: unknown model"),
        (["--cache-depth", "5"], "--model Skip-DiT-debug/2: cache_depth 5 must lie in 1..4, half the depth"),
        (["--num-sampling-steps", "1001"], "--num-sampling-steps 1001: "),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*ARGV, *argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
