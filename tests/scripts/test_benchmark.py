"""The benchmark: order, medians, comparisons, what is written. No test depends on how long a thing takes."""

import datetime
import importlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import cases as benchmark_cases
from benchmarks import official
from benchmarks import report as benchmark_report
from benchmarks import sampling as benchmark_sampling
from benchmarks.report import markdown, report
from benchmarks.timing import Case, Row, interleave, measure, relative_error
from runtime.errors import UserError, run
from scripts import benchmark
from scripts.benchmark import main
from tests.processes import ROOT

OFFICIAL = """
from models.dit import DiT as Ours, DiTConfig

class DiT(Ours):
    def __init__(self, **config):
        assert "cache_depth" not in config  # the official constructor knows no such thing
        side = config.pop("input_size")
        shape = (config.pop("in_channels"), side, side)
        super().__init__(DiTConfig(**config, sample_shape=shape))

    def forward(self, x, t, y):
        return super().forward(x, t, y=y).sample
"""
MACHINE = {"device": "NVIDIA H200", "cpu": "a CPU", "cpu_features": [], "threads": 1, "clock": "CUDA events"} | {
    "python": "3.11", "torch": "2.11", "cuda": "13.0", "commit": None
}  # fmt: skip


def case(name: str, value: float = 1.0, calls: list[str] | None = None, **options) -> Case:
    """Puts out a constant and notes its calls."""

    def work(state: str) -> torch.Tensor:
        if calls is not None:
            calls.append(state)
        return torch.tensor([value, 2.0])

    return Case(name, lambda: name, work, outcome=lambda state, result: [result], **options)


def row(name: str, seconds: float, **options) -> Row:
    fixed = dict(group="g", rounds=[seconds], flop=0.0, images=0, precision="bf16", is_peak=False, reference=None)
    return Row(**{**fixed, "name": name, "seconds": seconds, "error": None, **options})


def no_time(work) -> float:
    work()
    return 1.0


def test_cases_run_in_turn() -> None:
    order: list[str] = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, no_time)
    assert order == ["a", "b"] * 3
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_row_holds_the_median_and_every_round_after_the_warm_up() -> None:
    calls: list[str] = []
    readings = iter([100.0, 100.0, 5.0, 50.0, 1.0, 10.0, 2.0, 20.0])  # the first two are the warm-up's

    def clock(work) -> float:
        work()
        return next(readings)

    a, b = measure("g", [case("a", calls=calls), case("b", calls=calls, reference="a")], 3, clock)
    assert (a.rounds, a.seconds, b.rounds, b.seconds) == ([5.0, 1.0, 2.0], 2.0, [50.0, 10.0, 20.0], 20.0)
    assert calls == ["a", "b"] * 5
    assert (a.group, a.error, b.reference, b.error) == ("g", None, "a", 0.0)


@pytest.mark.parametrize("value", [1.001, float("nan"), float("inf")])
def test_a_case_that_computes_something_else_is_not_timed(value: float) -> None:
    def clock(work) -> float:
        raise AssertionError("timed")

    with pytest.raises(UserError, match=r"^wrong differs from right by .* times are not compared"):
        measure("g", [case("right"), case("wrong", value, reference="right")], 1, clock)


def test_outcomes_of_earlier_groups_are_compared_with() -> None:
    known = {}
    measure("g", [case("right")], 1, no_time, known=known)
    (actual,) = measure("g", [case("near", 1.01, reference="right", tolerance=0.1)], 1, no_time, known=known)
    assert actual.error == pytest.approx(0.005)
    assert set(known) == {"right", "near"}


def test_relative_error_is_the_worst_tensor_s() -> None:
    a, b = torch.tensor([1.0, 4.0]), torch.tensor([0.0])
    assert relative_error([a, b], [a, b]) == 0
    assert relative_error([a + 1, b], [a, b]) == pytest.approx(0.25)
    assert relative_error([a, b + 3], [a, b]) == pytest.approx(3)  # nothing to be relative to
    nan = torch.tensor([float("nan")])
    assert relative_error([nan, a], [b, a]) != relative_error([b], [b])
    assert torch.tensor(relative_error([nan, a + 1], [b, a])).isnan()  # a later number does not replace it
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error([a[None]], [a])


