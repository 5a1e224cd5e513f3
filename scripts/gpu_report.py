"""Measure the full-size network on a GPU: training, sampling's forward pass, optimizer; run by gpu_report.sh.

    python scripts/gpu_report.py --output-dir results
    python scripts/gpu_report.py --smoke

Training is the trainer's own step: draws, noising, the network in bf16, the losses of the process, the gradient's norm,
fused AdamW, the average; next to its peak of memory is the prediction of --dry-run. Images are random latents on the
device. Cases run one after the other, because XL/2 at batch 256 fills the card, and each is freed before the next.
Those for which no time is left are named.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks import cases
from benchmarks.evaluation import GROUP as EVALUATOR
from benchmarks.evaluation import PUBLISHED, TINY, EvaluatorSizes, evaluator_cases, extrapolated_seconds
from benchmarks.families import family_groups
from benchmarks.report import file_stem, headline, machine_info, markdown, report, write_json
from benchmarks.roofline import predictions, predictions_table
from benchmarks.sampling import sampling_groups, sampling_shares
from benchmarks.timing import BF16, Case, Clock, Row, Work, choose_clock, failure, measure
from data.array_images import ArrayImages
from diffusion import Batch
from models import create_model, model_config
from runtime.command_line import parse, parse_config
from runtime.distributed import World
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.settings import Values, setting
from training.config import KINDS, TrainSettings
from training.dry_run import predict_memory
from training.setup import Setup, set_up
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class GpuReportSettings:
    """Settings of gpu_report.py."""

    smoke: bool = setting(False, "everything tiny, on any machine: shows that the report works, measures nothing")
    output_dir: Path = setting(Path("benchmarks/results"), "folder of the JSON and the table")
    seconds: float = setting(400.0, "start no further measurement after this long")

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"--seconds {self.seconds}: must be positive")


class Sizes(NamedTuple):
    """Sizes and numbers of runs; the defaults are those of a GPU."""

    model: str = "DiT-XL/2"
    families: tuple[str, str, str, str, str] = (
        "DyDiT-XL/2", "Skip-DiT-XL/2", "DDT-XL/2", "Skip-Latte-XL/2", "Skip-LatteT2V-XL/2"
    )  # fmt: skip
    # (images per step, steps per timed run, timed runs) of each training case
    train: tuple[tuple[int, int, int], ...] = ((256, 4, 5), (32, 20, 5), (128, 8, 3))
    rows: int = 64  # of the forward pass: 32 guided images
    rounds: int = 15  # timed runs of everything else
    gemm_side: int = cases.GEMM_SIDE["cuda"]  # of the square matrix product
    images: int = 32  # of a sampling batch; each is two rows
    steps: int = 8  # sampling steps of a timed run
    spec: str = "ddim50"  # step spec of the trajectories that compare precisions
    family_steps: int = 20  # sampling steps in which the families leave work out
    evaluator: EvaluatorSizes = PUBLISHED  # sizes of the evaluator's cases


SMOKE = Sizes(
    "DiT-debug/2", ("DyDiT-debug/2", "Skip-DiT-debug/2", "DDT-debug/2", "Skip-Latte-debug/2", "Skip-LatteT2V-debug/2"),
    ((4, 1, 1), (2, 1, 1), (3, 1, 1)),
    rows=4, rounds=1, gemm_side=64, images=2, steps=2, spec="ddim5", family_steps=10, evaluator=TINY,
)  # fmt: skip
SAMPLING_ROUNDS, EVALUATOR_ROUNDS = 5, 3


class Training:
    """The trainer's own step in bf16; the images are random latents on the device."""

    def __init__(self, model: str, rows: int, device: torch.device, compiler: str | None) -> None:
        setup = open_training(model, rows, device)
        self.loss, network = setup.loss, cases.fill_zeros(setup.network)
        if compiler is not None:
            network.compile_blocks(compiler)
        inputs = cases.make_inputs(network, rows, device)
        self.batch = Batch(inputs.x, dict(inputs.conditioning), torch.arange(rows, device=device))
        self.trainer = Trainer(setup, World(0, 1, device), None, None)

    def run(self, steps: int) -> Tensor:
        """Train several steps without waiting in between, as in training; returns the first one's gradient norm."""
        return [self.step() for _ in range(steps)][0]

    def step(self) -> Tensor:
        """Train one step; returns the norm of its gradient, on the device."""
        step, rows = self.trainer.state.step, len(self.batch.index)
        draws = self.loss.draw(step, rows, device=self.batch.index.device)
        self.trainer.state.step += 1
        return self.trainer.train_step(step, [(self.batch, draws)])


