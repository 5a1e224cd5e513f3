"""A trace of a few steps, for chrome://tracing or Perfetto, and the table of what took the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FIRST_STEP, STEPS = 10, 5  # behind the steps in which kernels are chosen and memory is found
ROWS = 25


@contextmanager
def trace_steps(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Traces steps 10 to 14 of the block; the caller says when each one ends.

    Args:
        folder: gets trace.json and operations.txt once those steps are over; None traces nothing.

    Yields:
        What to call at the end of every step.
    """
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, order = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"

    def write(tracer: profile) -> None:
        tracer.export_chrome_trace(str(folder / "trace.json"))
        (folder / "operations.txt").write_text(tracer.key_averages().table(sort_by=order, row_limit=ROWS) + "\n")

    steps = schedule(wait=FIRST_STEP - 1, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as tracer:
        yield tracer.step
