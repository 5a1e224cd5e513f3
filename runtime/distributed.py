"""One process or many: torchrun starts them, this module tells a process who it is."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import PeerLost, UserError

T = TypeVar("T")
PATIENCE = timedelta(seconds=10)  # with peers that may not come


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank: 0 .. size - 1.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0


def world_size() -> int:
    """Number of processes that torchrun started, readable before anything is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str | None) -> torch.device:
    """The device of a process that is alone: "cuda", "cpu", or None for CUDA where there is one.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; use --device cpu, or check the driver")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def world(device: str | None = None, timeout_seconds: float = 1800) -> Iterator[World]:
    """Joins the process group that torchrun announces (NCCL on CUDA, gloo on CPU), and leaves it at the end.

    Args:
        device: "cuda", "cpu", or None for CUDA where there is one.
        timeout_seconds: how long a collective may wait for a peer.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    place = choose_device(device)
    kind = place.type
    if kind == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    size = world_size()
    if "RANK" not in os.environ or size == 1:
        yield World(0, 1, place)
        return
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # After torchrun restarted the workers, addresses of the dead ones may still stand in the store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", store)
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
    except SystemExit:  # decided by all processes together
        _leave_together()
        raise
    except UserError:  # of all processes, most often; torchrun kills those that are later than the first
        _wait_for_peers(store, rank, size)
        raise
    except RuntimeError as error:
        if any(word in str(error).lower() for word in ("timed out", "timeout", "closed by peer", "reset by peer")):
            reason = str(error).splitlines()[0]
            raise PeerLost(f"rank {dist.get_rank()}: a peer is hung or gone (--dist-timeout): {reason}") from error
        raise
    finally:
        _host_group.cache_clear()
        dist.destroy_process_group()


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the factors of float32 matrix products and convolutions to TF32; no effect on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _leave_together() -> None:
    """Waits for all, with nothing alive that holds on to the group (DDP sits in reference cycles).

    A process that goes first, or frees the group after it was destroyed, now and then aborts in gloo's threads.
    """
    dist.barrier()
    gc.collect()


def _wait_for_peers(store: dist.Store, rank: int, size: int) -> None:
    """Waits for those who leave, too; not for long, because others may know nothing of the error."""
    store.set(f"leaving_{rank}", "")
    with suppress(RuntimeError):  # a timeout is one
        store.wait([f"leaving_{peer}" for peer in range(size)], PATIENCE)
    gc.collect()


def barrier() -> None:
    """Waits for all peers; nothing to wait for in a world of one."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """The main process's value, on every process; any small picklable object."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def by_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every process; small and picklable.

    Raises:
        UserError: on every process, if it was raised on the main one.
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
def _host_group() -> Any:
    """A group that talks over the CPU, so that asking it does not wait for a GPU."""
    return dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None


def any_rank(flag: bool) -> bool:
    """Whether any process says yes; all must ask together."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([float(flag)])
    dist.all_reduce(votes, group=_host_group())
    return bool(votes > 0)


def from_all_ranks(x: Tensor) -> Tensor:
    """Stacks every process's tensor: (...) -> (size, ...)."""
    if not dist.is_initialized():
        return x[None]
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x)
    return torch.stack(gathered)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all processes (in place on several)."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def objects_from_all_ranks(value: T) -> list[T]:
    """Every process's value in the order of ranks, on every process; small picklable objects."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def fail_together() -> Iterator[None]:
    """Work that may fail on one process: the `UserError` of any is raised on all; all must enter the block."""
    found: UserError | None = None
    try:
        yield
    except UserError as error:
        found = error
    messages = objects_from_all_ranks(None if found is None else str(found))
    if found is not None:
        raise found
    for message in messages:
        if message is not None:
            raise UserError(message)


def rows_on_main(rows: Tensor) -> Tensor | None:
    """Joins the rows of all processes in the order of ranks: (n_r, ...) -> (sum of n_r, ...) on main, else None."""
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
