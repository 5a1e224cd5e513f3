"""Results as JSON and as tables, with the machine they were measured on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import Row
from runtime.devices import cpu_fields
from runtime.documents import to_dict
from runtime.files import atomic_path
from runtime.settings import Values

DATASHEET = {"H100": 989.4e12, "H200": 989.4e12}  # dense bf16 FLOP/s, by a word of the device's name
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def peaks(rows: Iterable[Row]) -> dict[str, float]:
    """FLOP/s of the fastest matrix product, by precision."""
    best: dict[str, float] = {}
    for row in rows:
        if row.is_peak:
            best[row.precision] = max(best.get(row.precision, 0.0), row.flop / min(row.rounds))
    return best


def datasheet_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the data sheet, if known."""
    return next((flops for word, flops in DATASHEET.items() if word in device_name), None)


def cpu_info() -> tuple[str, list[str]]:
    """Model of the processor, and those of `CPU_FEATURES` that it has."""
    fields = cpu_fields()
    if not fields:
        return platform.processor() or platform.machine(), []
    flags = fields.get("flags", "").split()
    return fields.get("model name", platform.machine()), [name for name in CPU_FEATURES if name in flags]


def commit() -> str | None:
    """The checkout's commit, with "+" if tracked files were changed; None without git or a checkout."""
    git = ("git", "-C", str(Path(__file__).resolve().parent))
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        revision, changed = run([*git, "rev-parse", "--short=12", "HEAD"]), run([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine_info(device: torch.device, clock: str) -> Values:
    """Describe the machine, for readers of the numbers."""
    cpu, features = cpu_info()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cpu_features": features,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": commit(),
    }


def document(settings: object, machine: Values, rows: Sequence[object], **more: object) -> Values:
    """Build the JSON document of a run.

    Args:
        settings: Dataclass of the script's settings, or values. Paths of the user are left out.
        machine: From `machine_info`.
        rows: Results, dataclasses or values.
        **more: Further members.
    """
    values = settings if isinstance(settings, dict) else to_dict(settings)
    values = {
        name: None if isinstance(getattr(settings, name, None), Path) else value for name, value in values.items()
    }
    results = [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in rows]  # type: ignore[arg-type]
    return {"format": 2, "settings": values, "machine": machine, "rows": results, **more}


def report(settings: object, machine: Values, rows: Sequence[Row], skipped: Sequence[str]) -> Values:
    """Build the JSON document of timed cases: rows, rates, and shares of the peaks."""
    best = peaks(rows)
    datasheet = datasheet_peak(machine["device"])
    seconds = {(row.group, row.name): row.seconds for row in rows}
    rounds = {(row.group, row.name): row.rounds for row in rows}
    results = []
    for row in rows:
        rate, peak = row.flop / row.seconds, best.get(row.precision)
        before = seconds.get((row.group, row.reference)) if row.reference else None
        results.append(
            dataclasses.asdict(row)
            | {
                "flop_per_second": rate or None,
                "peak_fraction": rate / peak if rate and peak else None,
                "datasheet_fraction": rate / datasheet if rate and datasheet and row.precision == "bf16" else None,
                "images_per_second": row.images / row.seconds or None,
                "seconds_per_step": row.seconds / row.steps if row.steps else None,
                "speedup": before / row.seconds if before else None,
                "speedup_interval": interval(rounds[row.group, row.reference], row.rounds)
                if row.reference and before
                else None,
            }
        )
    known = {**best, "bf16_datasheet": datasheet}
    return document(settings, machine, results, peak_flop_per_second=known, skipped=list(skipped))


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95 % interval of the mean speed-up of rounds in turn, by Student's t; None below five rounds."""
    if len(before) != len(after) or len(after) < 5:
        return None
    from scipy.stats import t  # heavy; only comparisons need it

    ratios = [old / new for old, new in zip(before, after, strict=True)]
    quantile = float(t.ppf(0.975, len(ratios) - 1))
    mean, half = statistics.mean(ratios), quantile * statistics.stdev(ratios) / len(ratios) ** 0.5
    return mean - half, mean + half


def markdown(document: Values) -> str:
    """The results as a Markdown table, a row a case; columns without any number are left out."""
    columns: dict[str, Callable[[Values], str]] = {
        "ms": lambda r: f"{r['seconds'] * 1e3:,.2f}",
        "spread": lambda r: f"{spread(r['rounds'], r['seconds']):.0%}",
        "us/step": lambda r: _shown(r["seconds_per_step"], "{:,.1f}", 1e6),
        "images/s": lambda r: _shown(r["images_per_second"], "{:,.1f}"),
        "GFLOP/s": lambda r: _shown(r["flop_per_second"], "{:,.0f}", 1e-9),
        "of GEMM peak": lambda r: _shown(r["peak_fraction"], "{:.0%}"),
        "of datasheet": lambda r: _shown(r["datasheet_fraction"], "{:.1%}"),
        "peak GB": lambda r: _shown(r["memory"], "{:.1f}", 1e-9),
        "predicted": lambda r: _shown(r["predicted_memory"], "{:.1f}", 1e-9),
        "speed-up": lambda r: _shown(r["speedup"], "{:.2f} x"),
        "95 %": lambda r: "{:.3f} to {:.3f}".format(*r["speedup_interval"]) if r["speedup_interval"] else "",
        "error": lambda r: _shown(r["error"], "{:.0e}"),
    }
    rows = document["rows"]
    cells = {title: [text(row) for row in rows] for title, text in columns.items()}
    cells = {title: texts for title, texts in cells.items() if any(texts)}
    named = {"group": [r["group"] for r in rows], "case": [r["name"] for r in rows], **cells}
    lines = aligned(list(named), list(map(list, zip(*named.values(), strict=True))), left=2)
    return "\n".join([lines, *(f"\nNot run: {reason}" for reason in document["skipped"])])


def spread(rounds: Sequence[float], median: float) -> float:
    """Distance of the slowest from the fastest round, relative to the median."""
    return (max(rounds) - min(rounds)) / median


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that is aligned as text, too: the first `left` columns to the left, numbers to the right."""
    widths = [max(2, *map(len, column)) for column in zip(titles, *rows, strict=True)]
    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    pads = [str.ljust if place < left else str.rjust for place in range(len(widths))]
    lines = [map(lambda pad, text, width: pad(text, width), pads, line, widths) for line in (titles, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def headline(document: Values) -> str:
    """One line on the machine, and one on its peaks if they were measured."""
    machine, best = document["machine"], document.get("peak_flop_per_second", {})
    features = f" ({', '.join(machine['cpu_features'])})" if machine["cpu_features"] else ""
    where = machine["device"] if machine["cuda"] else machine["cpu"] + features
    line = f"{where}, {machine['threads']} CPU thread(s), torch {machine['torch']}, {machine['clock']}"
    known = [f"{name.replace('_', ' ')} {value / 1e9:,.0f}" for name, value in best.items() if value]
    return f"{line}\nPeak in GFLOP/s: {', '.join(known)}" if known else line


def file_stem(device_name: str, date: datetime.date) -> str:
    """Return the name of the results: "NVIDIA H200", 1 May -> "nvidia-h200-2026-05-01"."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}-{date.isoformat()}"


def write_tables(folder: Path, name: str, document: Values, text: str) -> None:
    """Write NAME.json and NAME.md in a folder, each whole or not at all."""
    write_json(document, folder / f"{name}.json")
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text(text + "\n")


def write_json(document: Values, path: Path | None) -> None:
    """Write a document, whole or not at all; with None, nothing."""
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n")
