"""Ending a run on purpose: a signal becomes a question that the training loop asks between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from runtime import distributed

# sysexits.h: a temporary failure, try again. The state is saved; the same command goes on.
INTERRUPTED_STATUS = 75


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.received = False

    def by_any_rank(self) -> bool:
        """Whether any process was asked to stop; all must ask together, so that all stop after the same step."""
        return distributed.any_rank(self.received)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGTERM (what schedulers send before they kill) and Ctrl-C into a `StopRequest`, while the block runs.

    A second signal acts at once, as if nobody had listened: a process that waits for a hung peer asks no questions.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.received = True
        signal.signal(number, before[signal.Signals(number)])

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