def test_report_derives_rates_speed_up_and_shares_of_both_peaks() -> None:
    rows = [
        row("gemm", 2.0, rounds=[2.0, 1.0], flop=800e12, is_peak=True),
        row("plain", 4.0, flop=400e12, images=8),
        row("better", 2.0, flop=400e12, images=8, reference="plain", error=1e-3),
        row("fp32", 1.0, flop=1e12, precision="fp32", reference="lost"),
    ]
    document = report({}, MACHINE, rows, ["loader: no"])
    assert document["peak_flop_per_second"] == {"bf16": 800e12, "bf16_datasheet": 989.4e12}  # the fastest round
    _, plain, better, fp32 = document["rows"]
    assert (plain["speedup"], plain["peak_fraction"], plain["images_per_second"]) == (None, 0.125, 2.0)
    assert (better["speedup"], better["peak_fraction"]) == (2.0, 0.25)
    assert better["datasheet_fraction"] == pytest.approx(200 / 989.4)
    assert (fp32["peak_fraction"], fp32["datasheet_fraction"], fp32["speedup"]) == (None, None, None)
    assert document["skipped"] == ["loader: no"]
    json.dumps(document)


def test_table_is_aligned_and_leaves_empty_columns_out() -> None:
    rows = [row("plain", 0.004, rounds=[0.004, 0.006]), row("better", 0.002, reference="plain")]
    lines = markdown(report({}, MACHINE, rows, ["loader: no sklearn"])).splitlines()
    assert lines[0].split(" | ")[2:] == ["  ms", "spread", "speed-up |"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "4.00" in lines[2] and "50%" in lines[2] and "2.00 x" in lines[3]
    assert lines[-1] == "Not run: loader: no sklearn"


def test_compiled_cases_are_left_out_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    device = torch.device("cpu")
    assert benchmark_cases.find_compiler(device) is None
    network = benchmark_cases.random_network("DiT-debug/2", device)
    inputs = benchmark_cases.make_inputs(network, 2, device)
    for cases in (benchmark_cases.forward_cases, benchmark_cases.train_cases):
        names = {c.name for c in cases(network, inputs, None, None)}
        assert names and not any("compiled" in name for name in names)
        assert len(cases(network, inputs, None, "eager")) > len(names)


def test_a_loader_whose_package_is_missing_is_named() -> None:
    def latents_case() -> Case:
        raise ImportError("No module named 'data.latents'")

    cases, skipped = benchmark_cases.make_all([latents_case, lambda: case("a")])
    assert [c.name for c in cases] == ["a"]
    assert skipped == ["latents: No module named 'data.latents'"]


def test_no_git_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr("subprocess.run", missing)
    assert benchmark_report.commit() is None


def checkout(folder: Path, source: str = OFFICIAL) -> Path:
    folder.mkdir()
    (folder / "models.py").write_text(source)
    return folder


def test_a_network_for_text_is_timed_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_cases, "find_compiler", lambda device: None)
    argv = "--model LatteT2V-debug/2 --batch-size 2 --rounds 1 --device cpu --only train_step".split()
    assert run(main, "benchmark.py", [*argv, "--output", str(tmp_path / "result.json")]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    compared = [row["error"] for row in rows if row["reference"]]
    assert len(compared) == 2 and max(compared) <= 0.1


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_cases, "find_compiler", lambda device: "eager")
    monkeypatch.setitem(benchmark_cases.GEMM_SIDE, "cpu", 16)
    monkeypatch.setattr(benchmark_sampling, "NPZ_IMAGES", 40)
    monkeypatch.setattr(benchmark_sampling, "NPZ_SIDE", 8)
    output = tmp_path / "new" / "result.json"
    argv = ["--model", "DiT-debug/2", "--batch-size", "2", "--rounds", "1", "--device", "cpu"]
    argv += ["--against", str(checkout(tmp_path / "official")), "--output", str(output)]
    assert run(main, "benchmark.py", argv) == 0
    printed, document = capsys.readouterr().out, json.loads(output.read_text())

    rows = document["rows"]
    assert {r["group"] for r in rows} == set(benchmark.GROUPS)
    first = {group: next(r for r in rows if r["group"] == group) for group in benchmark.GROUPS}
    assert first["forward"]["name"] == first["train_step"]["name"] == "official, fp32"
    compared = [r for r in rows if r["reference"]]
    assert len(compared) >= 10 and all(r["speedup"] > 0 and 0 <= r["error"] <= 0.1 for r in compared)
    assert all(r["seconds"] > 0 and len(r["rounds"]) == 1 for r in rows)
    assert {name: r["flop"] for name, r in first.items()}["train_step"] == 3 * first["forward"]["flop"]
    assert {"fp32", "bf16"} < document["peak_flop_per_second"].keys()
    assert {"device", "cpu", "cpu_features", "threads", "torch", "commit"} < document["machine"].keys()
    assert [r["seconds_per_step"] > 0 for r in rows if r["group"] == "sampling" and "steps" in r["name"]] == [True] * 4
    assert document["skipped"] == [
        f"official {name} loop: the checkout has no diffusion package" for name in ("DDPM", "DDIM")
    ]
    assert all(r["name"] in printed for r in rows)
    assert str(tmp_path) not in output.read_text()  # whose machine it was is nobody's business


