"""The benchmark of sharing: what it counts, what it says, what it refuses. No time decides anything here."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.sharing import count_encoder_calls, make_sampling, measure_sharing
from runtime.errors import run
from scripts import benchmark_sharing
from tests.networks import debug_network

SMALL = "--model DDT-debug/2 --hidden-size 16 --num-heads 2 --input-size 4 --num-sampling-steps 20 --rounds 3".split()


def clock_of(costs: dict[int, float], network: torch.nn.Module) -> object:
    """A clock that tells multiply-adds instead of seconds."""

    def clock(work: object) -> float:
        calls = count_encoder_calls(network, work)
        return calls * costs[True] + (20 - calls) * costs[False]

    return clock


def test_calls_are_counted_and_the_bound_is_reached_where_time_is_work() -> None:
    network = debug_network("DDT")
    sample = make_sampling(network, 20, 2, torch.device("cpu"))
    costs = {True: sum(network.multiply_adds().values()), False: sum(network.multiply_adds_with_state().values())}
    runs = measure_sharing(network, sample, 20, [4, 10], 3, clock_of(costs, network))
    assert [(r.rate, r.encoder_calls, r.evaluations) for r in runs] == [(1, 20, 20), (4, 5, 20), (10, 2, 20)]
    for r in runs:
        assert r.multiply_adds == r.encoder_calls * costs[True] + (20 - r.encoder_calls) * costs[False]
        assert r.share == pytest.approx(1) and r.bound == pytest.approx(20 * costs[True] / r.multiply_adds)


def test_the_bounds_of_xl_at_width_192_are_the_stated_ones() -> None:
    """22 + 6 blocks, 64 tokens; at full width and 256 tokens it is 2.13 and 2.76."""
    from models import create_model

    with torch.device("meta"):
        network = create_model("DDT-XL/2", hidden_size=192, num_heads=3, input_size=16)
    full = network.executed_multiply_adds([True] * 100)
    bounds = [full / network.executed_multiply_adds([i % n == 0 for i in range(100)]) for n in (4, 10)]
    assert bounds == pytest.approx([2.14, 2.78], abs=0.005)


def test_a_run_prints_and_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(benchmark_sharing.main, "b", [*SMALL, "--output", str(tmp_path / "a.json"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "| 20 of 20 | 0% |" in out and "| 5 of 20 | 75% |" in out and "| 2 of 20 | 90% |" in out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["encoder_calls"] for row in rows] == [20, 5, 2]
    assert all(len(row["rounds"]) == 3 and row["share_of_bound"] > 0 for row in rows)


def test_a_missed_bound_is_an_error_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_sharing, "MUST_REACH", 1e9)
    with pytest.raises(SystemExit) as leaving:
        run(benchmark_sharing.main, "b", [*SMALL, "--check", "--device", "cpu"])
    assert leaving.value.code == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--rates 0", "--rates 0: must lie in 1..20"),
        ("--rates 21", "--rates 21: must lie in 1..20"),
        ("--rounds 0", "--rounds 0: must be at least 1"),
        ("--model IDiT-debug/2", "--model IDiT-debug/2: this network keeps nothing between evaluations"),
        ("--num-heads 3", "--model DDT-debug/2: hidden_size 16 over num_heads 3"),
    ],
)
def test_a_mistake_is_one_line(argv: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(benchmark_sharing.main, "b", [*SMALL, *argv.split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
