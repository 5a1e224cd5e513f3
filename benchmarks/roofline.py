"""Predicted times on a GPU: of the launches of a traced evaluation, next to those that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from benchmarks.cases import blank_conditioning
from benchmarks.fake_cuda import CudaTrace, Kernel, fake_cuda, trace
from benchmarks.report import aligned
from benchmarks.timing import Row
from models import create_model
from models.acceleration import AutocastNetwork, cast_weights_once
from runtime.settings import Values

LAUNCH, SHORTEST = 6e-6, 2e-6  # seconds of the host for a launch, of a device for the smallest kernel
# Float32 numbers of a parameter that a step's update reads and writes: AdamW 7, average 3, norm of the gradient 1
UPDATE = 11


class Device(NamedTuple):
    """A GPU's rates.

    Attributes:
        low: FLOP/s of a large matrix product in bf16, as measured on an H200.
        full: The same in float32, without TF32.
        bandwidth: Bytes/s, nine tenths of the data sheet's.
    """

    low: float
    full: float
    bandwidth: float


DEVICES = {"H100": Device(774e12, 51e12, 0.9 * 3.35e12), "H200": Device(774e12, 51e12, 0.9 * 4.8e12)}


def device_of(name: str) -> tuple[str, Device] | None:
    """Find a GPU by the word that its full name holds, such as "H200" of "NVIDIA H200"."""
    return next(((word, device) for word, device in DEVICES.items() if word in name), None)


def seconds(kernel: Kernel, device: Device) -> float:
    """Predict a launch's time on a device."""
    rate = device.full if kernel.dtype == torch.float32 else device.low
    return max(2 * kernel.macs / rate, kernel.bytes / device.bandwidth, SHORTEST)


def traced(model: str, rows: int, *, training: bool, precision: str = "bf16", cast_once: bool = True) -> CudaTrace:
    """Trace one evaluation, with its backward pass in training.

    Args:
        model: Name in the registry.
        rows: Of the evaluation.
        training: Weights are trained, and gradients computed.
        precision: "bf16" or "fp32".
        cast_once: Cast weights to bf16 before, as for sampling; those that are trained are cast in every evaluation.
    """
    with fake_cuda() as device:
        with device:
            network = create_model(model).requires_grad_(training).train(training)
        x, t = torch.empty(rows, *network.sample_shape, device=device), torch.empty(rows, device=device)
        conditioning = blank_conditioning(network, rows)
        evaluate = network if precision == "fp32" else AutocastNetwork(network, device, torch.bfloat16)
        if training:
            return trace(lambda: evaluate(x, t, **conditioning).sample.square().mean().backward())
        with torch.no_grad():
            if cast_once and precision == "bf16":
                cast_weights_once(network, torch.bfloat16, lambda: evaluate(x, t, **conditioning))
            return trace(lambda: evaluate(x, t, **conditioning))


# ----------------------------------------------------------------------------------------------------------------------
# Next to measured times


@cache
def _launches(model: str, rows: int, training: bool, precision: str, cast_once: bool) -> Sequence[Kernel]:
    return traced(model, rows, training=training, precision=precision, cast_once=cast_once).kernels


@cache
def _parameters(model: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(model).parameters())


def predict(row: Row, model: str, device: Device) -> float | None:
    """Predict the seconds of a case, not compiled; None where it does not say what it evaluates.

    Args:
        row: Its result.
        model: Name of its network.
        device: Rates of the GPU.
    """
    if row.is_peak:
        return row.flop / (device.full if row.precision == "fp32" else device.low)
    if row.work is None:
        return None
    kind, rows, times, graphs = row.work
    kernels = _launches(model, rows, kind == "training", row.precision, kind == "sampling")
    busy = sum(seconds(kernel, device) for kernel in kernels)
    if kind == "training":
        busy += 4 * UPDATE * _parameters(model) / device.bandwidth
    return times * max(busy, 0 if graphs else LAUNCH * len(kernels))


def predictions(rows: Iterable[Row], model: str, name: str) -> list[Values]:
    """Put predicted next to measured seconds, of all cases that have both.

    Args:
        rows: Results.
        model: Name of the network.
        name: Of the GPU; there are none for those of unknown rates.
    """
    if (found := device_of(name)) is None:
        return []
    word, device = found
    both = ((row, predict(row, model, device)) for row in rows)
    return [
        {"group": row.group, "name": row.name, "seconds": row.seconds, "predicted_seconds": value, "device": word}
        for row, value in both
        if value is not None
    ]


def predictions_table(predicted: Sequence[Values]) -> str:
    """The predictions as a Markdown table; nothing if there are none."""
    if not predicted:
        return ""
    rows = []
    for entry in predicted:
        measured, value = entry["seconds"], entry["predicted_seconds"]
        times = [f"{1e3 * measured:,.2f}", f"{1e3 * value:,.2f}", f"{measured / value:.2f}"]
        rows.append([entry["group"], entry["name"], *times])
    titles = ["group", "case", "measured: ms", f"predicted for {predicted[0]['device']}: ms", "measured / predicted"]
    return aligned(titles, rows, left=2)
