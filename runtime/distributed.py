"""Distributed processes, which torchrun starts: rank, size, device, and collective operations."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.devices import choose_device
from runtime.errors import RankError, RankTimeout, UserError
from runtime.launch import Launch, read_launch

T = TypeVar("T")
TIMEOUT = timedelta(seconds=10)  # of waiting for ranks that leave, too


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: Its number, 0 .. size - 1.
        size: Number of processes.
        device: Its device.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and messages."""
        return self.rank == 0


PRECISIONS = ("fp32", "tf32", "bf16")  # of a network's matrix products


@contextmanager
def world(device: str | None = None, timeout_seconds: float = 1800) -> Iterator[World]:
    """Join the process group that torchrun announces (NCCL on CUDA, gloo on CPU), and leave it at the end.

    Args:
        device: "cuda", "mps", "cpu", or None for CUDA if there is one.
        timeout_seconds: Timeout of collective operations.

    Raises:
        UserError: If the device is absent, or several processes cannot use it.
        RankError: For wrong variables of the launcher.
        RankTimeout: If the other processes cannot be reached.
    """
    launch, place = read_launch(), choose_device(device)
    _, size, _ = launch
    kind = place.type
    if kind == "cuda":
        place = choose_gpu(launch)
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    if kind == "mps":
        raise UserError(f"--device mps: for one process, not for WORLD_SIZE={size}; use --device cpu for several")
    timeout = timedelta(seconds=timeout_seconds)
    store, rank = _join(timeout)
    if kind == "cuda":
        check_gpus(store, rank, size, str(torch.cuda.get_device_properties(place).uuid), timeout)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=place if kind == "cuda" else None,
    )
    try:
        yield World(dist.get_rank(), size, place)
        _leave_together()
    except SystemExit:  # on all ranks at the same step
        _leave_together()
        raise
    except UserError as error:  # mostly on all ranks; torchrun kills those that are later than the first
        if isinstance(error, RankError):
            error.is_repeated = _is_repeated(store, error)
        _wait_for_ranks(store, rank, size)
        raise
    except RuntimeError as error:
        if any(word in str(error).lower() for word in ("timed out", "timeout", "closed by peer", "reset by peer")):
            reason = str(error).splitlines()[0]
            raise RankTimeout(
                f"rank {dist.get_rank()}: another rank hangs or is gone (--dist-timeout): {reason}"
            ) from error
        raise
    finally:
        _host_group.cache_clear()
        dist.destroy_process_group()


def choose_gpu(launch: Launch) -> torch.device:
    """The GPU of this process.

    Raises:
        RankError: If this machine has none of that number, or several processes have no numbers.
    """
    number, count = launch.local_rank, torch.cuda.device_count()
    if number is None and launch.size > 1:
        raise RankError("LOCAL_RANK: not set, so processes would share a GPU; start them with torchrun")
    if number is not None and number >= count:
        raise RankError(
            f"LOCAL_RANK={number}: this machine has {count} CUDA device{'' if count == 1 else 's'}; start one process "
            "for each (torchrun --nproc-per-node gpu), or use --device cpu"
        )
    return torch.device("cuda", number or 0)


def check_gpus(store: dist.Store, rank: int, size: int, gpu: str, timeout: timedelta) -> None:
    """Check that no two processes share a GPU.

    Args:
        store: Store of all processes.
        rank: Number of this process.
        size: Number of processes.
        gpu: Identity of its GPU.
        timeout: Longest time to wait for the others.

    Raises:
        UserError: On all processes, naming the first two that share one.
    """
    keys = [f"gpu_{peer}" for peer in range(size)]
    store.set(keys[rank], gpu)
    store.wait(keys, timeout)
    gpus = store.multi_get(keys)
    for peer, other in enumerate(gpus):
        if (first := gpus.index(other)) < peer:
            raise UserError(
                f"LOCAL_RANK: ranks {first} and {peer} have the same GPU ({gpu}); start them with torchrun, which "
                "numbers the processes of a machine"
            )


def _join(timeout: timedelta) -> tuple[dist.Store, int]:
    """The store of all processes at MASTER_ADDR, and the rank in it."""
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (OSError, RuntimeError, ValueError) as error:
        rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).splitlines()[0]
        raise RankTimeout(f"rank {rank}: cannot join the others at {address}:{port} (MASTER_ADDR): {reason}") from error
    # After torchrun restarted the workers, addresses of the old ones may still be in the store.
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank


