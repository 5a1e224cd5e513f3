"""Measures the full-size network on a GPU: training, sampling's forward pass, optimizer; run by gpu_report.sh.

Training is the trainer's own step: draws, noising, the network in bf16, the losses of the process, the gradient's norm,
fused AdamW, the average; beside its peak of memory stands what --dry-run predicts. Images are random latents on the
device. Cases run one after the other, because XL/2 at batch 256 fills the card, and each is freed before the next. What
no longer fits into the time allowed is named, not run.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from data.autoencoder import Pixels
from runtime.config import parse_config, setting
from torch import Tensor

from benchmarks.cases import (
    GEMM_SIDE,
    compile_blocks,
    filled_network,
    find_compiler,
    forward,
    forward_flop,
    gemm_cases,
    make_inputs,
    optimizer_cases,
)
from benchmarks.evaluation import GROUP as EVALUATOR
from benchmarks.evaluation import PUBLISHED, TINY, EvaluatorSizes, evaluator_cases, extrapolated_seconds
from benchmarks.families import family_groups
from benchmarks.report import headline, machine_info, markdown, report, write_report
from benchmarks.sampling import sampling_facts, sampling_groups
from benchmarks.timing import BF16, Case, Clock, Row, choose_clock, measure
from data.image_folder import ArrayImages
from diffusion import Batch, Objective, create_diffusion
from models import Network
from runtime.distributed import World
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from training.config import TrainConfig
from training.dry_run import predict_memory
from training.setup import Setup
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS = 120


@dataclass(frozen=True)
class GpuReportConfig:
    """Settings of gpu_report.py."""

    smoke: bool = setting(False, "everything tiny, on any machine: shows that the report works, measures nothing")
    output_dir: Path = setting(Path("benchmarks/results"), "where the JSON and the table go")
    seconds: float = setting(400.0, "start no further measurement after this long")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if not self.seconds > 0:
            raise ValueError(f"--seconds {self.seconds}: must be positive")


class Sizes(NamedTuple):
    """How large and how often.

    Attributes:
        model: registry name.
        train: (images per step, steps per timed run, timed runs) of each training case.
        rows: of the forward pass; 64 is 32 guided images.
        rounds: timed runs of everything else.
        drawn: images of a sampling batch; each is two rows.
        steps: sampling steps of a timed run.
        spec: steps of the trajectories whose precision is compared.
        gemm_side: of the square matrix product.
        family_steps: sampling steps in which the families leave work out.
        evaluator: of the evaluator's cases.
    """

    model: str
    train: tuple[tuple[int, int, int], ...]
    rows: int
    rounds: int
    gemm_side: int
    drawn: int = 32
    steps: int = 8
    spec: str = "ddim50"
    family_steps: int = 20
    evaluator: EvaluatorSizes = PUBLISHED


FULL = Sizes("DiT-XL/2", ((256, 4, 5), (32, 20, 5)), rows=64, rounds=15, gemm_side=GEMM_SIDE["cuda"])
SMOKE = Sizes(
    "DiT-debug/2",
    ((4, 1, 1), (2, 1, 1)),
    rows=4,
    rounds=1,
    gemm_side=64,
    drawn=2,
    steps=2,
    spec="ddim5",
    family_steps=4,
    evaluator=TINY,
)
SAMPLING_ROUNDS, EVALUATOR_ROUNDS = 5, 3


class Training:
    """The trainer's own step in bf16; the images are random latents on the device.

    Args:
        network: taken over.
        name: its name in the registry.
        rows: images per step.
        device: of network and images.
        compiler: backend for the blocks, or None.
    """

    def __init__(self, network: Network, name: str, rows: int, device: torch.device, compiler: str | None) -> None:
        settings: dict[str, Any] = {"learn_sigma": network.out_channels != network.in_channels}
        objective = Objective(network, create_diffusion(**settings), autocast=torch.bfloat16)
        config = TrainConfig(model=name, global_batch_size=rows, precision="bf16", vae="none")
        inputs = make_inputs(network, rows, device)
        shape = (network.in_channels, network.input_size, network.input_size)
        nothing = ArrayImages(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int64), ["none"], flip=False, seed=0)
        self.world = World(0, 1, device)
        self.setup = Setup(config, nothing, None, Pixels(), shape, objective, 1, settings)
        self.batch = Batch(inputs.x, inputs.y, torch.arange(rows, device=device))
        if compiler is not None:
            network.compile_blocks(compiler)
        self.predicted_memory = predict_memory(self.setup, self.world)["peak"]
        self.trainer = Trainer(self.setup, self.world, None, None)

    def run(self, steps: int) -> Tensor:
        """Several steps without waiting in between, as in training; returns the first one's gradient norm."""
        return [self.step() for _ in range(steps)][0]

    def step(self) -> Tensor:
        """One training step; returns the norm of its gradient, on the device."""
        step, rows = self.trainer.state.step, len(self.batch.y)
        draws = self.setup.objective.draw(step, rows, self.setup.latent_shape, self.world.device)
        self.trainer.state.step += 1
        return self.trainer.train_step(step, [(self.batch, draws)])


