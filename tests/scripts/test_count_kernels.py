"""Launches, bytes and predicted times of evaluations, without a card."""

import json

import pytest

from runtime.errors import run
from scripts.count_kernels import main


def counted(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict]:
    assert run(main, "count_kernels.py", ["--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_launches_do_not_depend_on_rows_and_work_does(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = counted(capsys, "--model", "DiT-debug/2", "--rows", "2", "8")
    assert few["launches"] == many["launches"] and few["host_ms"] == pytest.approx(6e-3 * few["launches"])
    assert many["macs"] == 4 * few["macs"] and few["waits"] == many["waits"] == []
    for entry in (few, many):
        parts = entry["kinds"].values()
        assert [sum(p[key] for p in parts) for key in ("launches", "bytes")] == [entry["launches"], entry["bytes"]]
        assert sum(p["H200_ms"] for p in parts) == pytest.approx(entry["device_ms"]["H200"])
        assert entry["device_ms"]["H200"] <= entry["device_ms"]["H100"]


def test_networks_for_text_and_for_clips_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    clips, texts = counted(capsys, "--model", "Latte-debug/2", "Skip-LatteT2V-debug/2", "--rows", "2")
    assert clips["macs"] > 0 < texts["macs"] and clips["waits"] == texts["waits"] == []


def test_training_casts_weights_at_every_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "DiT-debug/2", "--rows", "2")
    casts = [counted(capsys, *flags, *more)[0]["kinds"]["cast"] for more in ((), ("--training",))]
    assert casts[1]["launches"] > casts[0]["launches"] + 2 * 2 * 4, "weight and bias of each linear map"


def test_training_is_three_times_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients of inputs and of weights; attention's takes five products instead of two, the patches get none."""
    flags = ("--model", "DiT-debug/2", "--rows", "2")
    once, trained = (counted(capsys, *flags, *more)[0] for more in ((), ("--training",)))
    assert 2.95 * once["macs"] < trained["macs"] < 3.05 * once["macs"] and trained["waits"] == []


def test_tables_and_wrong_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "count_kernels.py", ["--model", "DiT-debug/2", "--rows", "2", "--kinds"]) == 0
    printed = capsys.readouterr().out
    assert "H200, graphs: ms" in printed and "| attention" in printed
    for flags, message in ((("--rows", "0"), "--rows 0: must be at least 1"), (("--model", "X"), "--model X: ")):
        assert run(main, "count_kernels.py", list(flags)) == 2
        assert message in capsys.readouterr().err
