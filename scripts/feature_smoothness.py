"""Show how smooth deep features are, over weights and over time, on which their reuse depends.

    python scripts/feature_smoothness.py --ckpt plain/0003000.safetensors skip/0003000.safetensors
    python scripts/feature_smoothness.py --ckpt DiT-XL-2-256x256 --num-sampling-steps 50 --num-images 2

(a) All weight matrices are moved along two random directions, by strengths alpha and beta in [-1, 1]; the surface is
the cosine similarity of the deep tokens with those of the unmoved network, at an early and at a late sampling step. The
rows of a direction are as long as the matrix's own, times `--strength`. The paper's script is not released, and its
normalisation not described: surfaces can be compared with one another, not with the paper's.

(b) Every block's output tokens are compared from one step to the next, and the output of a step that reuses state with
the output that it would have had without.

Everything is measured along a trajectory that reuses nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from benchmarks.plotting import pyplot, save_figure, style
from benchmarks.report import aligned
from benchmarks.timing import check_at_least
from diffusion import PROCESSES, create_diffusion, make_sampler, skip_cache
from diffusion.guidance import guided
from diffusion.sampling import ImageNoise, Sampler, evaluations, sample_loop
from models import Network, model_config
from models.loading import build_network, resolve_checkpoint
from models.skip_dit import default_cache_depth
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.documents import to_dict
from runtime.errors import UserError, error_prefix, run
from runtime.files import atomic_path, check_writable
from runtime.settings import setting

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SmoothnessSettings:
    """Settings of feature_smoothness.py."""

    ckpt: tuple[Path, ...] = setting(
        (), "checkpoints of DiT and Skip-DiT: ours, official files, or names of released ones", shown="required"
    )
    cache_depth: int | None = setting(None, "blocks kept at an end", shown="a quarter of the depth, and 4 at most")
    cache_interval: tuple[int, ...] = setting((2, 3, 4), "intervals at which reused outputs are compared")
    num_sampling_steps: str = setting("250", "step spec of the ancestral sampler")
    at: tuple[int, int] | None = setting(
        None, "the early and the late step of the surfaces, from 1", shown="10 and the last"
    )
    strength: float = setting(0.1, "norm of a whole disturbance, as a share of the weights' own")
    points: int = setting(11, "points of the surface on each axis")
    num_images: int = setting(10, "images to average over, of all classes in turn")
    seed: int = setting(0, "seed of noise and directions")
    device: Literal["cuda", "cpu"] | None = setting(None, "where to compute", shown="cuda if there is one")
    output_dir: Path = setting(Path("results/feature_smoothness"), "folder of pictures and numbers")

    def __post_init__(self) -> None:
        if not self.ckpt:
            raise ValueError("--ckpt: required; scripts/digits_skip_dit.sh trains some")
        check_at_least(self, 2, "points")
        check_at_least(self, 1, "num_images")
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"--strength {self.strength}: must be positive and finite")
        for step in self.at or ():
            if not 1 <= step <= self.steps:
                raise ValueError(f"--at {step}: there are steps 1 to {self.steps}")

    @property
    def steps(self) -> int:
        """Number of sampling steps."""
        with error_prefix(f"--num-sampling-steps {self.num_sampling_steps}"):
            return create_diffusion(self.num_sampling_steps).num_timesteps

    @property
    def surfaces_at(self) -> tuple[int, int]:
        """--at, or the tenth step and the last."""
        return self.at or (min(10, self.steps), self.steps)


class TrainedModel(NamedTuple):
    """A network that is examined, with its sampler and labels."""

    name: str  # in tables and pictures
    network: Network  # keeps state
    sampler: Sampler  # ancestral
    y: Tensor  # (N,) int64 labels
    depth: int  # 1-based number of the block with the tokens that are kept


class Findings(NamedTuple):
    """Results for one model."""

    surfaces: dict[int, Array]  # step -> (points, points), similarity by alpha (rows) and beta
    between_steps: Array  # (blocks, steps - 1) cosine similarity of a block's tokens with those of the step before
    change: Array  # like `between_steps`, norm of the difference over the norm of the tokens
    # interval -> (steps,) norm of the output's error over its norm; NaN at steps that compute state
    reused: dict[int, Array]


def open_model(path: Path, config: SmoothnessSettings, device: torch.device) -> TrainedModel:
    """Load a network so that it keeps state.

    Raises:
        UserError: If the file does not hold one that can.
    """
    info, weights = resolve_checkpoint(path)
    if info.process != "gaussian":
        raise UserError(f"--ckpt {path}: was trained under {info.process!r}; the ancestral sampler needs 'gaussian'")
    depth = model_config(info.model, **info.config).depth
    kept = default_cache_depth(depth) if config.cache_depth is None else config.cache_depth
    network = build_network(info, weights, device=device, cache_depth=kept)
    process = PROCESSES[info.process](**info.process_settings).make(network.out_channels != network.sample_shape[-3])
    sampler = make_sampler("ddpm", process, config.num_sampling_steps, pixels=info.encoder == "none")
    with error_prefix(f"--cache-interval {' '.join(map(str, config.cache_interval))}"):
        for interval in config.cache_interval:
            skip_cache(network, sampler, interval)
    y = torch.arange(config.num_images, device=device) % network.config.num_classes
    return TrainedModel(info.model, network, sampler, y, depth - kept)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity over the last dimension, averaged over all others."""
    return float(functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def relative_change(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| over the last dimension, averaged over all others."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean())


def trajectory(model: TrainedModel, seed: int) -> list[Tensor]:
    """Images before every step, (N, C, H, W) each, along a run that reuses nothing."""
    noise = ImageNoise(seed, range(len(model.y)), model.network.sample_shape, model.y.device)
    times, path = model.sampler.times, [noise.initial()]
    denoise = guided(model.network.for_sampling(times), {"y": model.y})

    def keep(i: int, x: Tensor, out: object) -> None:
        path.append(x)

    sample_loop(denoise, model.sampler, path[0], evaluations(times), noise_fn=noise, on_step=keep)
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
        moved = torch.randn(rows.shape, generator=generator).to(rows)
        moved *= rows.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
        direction[name] = moved.view_as(parameter)
    return direction


@torch.no_grad()
def surface(model: TrainedModel, x: Tensor, t: float, *, points: int, strength: float, seed: int) -> Array:
    """Similarity of the deep tokens at (x, t) with the unmoved network's: (points, points), by alpha and beta."""
    network, block = model.network, model.depth
    generator = torch.Generator().manual_seed(seed)
    first, second = (random_direction(network, generator) for _ in range(2))
    weights = dict(network.named_parameters())

    def deep(alpha: float, beta: float) -> Tensor:
        disturbed = {n: weights[n] + strength * (alpha * first[n] + beta * second[n]) for n in first}
        out = functional_call(network, disturbed, (x, t), {"y": model.y, "features_at": (block,)})
        return out.features[block]

    reference = deep(0.0, 0.0)
    axis = np.linspace(-1, 1, points)
    return np.array([[cosine(deep(alpha, beta), reference) for beta in axis] for alpha in axis])


# ----------------------------------------------------------------------------------------------------------------------
# (b) over time


@torch.no_grad()
def block_outputs(model: TrainedModel, path: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Output tokens of every block, step by step."""
    numbers = range(1, len(model.network.blocks) + 1)
    for x, t in zip(path, model.sampler.times, strict=True):
        features = model.network(x, t, y=model.y, features_at=numbers).features
        yield [features[number] for number in numbers]


def between_steps(model: TrainedModel, path: Sequence[Tensor]) -> tuple[Array, Array]:
    """Similarity and relative change of every block's tokens from step to step: (blocks, steps - 1) each."""
    similar: list[list[float]] = []
    change: list[list[float]] = []
    before: list[Tensor] | None = None
    for outputs in block_outputs(model, path):
        if before is not None:
            similar.append([cosine(now, then) for now, then in zip(outputs, before, strict=True)])
            change.append([relative_change(then, now) for now, then in zip(outputs, before, strict=True)])
        before = outputs
    return np.array(similar).T, np.array(change).T


@torch.no_grad()
def reused_error(model: TrainedModel, path: Sequence[Tensor], interval: int) -> Array:
    """Relative error of each step's output when it reuses the last computed state; NaN where it computes it."""
    network, errors, state = model.network, [], None
    refresh = skip_cache(network, model.sampler, interval)
    for x, t, fresh in zip(path, model.sampler.times, refresh, strict=True):
        full = network(x, t, y=model.y)
        if fresh:
            state = full.state
        reused = network(x, t, y=model.y, state=state).sample.flatten(start_dim=1)
        errors.append(float("nan") if fresh else relative_change(reused, full.sample.flatten(start_dim=1)))
    return np.array(errors)


def examine(model: TrainedModel, config: SmoothnessSettings) -> Findings:
    """Both analyses of one network."""
    path = trajectory(model, config.seed)
    surfaces = {}
    for step in config.surfaces_at:
        x, t = path[step - 1], model.sampler.times[step - 1]
        surfaces[step] = surface(model, x, t, points=config.points, strength=config.strength, seed=config.seed)
    similar, change = between_steps(model, path)
    return Findings(surfaces, similar, change, {n: reused_error(model, path, n) for n in config.cache_interval})


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and numbers


def plot_surfaces(findings: dict[str, Findings], path: Path) -> None:
    """Draw a row for each step with its own scale, a column for each network."""
    plt = pyplot()
    steps = list(next(iter(findings.values())).surfaces)
    size = (4.2 * len(findings), 3.6 * len(steps))
    figure, axes = plt.subplots(
        len(steps), len(findings), figsize=size, squeeze=False, subplot_kw={"projection": "3d"}, layout="constrained"
    )
    for row, step in zip(axes, steps, strict=True):
        lowest = min(float(each.surfaces[step].min()) for each in findings.values())
        for axis, (name, each) in zip(row, findings.items(), strict=True):
            values = each.surfaces[step]
            alpha, beta = np.meshgrid(*2 * (np.linspace(-1, 1, len(values)),), indexing="ij")
            axis.plot_surface(alpha, beta, values, cmap="viridis", vmin=lowest, vmax=1)
            axis.set_zlim(lowest, 1)
            axis.tick_params(axis="z", pad=10)
            axis.set_title(f"{name}, step {step}", fontsize=10)
            axis.set_xlabel(r"$\alpha$")
            axis.set_ylabel(r"$\beta$")
    figure.suptitle("Similarity of deep tokens under disturbed weights", fontsize=12)
    save_figure(figure, path)


def plot_similarity(findings: dict[str, Findings], path: Path) -> None:
    """Draw the change of every block's tokens from step to step, and the error of outputs that reuse state."""
    plt = pyplot()
    figure, axes = plt.subplots(
        2, len(findings), figsize=(5 * len(findings), 6.4), squeeze=False, sharey="row", layout="constrained"
    )
    changes = np.concatenate([each.change.ravel() for each in findings.values()])
    scale = plt.matplotlib.colors.LogNorm(max(changes.min(), 1e-4), changes.max())
    for (above, below), (name, each) in zip(axes.T, findings.items(), strict=True):
        blocks, steps = each.change.shape
        image = above.imshow(
            each.change, aspect="auto", origin="lower", cmap="magma", norm=scale, interpolation="nearest",
            extent=(1.5, steps + 1.5, 0.5, blocks + 0.5),
        )  # fmt: skip
        above.set_title(name, fontsize=10)
        above.set_xlabel("step")
        for interval, errors in each.reused.items():
            reusing = np.flatnonzero(~np.isnan(errors))
            below.plot(reusing + 1, errors[reusing], linewidth=1.2, label=f"N = {interval}")
        style(below, "step", "")
    axes[0, 0].set_ylabel("block")
    axes[1, 0].set_ylabel("error of the output")
    axes[1, 0].legend(frameon=False)
    figure.colorbar(image, ax=axes[0], label="change of tokens since the step before")
    figure.suptitle("Tokens from step to step, and outputs that reuse them", fontsize=12)
    save_figure(figure, path)


def summary(findings: dict[str, Findings], deep: dict[str, int]) -> str:
    """One Markdown table: a row for each network."""
    first = next(iter(findings.values()))
    titles, rows = ["network"], []
    for step in first.surfaces:
        titles += [f"mean similarity, step {step}", "smallest"]
    titles += ["change of kept tokens a step", *(f"error of reused outputs, N = {n}" for n in first.reused)]
    for name, each in findings.items():
        numbers = [number for values in each.surfaces.values() for number in (values.mean(), values.min())]
        numbers += [each.change[deep[name] - 1].mean(), *map(np.nanmean, each.reused.values())]
        rows.append([name, *(f"{number:.4f}" for number in numbers)])
    return aligned(titles, rows)


def as_json(findings: dict[str, Findings], config: SmoothnessSettings) -> str:
    """All numbers, to six decimals; null where a step computes state."""

    def plain(values: Array) -> object:
        return json.loads(json.dumps(np.round(values, 6).tolist()).replace("NaN", "null"))

    networks = {
        name: {
            "surfaces": {step: plain(values) for step, values in each.surfaces.items()},
            "between_steps": plain(each.between_steps),
            "change": plain(each.change),
            "reused": {interval: plain(errors) for interval, errors in each.reused.items()},
        }
        for name, each in findings.items()
    }
    return json.dumps({"settings": to_dict(config), "networks": networks})


def main(argv: Sequence[str]) -> None:
    """Parse flags, examine every network, write pictures and numbers."""
    config = parse_config(SmoothnessSettings, argv, program="feature_smoothness.py", doc=__doc__)
    check_writable(config.output_dir / "smoothness.json", "--output-dir")
    device = choose_device(config.device)
    findings, deep = {}, {}
    for number, model in enumerate([open_model(path, config, device) for path in config.ckpt]):
        name = model.name if model.name not in findings else f"{model.name} ({number})"
        findings[name], deep[name] = examine(model, config), model.depth

    pictures = [config.output_dir / "surfaces.png", config.output_dir / "similarity.png"]
    plot_surfaces(findings, pictures[0])
    plot_similarity(findings, pictures[1])
    with atomic_path(config.output_dir / "smoothness.json") as temporary:
        temporary.write_text(as_json(findings, config) + "\n")
    print(summary(findings, deep))
    print("Pictures: " + ", ".join(map(str, pictures)))


if __name__ == "__main__":
    sys.exit(run(main, "feature_smoothness.py"))