STAND_INS = {
    "DyDiT": """
from models.dydit import DyDiT as Ours, DyDiTConfig
from dynamic_stand_in import PART

class DiT(Ours):
    def __init__(self, in_channels, input_size, **config):
        super().__init__(DyDiTConfig(**config, sample_shape=(in_channels, input_size, input_size)))

    def forward(self, x, t, y):
        return super().forward(x, t, y=y)[0], PART
""",
    "DDT": """
from models.ddt import DDT as Ours, DDTConfig

class DDT(Ours):
    def __init__(self, in_channels, num_groups, hidden_size, num_blocks, num_encoder_blocks, patch_size, num_classes):
        super().__init__(DDTConfig(
            sample_shape=(in_channels, 8, 8), num_heads=num_groups, hidden_size=hidden_size, depth=num_blocks,
            encoder_depth=num_encoder_blocks, patch_size=patch_size, num_classes=num_classes,
        ))

    def forward(self, x, t, y):
        return tuple(super().forward(x, t, y=y))[:2]
""",
    "Skip-DiT": """
from models.skip_dit import SkipDiT, SkipDiTConfig

class DiT_skip(SkipDiT):
    def __init__(self, in_channels, input_size, **config):
        super().__init__(SkipDiTConfig(**config, sample_shape=(in_channels, input_size, input_size)))

    def forward(self, x, t, y):
        return super().forward(x, t, y=y)[0]
""",
}