def open_training(model: str, rows: int, device: torch.device, fake: FakeTensorMode | None = None) -> Setup:
    """Set a run up as train.py does, on latents that are all zero."""
    argv = ["--model", model, "--global-batch-size", str(rows), "--precision", "bf16", "--max-steps", "1"]
    given = parse(TrainSettings, argv, program="gpu_report.py", doc=None, kinds=KINDS)
    config = model_config(model)
    channels, height, width = config.sample_shape
    classes = [str(k) for k in range(config.num_classes)]
    data = ArrayImages(np.zeros((1, height, width, channels), np.uint8), np.zeros(1, np.int64), classes)
    with device:  # much faster than on the CPU
        return set_up(given, device, dataset=data, fake=fake)


@cache
def predicted_memory(model: str, rows: int, device: torch.device) -> int:
    """Peak of a training step's memory, as --dry-run predicts it."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return predict_memory(open_training(model, rows, device, fake), World(0, 1, device), fake)["peak"]


class Measurement(NamedTuple):
    """A group of cases that are prepared, timed and freed together."""

    group: str
    make: Callable[[], list[Case]]
    rounds: int


def training_case(sizes: Sizes, rows: int, steps: int, device: torch.device, compiler: str | None) -> list[Case]:
    """Training at one batch size, as it is (None) or compiled; alone, so that nothing else takes up memory."""
    name = f"bf16, batch {rows}"
    with torch.device("meta"):
        flop = 3 * steps * cases.forward_flop(create_model(sizes.model), rows)
    case = Case(
        f"{name}, blocks compiled" if compiler else name,
        lambda: Training(sizes.model, rows, device, compiler),
        lambda training: training.run(steps),
        outcome=lambda training, norm: [norm],
        reference=name if compiler else None,
        tolerance=BF16,
        flop=flop,
        images=steps * rows,
        precision="bf16",
        work=None if compiler else Work("training", rows, steps),
        predicted_memory=lambda training: predicted_memory(sizes.model, rows, device),
    )
    return [case]


def one_forward_case(sizes: Sizes, device: torch.device, bf16: bool, compiler: str | None) -> list[Case]:
    """The forward pass: float32 or autocast, compiled or not."""
    network, rows = cases.random_network(sizes.model, device), sizes.rows
    name = f"{'bf16 autocast' if bf16 else 'fp32'}, {rows} rows{', blocks compiled' if compiler else ''}"
    flop, inputs = cases.forward_flop(network, rows), cases.make_inputs(network, rows, device)
    make = partial(cases.compiled, network, compiler) if compiler else lambda: network
    case = cases.forward_case(name, flop, inputs, make, f"fp32, {rows} rows", bf16=bf16)
    return [case if compiler else replace(case, work=Work("forward", rows, 1))]


def measurements(sizes: Sizes, device: torch.device, compiler: str | None) -> Iterator[Measurement]:
    """All measurements, the most important first; networks are made when their turn comes."""
    side = sizes.gemm_side
    yield Measurement("peak", lambda: cases.gemm_cases(device, [(side, side, side)]), sizes.rounds)
    for kind in dict.fromkeys((None, compiler)):
        for rows, steps, rounds in sizes.train[: 2 if kind is None and compiler is not None else None]:
            yield Measurement("training", partial(training_case, sizes, rows, steps, device, kind), rounds)
    for bf16, kind in dict.fromkeys(((False, None), (True, None), (True, compiler))):
        yield Measurement("forward", partial(one_forward_case, sizes, device, bf16, kind), sizes.rounds)
    for make in sampling_groups(sizes.model, sizes.images, sizes.steps, device, compiler):
        yield Measurement("sampling", make, min(SAMPLING_ROUNDS, sizes.rounds))
    network = partial(cases.random_network, sizes.model, device)
    yield Measurement("optimizer", lambda: cases.optimizer_cases(network()), sizes.rounds)
    rounds = min(EVALUATOR_ROUNDS, sizes.rounds)
    yield Measurement(EVALUATOR, lambda: evaluator_cases(device, sizes.evaluator), rounds)
    groups = family_groups(sizes.families, sizes.images, sizes.family_steps, device, compiler)
    for group, make in groups.items():
        yield Measurement(group, make, min(SAMPLING_ROUNDS, sizes.rounds))


def comparable(group: Sequence[Case], known: Mapping[str, Sequence[Tensor]]) -> list[Case]:
    """The cases; those that lost their reference to memory or time are not compared."""
    there = {*known, *(case.name for case in group)}
    return [case if case.reference in there else replace(case, reference=None) for case in group]


def measure_all(
    measurements: Iterator[Measurement], device: torch.device, clock: Clock, deadline: float
) -> Iterator[tuple[list[Row], list[str]]]:
    """Run measurements one after the other.

    Yields:
        After each, its rows, and the reason if they are missing.
    """
    known: dict[str, Sequence[Tensor]] = {}
    for number, (group, make, rounds) in enumerate(measurements, start=1):
        if time.monotonic() > deadline:
            yield [], [f"{group} (measurement {number}): the time is up"]
            continue
        try:
            yield measure(group, comparable(make(), known), rounds, clock, known=known, device=device), []
        except Exception as error:  # whatever fails must not cost the other results
            yield [], [f"{group} (measurement {number}): {failure(error)}"]
        print(f"{number}: {group} done, {deadline - time.monotonic():.0f} s left", file=sys.stderr, flush=True)
        if group == "optimizer":
            known.clear()
        torch._dynamo.reset()
        if device.type == "cuda":
            gc.collect()  # a network and its compiled blocks refer to each other
            torch.cuda.empty_cache()


def run_gpu_tests() -> str:
    """Run the tests marked gpu, from the files that have any: others may need packages that are not here."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    if not files:
        return "none"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not finished in {TEST_SECONDS} s"
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    return lines[-1].strip("= ")


