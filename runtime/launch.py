"""The place of this process among all, as torchrun announces it in the environment."""

from __future__ import annotations

import os
from typing import NamedTuple

from runtime.errors import RankError

# Ranks of launchers that torchrun replaces, and their numbers of processes: the first that is set counts.
OTHER_LAUNCHERS = {
    "SLURM_PROCID": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_SIZE",),
    "PMI_RANK": ("PMI_SIZE",),
    "MV2_COMM_WORLD_RANK": ("MV2_COMM_WORLD_SIZE",),
}
REMEDY = "start several processes with torchrun, and one without RANK and WORLD_SIZE"


class Launch(NamedTuple):
    """This process among all.

    Attributes:
        rank: Its number, 0 .. size - 1.
        size: Number of processes.
        local_rank: Its number on this machine, which is that of its GPU; None if it was not announced.
    """

    rank: int
    size: int
    local_rank: int | None


def world_size() -> int:
    """Number of processes that torchrun started, known before anything is set up.

    Raises:
        RankError: If WORLD_SIZE is not a number from 1 on.
    """
    size = _number("WORLD_SIZE")
    if size == 0:
        raise RankError(f"WORLD_SIZE=0: must be at least 1; {REMEDY}")
    return 1 if size is None else size


def machine_size() -> int:
    """Number of processes that torchrun started on this machine; all of them if it is not announced."""
    return _number("LOCAL_WORLD_SIZE") or world_size()


def read_launch() -> Launch:
    """Read and check the variables of torchrun.

    Raises:
        RankError: If one is missing, no number, or does not fit the others; or if another launcher than torchrun
            started several processes.
    """
    size, rank, local_rank = world_size(), _number("RANK"), _number("LOCAL_RANK")
    if rank is None:
        if size > 1:
            raise RankError(f"WORLD_SIZE={size}: RANK is not set; {REMEDY}")
        if "WORLD_SIZE" not in os.environ:
            _check_other_launchers()
        return Launch(0, 1, local_rank)
    if rank >= size:
        beyond = f"WORLD_SIZE={size}" if "WORLD_SIZE" in os.environ else "WORLD_SIZE, which is not set"
        raise RankError(f"RANK={rank}: must be below {beyond}; {REMEDY}")
    if size > 1:
        if not os.environ.get("MASTER_ADDR"):
            raise RankError(f"MASTER_ADDR: not set, though WORLD_SIZE={size}; {REMEDY}")
        port = _number("MASTER_PORT")
        if port is None or not 0 < port < 1 << 16:
            value = "not set" if port is None else f"{port} is no port"
            raise RankError(f"MASTER_PORT: {value}, though WORLD_SIZE={size}; {REMEDY}")
    return Launch(rank, size, local_rank)


def _check_other_launchers() -> None:
    """Refuse several processes of another launcher, each of which would run alone."""
    for variable, counts in OTHER_LAUNCHERS.items():
        if variable not in os.environ:
            continue
        rank = os.environ[variable]
        size = next((os.environ[name] for name in counts if name in os.environ), "1")
        if rank != "0" or size not in ("", "1"):
            raise RankError(
                f"{variable}={rank}: several processes were started, but not by torchrun, which sets RANK and "
                f"WORLD_SIZE; let the launcher start torchrun once on each machine (scripts/slurm_train.sh does), "
                f"or unset {variable} for a single process"
            )


def _number(name: str) -> int | None:
    """A variable that is a number from 0 on; None if it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RankError(f"{name}={text!r}: must be a number from 0 on; {REMEDY}")
    return int(text)