@pytest.mark.parametrize("family", STAND_INS)
def test_every_family_is_compared_with_its_official_network(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark_cases.GEMM_SIDE, "cpu", 16)
    path = tmp_path / official.OFFICIAL[family].file
    path.parent.mkdir(parents=True)
    path.write_text(STAND_INS[family])
    (path.parent / "dynamic_stand_in.py").write_text("PART = None")
    argv = f"--model {family}-debug/2 --batch-size 2 --rounds 5 --device cpu --only forward,train_step".split()
    argv += ["--precision", "fp32", "--no-compiled", "--output", str(tmp_path / "result.json")]
    assert run(main, "benchmark.py", [*argv, "--against", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    compared = [row for row in rows if row["reference"] == "official, fp32"]
    assert [row["group"] for row in compared] == ["forward", "train_step", "train_step"]
    assert all(row["error"] < 1e-6 and row["speedup_interval"][0] < row["speedup_interval"][1] for row in compared)
    assert {row["precision"] for row in rows} == {"fp32"} and "95 %" in capsys.readouterr().out
    assert "dynamic_stand_in" not in sys.modules and str(path.parent) not in sys.path


def test_the_interval_is_student_s() -> None:
    before, after = [0.9, 1.1] * 7 + [2.0], [1.0] * 14 + [2.0]
    half = 2.1448 * (0.14 / 14) ** 0.5 / 15**0.5
    assert benchmark_report.interval(before, after) == pytest.approx((1 - half, 1 + half), abs=1e-5)
    assert benchmark_report.interval(before[:4], after[:4]) is benchmark_report.interval(before, after[1:]) is None


def test_a_family_without_an_official_network_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "Latte-debug/2", "--only", "forward", "--device", "cpu", "--against", "."]
    assert run(main, "benchmark.py", argv) == 2
    assert "Latte-debug/2 has no official network here; families: DiT, DyDiT, DDT, Skip-DiT" in capsys.readouterr().err


def test_the_official_network_lives_beside_ours_and_takes_our_weights(tmp_path: Path) -> None:
    ours = benchmark_cases.random_network("DiT-debug/2", torch.device("cpu"))
    before = sys.modules["models"]
    theirs = official.official_network(checkout(tmp_path / "official"), ours, "DiT-debug/2")
    assert sys.modules["models"] is before and "official_dit_models" not in sys.modules
    assert type(theirs).__module__ == "official_dit_models" and not theirs.training
    inputs = benchmark_cases.make_inputs(ours, 2, torch.device("cpu"))
    assert torch.equal(benchmark_cases.forward(theirs, inputs), benchmark_cases.forward(ours, inputs))
    assert benchmark_cases.forward(ours, inputs).std() > 1e-3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (OFFICIAL.replace(".sample", ".sample * 1.001"), "fp32 differs from official, fp32 by"),
        ("import timm_of_nobody.layers", "needs timm_of_nobody, which is not installed"),
        ("x = 1", "cannot be given the weights of DiT-debug/2"),
        (OFFICIAL.replace("**config", "width"), "cannot be given the weights of DiT-debug/2"),
    ],
)
def test_an_official_checkout_that_will_not_do(
    tmp_path: Path, source: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkout(tmp_path / "official", source)
    argv = ["--model", "DiT-debug/2", "--batch-size", "1", "--rounds", "1", "--only", "forward", "--device", "cpu"]
    assert run(main, "benchmark.py", [*argv, "--against", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--only", "forward,speed"], "unknown group 'speed'; choose from forward, train_step"),
        (["--model", "DiT-debug/3"], "--model DiT-debug/3: unknown model"),
        (["--against", "nowhere", "--only", "loader"], "--against nowhere: has no effect without"),
        (["--threads", "0", "--only", "sampling"], "--threads 0: must be at least 1"),
        (["--model", "DiT-debug/2", "--only", "forward", "--against", "nowhere"], "no models.py there"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "benchmark.py", argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_gpu_report_says_in_one_line_that_there_is_no_gpu() -> None:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "gpu_report.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no GPU here" in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.fixture
def gpu_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as `python scripts/gpu_report.py` sees it, with its neighbour at the top of the path."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("gpu_report")


def test_gpu_report_smoke(gpu_report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(gpu_report.main, "gpu_report.py", ["--smoke", "--output-dir", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "smoke.json").read_text())
    rows = document["rows"]
    groups = {"peak": 2, "training": 5, "forward": 3, "sampling": 8}
    groups |= {"optimizer": 4, "evaluator": 5, "caching": 4, "sharing": 3, "routing": 4, "clips": 4, "text": 4}
    assert [r["group"] for r in rows] == [group for group, count in groups.items() for _ in range(count)]
    training = rows[2:7]
    assert [r["images"] for r in training] == [4, 2, 4, 2, 3] and all(r["predicted_memory"] > 0 for r in training)
    routed = {r["name"]: r["flop"] for r in rows if r["group"] == "routing"}
    assert routed["DyDiT, routed"] < 0.7 * routed["plain DiT"]
    for group in ("caching", "sharing", "clips", "text"):
        work = [r["flop"] for r in rows if r["group"] == group]
        assert all(less <= more for more, less in pairwise(work)) and work[-1] < work[0], group
    assert [r["reference"] for r in training] == [None, None, "bf16, batch 4", "bf16, batch 2", None]
    sampled = [r for r in rows if r["group"] == "sampling"]
    assert [round(r["images"], 3) for r in sampled] == [0.016, 0.08, 0.2] * 2 + [0.04, 0.08], "shares of a trajectory"
    assert sampled[-1]["name"] == "DDIM-50, 2 guided images, diffusers, bf16" and sampled[-1]["error"] < 0.1
    assert all(0 < share < 1 for share in document["sampling"].values()) and len(document["sampling"]) == 2
    evaluated = [r["seconds"] for r in rows if r["group"] == "evaluator"]
    assert document["evaluator_seconds"] == pytest.approx(evaluated[0] / 4 * (40 + 60) + sum(evaluated[1:]))
    assert document["skipped"] == [] and document["gpu_tests"].startswith("not run")
    predicted = [entry["group"] for entry in document["predictions"]]
    assert predicted == ["peak"] * 2 + ["training"] * 2 + ["forward"] * 2 + ["sampling"] * 4
    assert "measured / predicted" in (tmp_path / "smoke.md").read_text()
    assert (tmp_path / "smoke.md").read_text().strip() == capsys.readouterr().out.strip()


def test_gpu_report_names_what_it_had_no_time_for(gpu_report: ModuleType, tmp_path: Path) -> None:
    argv = ["--smoke", "--seconds", "1e-9", "--output-dir", str(tmp_path)]
    assert run(gpu_report.main, "gpu_report.py", argv) == 0
    document = json.loads((tmp_path / "smoke.json").read_text())
    assert document["rows"] == []
    assert len(document["skipped"]) == 10 + 5 + 3 + 2 + 1 + 1 and all(
        "the time is up" in word for word in document["skipped"]
    )


def test_gpu_report_goes_on_after_a_measurement_that_failed(
    gpu_report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> list[Case]:
        raise torch.cuda.OutOfMemoryError("no")

    def broken() -> list[Case]:
        return [gpu_report.Case("c", lambda: 1 / 0, lambda state: state)]

    lost = [gpu_report.Case("b", lambda: 0, lambda state: state, reference="a")]
    expected = [gpu_report.Measurement("training", make, 1) for make in (too_large, broken, lambda: lost)]
    results = list(gpu_report.measure_all(iter(expected), torch.device("cpu"), no_time, float("inf")))
    rows, skipped = (sum(parts, []) for parts in zip(*results, strict=True))
    reason = "training (measurement 2): ZeroDivisionError: division by zero"
    assert skipped == ["training (measurement 1): out of memory", reason]
    assert "Traceback" in capsys.readouterr().err, "of what nobody expected"
    assert [(r.name, r.reference, r.error) for r in rows] == [("b", None, None)]


def test_gpu_report_s_file_is_named_after_device_and_day(gpu_report: ModuleType) -> None:
    assert gpu_report.file_stem("NVIDIA H200 (MIG 1g)", datetime.date(2026, 5, 1)) == "nvidia-h200-mig-1g-2026-05-01"
