"""Shows how smooth deep features are, over weights and over time: what decides whether they can be reused.

    python scripts/feature_smoothness.py --ckpt plain/0003000.safetensors skip/0003000.safetensors

(a) All weight matrices are moved along two random directions, by strengths alpha and beta in [-1, 1]; the surface is
the cosine similarity of the deep tokens with those of the unmoved network, at an early and at a late sampling step. The
rows of a direction are as long as the matrix's own, times `--strength`. The paper's script is not released, and how it
normalises is not said: surfaces can be compared with one another, not with the paper's.

(b) Every block's output tokens are compared from one step to the next, and the output of a step that reuses state with
the output that it would have had without.

Everything is measured along a trajectory that reuses nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from runtime.config import parse_config, setting, to_dict
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from benchmarks.plotting import pyplot, save_figure
from diffusion import ImageNoise, create_diffusion, sample_loop, skip_cache
from diffusion.sampling import Sampler
from models import ModelOutput, Network, model_config
from models.loading import restore, settings_of
from models.skip_dit import default_cache_depth
from runtime import distributed
from runtime.checkpoint import read_checkpoint
from runtime.errors import blame, run
from runtime.files import atomic_path, check_writable

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SmoothnessConfig:
    """Settings of feature_smoothness.py."""

    ckpt: tuple[Path, ...] = setting((), "checkpoints of DiT and Skip-DiT: ours, or official files (required)")
    cache_depth: int | None = setting(None, "blocks kept at an end; a quarter of the depth, and 4 at most")
    cache_interval: tuple[int, ...] = setting((2, 3, 4), "intervals at which reused outputs are compared")
    num_sampling_steps: str = setting("250", "step spec of the ancestral sampler")
    at: tuple[int, int] | None = setting(None, "the early and the late step of the surfaces, from 1; 10 and the last")
    strength: float = setting(0.1, "norm of a whole disturbance, as a share of the weights' own")
    points: int = setting(11, "points of the surface on each axis")
    num_images: int = setting(10, "images to average over, of all classes in turn")
    seed: int = setting(0, "seed of noise and directions")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    output_dir: Path = setting(Path("results/feature_smoothness"), "where pictures and numbers go")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if not self.ckpt:
            raise ValueError("--ckpt: required; scripts/digits_skip_dit.sh trains some")
        for flag, value, least in (("--points", self.points, 2), ("--num-images", self.num_images, 1)):
            if value < least:
                raise ValueError(f"{flag} {value}: must be at least {least}")
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"--strength {self.strength}: must be positive and finite")
        with blame(f"--num-sampling-steps {self.num_sampling_steps}"):
            create_diffusion(self.num_sampling_steps)
        for step in self.at or ():
            if not 1 <= step <= self.steps:
                raise ValueError(f"--at {step}: there are steps 1 to {self.steps}")

    @property
    def steps(self) -> int:
        """How many steps are sampled."""
        return create_diffusion(self.num_sampling_steps).num_timesteps

    @property
    def surfaces_at(self) -> tuple[int, int]:
        """--at, or the tenth step and the last."""
        return self.at or (min(10, self.steps), self.steps)


class Subject(NamedTuple):
    """A network under examination, with its sampler and labels.

    Attributes:
        name: in tables and pictures.
        network: keeps state.
        sampler: ancestral.
        y: (N,) int64 labels.
        depth: 1-based number of the block whose tokens are remembered.
    """

    name: str
    network: Network
    sampler: Sampler
    y: Tensor
    depth: int


class Findings(NamedTuple):
    """What is found out about one subject.

    Attributes:
        surfaces: step -> (points, points), similarity by alpha (rows) and beta.
        between_steps: (blocks, steps - 1) cosine similarity of a block's tokens with those of the step before.
        change: like `between_steps`, norm of the difference over the norm of the tokens.
        reused: interval -> (steps,) norm of the output's error over its norm; NaN at steps that refresh.
    """

    surfaces: dict[int, Array]
    between_steps: Array
    change: Array
    reused: dict[int, Array]


def open_subject(path: Path, config: SmoothnessConfig, device: torch.device) -> Subject:
    """Restores a network so that it keeps state.

    Raises:
        UserError: if the file does not hold one that can.
    """
    checkpoint, source = read_checkpoint(path), f"--ckpt {path}"
    name, settings = settings_of(checkpoint, source)
    depth = getattr(model_config(name, **settings), "depth", 1)
    kept = default_cache_depth(depth) if config.cache_depth is None else config.cache_depth
    network = restore(checkpoint, source, cache_depth=kept).to(device)
    process, pixels = {}, False
    if checkpoint.meta is not None:
        process = {key: value for key, value in checkpoint.meta["process"].items() if key != "name"}
        pixels = checkpoint.meta["data"]["vae"] == "none"
    sampler = create_diffusion(config.num_sampling_steps, **process).ancestral(
        clip_denoised=pixels, convention=network.time_convention
    )
    with blame(f"--cache-interval {' '.join(map(str, config.cache_interval))}"):
        for interval in config.cache_interval:
            skip_cache(network, sampler.times, interval)
    y = torch.arange(config.num_images, device=device) % network.num_classes
    return Subject(name, network, sampler, y, depth - kept)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity over the last dimension, averaged over all others."""
    return float(functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def relative_change(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| over the last dimension, averaged over all others."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean())


def trajectory(subject: Subject, seed: int) -> list[Tensor]:
    """Images in front of every step, (N, C, H, W) each, along a run that reuses nothing."""
    network = subject.network
    shape = (network.in_channels, network.input_size, network.input_size)
    noise = ImageNoise(seed, range(len(subject.y)), shape, subject.y.device)
    path = [noise.initial()]
    prepared = network.for_sampling(subject.sampler.times)

    def denoise(x: Tensor, t: float | Tensor, state: Any = None, /) -> ModelOutput:
        return prepared(x, t, subject.y)

    sample_loop(denoise, subject.sampler, path[0], None, noise, lambda i, x, out: path.append(x))
    return path[:-1]


# ----------------------------------------------------------------------------------------------------------------------
# (a) over weights


def random_direction(network: Network, generator: torch.Generator) -> dict[str, Tensor]:
    """A random disturbance of every weight matrix, each row as long as the matrix's own row; nothing for vectors."""
    direction = {}
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 or name == "pos_embed":
            continue
        rows = parameter.flatten(start_dim=1)
        drawn = torch.randn(rows.shape, generator=generator).to(rows)
        drawn *= rows.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        direction[name] = drawn.view_as(parameter)
    return direction


@torch.no_grad()
def surface(subject: Subject, x: Tensor, t: float, *, points: int, strength: float, seed: int) -> Array:
    """Similarity of the deep tokens at (x, t) with the unmoved network's: (points, points), by alpha and beta."""
    network, block = subject.network, subject.depth
    generator = torch.Generator().manual_seed(seed)
    first, second = (random_direction(network, generator) for _ in range(2))
    weights = dict(network.named_parameters())

    def deep(alpha: float, beta: float) -> Tensor:
        moved = {n: weights[n] + strength * (alpha * first[n] + beta * second[n]) for n in first}
        return functional_call(network, moved, (x, t, subject.y), {"features_at": block}).features

    reference = deep(0.0, 0.0)
    axis = np.linspace(-1, 1, points)
    return np.array([[cosine(deep(alpha, beta), reference) for beta in axis] for alpha in axis])


# ----------------------------------------------------------------------------------------------------------------------
# (b) over time


@torch.no_grad()
def block_outputs(subject: Subject, path: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Output tokens of every block, step by step."""
    network, seen = subject.network, dict[int, Tensor]()

    def keep(number: int) -> Callable[..., None]:
        return lambda module, arguments, output: seen.update({number: output})

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(network.blocks)]
    try:
        for x, t in zip(path, subject.sampler.times, strict=True):
            network(x, t, subject.y)
            yield [seen[i] for i in range(len(network.blocks))]
    finally:
        for handle in handles:
            handle.remove()


def between_steps(subject: Subject, path: Sequence[Tensor]) -> tuple[Array, Array]:
    """Similarity and relative change of every block's tokens from step to step: (blocks, steps - 1) each."""
    similar: list[list[float]] = []
    change: list[list[float]] = []
    before: list[Tensor] | None = None
    for outputs in block_outputs(subject, path):
        if before is not None:
            similar.append([cosine(now, then) for now, then in zip(outputs, before, strict=True)])
            change.append([relative_change(then, now) for now, then in zip(outputs, before, strict=True)])
        before = outputs
    return np.array(similar).T, np.array(change).T


@torch.no_grad()
def reused_error(subject: Subject, path: Sequence[Tensor], interval: int) -> Array:
    """Relative error of each step's output when it reuses the state of the last refresh; NaN where it refreshes."""
    network, times = subject.network, subject.sampler.times
    errors, state = [], None
    for x, t, fresh in zip(path, times, skip_cache(network, times, interval), strict=True):
        full = network(x, t, subject.y)
        if fresh:
            state = full.state
        reused = network(x, t, subject.y, state).sample.flatten(start_dim=1)
        errors.append(float("nan") if fresh else relative_change(reused, full.sample.flatten(start_dim=1)))
    return np.array(errors)


def examine(subject: Subject, config: SmoothnessConfig) -> Findings:
    """Both analyses of one network."""
    path = trajectory(subject, config.seed)
    places = {step: (path[step - 1], subject.sampler.times[step - 1]) for step in config.surfaces_at}
    surfaces = {
        step: surface(subject, x, t, points=config.points, strength=config.strength, seed=config.seed)
        for step, (x, t) in places.items()
    }
    similar, change = between_steps(subject, path)
    return Findings(surfaces, similar, change, {n: reused_error(subject, path, n) for n in config.cache_interval})


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and numbers


def draw_surfaces(found: dict[str, Findings], path: Path) -> None:
    """A row for each step with a scale of its own, a column for each network."""
    plt = pyplot()
    steps = list(next(iter(found.values())).surfaces)
    size = (4.2 * len(found), 3.6 * len(steps))
    figure, axes = plt.subplots(
        len(steps), len(found), figsize=size, squeeze=False, subplot_kw={"projection": "3d"}, layout="constrained"
    )
    for row, step in zip(axes, steps, strict=True):
        lowest = min(float(f.surfaces[step].min()) for f in found.values())
        for axis, (name, findings) in zip(row, found.items(), strict=True):
            values = findings.surfaces[step]
            alpha, beta = np.meshgrid(*2 * (np.linspace(-1, 1, len(values)),), indexing="ij")
            axis.plot_surface(alpha, beta, values, cmap="viridis", vmin=lowest, vmax=1)
            axis.set_zlim(lowest, 1)
            axis.tick_params(axis="z", pad=10)
            axis.set_title(f"{name}, step {step}", fontsize=10)
            axis.set_xlabel(r"$\alpha$")
            axis.set_ylabel(r"$\beta$")
    figure.suptitle("Similarity of deep tokens under disturbed weights", fontsize=12)
    save_figure(figure, path)


def draw_similarity(found: dict[str, Findings], path: Path) -> None:
    """Above: change of every block's tokens from step to step; below: error of outputs that reuse state."""
    plt = pyplot()
    figure, axes = plt.subplots(
        2, len(found), figsize=(5 * len(found), 6.4), squeeze=False, sharey="row", layout="constrained"
    )
    changes = np.concatenate([f.change.ravel() for f in found.values()])
    scale = plt.matplotlib.colors.LogNorm(max(changes.min(), 1e-4), changes.max())
    for axis, (name, findings) in zip(axes[0], found.items(), strict=True):
        image = axis.imshow(
            findings.change, aspect="auto", origin="lower", cmap="magma", norm=scale, interpolation="nearest",
            extent=(1.5, findings.change.shape[1] + 1.5, 0.5, len(findings.change) + 0.5),
        )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
    axes[0, 0].set_ylabel("block")
    figure.colorbar(image, ax=axes[0], label="change of tokens since the step before")
    for axis, findings in zip(axes[1], found.values(), strict=True):
        for interval, errors in findings.reused.items():
            steps = np.flatnonzero(~np.isnan(errors))
            axis.plot(steps + 1, errors[steps], linewidth=1.2, label=f"N = {interval}")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylabel("error of the output")
    axes[1, 0].legend(frameon=False)
    figure.suptitle("Tokens from step to step, and outputs that reuse them", fontsize=12)
    save_figure(figure, path)


def summary(found: dict[str, Findings], deep: dict[str, int]) -> str:
    """One Markdown table: a row for each network."""
    first = next(iter(found.values()))
    header = ["network"]
    for step in first.surfaces:
        header += [f"mean similarity, step {step}", "smallest"]
    header += ["change of remembered tokens a step", *(f"error of reused outputs, N = {n}" for n in first.reused)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, findings in found.items():
        cells = [name]
        for values in findings.surfaces.values():
            cells += [f"{values.mean():.4f}", f"{values.min():.4f}"]
        cells.append(f"{findings.change[deep[name] - 1].mean():.4f}")
        cells += [f"{np.nanmean(errors):.4f}" for errors in findings.reused.values()]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(found: dict[str, Findings], config: SmoothnessConfig) -> str:
    """All numbers, to six decimals; null where a step refreshes."""

    def plain(values: Array) -> Any:
        return json.loads(json.dumps(np.round(values, 6).tolist()).replace("NaN", "null"))

    networks = {
        name: {
            "surfaces": {step: plain(values) for step, values in f.surfaces.items()},
            "between_steps": plain(f.between_steps),
            "change": plain(f.change),
            "reused": {interval: plain(errors) for interval, errors in f.reused.items()},
        }
        for name, f in found.items()
    }
    return json.dumps({"settings": to_dict(config), "networks": networks})


def main(argv: Sequence[str]) -> None:
    """Parses flags, examines every network, writes pictures and numbers."""
    config = parse_config(SmoothnessConfig, argv, program="feature_smoothness.py", description=__doc__.split("\n")[0])
    check_writable(config.output_dir / "smoothness.json", "--output-dir")
    device = distributed.choose_device(config.device)
    subjects = [open_subject(path, config, device) for path in config.ckpt]
    found, deep = {}, {}
    for number, subject in enumerate(subjects):
        name = subject.name if subject.name not in found else f"{subject.name} ({number})"
        found[name], deep[name] = examine(subject, config), subject.depth

    pictures = [config.output_dir / "surfaces.png", config.output_dir / "similarity.png"]
    draw_surfaces(found, pictures[0])
    draw_similarity(found, pictures[1])
    with atomic_path(config.output_dir / "smoothness.json") as temporary:
        temporary.write_text(as_json(found, config) + "\n")
    print(summary(found, deep))
    print("Pictures: " + ", ".join(map(str, pictures)))


if __name__ == "__main__":
    sys.exit(run(main, "feature_smoothness.py"))