def allow_tf32(allowed: bool) -> None:
    """Let CUDA round the factors of float32 matrix products and convolutions to TF32, or not; no effect on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32_inside(allowed: bool) -> Iterator[None]:
    """Allow TF32 inside the block, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _leave_together() -> None:
    """Wait for all ranks, after freeing all references to the group (DDP is part of reference cycles)."""
    # A process that leaves first, or frees the group after it was destroyed, sometimes aborts in gloo's threads.
    dist.barrier()
    gc.collect()


def _is_repeated(store: dist.Store, error: RankError) -> bool:
    """True if another rank has met the same error before; False if the ranks are out of reach."""
    with suppress(RuntimeError):
        return store.add(f"error: {error}", 1) > 1
    return False


def _wait_for_ranks(store: dist.Store, rank: int, size: int) -> None:
    """Wait a short time for the ranks that leave, too; others may not have this error."""
    store.set(f"leaving_{rank}", "")
    with suppress(RuntimeError):  # a timeout is one
        store.wait([f"leaving_{peer}" for peer in range(size)], TIMEOUT)
    gc.collect()


def barrier() -> None:
    """Wait for all ranks; returns at once in a world of one."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank; any small picklable object."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its small, picklable result on every rank.

    Raises:
        UserError: On every rank, if it was raised on rank 0.
    """
    result: list[T] = []
    problem = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result.append(work())
        except UserError as error:
            problem = str(error)
    result, problem = broadcast((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result[0]


@cache
def _host_group() -> dist.ProcessGroup | None:
    """Process group over the CPU, so that its operations do not wait for a GPU."""
    if dist.get_backend() == "gloo":
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


class Votes:
    """A question to all ranks at every step, answered at the next one, so that no rank waits for another.

    As a context manager it ends with no operation in flight.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def ask(self, flag: bool) -> bool:
        """True on all ranks if the flag was set on any at the call before; in a world of one, if it is set now."""
        if not dist.is_initialized():
            return flag
        answer, votes = self._answer(), torch.tensor([float(flag)])
        work = dist.all_reduce(votes, group=_host_group(), async_op=True)
        assert work is not None  # every rank is a member
        self._pending = work, votes
        return answer

    def _answer(self) -> bool:
        if self._pending is None:
            return False
        (work, votes), self._pending = self._pending, None
        work.wait()
        return bool(votes > 0)

    def __enter__(self) -> Votes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, SystemExit):
            self._answer()
        elif self._pending is not None:  # the others may be gone, too
            with suppress(RuntimeError):
                self._pending[0].wait(TIMEOUT)


def from_all_ranks(x: Tensor) -> Tensor:
    """Stack every rank's tensor: (...) -> (size, ...)."""
    if not dist.is_initialized():
        return x[None]
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x)
    return torch.stack(gathered)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all ranks (in place on several)."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def objects_from_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's value in the order of ranks, on every rank (of a group); small picklable objects."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()  # replaced by each rank's
    dist.all_gather_object(values, value, group=group)
    return values


def place() -> tuple[int, int]:
    """Number of this process, and number of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def thread_group() -> dist.ProcessGroup | None:
    """A process group over the CPU for the collective operations of one thread; None in a world of one."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise a `UserError` of any rank on all of them (of a group); all must enter the block."""
    error_here: UserError | None = None
    try:
        yield
    except UserError as error:
        error_here = error
    messages = objects_from_all_ranks(None if error_here is None else str(error_here), group)
    if error_here is not None:
        raise error_here
    for message in messages:
        if message is not None:
            raise UserError(message)


def rows_on_main(rows: Tensor) -> Tensor | None:
    """Join the rows of all ranks in the order of ranks: (n_r, ...) -> (sum of n_r, ...) on rank 0, else None."""
    if not dist.is_initialized():
        return rows
    counts = from_all_ranks(torch.tensor(len(rows), device=rows.device)).tolist()
    if dist.get_rank() != 0:
        if len(rows):
            dist.send(rows.contiguous(), dst=0)
        return None
    parts = [rows]
    for rank, count in enumerate(counts[1:], start=1):
        if count:
            parts.append(rows.new_empty((count, *rows.shape[1:])))
            dist.recv(parts[-1], src=rank)
    return torch.cat(parts)
