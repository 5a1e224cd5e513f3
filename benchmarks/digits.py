"""Digits drawn from checkpoints in every way that saves work, scored, and their work counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusion.refresh import takes_cache_depth

from benchmarks.counting import SamplingCost
from data.digits import NUM_CLASSES, load_digits
from data.pixels import Images, to_uint8
from diffusion import PUBLISHED_PROCESS
from evaluator.digits import DigitsScores, score_digits
from models import create_model, family_of, model_config
from models.skip_dit import default_cache_depth
from runtime import distributed
from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError, blame
from sampling.config import SAMPLERS, SamplingConfig
from sampling.pipeline import Pipeline

BATCH = 250


class Protocol(NamedTuple):
    """How a process is sampled where nobody says: as the scripts that train for it were tuned."""

    sampler: str
    scale: float


PROTOCOLS = {"gaussian": Protocol("ddim", 1.1), "flow": Protocol("euler", 1.0)}


@dataclass(frozen=True)
class Subject:
    """A network trained on the digits.

    Attributes:
        path: checkpoint of train.py.
        name: model, and whatever else sets its training apart; subjects of one name are seeds of it.
        seed: of its training.
        process: that it was trained under.
        target: share of the blocks' work that its routers were trained for; None without routers.
        reuse: flags without which it keeps no state that evaluations could reuse; None where nothing makes it.
    """

    path: Path
    name: str
    seed: int
    process: str
    target: float | None
    reuse: Mapping[str, Any] | None


def open_subject(path: Path, cache_depth: int | None = None) -> Subject:
    """Looks at a checkpoint.

    Args:
        path: of the file.
        cache_depth: blocks at an end that a cached evaluation runs; a quarter of the depth, and 4 at most.

    Raises:
        UserError: if it is not one of train.py's, trained on the digits; or so many blocks cannot be kept.
    """
    meta = read_checkpoint(path).meta
    if meta is None or tuple(meta["data"]["image_shape"]) != (1, 8, 8):
        raise UserError(f"--ckpt {path}: not a checkpoint of train.py that was trained on the digits")
    settings, trained = dict(meta["model"]), meta.get("train", {})
    model, process = settings.pop("name"), meta["process"]["name"]
    family, target = family_of(model).network, trained.get("flops_target")
    reuse: dict[str, Any] | None = None
    if takes_cache_depth(model_config(model, **settings)):
        reuse = {"cache_depth": cache_depth or default_cache_depth(settings["depth"])}
        with blame(f"--ckpt {path}"):
            model_config(model, **{**settings, **reuse})
    else:
        with torch.device("meta"):
            reuse = {} if create_model(model, **settings).keeps_state else None
    name = model if process == PUBLISHED_PROCESS[family.time_convention] else f"{model}, {process}"
    if target is not None:
        name += f", target {target:g}"
    return Subject(path, name, trained.get("global_seed", 0), process, target, reuse)


def find_checkpoints(places: Sequence[Path]) -> Iterator[Path]:
    """Files as they are; of folders the last checkpoint of every run in them."""
    for place in places:
        if not place.is_dir():
            yield place
            continue
        runs = sorted({path.parent for path in place.rglob("checkpoints/*.safetensors")})
        yield from (max(run.glob("*.safetensors")) for run in runs)


def newest(subjects: Sequence[Subject]) -> list[Subject]:
    """Of several runs of one name and seed the last one, in the order of names as they first came."""
    kept: dict[tuple[str, int], Subject] = {(subject.name, subject.seed): subject for subject in subjects}
    names = list(dict.fromkeys(subject.name for subject in subjects))
    return sorted(kept.values(), key=lambda subject: names.index(subject.name))


class Way(NamedTuple):
    """How a subject is sampled.

    Attributes:
        steps: of the sampler.
        interval: evaluations from one that computes the kept state to the next; 1 where all do.
        config: the settings.
    """

    steps: int
    interval: int
    config: SamplingConfig

    @property
    def label(self) -> str:
        """In tables."""
        name = "R" if self.config.refresh_rate else "N"
        reuse = "" if self.interval == 1 else f", {name} = {self.interval}"
        scale = "" if self.config.cfg_scale == 1 else f", scale {self.config.cfg_scale:g}"
        return f"{self.config.sampler}, {self.steps} steps{scale}{reuse}"


def ways(subject: Subject, steps: Sequence[int], intervals: Sequence[int], **flags: Any) -> list[Way]:
    """All ways to sample a subject: with ever fewer steps; and with the first number of them, reusing state.

    Under Gaussian diffusion state is reused by Skip-Cache's rule, under a flow where measured similarities say that it
    costs least.

    Args:
        subject: to be sampled.
        steps: numbers of them.
        intervals: of reuse, for subjects that can; each above 1.
        **flags: fields of `SamplingConfig`; sampler and guidance scale are `PROTOCOLS`' where they are None.

    Raises:
        ValueError: for flags that do not fit.
    """
    protocol = PROTOCOLS[subject.process]
    own: dict[str, Any] = {"sampler": protocol.sampler, "cfg_scale": protocol.scale}
    fixed = {**own, **{name: value for name, value in flags.items() if value is not None}}

    if SAMPLERS[fixed["sampler"]].process != subject.process:
        raise ValueError(f"--sampler {fixed['sampler']}: the network was trained under {subject.process!r}")

    def way(count: int, interval: int, **reuse: Any) -> Way:
        spec = f"ddim{count}" if fixed["sampler"] == "ddim" else str(count)
        return Way(count, interval, SamplingConfig(ckpt=subject.path, num_sampling_steps=spec, **fixed, **reuse))

    found = [way(count, 1) for count in steps]
    if subject.reuse is None:
        return found
    flow = subject.process == "flow"
    for interval in intervals:
        rate = {"refresh_rate": interval, "sharing": "cheapest"} if flow else {"cache_interval": interval}
        found.append(way(steps[0], interval, **subject.reuse, **rate))
    return found


@dataclass(frozen=True)
class Result:
    """One way of one subject.

    Attributes:
        name: of the subject.
        seed: of its training.
        target: of its routers; None without.
        way: label.
        steps: of the sampler.
        interval: of reuse; 1 without.
        evaluations: of the network, as the sampler counts them.
        full: of them, that reused nothing.
        multiply_adds: executed for one image, all its evaluations and both rows of guidance.
        dense: the same if nothing had been left out.
        block_ratio: share of the blocks' attention and MLP that ran.
        scores: of the digits.
        psnr: to the digits of the subject's first way, in dB; None for these.
    """

    name: str
    seed: int
    target: float | None
    way: str
    steps: int
    interval: int
    evaluations: int
    full: int
    multiply_adds: float
    dense: float
    block_ratio: float
    scores: DigitsScores
    psnr: float | None


def draw(config: SamplingConfig, count: int, seed: int) -> tuple[Images, Sequence[bool], SamplingCost]:
    """Digits (N, 8, 8, 1) uint8 of all classes in turn; which evaluations reused nothing; and what all of them took."""
    device = distributed.choose_device(config.device)
    pipeline, labels = Pipeline(config, device), torch.arange(count) % NUM_CLASSES
    with SamplingCost().listening() as cost:
        latents = [pipeline.denoise(seed, rows.tolist(), labels[rows]) for rows in torch.arange(count).split(BATCH)]
    images = to_uint8(pipeline.decode(torch.cat(latents))).cpu().numpy()
    return images, pipeline.refresh or [True] * len(pipeline.sampler.times), cost


def examine(subject: Subject, all_ways: Sequence[Way], count: int, seed: int) -> Iterator[Result]:
    """Samples one subject in all ways, from the same noise; the first way is what the others are compared with."""
    splits = {"train": load_digits("train"), "test": load_digits("test")}
    labels, reference = np.arange(count) % NUM_CLASSES, None
    for way in all_ways:
        images, refresh, cost = draw(way.config, count, seed)
        yield Result(
            name=subject.name,
            seed=subject.seed,
            target=subject.target,
            way=way.label,
            steps=way.steps,
            interval=way.interval,
            evaluations=len(refresh),
            full=sum(refresh),
            multiply_adds=cost.executed.total() / count,
            dense=cost.dense.total() / count,
            block_ratio=cost.block_ratio,
            scores=score_digits(images, labels, **splits),
            psnr=None if reference is None else psnr(images, reference),
        )
        reference = images if reference is None else reference


def psnr(images: Images, reference: Images) -> float | None:
    """Peak signal-to-noise ratio in dB over all pixels; None for equal images."""
    error = float(np.mean((images.astype(np.float64) - reference) ** 2))
    return 10 * math.log10(255**2 / error) if error else None
