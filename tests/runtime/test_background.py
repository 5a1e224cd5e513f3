"""Order, bounds and errors of tasks in a background thread."""

import threading

import pytest
import torch

from runtime.background import Background

CPU = torch.device("cpu")


def test_tasks_run_in_order_in_one_other_thread() -> None:
    done: list[tuple[int, str]] = []
    with Background(CPU) as background:
        for i in range(20):
            background.submit(lambda i=i: done.append((i, threading.current_thread().name)))
    assert [i for i, _ in done] == list(range(20))
    assert {name for _, name in done} == {"background_0"}


def test_submit_returns_at_once_and_waits_at_the_bound() -> None:
    release, started, submitted = threading.Event(), threading.Event(), []

    def wait() -> None:
        started.set()
        assert release.wait(10)

    def submit_three() -> None:
        with Background(CPU, depth=2) as background:
            for i in range(3):
                background.submit(wait)
                submitted.append(i)

    main = threading.Thread(target=submit_three)
    main.start()
    assert started.wait(10)
    main.join(0.05)
    assert submitted == [0, 1] and main.is_alive()  # the third waits for the first
    release.set()
    main.join(10)
    assert submitted == [0, 1, 2]


def test_an_error_is_raised_by_the_next_submit_or_at_the_exit() -> None:
    done: list[int] = []
    with pytest.raises(ZeroDivisionError), Background(CPU, depth=1) as background:
        background.submit(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        background.submit(lambda: done.append(1))
        raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError), Background(CPU) as background:
        background.submit(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert done == []


def test_an_error_of_the_main_thread_cancels_tasks() -> None:
    release, done = threading.Event(), []
    with pytest.raises(KeyError), Background(CPU, depth=3) as background:
        background.submit(lambda: release.wait(10))  # type: ignore[arg-type,return-value]
        background.submit(lambda: done.append(1))
        background.submit(lambda: done.append(2))
        threading.Timer(0.05, release.set).start()
        raise KeyError
    assert done == []


@pytest.mark.gpu
def test_a_task_on_a_gpu_reads_what_was_computed_before_it() -> None:
    device, sums = torch.device("cuda"), []
    with Background(device) as background:
        for i in range(20):
            x = torch.full((1000, 1000), float(i), device=device)
            for _ in range(20):
                x = x @ torch.eye(1000, device=device)
            background.submit(lambda x=x: sums.append(float(x.mean())))
    assert sums == [float(i) for i in range(20)]
