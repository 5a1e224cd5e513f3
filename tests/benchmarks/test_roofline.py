"""Predicted times of launches, and beside measured ones."""

import pytest
import torch

from benchmarks.fake_cuda import Kernel
from benchmarks.roofline import DEVICES, LAUNCH, SHORTEST, predictions, predictions_table, seconds, traced
from benchmarks.timing import Row, Work

MODEL = "DiT-debug/2"


def test_a_launch_is_bound_by_its_work_its_bytes_or_the_least_time() -> None:
    kernel, device = Kernel("mm", "matrix product", 387 * 10**9, 1, torch.bfloat16), DEVICES["H200"]
    assert seconds(kernel, device) == pytest.approx(1e-3)
    assert seconds(kernel._replace(macs=0, bytes=432 * 10**7), device) == pytest.approx(1e-3)
    assert seconds(kernel._replace(macs=0), device) == SHORTEST


def measured(name: str, work: Work | None, precision: str = "bf16", **options: object) -> Row:
    """A stand-in of a measurement that took a second."""
    fields = {"flop": 0.0, "images": 0, "is_peak": False, "reference": None, "error": None, **options}
    return Row(group="g", name=name, seconds=1.0, rounds=[1.0], precision=precision, work=work, **fields)


def test_measured_times_are_beside_predicted_ones() -> None:
    rows = [
        measured("product", None, flop=774e12, is_peak=True),
        measured("product in float32", None, "fp32", flop=774e12, is_peak=True),
        measured("loader", None),
        measured("forward", Work("forward", 4, 1)),
        measured("float32", Work("forward", 4, 1), "fp32"),
        measured("sampling", Work("sampling", 4, 3)),
        measured("sampling, graphs", Work("sampling", 4, 3, graphs=True)),
        measured("training", Work("training", 4, 2)),
    ]
    both = {entry["name"]: entry["predicted_seconds"] for entry in predictions(rows, MODEL, "NVIDIA H200")}
    assert list(both) == [row.name for row in rows if row.name != "loader"]
    assert both["product"] == pytest.approx(1) and both["product in float32"] == pytest.approx(774 / 51)
    launches = len(traced(MODEL, 4, training=False).kernels)
    assert both["sampling"] == pytest.approx(3 * LAUNCH * launches), "so small a network waits for its host"
    assert 2.99 * SHORTEST * launches < both["sampling, graphs"] < both["sampling"]
    assert both["float32"] < both["forward"], "without casts"
    assert both["sampling"] / 3 < both["forward"] < both["training"] / 2 / 2, "weights cast every time; backward"
    table = predictions_table(predictions(rows, MODEL, "NVIDIA H200"))
    assert "predicted for H200: ms" in table and table.count("\n") == 1 + len(both)
    assert table.splitlines()[2].replace("|", " ").split()[-3:] == ["1,000.00", "1,000.00", "1.00"]


def test_a_large_step_is_bound_by_the_device_and_by_its_update() -> None:
    row = measured("training", Work("training", 256, 1))
    (entry,) = predictions([row], "DiT-S/2", "NVIDIA H100 80GB HBM3")
    kernels = traced("DiT-S/2", 256, training=True).kernels
    update = 4 * 11 * 33e6 / DEVICES["H100"].bandwidth
    expected = sum(seconds(kernel, DEVICES["H100"]) for kernel in kernels) + update
    assert entry["device"] == "H100" and entry["predicted_seconds"] == pytest.approx(expected, rel=1e-3)


def test_a_gpu_of_unknown_rates_has_no_predictions() -> None:
    assert predictions([measured("forward", Work("forward", 4, 1))], MODEL, "a GPU") == []
    assert predictions_table([]) == ""
