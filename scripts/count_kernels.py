"""Count what a CUDA device is asked to do in one evaluation, and predict how long it takes; on any machine.

    python scripts/count_kernels.py                                  # XL/2 of every family, 1 and 32 guided images
    python scripts/count_kernels.py --model DiT-S/2 --rows 8 --kinds

An evaluation in bf16 is traced with tensors that have no values: launches by kind, bytes and MACs. Weights are cast
once, as for sampling; with --training they are trained, autocast casts them, and a backward pass follows. A launch
takes as long as its operations at the rate of a large matrix product, or as its bytes at nine tenths of the data
sheet's bandwidth, and 2 us at least; without CUDA graphs the host needs 6 us for each, and the longer of both counts. A
DyDiT is counted by its masks, and compiled blocks, which have fewer launches, not at all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from benchmarks.fake_cuda import CudaTrace, Kind
from benchmarks.report import aligned
from benchmarks.roofline import DEVICES, LAUNCH, seconds, traced
from runtime.command_line import parse_config
from runtime.errors import error_prefix, run
from runtime.settings import flag_name, setting

FAMILIES = ("DiT-XL/2", "DyDiT-XL/2", "Skip-DiT-XL/2", "DDT-XL/2")


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Settings of count_kernels.py."""

    model: tuple[str, ...] = setting(FAMILIES, "models to count")
    rows: tuple[int, ...] = setting((2, 64), "rows of an evaluation; a guided image is two")
    training: bool = setting(False, "forward and backward pass of training, in which weights are cast every time")
    kinds: bool = setting(False, "also print launches, bytes and predicted time by kind")
    json: bool = setting(False, "print JSON instead of tables")

    def __post_init__(self) -> None:
        for name in ("model", "rows"):
            if not getattr(self, name):
                raise ValueError(f"{flag_name(name)}: give at least one")
        if min(self.rows) < 1:
            raise ValueError(f"--rows {min(self.rows)}: must be at least 1")


def document(model: str, rows: int, recorded: CudaTrace) -> dict[str, object]:
    """Describe an evaluation: launches by kind, bytes, MACs, and predicted milliseconds by device."""
    kernels = recorded.kernels
    busy = {name: sum(seconds(kernel, device) for kernel in kernels) for name, device in DEVICES.items()}
    return {
        "model": model,
        "rows": rows,
        "launches": len(kernels),
        "kinds": {
            kind: {
                "launches": len(some),
                "bytes": sum(kernel.bytes for kernel in some),
                "H200_ms": 1e3 * sum(seconds(kernel, DEVICES["H200"]) for kernel in some),
            }
            for kind in get_args(Kind)
            if (some := [kernel for kernel in kernels if kernel.kind == kind])
        },
        "bytes": sum(kernel.bytes for kernel in kernels),
        "macs": sum(kernel.macs for kernel in kernels),
        "host_ms": 1e3 * LAUNCH * len(kernels),
        "device_ms": {name: 1e3 * value for name, value in busy.items()},
        "waits": recorded.faults,
    }


def tables(documents: Sequence[dict[str, object]], kinds: bool) -> str:
    """Lay results out as Markdown: a row an evaluation, and on request one a kind."""
    rows, parts = [], []
    for entry in documents:
        host, busy, named = entry["host_ms"], entry["device_ms"], [str(entry["model"]), str(entry["rows"])]
        assert isinstance(host, float) and isinstance(busy, dict) and isinstance(entry["kinds"], dict)
        work = [f"{entry['launches']:,}", f"{entry['bytes'] / 1e9:.2f}", f"{entry['macs'] / 1e12:.3f}"]  # type: ignore[operator]
        times = [text for own in busy.values() for text in (f"{own:.2f}", f"{max(own, host):.2f}")]
        rows.append([*named, *work, *times])
        for kind, part in entry["kinds"].items():
            parts.append(
                [*named, kind, f"{part['launches']:,}", f"{part['bytes'] / 1e9:.2f}", f"{part['H200_ms']:.2f}"]
            )
    titles = [f"{name}, {how}: ms" for name in DEVICES for how in ("graphs", "launched")]
    printed = [aligned(["model", "rows", "launches", "GB", "TMAC", *titles], rows)]
    if kinds:
        printed.append(aligned(["model", "rows", "kind", "launches", "GB", "H200: ms"], parts, left=3))
    return "\n\n".join(printed)


def main(argv: Sequence[str]) -> None:
    """Parse flags, trace, print."""
    config = parse_config(KernelSettings, argv, program="count_kernels.py", doc=__doc__)
    documents = []
    for model in config.model:
        for rows in config.rows:
            with error_prefix(f"--model {model}"):
                documents.append(document(model, rows, traced(model, rows, training=config.training)))
    print(json.dumps(documents, indent=2) if config.json else tables(documents, config.kinds))


if __name__ == "__main__":
    sys.exit(run(main, "count_kernels.py"))