class Measurement(NamedTuple):
    """A group of cases that are prepared, timed and freed together."""

    group: str
    cases: Callable[[], list[Case]]
    rounds: int


def training_case(sizes: Sizes, rows: int, steps: int, device: torch.device, compiler: str | None) -> Case:
    """Training at one batch size, as it is (None) or compiled."""
    network = filled_network(sizes.model, device)
    name = f"bf16, batch {rows}"
    return Case(
        f"{name}, blocks compiled" if compiler else name,
        lambda: Training(network, sizes.model, rows, device, compiler),
        lambda training: training.run(steps),
        outcome=lambda training, norm: [norm],
        reference=name if compiler else None,
        tolerance=BF16,
        flop=3 * steps * forward_flop(network, rows),
        images=steps * rows,
        precision="bf16",
        predicted_memory=lambda training: training.predicted_memory,
    )


def forward_case(sizes: Sizes, device: torch.device, dtype: torch.dtype | None, compiler: str | None) -> Case:
    """The forward pass: float32 (None) or autocast, compiled or not."""
    network = filled_network(sizes.model, device)
    inputs = make_inputs(network, sizes.rows, device)
    reference = f"fp32, {sizes.rows} rows"
    name = f"{'fp32' if dtype is None else 'bf16 autocast'}, {sizes.rows} rows{', blocks compiled' if compiler else ''}"
    return Case(
        name,
        lambda: compile_blocks(network, compiler) if compiler else network,
        torch.no_grad()(lambda made: forward(made, inputs, dtype)),
        outcome=lambda made, result: [result],
        reference=None if name == reference else reference,
        tolerance=BF16,
        flop=forward_flop(network, sizes.rows),
        images=sizes.rows,
        precision="fp32" if dtype is None else "bf16",
    )


def alone(make: Callable[[], Case]) -> list[Case]:
    """A group of one case, so that nothing else takes up memory."""
    return [make()]


def measurements(sizes: Sizes, device: torch.device, compiler: str | None) -> Iterator[Measurement]:
    """What is measured, most wanted first; networks are made when their turn comes."""
    side, bf16 = sizes.gemm_side, torch.bfloat16
    yield Measurement("peak", lambda: gemm_cases(device, [(side, side, side)]), sizes.rounds)
    for kind in dict.fromkeys((None, compiler)):
        for rows, steps, rounds in sizes.train:
            make = partial(training_case, sizes, rows, steps, device, kind)
            yield Measurement("training", partial(alone, make), rounds)
    for dtype, kind in dict.fromkeys(((None, None), (bf16, None), (bf16, compiler))):
        make = partial(forward_case, sizes, device, dtype, kind)
        yield Measurement("forward", partial(alone, make), sizes.rounds)
    for cases in sampling_groups(sizes.model, sizes.drawn, sizes.steps, device, compiler):
        yield Measurement("sampling", cases, min(SAMPLING_ROUNDS, sizes.rounds))
    for group, cases in family_groups(
        sizes.model.removeprefix("DiT-"), sizes.drawn, sizes.family_steps, device, compiler
    ):
        yield Measurement(group, cases, min(SAMPLING_ROUNDS, sizes.rounds))
    yield Measurement("optimizer", lambda: optimizer_cases(filled_network(sizes.model, device)), sizes.rounds)
    rounds = min(EVALUATOR_ROUNDS, sizes.rounds)
    yield Measurement(EVALUATOR, lambda: evaluator_cases(device, sizes.evaluator), rounds)


