"""The benchmark of routing: what it holds fixed, what it counts, and that it runs."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.cases import random_network
from benchmarks.routing import ALL_ON, DENSE, MASKED, ROUTED, Workload, open_gates, plain_dit, routing_cases, speedup
from benchmarks.timing import Row
from runtime.errors import run
from scripts import benchmark_routing
from tests.golden_data import assert_close

CPU = torch.device("cpu")
SMALL = Workload("DyDiT-debug/2", depth=3, rows=4, heads=3, groups=2, tokens=0.75)


@torch.no_grad()
def test_gates_are_opened_for_the_share_that_was_asked_for() -> None:
    network = random_network(SMALL.model, CPU, depth=3)
    x, y = torch.randn(4, 4, 8, 8), torch.arange(4)
    open_gates(network, SMALL, x, 500.0, y)
    actual = network(x, 500.0, y=y).aux
    assert (actual.heads.sum(-1) == 3).all() and (actual.mlp.sum(-1) == 2).all()
    assert (actual.tokens.sum((0, 2)) == 48).all()  # of 64 in each of three blocks
    assert len({tuple(mask.tolist()) for mask in actual.heads[0]}) > 1
    for t in (0.0, 999.0):  # at any time; which tokens, the image says
        assert torch.equal(network(x, t, y=y).aux.heads, actual.heads)
    open_gates(network, SMALL._replace(heads=4, groups=4, tokens=1.0), x, 500.0, y)
    assert all(mask.all() for mask in network(x, 3.0, y=y).aux)


@torch.no_grad()
def test_the_plain_dit_has_the_same_weights() -> None:
    network = random_network(SMALL.model, CPU)
    x, y = torch.randn(4, 4, 8, 8), torch.arange(4)
    assert_close(plain_dit(network)(x, 5.0, y=y).sample, network(x, 5.0, y=y, complete_model=True).sample, 1e-6)


def test_cases_count_the_work_that_they_do() -> None:
    cases = {case.name: case for case in routing_cases(SMALL, CPU)}
    assert list(cases) == [DENSE, ALL_ON, ROUTED, MASKED]
    network = random_network(SMALL.model, CPU, depth=3)
    parts = network.cost()
    assert cases[ALL_ON].flop == pytest.approx(2 * 4 * sum(parts.values()))
    assert cases[DENSE].flop == pytest.approx(2 * 4 * (sum(parts.values()) - parts["routers"]))
    attention = parts["attention_linear"] + parts["attention_products"]
    saved = attention / 4 + parts["mlp"] * (1 - 0.5 * 0.75)
    assert cases[ROUTED].flop == cases[MASKED].flop == pytest.approx(cases[ALL_ON].flop - 2 * 4 * saved)
    state = cases[ROUTED].prepare()
    assert_close(cases[ROUTED].run(state), cases[MASKED].run(cases[MASKED].prepare()), 5e-6)
    assert not torch.equal(cases[ROUTED].run(state), cases[DENSE].run(cases[DENSE].prepare()))


def test_a_loop_is_counted_over_all_its_guided_steps() -> None:
    one = {case.name: case.flop for case in routing_cases(SMALL, CPU)}
    loop = {case.name: case.flop for case in routing_cases(SMALL, CPU, steps=3)}
    assert loop[DENSE] == pytest.approx(6 * one[DENSE]) and loop[ALL_ON] == pytest.approx(6 * one[ALL_ON])


def test_a_saving_is_speed_up_and_less_work_and_their_quotient() -> None:
    fixed = dict(group="g", rounds=[1.0], images=0, precision="fp32", is_peak=False, reference=None, error=None)
    rows = [Row(name=DENSE, seconds=6.0, flop=10.0, **fixed), Row(name=ROUTED, seconds=4.0, flop=5.0, **fixed)]
    assert speedup(rows) == (1.5, 2.0) and speedup(rows).quotient == 0.75


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    argv = "--model DyDiT-debug/2 --depth 2 --batch-size 2 --rounds 1 --device cpu --num-sampling-steps 2".split()
    argv += ["--precision", "bf16", "--output", str(output)]
    assert run(benchmark_routing.main, "benchmark_routing.py", argv) == 0
    printed, document = capsys.readouterr().out, json.loads(output.read_text())
    assert [row["name"] for row in document["rows"]] == [DENSE, ALL_ON, ROUTED, MASKED]
    assert all(row["name"] in printed for row in document["rows"]) and "quotient" in printed
    assert [entry["name"] for entry in document["savings"]] == [ALL_ON, ROUTED, MASKED]
    for entry in document["savings"]:
        assert entry["quotient"] == pytest.approx(entry["speedup"] / entry["reduction"])
    assert str(tmp_path) not in output.read_text()


def test_without_a_model_the_published_cases_are_timed() -> None:
    config = benchmark_routing.RoutingSettings()
    assert [s.title for s in benchmark_routing.workloads(config, CPU)] == [
        "DyDiT-S/2, batch 8: 4 heads, 3 groups, 80% of tokens",
        "DyDiT-XL/2, 1 block, batch 2: 10 heads, 10 groups, 75% of tokens",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--tokens", "1.2"], "--tokens 1.2: must lie in [0, 1]"),
        (["--heads", "3"], "--heads 3: has no effect without --model"),
        (["--model", "DiT-debug/2"], "--model DiT-debug/2: has no routers; choose a DyDiT"),
        (["--model", "DyDiT-tiny/2"], "--model DyDiT-tiny/2: unknown model"),
        (["--model", "DyDiT-debug/2", "--groups", "5"], "--groups 5: DyDiT-debug/2 has 4"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(benchmark_routing.main, "benchmark_routing.py", [*argv, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
