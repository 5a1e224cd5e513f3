"""Times the network, a training step, optimizer and average, and the loaders, each beside a plain baseline.

    python scripts/benchmark.py --model DiT-S/2 --batch-size 8
    python scripts/benchmark.py --only forward,train_step --against ../DiT     # a checkout of facebookresearch/DiT

Cases that are compared run in turn (A B C, A B C, ...) in one process on the same weights and inputs, and must agree
before they are timed. A time is the median over rounds: of CPU time on one thread, which neighbours on the machine
disturb little; of wall time on several threads; of CUDA events on a GPU. The peak is that of matrix products
(`torch.nn.functional.linear`) timed in the same rounds.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import Network, create_model, model_config
from runtime.config import parse_config, setting, to_dict
from runtime.ema import EMA
from runtime.errors import UserError, blame, run
from runtime.files import atomic_path, check_writable

GROUPS = ("forward", "train_step", "optimizer", "loader")
DATASHEET = {"H100": 989.4e12, "H200": 989.4e12}  # dense bf16 FLOP/s, by a word of the device's name
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
EMA_DECAY, LEARNING_RATE = 0.9999, 1e-4
WARM_UPS = 2
# Largest max|difference| / max|reference| of a tensor. A bf16 product keeps 8 bits, and errors of the layers add up.
SAME, SAME_GRADIENT, BF16 = 1e-5, 1e-4, 0.1

Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of benchmark.py."""

    model: str = setting("DiT-S/2", "name in the registry (models.list_models())")
    batch_size: int = setting(8, "images per forward pass and training step")
    rounds: int = setting(7, "timed runs of each case; the median counts")
    only: str = setting(",".join(GROUPS), "groups to run, separated by commas")
    against: Path | None = setting(None, "also time a checkout of facebookresearch/DiT (its models.py needs timm)")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    threads: int = setting(1, "CPU threads")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("batch_size", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        unknown = sorted(set(self.groups) - set(GROUPS))
        if unknown:
            raise ValueError(f"--only {self.only}: unknown group {unknown[0]!r}; choose from {', '.join(GROUPS)}")
        if self.against is not None and not {"forward", "train_step"} & set(self.groups):
            raise ValueError(f"--against {self.against}: has no effect without the forward or train_step group")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU here")

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups to run, in the order given."""
        return tuple(name.strip() for name in self.only.split(","))


# ----------------------------------------------------------------------------------------------------------------------
# Cases and the one timer


@dataclass(frozen=True)
class Case:
    """One thing to be timed.

    Attributes:
        name: in tables, unique within a group.
        prepare: makes the state, once.
        run: the work, given the state.
        outcome: (state, result of the first run) -> tensors that must agree with the reference's; None: not compared.
        reference: name of the case that it is compared with; it stands before this one.
        tolerance: largest relative error of `outcome`.
        flop: of one run; 0 where nobody counts.
        images: of one run; 0 where that means nothing.
        precision: whose GEMM peak is the limit, "fp32" or "bf16".
        is_peak: a bare matrix product, which sets that peak.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    outcome: Callable[[Any, Any], Sequence[Tensor]] | None = None
    reference: str | None = None
    tolerance: float = SAME
    flop: float = 0.0
    images: int = 0
    precision: str = "fp32"
    is_peak: bool = False


@dataclass(frozen=True)
class Row:
    """What was measured of one case; `error` is against the reference, `memory` the CUDA peak in bytes."""

    group: str
    name: str
    seconds: float
    rounds: list[float]
    flop: float
    images: int
    precision: str
    is_peak: bool
    reference: str | None
    error: float | None
    memory: int | None = None


def interleave(runs: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Times A B C, A B C, ...: what slows the machine for a while then slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            times[name].append(clock(work))
    return times


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest max|difference| / max|wanted| over pairs of tensors; NaN where a number is not finite.

    Raises:
        ValueError: if shapes differ.
    """
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.shape != theirs.shape:  # broadcasting would hide it
            raise ValueError(f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}")
        ours, theirs = ours.detach().float(), theirs.detach().float()
        scale = float(theirs.abs().max())
        error = float((ours - theirs).abs().max()) / (scale or 1.0)
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def check(case: Case, outcomes: Mapping[str, Sequence[Tensor]]) -> float | None:
    """Error of a case against its reference.

    Raises:
        UserError: if they compute different things, so that comparing their times would mean nothing.
    """
    if case.reference is None:
        return None
    error = relative_error(outcomes[case.name], outcomes[case.reference])
    if not error <= case.tolerance:
        raise UserError(
            f"{case.name} differs from {case.reference} by {error:.1e} of its largest value, "
            f"more than the {case.tolerance:.0e} allowed; times are not compared"
        )
    return error


def measure(
    group: str,
    cases: Sequence[Case],
    rounds: int,
    clock: Clock,
    *,
    known: dict[str, Sequence[Tensor]] | None = None,
    device: torch.device | None = None,
) -> list[Row]:
    """Prepares cases, compares their first results, warms up, and times them in turn.

    Args:
        group: name for the rows.
        cases: references first.
        rounds: timed runs of each.
        clock: seconds of one call.
        known: outcomes of earlier calls by name, to compare with; added to.
        device: where peak memory is read, if it is a GPU and there is a single case.

    Raises:
        UserError: if a case does not agree with its reference.
    """
    outcomes = {} if known is None else known
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float | None] = {}
    for case in cases:
        state = case.prepare()
        result = case.run(state)
        if case.outcome is not None:
            outcomes[case.name] = case.outcome(state, result)
        errors[case.name] = check(case, outcomes)
        runs[case.name] = partial(case.run, state)
    interleave(runs, WARM_UPS - 1, clock)  # the first run above was one too
    watched = device if device is not None and device.type == "cuda" and len(cases) == 1 else None
    if watched is not None:
        torch.cuda.reset_peak_memory_stats(watched)
    times = interleave(runs, rounds, clock)
    memory = None if watched is None else torch.cuda.max_memory_allocated(watched)
    return [
        Row(
            group=group,
            seconds=statistics.median(times[case.name]),
            rounds=times[case.name],
            error=errors[case.name],
            memory=memory,
            **{name: getattr(case, name) for name in ("name", "flop", "images", "precision", "is_peak", "reference")},
        )
        for case in cases
    ]


def process_seconds(work: Callable[[], Any]) -> float:
    """CPU time of a call, over all threads of the process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_seconds(work: Callable[[], Any]) -> float:
    """Time of a call on the GPU, between two events of its stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def choose_clock(device: torch.device, threads: int) -> tuple[str, Clock]:
    """Name and clock: CPU time says nothing about the speed of several threads, nor of a GPU."""
    if device.type == "cuda":
        return "CUDA events", cuda_seconds
    return ("process CPU time", process_seconds) if threads == 1 else ("wall time", wall_seconds)


# ----------------------------------------------------------------------------------------------------------------------
# What is timed: networks


class Inputs(NamedTuple):
    """Noisy images, times, labels, and what the prediction is compared with."""

    x: Tensor
    t: Tensor
    y: Tensor
    target: Tensor


def filled_network(name: str, device: torch.device) -> Network:
    """A network in eval mode whose zero-initialised weights are drawn too: else its output would be 0.

    In eval mode the official network drops no labels; ours leaves that to the objective. Nothing else depends on it.
    """
    torch.manual_seed(0)
    with device:
        network = create_model(name)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return network.eval()


def make_inputs(network: Network, rows: int, device: torch.device) -> Inputs:
    """Random inputs of the right shapes, the same for every call."""
    generator = torch.Generator(device).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=device)
    side = network.input_size
    t = torch.randint(1000, (rows,), generator=generator, device=device)
    y = torch.randint(network.num_classes, (rows,), generator=generator, device=device)
    t = t if network.time_convention == "index" else t / 1000
    return Inputs(draw(rows, network.in_channels, side, side), t, y, draw(rows, network.out_channels, side, side))


def forward(network: nn.Module, inputs: Inputs, autocast: torch.dtype | None = None) -> Tensor:
    """The prediction of ours or of an official network."""
    with torch.autocast(inputs.x.device.type, autocast, enabled=autocast is not None):
        out = network(inputs.x, inputs.t, inputs.y)
    return out if isinstance(out, Tensor) else out.sample


def forward_flop(network: Network, rows: int) -> float:
    """Operations of a forward pass; a multiply-add is two."""
    return 2.0 * sum(network.multiply_adds().values()) * rows


def find_compiler(device: torch.device) -> str | None:
    """What torch.compile can use: "inductor" with a C++ compiler, or Triton on a GPU; None without."""
    if device.type == "cuda":
        return "inductor" if importlib.util.find_spec("triton") else None
    return "inductor" if any(shutil.which(name) for name in ("g++", "clang++", "c++")) else None


def compile_blocks(network: Network, backend: str) -> Network:
    """Compiles each block for the shapes it will see, as train.py --compile does; identical blocks share the code."""
    for block in network.blocks:
        block.compile(dynamic=False, backend=backend)
    return network


def gemm_cases(device: torch.device, shapes: Iterable[tuple[int, int, int]]) -> list[Case]:
    """Bare linear maps in both precisions: (rows, inputs, outputs) each."""

    def prepare(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)

    return [
        Case(
            f"GEMM {precision}, {m} x {k} x {n}",
            partial(prepare, m, k, n, dtype),
            lambda state: nn.functional.linear(*state),
            flop=2.0 * m * k * n,
            precision=precision,
            is_peak=True,
        )
        for m, k, n in dict.fromkeys(shapes)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]


def peak_cases(network: Network, rows: int, device: torch.device) -> list[Case]:
    """A large square product, and the network's own largest where it has a width and tokens."""
    side = GEMM_SIDE[device.type]
    shapes = [(side, side, side)]
    width, patch = getattr(network.config, "hidden_size", None), getattr(network.config, "patch_size", None)
    if width and patch:
        shapes.append((rows * (network.input_size // patch) ** 2, width, 4 * width))
    return gemm_cases(device, shapes)


def forward_cases(network: Network, inputs: Inputs, peer: nn.Module | None, compiler: str | None) -> list[Case]:
    """The network as it is, in bf16, compiled; the official one in front where it is given."""
    first = "official, fp32" if peer is not None else "fp32"

    def case(name: str, make: Callable[[], nn.Module], autocast: torch.dtype | None = None) -> Case:
        return Case(
            name,
            make,
            torch.no_grad()(lambda made: forward(made, inputs, autocast)),
            outcome=lambda made, result: [result],
            reference=None if name == first else first,
            tolerance=BF16 if autocast else SAME,
            flop=forward_flop(network, len(inputs.x)),
            images=len(inputs.x),
            precision="bf16" if autocast else "fp32",
        )

    cases = [case(first, lambda: peer)] if peer is not None else []
    cases += [case("fp32", lambda: network), case("bf16 autocast", lambda: network, torch.bfloat16)]
    if compiler is not None:
        compiled = partial(_compiled_copy, network, compiler)
        cases.append(case("fp32, blocks compiled", compiled))
        cases.append(case("bf16 autocast, blocks compiled", compiled, torch.bfloat16))
    return cases


def _compiled_copy(network: Network, compiler: str) -> Network:
    return compile_blocks(copy.deepcopy(network), compiler)


# ----------------------------------------------------------------------------------------------------------------------
# What is timed: training


class ParameterwiseEMA:
    """The average as the official train.py keeps it: every named parameter by itself, frozen ones too."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.source, self.network, self.decay = network, copy.deepcopy(network).requires_grad_(False), decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the network."""
        averages = dict(self.network.named_parameters())
        for name, parameter in self.source.named_parameters():
            averages[name].mul_(self.decay).add_(parameter, alpha=1 - self.decay)


class TrainLoop:
    """A training step: mean squared error, AdamW, average.

    Args:
        network: taken over, not copied.
        inputs: the same batch for every step.
        plain: AdamW as it is by default and `ParameterwiseEMA`, as in the official train.py; else fused and foreach.
        autocast: precision of the forward pass; None is float32.
        compiler: backend for the blocks; None leaves them as they are.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Inputs,
        *,
        plain: bool,
        autocast: torch.dtype | None = None,
        compiler: str | None = None,
    ) -> None:
        self.network, self.inputs, self.autocast = network, inputs, autocast
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.trained, plain=plain)
        self.ema = ParameterwiseEMA(network, EMA_DECAY) if plain else EMA(network, EMA_DECAY)
        if compiler is not None:
            assert isinstance(network, Network)
            compile_blocks(network, compiler)

    def step(self) -> Tensor:
        """One step; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = (forward(self.network, self.inputs, self.autocast).float() - self.inputs.target).square().mean()
        loss.backward()
        self.optimizer.step()
        self.ema.update()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """The last step's."""
        return [p.grad for p in self.trained if p.grad is not None]


def make_optimizer(parameters: Iterable[Tensor], *, plain: bool) -> torch.optim.Optimizer:
    """AdamW with the official settings: as PyTorch chooses by itself, or fused."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=None if plain else True)


def train_cases(network: Network, inputs: Inputs, peer: nn.Module | None, compiler: str | None) -> list[Case]:
    """Training steps from the same weights on the same batch; compared by loss and gradients of the first one."""
    first = "official, fp32" if peer is not None else "fp32, plain AdamW and EMA"
    bf16 = torch.bfloat16

    def case(name: str, source: nn.Module, *, plain: bool = False, **options: Any) -> Case:
        return Case(
            name,
            lambda: TrainLoop(copy.deepcopy(source), inputs, plain=plain, **options),
            lambda loop: loop.step(),
            outcome=lambda loop, loss: [loss, *loop.gradients()],
            reference=None if name == first else first,
            tolerance=BF16 if "autocast" in options else SAME_GRADIENT,
            flop=3 * forward_flop(network, len(inputs.x)),
            images=len(inputs.x),
            precision="bf16" if "autocast" in options else "fp32",
        )

    cases = [case(first, peer, plain=True)] if peer is not None else []
    cases.append(case("fp32, plain AdamW and EMA", network, plain=True))
    cases.append(case("fp32, fused AdamW, foreach EMA", network))
    cases.append(case("bf16 autocast, fused AdamW, foreach EMA", network, autocast=bf16))
    if compiler is not None:
        cases.append(case("the same, blocks compiled", network, autocast=bf16, compiler=compiler))
    return cases


def optimizer_cases(network: Network) -> list[Case]:
    """AdamW and the average alone, plain and as the trainer has them."""

    def optimizer(plain: bool) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        trained = [p for p in copy.deepcopy(network).parameters() if p.requires_grad]
        generator = torch.Generator(trained[0].device).manual_seed(2)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter).normal_(std=0.01, generator=generator)
        return make_optimizer(trained, plain=plain), trained

    def average(kind: type[ParameterwiseEMA] | type[EMA[nn.Module]]) -> ParameterwiseEMA | EMA[nn.Module]:
        ahead = copy.deepcopy(network)
        ema = kind(ahead, EMA_DECAY)
        with torch.no_grad():
            for parameter in ahead.parameters():
                parameter.mul_(3.0 if parameter.requires_grad else 1.0)
        return ema

    def averages(ema: Any, _: Any) -> list[Tensor]:
        return [p.clone() for p in ema.network.parameters()]

    def weights(state: tuple[Any, list[Tensor]], _: Any) -> list[Tensor]:
        return [p.detach().clone() for p in state[1]]

    def step(state: tuple[torch.optim.Optimizer, Any]) -> None:
        state[0].step()

    plain, loop = "AdamW, as by default", "EMA, a loop over parameters"
    return [
        Case(plain, partial(optimizer, True), step, weights),
        Case("AdamW, fused", partial(optimizer, False), step, weights, plain),
        Case(loop, partial(average, ParameterwiseEMA), lambda ema: ema.update(), averages),
        Case("EMA, one foreach", partial(average, EMA), lambda ema: ema.update(), averages, loop),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# What is timed: loaders


def loader_cases(folder: Path) -> list[Callable[[], Case]]:
    """Makers of the loaders' cases, in a scratch folder; a maker raises ImportError where a package is missing."""
    return [partial(image_folder_case, folder / "images"), digits_case, partial(latents_case, folder / "latents")]


def image_folder_case(folder: Path, images: int = 8) -> Case:
    """Decode, crop and flip photographs of ImageNet's usual size, about 100 KB each."""
    from PIL import Image

    from data import open_dataset

    (folder / "one").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse) + rng.normal(0, 10, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "one" / f"{number}.jpg", quality=90)
    dataset = open_dataset("imagefolder", folder, 256, 3)
    return Case(
        "JPEG 500 x 375 to 256 pixels",
        lambda: dataset,
        lambda data: [data[0, index] for index in range(images)],
        images=images,
    )


def digits_case(images: int = 256) -> Case:
    """Items of the embedded digits, collated."""
    from torch.utils.data import default_collate

    from data import open_dataset

    dataset = open_dataset("digits", None, None, 1)
    return Case(
        "digits, collated",
        lambda: dataset,
        lambda data: default_collate([data[0, index] for index in range(images)]),
        images=images,
    )


def latents_case(folder: Path, images: int = 256) -> Case:
    """A shuffled batch of stored moments of 256-pixel images, both flips, from memory-mapped shards."""
    from data.latents import Encoded, LatentShards, write_index, write_json, write_shard

    folder.mkdir(parents=True)
    shape, rng = (2, 8, 32, 32), np.random.default_rng(0)
    manifest = {"format": 1, "classes": ["one"], "image_shape": [3, 256, 256], "moments_shape": list(shape)}
    write_json(folder / "manifest.json", {**manifest, "scale": 0.18215, "vae": "none", "encoder_sha256": "0"})
    for number in range(2):
        moments = rng.standard_normal((images, *shape)).astype(np.float16)
        part = Encoded(moments, [0] * images, [f"one/{i}.jpg" for i in range(images)], [])
        write_shard(folder, number, shape, [part])
    write_index(folder, 2)
    keys = [(0, int(index)) for index in rng.permutation(2 * images)[:images]]
    return Case("stored latents, gathered", lambda: LatentShards(folder), lambda data: data.gather(keys), images=images)


def make_all(makers: Iterable[Callable[[], Case]]) -> tuple[list[Case], list[str]]:
    """The cases that can be made here, and a word on each that cannot."""
    cases, skipped = [], []
    for maker in makers:
        try:
            cases.append(maker())
        except ImportError as error:
            function = maker.func if isinstance(maker, partial) else maker
            skipped.append(f"{function.__name__.removesuffix('_case').replace('_', ' ')}: {error}")
    return cases, skipped


# ----------------------------------------------------------------------------------------------------------------------
# The official network


def load_official(folder: Path) -> ModuleType:
    """Imports models.py of an official checkout under a name that cannot meet our `models`.

    Raises:
        UserError: if it is not there, or what it imports is not installed.
    """
    path = folder / "models.py"
    spec = importlib.util.spec_from_file_location("official_dit_models", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--against {folder}: no models.py there; give a checkout of facebookresearch/DiT")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--against {folder}: its models.py needs {error.name}, which is not installed "
            f"(pip install --no-deps {str(error.name).split('.')[0]})"
        ) from error
    return module


def official_network(folder: Path, ours: Network, name: str) -> nn.Module:
    """The official network with our weights.

    Raises:
        UserError: if it cannot be built, or names its weights differently.
    """
    module = load_official(folder)
    try:
        network = module.DiT(**dataclasses.asdict(ours.config))
        network.load_state_dict(ours.state_dict(), strict=True)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"--against {folder}: cannot be given the weights of {name}: {error}") from error
    return network.to(next(ours.parameters()).device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Results


def peaks(rows: Iterable[Row]) -> dict[str, float]:
    """FLOP/s of the fastest matrix product, by precision."""
    found: dict[str, float] = {}
    for row in rows:
        if row.is_peak:
            found[row.precision] = max(found.get(row.precision, 0.0), row.flop / min(row.rounds))
    return found


def datasheet_peak(device_name: str) -> float | None:
    """The maker's dense bf16 FLOP/s, where known."""
    return next((flops for word, flops in DATASHEET.items() if word in device_name), None)


def cpu_info() -> tuple[str, list[str]]:
    """Model of the processor, and which of `CPU_FEATURES` it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return fields.get("model name", platform.machine()), [name for name in CPU_FEATURES if name in flags]


def commit() -> str | None:
    """The checkout's commit, with "+" where tracked files were changed; None where there is no git or no checkout."""
    git = ("git", "-C", str(Path(__file__).resolve().parent))
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine_info(device: torch.device, clock: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu, features = cpu_info()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cpu_features": features,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": commit(),
    }


def report(
    settings: dict[str, Any], machine: dict[str, Any], rows: Sequence[Row], skipped: Sequence[str]
) -> dict[str, Any]:
    """The JSON document of a run: what was measured, and what follows from it."""
    best = peaks(rows)
    datasheet = datasheet_peak(machine["device"])
    seconds = {(row.group, row.name): row.seconds for row in rows}
    results = []
    for row in rows:
        rate, peak = row.flop / row.seconds, best.get(row.precision)
        before = seconds.get((row.group, row.reference)) if row.reference else None
        results.append(
            dataclasses.asdict(row)
            | {
                "flop_per_second": rate or None,
                "peak_fraction": rate / peak if rate and peak else None,
                "datasheet_fraction": rate / datasheet if rate and datasheet and row.precision == "bf16" else None,
                "images_per_second": row.images / row.seconds or None,
                "speedup": before / row.seconds if before else None,
            }
        )
    return {
        "format": 1,
        "settings": settings,
        "machine": machine,
        "peak_flop_per_second": {**best, "bf16_datasheet": datasheet},
        "rows": results,
        "skipped": list(skipped),
    }


def markdown(document: dict[str, Any]) -> str:
    """The results as a Markdown table, a row a case; columns without any number are left out."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "ms": lambda r: f"{r['seconds'] * 1e3:,.2f}",
        "spread": lambda r: f"{(max(r['rounds']) - min(r['rounds'])) / r['seconds']:.0%}",
        "images/s": lambda r: _shown(r["images_per_second"], "{:,.1f}"),
        "GFLOP/s": lambda r: _shown(r["flop_per_second"], "{:,.0f}", 1e-9),
        "of GEMM peak": lambda r: _shown(r["peak_fraction"], "{:.0%}"),
        "of datasheet": lambda r: _shown(r["datasheet_fraction"], "{:.1%}"),
        "peak GB": lambda r: _shown(r["memory"], "{:.1f}", 1e-9),
        "speed-up": lambda r: _shown(r["speedup"], "{:.2f} x"),
        "error": lambda r: _shown(r["error"], "{:.0e}"),
    }
    rows = document["rows"]
    cells = {title: [text(row) for row in rows] for title, text in columns.items()}
    cells = {title: texts for title, texts in cells.items() if any(texts)}
    named = {"group": [r["group"] for r in rows], "case": [r["name"] for r in rows], **cells}
    widths = [max(map(len, [title, *texts])) for title, texts in named.items()]
    rule = ["-" * widths[0], "-" * widths[1], *("-" * (w - 1) + ":" for w in widths[2:])]
    lines = []
    for line in (list(named), rule, *zip(*named.values(), strict=True)):
        left = [text.ljust(width) for text, width in zip(line[:2], widths, strict=False)]
        right = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        lines.append(f"| {' | '.join(left + right)} |")
    return "\n".join([*lines, *(f"\nNot run: {word}" for word in document["skipped"])])


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def headline(document: dict[str, Any]) -> str:
    """One line on the machine, one on its peaks."""
    machine, best = document["machine"], document["peak_flop_per_second"]
    features = f" ({', '.join(machine['cpu_features'])})" if machine["cpu_features"] else ""
    known = [f"{name.replace('_', ' ')} {value / 1e9:,.0f}" for name, value in best.items() if value]
    where = machine["device"] if machine["cuda"] else machine["cpu"] + features
    return (
        f"{where}, {machine['threads']} CPU thread(s), torch {machine['torch']}, {machine['clock']}\n"
        f"Peak in GFLOP/s: {', '.join(known) or 'not measured'}"
    )


def write_report(document: dict[str, Any], path: Path) -> None:
    """Writes the JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# The run


def network_rows(config: BenchmarkConfig, device: torch.device, clock: Clock) -> tuple[list[Row], list[str]]:
    """The groups that need a network."""
    network = filled_network(config.model, device)
    inputs = make_inputs(network, config.batch_size, device)
    peer = official_network(config.against, network, config.model) if config.against else None
    compiler, rows, skipped = find_compiler(device), [], []
    if compiler is None:
        skipped.append("compiled blocks: no C++ compiler (on a GPU: no Triton)")
    makers: dict[str, Callable[[], list[Case]]] = {
        "forward": lambda: forward_cases(network, inputs, peer, compiler) + peak_cases(network, len(inputs.x), device),
        "train_step": lambda: train_cases(network, inputs, peer, compiler) + peak_cases(network, len(inputs.x), device),
        "optimizer": lambda: optimizer_cases(network),
    }
    for group in config.groups:
        if group in makers:
            rows += measure(group, makers[group](), config.rounds, clock)
    return rows, skipped


def loader_rows(rounds: int) -> tuple[list[Row], list[str]]:
    """The loaders, on one CPU thread whatever the device."""
    with tempfile.TemporaryDirectory() as folder:
        cases, skipped = make_all(loader_cases(Path(folder)))
        return measure("loader", cases, rounds, process_seconds), skipped


def main(argv: Sequence[str]) -> None:
    """Parses flags, measures, prints the table, writes the JSON."""
    config = parse_config(BenchmarkConfig, argv, program="benchmark.py", description=__doc__.split("\n")[0])
    with blame(f"--model {config.model}"):
        model_config(config.model)
    if config.output is not None:
        check_writable(config.output, "--output")
    torch.set_num_threads(config.threads)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clock_name, clock = choose_clock(device, config.threads)
    rows, skipped = network_rows(config, device, clock) if set(config.groups) - {"loader"} else ([], [])
    if "loader" in config.groups:
        more_rows, more_skipped = loader_rows(config.rounds)
        rows, skipped = rows + more_rows, skipped + more_skipped
    # Paths are the user's own and say nothing about the numbers
    settings = {**to_dict(config), "against": config.against is not None, "output": None}
    document = report(settings, machine_info(device, clock_name), rows, skipped)
    print(f"{headline(document)}\n\n{markdown(document)}")
    if config.output is not None:
        write_report(document, config.output)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark.py"))
