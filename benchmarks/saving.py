"""Measure how long saving a checkpoint stops training, against a copy of the same bytes into a ready buffer.

    python -m benchmarks.saving [--model DiT-B/2] [--folder /tmp]

Weights, average and two moments of a model are saved, in turn by the trainer's way and by `save_checkpoint`, which
returns when the file is whole, as version 0.1 did. Times are wall time, the median of five saves after the first,
which allocates the copy. The file has been written before the next save, so that nothing waits for the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.timing import wall_seconds
from models import create_model
from runtime.checkpoint import save_checkpoint
from runtime.saver import BackgroundSaver, State

ROUNDS = 5


def measure(model: str, folder: Path) -> dict[str, float]:
    """Median seconds of a copy, of the pause of a save, of a whole save, and of the first pause; the bytes."""
    weights = create_model(model).state_dict()
    groups = {name: {k: v.clone() for k, v in weights.items()} for name in ("model", "ema", "moment1", "moment2")}
    tensors = [tensor for group in groups.values() for tensor in group.values()]
    ready = [tensor.clone() for tensor in tensors]
    saver = BackgroundSaver(folder, lambda path, step: None)
    times: dict[str, list[float]] = {"copy": [], "pause": [], "whole save": []}
    for _ in range(ROUNDS + 1):
        times["copy"].append(wall_seconds(lambda: [a.copy_(b) for a, b in zip(ready, tensors, strict=True)]))
        times["pause"].append(wall_seconds(lambda: saver.save(State(1, groups, {}))))
        saver.wait()
        times["whole save"].append(wall_seconds(lambda: save_checkpoint(folder / "0000002.safetensors", groups, {})))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {**medians, "first pause": times["pause"][0], "bytes": float(sum(t.nbytes for t in tensors))}


def main() -> None:
    """Print the times and their ratios to the copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-B/2")
    parser.add_argument("--folder", type=Path, help="where files are written, and deleted (default: temporary files)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.model, Path(folder))
    print(f"{args.model}: {result.pop('bytes') / 1e9:.2f} GB")
    for name, value in result.items():
        print(f"{name:<12}{value:>9.3f} s{value / result['copy']:>8.2f} x copy")


if __name__ == "__main__":
    main()
