"""One process or many: torchrun starts them, this module tells a process who it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import UserError


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


@contextmanager
def world(device: str | None = None, timeout_seconds: float = 1800) -> Iterator[World]:
    """Joins the process group that torchrun announces (NCCL on CUDA, gloo on CPU), and leaves it at the end.

    Args:
        device: "cuda", "cpu", or None for CUDA where there is one.
        timeout_seconds: how long a collective may wait for a peer.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; use --device cpu, or check the driver")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(kind)
    if kind == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    size = world_size()
    if "RANK" not in os.environ or size == 1:
        yield World(0, 1, place)
        return
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=place if kind == "cuda" else None,
    )
    try:
        yield World(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for all peers; nothing to wait for in a world of one."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all processes (in place on several)."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
