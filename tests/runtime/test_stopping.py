import os
import signal

import pytest
from runtime.stopping import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_is_a_question_and_a_second_one_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with stop_on_signal() as request:
            assert not request.by_any_rank()
            os.kill(os.getpid(), number)
            assert request.by_any_rank() and acted == []
            os.kill(os.getpid(), number)
            assert acted == [number]
        os.kill(os.getpid(), number)
        assert acted == [number, number], "the old handler is back"
    finally:
        signal.signal(number, before)
