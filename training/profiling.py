"""Profile of some early steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.profiler import profile

PROFILE_FROM, PROFILE_STEPS = 10, 5  # after the steps in which kernels are chosen and memory is allocated
PROFILE_ROWS = 25


@contextmanager
def trace_steps(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Trace steps 10 to 14 of the block for chrome://tracing or Perfetto; the caller marks the end of each step.

    Args:
        folder: Gets trace.json and operations.txt once those steps are over; None traces nothing.

    Yields:
        A function to call at the end of every step.
    """
    if folder is None:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    folder.mkdir(parents=True, exist_ok=True)
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, order = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"

    def write(tracer: profile) -> None:
        tracer.export_chrome_trace(str(folder / "trace.json"))
        (folder / "operations.txt").write_text(
            tracer.key_averages().table(sort_by=order, row_limit=PROFILE_ROWS) + "\n"
        )

    steps = schedule(wait=PROFILE_FROM - 1, warmup=1, active=PROFILE_STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as tracer:
        yield tracer.step
