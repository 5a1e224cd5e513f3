"""Comparison of two versions of this project: the same work by each, in turn, each in a process with its own imports.

The process of a version is this file, run with the version's folder on the path. Its work is reached through the
command lines of train.py and sample.py, which hardly change between versions. A round is A B B A, and its ratio that of
the CPU times of B and A, so that neither a slow moment of the machine nor a drift favours one of them. Every round has
new processes: where their memory happens to be makes a difference of up to a tenth, and would be shared by the rounds
of a process.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import UserError

SAMPLING_STEPS = 10
PARTS = {"forward": 1, "training step": 1, "sampling step": SAMPLING_STEPS}  # part -> steps in its work
ROUNDS = 15
STUDENT_T = 2.145  # 97.5 % quantile for 14 degrees of freedom
SECONDS, WARM_UPS = 0.3, 3  # length of a timed piece of work, and its runs before
ROOT = Path(__file__).resolve().parent.parent
Clock = Callable[[str, int], float]  # part, number of runs -> CPU seconds


class Comparison(NamedTuple):
    """Result of one part; a speed-up above 1 means that this version is the faster one."""

    part: str
    seconds: float
    seconds_before: float
    speedup: float
    interval: tuple[float, float]
    speedups: list[float]


def compare(other: Path, model: str, images: int, threads: int) -> list[Comparison]:
    """Compare this version with the one in another folder.

    Args:
        other: Checkout of the other version.
        model: Name in the registry; it is given the size of the digits.
        images: Images of a batch.
        threads: Number of CPU threads.

    Raises:
        UserError: If one of the versions cannot do the work.
    """
    if not (other / "train.py").is_file():
        raise UserError(f"--against-version {other}: no train.py there; give a checkout of this project")
    rounds: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
    for _ in range(ROUNDS):
        with worker(ROOT, model, images, threads) as ours, worker(other, model, images, threads) as theirs:
            for part, measured in rounds.items():
                measured.append(time_part(part, ours, theirs))
    return [summarise(part, measured) for part, measured in rounds.items()]


def time_part(part: str, ours: Clock, theirs: Clock) -> tuple[float, float]:
    """A round of one part: CPU seconds a step of this version, and of the other one."""
    theirs(part, WARM_UPS)
    runs = max(1, round(SECONDS * WARM_UPS / ours(part, WARM_UPS)))
    steps = 2 * runs * PARTS[part]
    a, b, c, d = ours(part, runs), theirs(part, runs), theirs(part, runs), ours(part, runs)
    return (a + d) / steps, (b + c) / steps


def summarise(part: str, rounds: Sequence[tuple[float, float]]) -> Comparison:
    """Medians, mean speed-up, and its 95 % interval."""
    speedups = [before / now for now, before in rounds]
    mean, half = statistics.mean(speedups), STUDENT_T * statistics.stdev(speedups) / len(speedups) ** 0.5
    now, before = (statistics.median(times) for times in zip(*rounds, strict=True))
    return Comparison(part, now, before, mean, (mean - half, mean + half), speedups)


@contextmanager
def worker(tree: Path, model: str, images: int, threads: int) -> Iterator[Clock]:
    """Start the process of a version."""
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-P", __file__, model, str(images)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, bufsize=1, stdin=pipe, stdout=pipe, stderr=log
        )
        assert process.stdin is not None and process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def seconds(part: str, runs: int) -> float:
            requests.write(f"{part}, {runs}\n")
            if answer := answers.readline():
                return float(answer)
            log.seek(0)
            reason = (log.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"--against-version: {tree} fails at the {part}: {reason}")

        try:
            yield seconds
        finally:
            process.kill()
            process.wait()


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    from benchmarks.report import aligned

    rows = []
    for part, now, before, speedup, (low, high), _ in comparisons:
        times = [f"{seconds * 1e3:,.2f}" for seconds in (now, before)]
        rows.append([part, *times, f"{speedup:.3f} x", f"{low:.3f} to {high:.3f}"])
    return aligned(["part", "ms", "other version, ms", "speed-up", f"95 % of {ROUNDS} rounds"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# In the process of a version


class _Call(Exception):
    """Arguments of a call that was intercepted."""


def intercept(owner: object, name: str, main: Callable[[Sequence[str]], None], argv: str) -> tuple[Any, Any]:
    """Run a script up to its first call of a function; returns the call's arguments, by place and by name."""

    def stop(*args: object, **options: object) -> None:
        raise _Call(args, options)

    original = getattr(owner, name)
    setattr(owner, name, stop)
    try:
        main(argv.split())
    except _Call as call:
        return call.args[0], call.args[1]
    finally:
        setattr(owner, name, original)
    raise RuntimeError(f"{name} was not called")


def parts(model: str, images: int) -> dict[str, Callable[[], object]]:
    """The work of all parts, by the version on the path."""
    import torch

    import sample
    import train
    from training import trainer as training

    argv = (
        f"--dataset digits --model {model} --num-classes 10 --global-batch-size {images} --num-workers 0 --device cpu"
    )
    (trainer,), _ = intercept(training.Trainer, "run", train.main, argv)
    trainer.save()
    if hasattr(trainer, "wait_for_save"):  # earlier versions return when the file is whole
        trainer.wait_for_save()
    (checkpoint,) = Path().rglob("*.safetensors")
    labels = " ".join(str(image % 10) for image in range(images))
    argv = f"--ckpt {checkpoint} --class-labels {labels} --num-sampling-steps {SAMPLING_STEPS} --device cpu"
    modules = (importlib.import_module(f"sampling.{name}") for name in ("pipeline", "run"))  # its place has changed
    loop = next(module for module in modules if hasattr(module, "sample_loop"))
    args, options = intercept(loop, "sample_loop", sample.main, argv)
    batches, network = training.batches(trainer.setup, trainer.world, 0), trainer.setup.network
    x, y, t = torch.randn(images, 1, 8, 8), torch.arange(images) % 10, torch.full((images,), 0.5)
    return {
        "forward": torch.no_grad()(lambda: network(x, t, y=y)),
        "training step": lambda: trainer.train_step(*next(batches)),
        "sampling step": lambda: loop.sample_loop(*args, **options),
    }


def serve(model: str, images: int) -> None:
    """Answer every line "part, runs" of the standard input by the CPU seconds of that work."""
    answers, sys.stdout = sys.stdout, sys.stderr
    work = parts(model, images)
    for line in sys.stdin:
        part, runs = line.rsplit(",", 1)
        start = time.process_time()
        for _ in range(int(runs)):
            work[part]()
        print(time.process_time() - start, file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