def comparable(cases: Sequence[Case], known: Mapping[str, Sequence[Tensor]]) -> list[Case]:
    """The cases, those without a reference whose reference was lost to memory or time."""
    there = {*known, *(case.name for case in cases)}
    return [case if case.reference in there else replace(case, reference=None) for case in cases]


def measure_all(
    wanted: Iterator[Measurement], device: torch.device, clock: Clock, deadline: float
) -> tuple[list[Row], list[str]]:
    """Runs measurements one after the other.

    Returns:
        Rows, and a word on each that did not fit into memory or time.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    known: dict[str, Sequence[Tensor]] = {}
    for number, (group, cases, rounds) in enumerate(wanted, start=1):
        if time.monotonic() > deadline:
            skipped.append(f"{group} (measurement {number}): the time is up")
            continue
        try:
            rows += measure(group, comparable(cases(), known), rounds, clock, known=known, device=device)
        except torch.cuda.OutOfMemoryError:
            skipped.append(f"{group} (measurement {number}): out of memory")
        except UserError as error:  # one disagreement must not cost the other results
            skipped.append(f"{group} (measurement {number}): {error}")
        print(f"{number}: {group} done", file=sys.stderr, flush=True)
        if group == "optimizer":
            known.clear()
        gc.collect()  # a network and its compiled blocks refer to each other
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, skipped


def run_gpu_tests() -> str:
    """The tests marked gpu, from the files that have any: others may need packages that are not here."""
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


def file_stem(device_name: str, date: datetime.date) -> str:
    """Name of the results: "NVIDIA H200", 1 May -> "nvidia-h200-2026-05-01"."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}-{date.isoformat()}"


def as_text(document: dict[str, Any]) -> str:
    """The Markdown file."""
    facts = "".join(f"\n{name}: {value:.2%}" for name, value in document["sampling"].items())
    if document["evaluator_seconds"] is not None:
        facts += (
            f"\nevaluating {document['settings']['evaluator']['samples']:,} images, extrapolated, without reading: "
        )
        facts += f"{document['evaluator_seconds']:.1f} s"
    return f"{headline(document)}\n\nTests marked gpu: {document['gpu_tests']}{facts}\n\n{markdown(document)}\n"


def main(argv: Sequence[str]) -> None:
    """Tests, measures, writes the JSON and the table."""
    config = parse_config(GpuReportConfig, argv, program="gpu_report.py", description=__doc__.split("\n")[0])
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
    sizes, compiler = (SMOKE, "eager") if config.smoke else (FULL, find_compiler(device))
    rows, skipped = measure_all(measurements(sizes, device, compiler), device, clock, deadline)
    if compiler is None:
        skipped.append("compiled blocks: Triton is not installed")
    facts, lacking = sampling_facts(sizes.model, device, sizes.drawn, sizes.steps, sizes.spec, deadline)
    skipped += lacking
    settings = {"smoke": config.smoke, "seconds": config.seconds, **sizes._asdict()}
    settings["evaluator"] = dataclasses.asdict(sizes.evaluator)
    document = report(settings, machine, rows, skipped) | {"gpu_tests": tests, "sampling": facts}
    document["evaluator_seconds"] = extrapolated_seconds(rows, sizes.evaluator)
    write_report(document, path)
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(as_text(document))
    print(as_text(document))


if __name__ == "__main__":
    sys.exit(run(main, "gpu_report.py"))
