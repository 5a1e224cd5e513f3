"""Runs of diffusers' HunYuan-DiT in the benchmark: counted work against published figures, and what really runs."""

import json

import pytest
import torch

from benchmarks.hunyuan import RELEASED, evaluation_macs, hunyuan_runs, hunyuan_transformer
from benchmarks.reuse import count_blocks
from runtime.errors import run
from scripts import benchmark_reuse

SMALL = {"hidden_size": 32, "num_heads": 2, "input_size": 8}


def main(*argv: str) -> int:
    flags = ["--model", "HunyuanDiT2DModel", "--device", "cpu", "--rounds", "1"]
    sizes = "--hidden-size 32 --num-heads 2 --input-size 8".split()
    return run(benchmark_reuse.main, "benchmark_reuse.py", [*flags, *sizes, *argv])


def test_the_released_network_has_the_published_macs() -> None:
    """1024 x 1024 pixels: 7,183 G for a whole evaluation, 368 G (5.1 %) for a cached one; 1.46 x at N = 2."""
    sizes = {name: int(RELEASED[name]) for name in ("hidden_size", "num_heads", "input_size")}
    transformer = hunyuan_transformer(torch.device("meta"), **sizes)
    assert len(transformer.blocks) == 40 and transformer.config.cross_attention_dim_t5 == 2048
    whole, cached = evaluation_macs(transformer, 1)
    assert (round(whole / 1e9), round(cached / 1e9)) == (7183, 368)
    runs = hunyuan_runs(transformer, 100, (1, 2, 3, 4, 5, 6), 1, 1)
    full = [sum(one.refresh) for one in runs.values()]
    assert full == [100, 67, 56, 50, 48, 45]
    bounds = [100 * whole / one.macs for one in runs.values()]
    assert bounds == pytest.approx([1, 1.46, 1.72, 1.90, 1.97, 2.09], abs=0.006)


def test_layers_of_a_run_are_those_that_are_counted() -> None:
    transformer = hunyuan_transformer(torch.device("cpu"), **SMALL, num_layers=6)
    runs = hunyuan_runs(transformer, 12, (1, 2), 2, 2)
    for one in runs.values():
        assert count_blocks(one.blocks, one.latents) == sum(6 if fresh else 4 for fresh in one.refresh)
    every, second = runs.values()
    assert torch.equal(every.latents(), every.latents()) and not torch.equal(every.latents(), second.latents())
    whole, cached = evaluation_macs(transformer, 2)
    assert every.macs == 12 * whole and second.macs == 7 * whole + 5 * cached and cached < whole


def test_the_script_prints_its_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert main("--num-sampling-steps", "6", "--intervals", "2", "--output", str(output)) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["full_steps"], row["cached_steps"], row["blocks"]) for row in rows] == [(6, 0, 240), (3, 3, 126)]
    assert "N = 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--precision", "bf16"], "--precision bf16: is timed in fp32 alone"),
        (["--cache-depth", "20"], "depth 20 must be at least 1 and less than half of the 40 blocks"),
        (["--num-heads", "3"], "hidden_size 32 must be divisible by 4 times the number of heads, 3"),
        (["--num-sampling-steps", "1000"], "the number of steps must be 1 to 999, not 1000"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
