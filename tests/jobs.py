"""Sampling jobs that fail on the way."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from runtime.background import Background
from sampling.pipeline import Pipeline


def fail_after(chunks: int, job: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a job of this process that fails once so many chunks are written."""
    denoise, calls = Pipeline.denoise, []

    def failing(self: Pipeline, *args: Any, **options: Any) -> Tensor:
        if len(calls) == chunks:
            raise MemoryError
        calls.append(1)
        return denoise(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Pipeline, "denoise", failing)
        # A failure cancels what waits in the background, so that the chunks that are written would be a race.
        patch.setattr(Background, "submit", lambda self, task: task())
        job()
