"""Work in a background thread, in order; on a GPU in a separate stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import Self

import torch


class Background:
    """A worker thread for tasks that use results of the main thread.

    A context manager: its exit waits for all tasks. An error of a task is raised by the next `submit`, or at the exit.

    Args:
        device: Device of the tasks. On CUDA a task starts when all operations that were queued before its `submit`
            have finished, and runs concurrently with later ones.
        depth: Largest number of unfinished tasks; a further `submit` waits, so that memory is bounded.
    """

    def __init__(self, device: torch.device, depth: int = 2) -> None:
        self._device, self._depth = device, depth
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._pending: deque[Future[None]] = deque()

    def submit(self, task: Callable[[], None]) -> None:
        """Queue a task. It keeps its tensors alive until it ends; on a GPU it must end by reading its result.

        Raises:
            Exception: The error of an earlier task; this one is not started then.
        """
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

        def run() -> None:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                if self._stream is not None and ready is not None:
                    self._stream.wait_event(ready)
                task()

        self._pending.append(self._thread.submit(run))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # tasks that have not started are not needed any more
            self._thread.shutdown(cancel_futures=True)
            return
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)
