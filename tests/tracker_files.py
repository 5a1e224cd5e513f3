"""What trackers of experiments wrote on this machine, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK, HEADER, MAGIC = 1 << 15, 7, 7  # of LevelDB's log format, and of wandb's mark before it
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Tracked(NamedTuple):
    """A run of a tracker.

    Attributes:
        losses: Training step -> loss, in the order in which they were reported, as pairs.
        samples: Steps of grids.
        settings: All settings that were reported.
        runs: Number of runs that the tracker has.
    """

    losses: list[tuple[int, float]]
    samples: list[int]
    settings: dict[str, Any]
    runs: int


def of_tensorboard(folder: Path) -> Tracked:
    """Read the events of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    text = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    rows = (line.strip("| ").split(" | ") for line in text.splitlines()[2:])
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    samples = [event.step for event in events.Images("samples")]
    return Tracked(losses, samples, {row[0]: row[1] if len(row) > 1 else "" for row in rows}, 1)


def of_trackio(project: str) -> Tracked:
    """Read the only run of a project."""
    import trackio

    names = trackio.SQLiteStorage.get_runs(project)
    (name,) = {run["name"] if isinstance(run, dict) else run for run in names}
    logs = trackio.SQLiteStorage.get_logs(project, name)
    losses = [(log["step"], log["loss"]) for log in logs if "loss" in log]
    samples = [log["step"] for log in logs if "samples" in log]
    return Tracked(losses, samples, trackio.SQLiteStorage.get_run_config(project, name) or {}, len(names))


def of_wandb(folder: Path) -> Tracked:
    """Read the files that wandb wrote without a connection, of all starts of a run."""
    losses, samples, settings, ids = [], [], dict[str, Any](), set()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in _records(path.read_bytes()):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                for item in record.run.config.update:
                    settings[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                losses += [(items["step"], items["loss"])] if "loss" in items else []
                samples += [items["step"]] if "samples" in items else []
    return Tracked(losses, samples, settings, len(ids))


def _records(content: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    place, parts = MAGIC, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
