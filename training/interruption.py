"""Signals that stop a run after a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# sysexits.h: a temporary failure, try again. The state is saved; the same command resumes the run.
INTERRUPTED_STATUS = 75


class StopRequest:
    """A flag that a signal sets."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn what schedulers send before they kill (SIGTERM, SIGUSR1) and Ctrl-C into a `StopRequest` in the block.

    A second signal has its usual effect at once: a process that waits for a hung rank reads no flag.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.received = True
        signal.signal(number, before[signal.Signals(number)])

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
