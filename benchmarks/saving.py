"""Measure how long saving a checkpoint stops training, and what checksums cost when one is loaded.

    python -m benchmarks.saving [--model DiT-B/2] [--folder /tmp]
    python -m benchmarks.saving --loading --model DiT-XL/2

Saving: weights, average and two moments of a model are saved, in turn by the trainer's two ways (one file, and a folder
to which each process adds its part) and by `save_checkpoint`, which returns when the file is whole, as
version 0.1 did, and compared with a copy of the same bytes into a ready buffer. Times are wall time, the median of five
saves after the first; that one allocates the copy, unless its memory was prepared, as the trainer does it. The file has
been written before the next save, so that nothing waits for the disk.

Loading: `load_network` of files in the page cache, in turn with and without checksums, and the SHA-256 of each file,
which is recorded and compared where a format has no checksums. Times are medians of five after the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks.timing import wall_seconds
from models import create_model, family_of
from models.loading import load_network
from runtime.files import remove
from runtime.groups import save_checkpoint
from runtime.saver import BackgroundSaver, ShardedSaver, State
from runtime.weight_files import weights_sha256
from runtime.zip_checksums import PartChecksums

ROUNDS = 5
Times = tuple[float, float]  # seconds of CPU time and of wall time


def measure(model: str, folder: Path) -> dict[str, float]:
    """Median seconds of a copy, of the pause of a save, of a whole save, and of first pauses; the bytes."""
    weights = create_model(model).state_dict()
    groups = {name: {k: v.clone() for k, v in weights.items()} for name in ("model", "ema", "moment1", "moment2")}
    tensors = [tensor for group in groups.values() for tensor in group.values()]
    ready = [tensor.clone() for tensor in tensors]
    saver, sharded = (kind(folder, lambda path, step: remove(path)) for kind in (BackgroundSaver, ShardedSaver))
    times: dict[str, list[float]] = {"copy": [], "pause": [], "sharded pause": [], "whole save": []}
    for _ in range(ROUNDS + 1):
        times["copy"].append(wall_seconds(lambda: [a.copy_(b) for a, b in zip(ready, tensors, strict=True)]))
        times["pause"].append(wall_seconds(lambda: saver.save(State(1, groups, {}))))
        saver.wait()
        times["sharded pause"].append(wall_seconds(lambda: sharded.save(State(3, groups, {}))))
        sharded.wait()
        times["whole save"].append(wall_seconds(lambda: save_checkpoint(folder / "0000002.safetensors", groups, {})))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    firsts = {"first pause, not prepared": times["pause"][0]}
    prepared = BackgroundSaver(folder, lambda path, step: remove(path))
    prepared.prepare(groups)
    prepared.wait()  # as long as the steps before the first save take
    firsts["first pause"] = wall_seconds(lambda: prepared.save(State(4, groups, {})))
    prepared.wait()
    return {**medians, **firsts, "bytes": float(sum(t.nbytes for t in tensors))}


def print_saving(model: str, folder: Path) -> None:
    """Print the times of saves and their ratios to the copy."""
    result = measure(model, folder)
    print(f"{model}: {result.pop('bytes') / 1e9:.2f} GB")
    for name, value in result.items():
        print(f"{name:<26}{value:>9.3f} s{value / result['copy']:>8.2f} x copy")


def write_files(model: str, folder: Path) -> dict[str, Path]:
    """Write the average of a fresh network in our format, as a zip .pt, and as one next to other weights; by name."""
    network = create_model(model)
    weights, fields = network.state_dict(), dataclasses.asdict(network.config)
    meta = {
        "format": 2,
        "model": {"name": model, **fields},
        "process": {"name": family_of(model).process},
        "encoder": {"name": "none"},
    }
    files = {"ours": folder / "a.safetensors", "zip .pt": folder / "a.pt", "zip .pt, half used": folder / "b.pt"}
    save_checkpoint(files["ours"], {"ema-0.9999": weights}, meta)
    torch.save({"ema": weights}, files["zip .pt"])
    others = {name: tensor.clone() for name, tensor in weights.items()}
    torch.save({"model": others, "ema": weights}, files["zip .pt, half used"])
    return files


def seconds(work: Callable[[], object]) -> Times:
    """CPU time and wall time of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def load_unchecked(path: Path) -> None:
    """Load a network and compare no checksum."""
    with (
        # Functions: a mock would keep the tensors that it was called with
        mock.patch("runtime.tensor_file.checksum", lambda tensor: mock.ANY),  # equal to any recorded one
        mock.patch.object(PartChecksums, "compare", lambda self, tensors: False),
    ):
        load_network(path)


def measure_loading(path: Path) -> dict[str, Times]:
    """Median times of loading a file with and without checksums, and of its SHA-256."""
    works: dict[str, Callable[[], object]] = {
        "checked": lambda: load_network(path),
        "unchecked": lambda: load_unchecked(path),
        "SHA-256": lambda: weights_sha256(path),
    }
    times: dict[str, list[Times]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: _medians(values[1:]) for name, values in times.items()}


def _medians(times: list[Times]) -> Times:
    cpu, wall = zip(*times, strict=True)
    return statistics.median(cpu), statistics.median(wall)


def print_loading(model: str, folder: Path) -> None:
    """Print the times of loading: CPU time, and wall time in brackets."""
    print(f"{model + ', s of CPU time (of wall time)':<44}{'GB':>8}{'checked':>16}{'unchecked':>16}{'SHA-256':>16}")
    for name, path in write_files(model, folder).items():
        columns = "".join(f"{f'{cpu:.2f} ({wall:.2f})':>16}" for cpu, wall in measure_loading(path).values())
        print(f"{name:<44}{path.stat().st_size / 1e9:>8.2f}{columns}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # mapped files included
    print(f"peak memory: {peak / 1e9:.2f} GB")


def main() -> None:
    """Print the times of saving or of loading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-B/2")
    parser.add_argument("--folder", type=Path, help="where files are written, and deleted (default: temporary files)")
    parser.add_argument("--loading", action="store_true", help="measure loading instead of saving")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (print_loading if args.loading else print_saving)(args.model, Path(folder))


if __name__ == "__main__":
    main()
