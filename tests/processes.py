"""Running the project's scripts in processes of their own: as a user does, or as ranks that share one import."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parent.parent
TIMEOUT = 240
GRACE = 15  # seconds that ranks have to leave after one has failed
# Imported once by the process that ranks are forked from.
PRELOADED = "tests.processes train sample_ddp evaluator.__main__ torch._dynamo sklearn.datasets timm".split()


def clean_environment() -> dict[str, str]:
    """Variables of a process on one thread, on the CPU, that is no rank and asks no hub."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return environment | more


def run_script(
    script: str | Path, *argv: str, ranks: int = 1, folder: Path, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository root in `folder`, on the CPU with one thread a process; waits for its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    launcher += ["--max-restarts", str(restarts)] if restarts else []
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *argv],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def folder_by_rank(flag: str, folders: Sequence[Path]) -> str:
    """Code for each rank to execute first: gives it a folder of its own, as where machines do not share a disk."""
    names = [str(folder) for folder in folders]
    return f"import os, sys\nsys.argv += [{flag!r}, {names!r}[int(os.environ['RANK'])]]\n"


def run_ranks(
    script: str | Path, *argv: str, ranks: int = 2, folder: Path, fault: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a script on several ranks without torchrun, which takes a tenth of the time (see `fork_script`).

    Args:
        script: Script, from the repository root.
        argv: Arguments of the script.
        ranks: Number of processes.
        folder: Working directory.
        fault: Python code that each rank executes first.

    Returns:
        The first exit status that is not 0, or 0; output and errors of all ranks, one after the other.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    places = [where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    outputs = [folder / f".rank{rank}" for rank in range(ranks)]
    processes = [
        fork_script(script, *argv, folder=folder, output=output, environment=place, fault=fault)
        for output, place in zip(outputs, places, strict=True)
    ]
    deadline = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE)
    for process in processes:
        process.kill()
        process.join()
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    out, error = ("".join(Path(f"{o}.{kind}").read_text() for o in outputs) for kind in ("out", "err"))
    return subprocess.CompletedProcess([str(script), *argv], status, out, error)


def fork_script(
    script: str | Path,
    *argv: str,
    folder: Path,
    output: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
    fault: str = "",
) -> BaseProcess:
    """Start a script in a process that is forked from one that has the imports.

    Args:
        script: Script, from the repository root.
        argv: Arguments of the script.
        folder: Working directory.
        output: Name of the files of output (with .out) and errors (.err).
        environment: More variables.
        fault: Python code that is executed first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = (str(ROOT / script), argv, str(folder), str(output), {**clean_environment(), **environment}, fault)
    process = context.Process(target=_run_forked, args=arguments)
    before = dict(os.environ)
    try:
        os.environ.update(clean_environment())  # for the server, if this starts it
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _run_forked(
    script: str, argv: Sequence[str], folder: str, output: str, environment: Mapping[str, str], fault: str
) -> None:
    import torch

    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    gc.freeze()  # a collection at the end would go through all modules
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *argv]
    exec(fault, {"__name__": "fault"})
    runpy.run_path(script, run_name="__main__")
