"""The comparison of two versions: order, ratios and interval, and the work of this version."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import versions
from benchmarks.versions import PARTS, parts, summarise, table, time_part
from runtime.errors import run
from scripts import benchmark


def recorded(name: str, seconds: float, calls: list[str]) -> Callable[[str, int], float]:
    def work(part: str, runs: int) -> float:
        calls.append(f"{name}{runs}")
        return seconds * runs

    return work


def test_rounds_are_a_b_b_a_and_ratios_are_those_of_a_round() -> None:
    calls: list[str] = []
    timed = time_part("sampling step", recorded("a", 0.1, calls), recorded("b", 0.2, calls))
    assert calls == ["b3", "a3"] + ["a3", "b3", "b3", "a3"]  # 0.3 s a piece
    steps = PARTS["sampling step"]
    assert timed == pytest.approx((0.1 / steps, 0.2 / steps))
    assert summarise("sampling step", [timed, timed]).speedups == pytest.approx([2.0, 2.0])


def test_the_interval_is_student_s() -> None:
    actual = summarise("forward", [(1.0, 0.9), (1.0, 1.1)] * 7 + [(2.0, 2.0)])
    half = 2.145 * (0.14 / 14) ** 0.5 / 15**0.5
    assert actual.speedup == pytest.approx(1) and actual.interval == pytest.approx((1 - half, 1 + half))
    assert (actual.seconds, actual.seconds_before) == (1.0, 1.1)
    assert "1.000 x" in table([actual]) and f"{1 - half:.3f} to {1 + half:.3f}" in table([actual])


def test_every_part_runs_in_this_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work = parts("DiT-digits/2", 2)
    assert work.keys() == PARTS.keys()
    for part in work.values():
        for _ in range(2):
            part()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "--against-version old: no train.py there; give a checkout of this project"),
        (["train.py", "torch.py"], "old fails at the forward: ZeroDivisionError: division by zero"),
    ],
)
def test_a_version_that_cannot_be_run_is_one_line(
    files: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(versions, "ROOT", tmp_path / "old")
    (tmp_path / "old" / "runtime").mkdir(parents=True)
    (tmp_path / "old" / "runtime" / "errors.py").write_text("class UserError(Exception): pass")
    for name in files:
        (tmp_path / "old" / name).write_text("1 / 0")
    assert run(benchmark.main, "benchmark.py", ["--against-version", "old"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_this_version_is_as_fast_as_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "SECONDS", 0.05)
    monkeypatch.setattr(versions, "ROUNDS", 2)
    argv = ["--model", "DiT-digits/2", "--batch-size", "2", "--against-version", str(versions.ROOT)]
    assert run(benchmark.main, "benchmark.py", argv) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == len(PARTS) and all(0.5 < float(line.split("|")[4].split()[0]) < 2 for line in lines)
