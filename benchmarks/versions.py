"""Comparison of two versions of this project: the same work by each, in turn, each in a process with its own imports.

The process of a version is this file, run with the version's folder on the path. What it times is reached through the
command lines of train.py and sample.py, which hardly change between versions. A round is A B B A, and its ratio that of
the CPU times of B and A, so that neither a slow moment of the machine nor a drift favours one of them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtime.errors import UserError

SAMPLING_STEPS = 10
PARTS = {"forward": 1, "training step": 1, "sampling step": SAMPLING_STEPS}  # part -> steps in its work
ROUNDS, STUDENT_T = 15, 2.145  # 97.5 % quantile for 14 degrees of freedom
SECONDS, WARM_UPS = 0.3, 3  # length of a timed piece of work, and its runs before
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Comparison:
    """Result of one part; a speed-up above 1 says that this version is the faster one."""

    part: str
    seconds: float
    seconds_before: float
    speedups: list[float]

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean speed-up, and the ends of its 95 % interval."""
        mean = statistics.mean(self.speedups)
        half = STUDENT_T * statistics.stdev(self.speedups) / len(self.speedups) ** 0.5
        return mean, mean - half, mean + half


def compare(other: Path, model: str, rows: int, threads: int) -> list[Comparison]:
    """Compare this version with the one in another folder.

    Args:
        other: Checkout of the other version.
        model: Name in the registry; it is given the size of the digits.
        rows: Images of a batch.
        threads: Number of CPU threads.

    Raises:
        UserError: If one of the versions cannot do the work.
    """
    if not (other / "train.py").is_file():
        raise UserError(f"--against-version {other}: no train.py there; give a checkout of this project")
    argv = (model, str(rows))
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(worker(tree, argv, threads)) for tree in (ROOT, other))
        return [compare_part(part, ours, theirs) for part in PARTS]


def compare_part(part: str, ours: Callable[..., float], theirs: Callable[..., float]) -> Comparison:
    """Time one part of both versions, in turn."""
    theirs(part, WARM_UPS)
    repeats = max(1, round(SECONDS * WARM_UPS / ours(part, WARM_UPS)))
    rounds = []
    for _ in range(ROUNDS):
        a, b, c, d = ours(part, repeats), theirs(part, repeats), theirs(part, repeats), ours(part, repeats)
        rounds.append((a + d, b + c))
    now, before = (statistics.median(times) / (2 * repeats * PARTS[part]) for times in zip(*rounds, strict=True))
    return Comparison(part, now, before, [b / a for a, b in rounds])


@contextmanager
def worker(tree: Path, argv: Sequence[str], threads: int) -> Iterator[Callable[..., float]]:
    """Start the process of a version; yields a function of part and repeats that returns its CPU seconds."""
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, *argv], cwd=folder, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def seconds(part: str, repeats: int) -> float:
            stdin.write(f"{part}, {repeats}\n")
            answer = stdout.readline()
            if not answer:
                raise UserError(f"--against-version: {tree} fails at the {part}: {_last_line(log)}")
            return float(answer)

        try:
            yield seconds
        finally:
            process.kill()
            process.wait()


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    return (file.read().strip().splitlines() or ["no message"])[-1]


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    from benchmarks.report import aligned

    rows = []
    for each in comparisons:
        mean, low, high = each.interval
        times = [f"{seconds * 1e3:,.2f}" for seconds in (each.seconds, each.seconds_before)]
        rows.append([each.part, *times, f"{mean:.3f} x", f"{low:.3f} to {high:.3f}"])
    return aligned(["part", "ms", "other version, ms", "speed-up", f"95 % of {ROUNDS} rounds"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# In the process of a version


class _Call(Exception):
    """Arguments of a call that was intercepted."""


def intercept(owner: object, name: str, main: Callable[[Sequence[str]], None], argv: str) -> tuple[Any, dict[str, Any]]:
    """Run a script up to its first call of a function; returns the call's arguments."""

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


def parts(model: str, rows: int) -> dict[str, Callable[[], object]]:
    """The work of all parts, by the version on the path."""
    import torch

    import sample
    import train
    from sampling import pipeline
    from training import trainer as training

    argv = f"--dataset digits --model {model} --num-classes 10 --global-batch-size {rows} --num-workers 0 --device cpu"
    (trainer,), _ = intercept(training.Trainer, "run", train.main, argv)
    trainer.save()
    (checkpoint,) = Path().rglob("*.safetensors")
    labels = " ".join(str(row % 10) for row in range(rows))
    argv = f"--ckpt {checkpoint} --class-labels {labels} --num-sampling-steps {SAMPLING_STEPS} --device cpu"
    args, options = intercept(pipeline, "sample_loop", sample.main, argv)
    batches, network = training.batches(trainer.setup, trainer.world, 0), trainer.setup.network
    x, y, t = torch.randn(rows, 1, 8, 8), torch.arange(rows) % 10, torch.full((rows,), 0.5)
    forward = torch.no_grad()(lambda: network(x, t, y=y))
    return {
        "forward": forward,
        "training step": lambda: trainer.train_step(*next(batches)),
        "sampling step": lambda: pipeline.sample_loop(*args, **options),
    }


def serve(model: str, rows: int) -> None:
    """Answer every line "part, repeats" of the standard input by the CPU seconds of that work."""
    answers, sys.stdout = sys.stdout, sys.stderr
    work = parts(model, rows)
    for line in sys.stdin:
        part, repeats = line.rsplit(",", 1)
        start = time.process_time()
        for _ in range(int(repeats)):
            work[part]()
        print(time.process_time() - start, file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
