"""Work that runs behind the main one: in one thread, in order, on a GPU in a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import Self

import torch


class Background:
    """Takes work that follows on what the main thread has computed, so that the main thread can go on.

    A context: leaving it waits for everything that was handed over, and an error of the work is raised where the next
    piece is handed over, or there.

    Args:
        device: where the work computes. On CUDA it starts when the GPU has done what was asked of it before the work
            was handed over, and runs beside what is asked of it afterwards.
        depth: pieces that may wait or run; handing over another one waits, so that memory stays bounded.
    """

    def __init__(self, device: torch.device, depth: int = 2) -> None:
        self._device, self._depth = device, depth
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._pending: deque[Future[None]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        """Hands over a piece. What it refers to lives until it is done, on the GPU too if it ends by reading a result.

        Raises:
            Exception: what an earlier piece raised; this one is not begun then.
        """
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

        def run() -> None:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                if self._stream is not None and ready is not None:
                    self._stream.wait_event(ready)
                work()

        self._pending.append(self._thread.submit(run))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # do not begin what nobody waits for
            self._thread.shutdown(cancel_futures=True)
            return
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)
