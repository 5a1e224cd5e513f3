"""Order, bounds and errors of work behind the main thread."""

import threading

import pytest
import torch

from runtime.background import Background

CPU = torch.device("cpu")


def test_work_is_done_in_order_beside_the_main_thread() -> None:
    done: list[tuple[int, str]] = []
    with Background(CPU) as behind:
        for i in range(20):
            behind.submit(lambda i=i: done.append((i, threading.current_thread().name)))
    assert [i for i, _ in done] == list(range(20))
    assert {name for _, name in done} == {"background_0"}


def test_the_main_thread_goes_on_and_waits_at_the_bound() -> None:
    release, started, handed_over = threading.Event(), threading.Event(), []

    def wait() -> None:
        started.set()
        assert release.wait(10)

    def hand_over() -> None:
        with Background(CPU, depth=2) as behind:
            for i in range(3):
                behind.submit(wait)
                handed_over.append(i)

    main = threading.Thread(target=hand_over)
    main.start()
    assert started.wait(10)
    main.join(0.05)
    assert handed_over == [0, 1] and main.is_alive()  # the third waits for the first
    release.set()
    main.join(10)
    assert handed_over == [0, 1, 2]


def test_an_error_is_raised_at_the_next_piece_or_at_the_end() -> None:
    done: list[int] = []
    with pytest.raises(ZeroDivisionError), Background(CPU, depth=1) as behind:
        behind.submit(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        behind.submit(lambda: done.append(1))
        raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError), Background(CPU) as behind:
        behind.submit(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert done == []


def test_an_error_of_the_main_thread_leaves_at_once() -> None:
    release, done = threading.Event(), []
    with pytest.raises(KeyError), Background(CPU, depth=3) as behind:
        behind.submit(lambda: release.wait(10))  # type: ignore[arg-type,return-value]
        behind.submit(lambda: done.append(1))
        behind.submit(lambda: done.append(2))
        threading.Timer(0.05, release.set).start()
        raise KeyError
    assert done == []


@pytest.mark.gpu
def test_work_on_a_gpu_sees_what_was_computed_before_it() -> None:
    device, sums = torch.device("cuda"), []
    with Background(device) as behind:
        for i in range(20):
            x = torch.full((1000, 1000), float(i), device=device)
            for _ in range(20):
                x = x @ torch.eye(1000, device=device)
            behind.submit(lambda x=x: sums.append(float(x.mean())))
    assert sums == [float(i) for i in range(20)]
