"""Stand-ins of sbatch, srun and scontrol, which record their calls and start real processes on this machine.

As a module it installs them; as a program, `python tests/slurm.py NAME ARGUMENTS...`, it is one of them. A job runs
while sbatch waits. All nodes are this machine, with one process each.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STATE, PREEMPT = "STANDIN_STATE", "STANDIN_PREEMPT"  # folder of the calls; pattern of the files that start a preemption
TIMEOUT = 240


def install(folder: Path, **programs: str) -> dict[str, str]:
    """Write the stand-ins, and other programs by their source in sh; returns the environment that uses them."""
    bin_folder, state = folder / "bin", folder / "state"
    bin_folder.mkdir(), state.mkdir()
    for name in PROGRAMS:
        programs[name] = f'exec "{sys.executable}" "{__file__}" {name} "$@"'
    for name, source in programs.items():
        path = bin_folder / name
        path.write_text(f"#!/bin/sh\n{source}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "STANDIN_"))}
    return kept | {"PATH": f"{bin_folder}:{kept['PATH']}", STATE: str(state), "PYTHONPATH": str(ROOT)}


def submit(environment: dict[str, str], *argv: str) -> str:
    """Submit a job from the repository's root, and wait for its end; returns its number."""
    done = subprocess.run(
        ["sbatch", "--parsable", *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def calls(environment: dict[str, str], name: str) -> list[list[str]]:
    """Arguments of the calls of a stand-in, in order."""
    lines = (Path(environment[STATE]) / "calls.jsonl").read_text().splitlines()
    return [call["argv"] for call in map(json.loads, lines) if call["name"] == name]


def outcome(environment: dict[str, str], job: str) -> tuple[list[int], str]:
    """Exit statuses of a job's tasks (none if it never started), and their output."""
    state = Path(environment[STATE])
    return json.loads((state / f"{job}.json").read_text()), (state / f"{job}.out").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# The programs


def split(argv: list[str], values: tuple[str, ...] = ()) -> tuple[dict[str, str], list[str]]:
    """Options before the first other word, and the rest."""
    options: dict[str, str] = {}
    while argv and argv[0].startswith("--"):
        name, _, value = argv[0].partition("=")
        if name in values and not value:
            argv, value = argv[1:], argv[1]
        options[name], argv = value, argv[1:]
    return options, argv


def sbatch(argv: list[str]) -> int:
    """Run a job, again as long as it is queued again, and print its number."""
    options, (script, *rest) = split(argv, ("--nodes", "--array", "--dependency"))
    state = Path(os.environ[STATE])
    job = str(100 + len(list(state.glob("*.out"))))
    output = state / f"{job}.out"
    output.touch()
    needed = options.get("--dependency", "").removeprefix("afterok:")
    statuses: list[int] = []
    if not needed or not any(json.loads((state / f"{needed}.json").read_text()) or [1]):
        nodes = options.get("--nodes", "1")
        places = {"SLURM_JOB_ID": job, "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_NODELIST": f"node[1-{nodes}]"}
        places |= {"SLURM_JOB_NUM_NODES": nodes, "SLURM_GPUS_ON_NODE": "1"}
        for task in tasks(options.get("--array")):
            statuses.append(run_task(script, rest, {**os.environ, **places, **task}, output))
    (state / f"{job}.json").write_text(json.dumps(statuses))
    print(job)
    return 0


def tasks(array: str | None) -> list[dict[str, str]]:
    """Variables of the tasks of an array: 1-3, or 2,5; of a job without an array, none."""
    if array is None:
        return [{}]
    first, _, last = array.partition("-")
    numbers = [*range(int(first), int(last) + 1)] if last else [int(number) for number in array.split(",")]
    common = {"MIN": min(numbers), "MAX": max(numbers), "COUNT": len(numbers)}
    return [{f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in {**common, "ID": number}.items()} for number in numbers]


def run_task(script: str, argv: list[str], environment: dict[str, str], output: Path) -> int:
    """Run a batch script; the first time it is preempted once a file of the pattern is there."""
    header = re.search(r"^#SBATCH --signal=B:(\w+)@", Path(script).read_text(), re.MULTILINE)
    mark, pattern = Path(os.environ[STATE]) / "requeue", environment.get(PREEMPT)
    while True:
        with output.open("a") as file:
            process = subprocess.Popen(["bash", script, *argv], env=environment, stdout=file, stderr=file)
        while pattern and header and process.poll() is None:
            if any(Path("/").glob(pattern.lstrip("/"))):
                process.send_signal(getattr(signal, f"SIG{header[1]}"))
                pattern = None
            time.sleep(0.02)
        status = process.wait(TIMEOUT)
        if not mark.exists():
            return status
        mark.unlink()


def srun(argv: list[str]) -> int:
    """Start a process for every node, and pass signals on."""
    _, command = split(argv)
    nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
    processes: list[subprocess.Popen[Any]] = []
    signal.signal(signal.SIGTERM, lambda number, frame: [process.send_signal(number) for process in processes] and None)
    for node in nodes:
        processes.append(subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}))
    return max(process.wait() % 256 for process in processes)


def scontrol(argv: list[str]) -> int:
    """Name the nodes, or note that the job is to run again."""
    if argv[:2] == ["show", "hostnames"]:
        print("\n".join(["localhost"] * int(os.environ["SLURM_JOB_NUM_NODES"])))
    else:
        (Path(os.environ[STATE]) / "requeue").touch()
    return 0


PROGRAMS: dict[str, Callable[[list[str]], int]] = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}

if __name__ == "__main__":
    with (Path(os.environ[STATE]) / "calls.jsonl").open("a") as log:
        print(json.dumps({"name": sys.argv[1], "argv": sys.argv[2:]}), file=log)
    sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