def as_text(document: Values) -> str:
    """Content of the Markdown file."""
    lines = [f"Tests marked gpu: {document['gpu_tests']}"]
    lines += [f"{name}: {value:.2%}" for name, value in document["sampling"].items()]
    seconds, images = document["evaluator_seconds"], document["settings"]["evaluator"]["samples"]
    if seconds is not None:
        lines.append(f"evaluating {images:,} images, extrapolated, without reading: {seconds:.1f} s")
    parts = [headline(document), "\n".join(lines), markdown(document), predictions_table(document["predictions"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def main(argv: Sequence[str]) -> None:
    """Run the tests, measure, write the JSON and the table."""
    config = parse_config(GpuReportSettings, argv, program="gpu_report.py", doc=__doc__)
    if not config.smoke and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here, and the report is about one; --smoke runs it tiny on any machine")
    deadline = time.monotonic() + config.seconds
    device = torch.device("cpu") if config.smoke else torch.device("cuda", 0)
    clock_name, clock = choose_clock(device, threads=1)
    machine = machine_info(device, clock_name)
    stem = "smoke" if config.smoke else file_stem(machine["device"], datetime.date.today())
    path = config.output_dir / f"{stem}.json"
    check_writable(path, "--output-dir")
    tests = "not run (smoke)" if config.smoke else run_gpu_tests()
    # Tracing alone, without generating code, is enough to show that a block can be compiled
    sizes, compiler = (SMOKE, "eager") if config.smoke else (Sizes(), cases.find_compiler(device))
    settings = {"smoke": config.smoke, "seconds": config.seconds, **sizes._asdict()}
    settings["evaluator"] = dataclasses.asdict(sizes.evaluator)

    rows: list[Row] = []
    skipped = [] if compiler is not None else ["compiled blocks: Triton is not installed"]

    def write(shares: Mapping[str, float], lacking: Sequence[str], predicted: Sequence[Values] = ()) -> str:
        document = report(settings, machine, rows, [*skipped, *lacking]) | {"gpu_tests": tests, "sampling": shares}
        document |= {"evaluator_seconds": extrapolated_seconds(rows, sizes.evaluator), "predictions": list(predicted)}
        write_json(document, path)
        with atomic_path(path.with_suffix(".md")) as temporary:
            temporary.write_text(as_text(document))
        return as_text(document)

    for more, missing in measure_all(measurements(sizes, device, compiler), device, clock, deadline):
        rows += more
        skipped += missing
        write({}, ["what follows: the report was ended early"])  # so that nothing is lost if it is
    shares = sampling_shares(sizes.model, device, sizes.images, sizes.steps, sizes.spec, deadline)
    print(write(*shares, predictions(rows, sizes.model, "H200" if config.smoke else machine["device"])))


if __name__ == "__main__":
    sys.exit(run(main, "gpu_report.py"))
