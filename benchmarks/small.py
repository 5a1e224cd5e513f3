"""Small images and clips sampled from checkpoints in every way that saves work, scored, and their work counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.counting import SamplingCost
from benchmarks.moving_digits import ClipScorer, ClipScores
from data.encoders import Pixels
from data.moving_digits import MovingDigits
from data.pixels import Images
from data.small import load_small
from data.writers import writer_of
from diffusion import SAMPLERS
from diffusion.caching import takes_cache_depth
from evaluator.small import DIGITS, SETS, SmallScorer, SmallScores, SmallSet
from evaluator.small.sets import SPLITS
from models import family_of, model_config
from models.loading import CheckpointInfo, build_network, resolve_checkpoint
from models.skip_dit import default_cache_depth
from runtime.errors import UserError, error_prefix
from runtime.given import Given
from runtime.json_file import Json
from runtime.settings import Values
from sampling.config import KINDS, SamplingSettings
from sampling.pipeline import Pipeline
from sampling.run import PreparedRun

BATCH = 250

Scorer = SmallScorer | ClipScorer
Scores = SmallScores | ClipScores

# Default sampler and guidance scale of a process: those for which the training scripts were tuned
PROTOCOLS = {"gaussian": ("ddim", 1.1), "flow": ("euler", 1.0)}


class TrainedModel(NamedTuple):
    """A network trained on a set that has scores."""

    path: Path  # checkpoint of train.py
    name: str  # model, and what else distinguishes its training; models of one name are seeds of it
    seed: int  # of its training
    target: float | None  # share of the blocks' work that its routers were trained for; None without routers
    pipeline: Pipeline  # its network, so built that it keeps state if anything makes it
    scorer: Scorer  # of the set that it was trained on


def open_model(path: Path, cache_depth: int | None = None, device: torch.device | str = "cpu") -> TrainedModel:
    """Open a checkpoint.

    Args:
        path: File.
        cache_depth: Blocks at an end that a cached evaluation runs, of clips pairs of them; None is a quarter of the
            depth, and 4 at most, of clips one pair.
        device: Device of the network.

    Raises:
        UserError: If it is not one of train.py's, trained on a set that has scores; or so many blocks cannot be kept.
    """
    info, weights = resolve_checkpoint(path)
    scorer = find_scorer(info)
    if info.meta is None or scorer is None:
        raise UserError(
            f"--ckpt {path}: not a checkpoint that train.py trained on the digits, moving digits or Fashion-MNIST"
        )
    config, fields = model_config(info.model, **info.config), Values()
    if takes_cache_depth(config):
        usual = 1 if isinstance(scorer, ClipScorer) else default_cache_depth(config.depth)
        fields["cache_depth"] = cache_depth or usual
    network = build_network(info, weights, device=device, **fields)
    pipeline = Pipeline(network, info, Pixels(), Given(SamplingSettings(model=info.model), KINDS))
    # Earlier versions kept the settings of training without sections
    train: Json = info.meta.get("train", {})
    target = info.meta.get("loss", train).get("flops_target")
    name = info.model if info.process == family_of(info.model).process else f"{info.model}, {info.process}"
    if target is not None:
        name += f", target {target:g}"
    return TrainedModel(path, name, train.get("optimization", train).get("global_seed", 0), target, pipeline, scorer)


def find_scorer(info: CheckpointInfo) -> Scorer | None:
    """The scorer of the set that a checkpoint was trained on; None if it is another, or unknown.

    Raises:
        UserError: If the files of the set are gone.
    """
    if info.meta is None:
        return None
    if info.image_shape == (1, 8, 8):
        return open_scorer(DIGITS, None)
    if info.meta.get("train", {}).get("data", {}).get("dataset") == "moving-digits" and info.image_shape:
        frames, _, side, _ = info.image_shape
        return open_clip_scorer(frames, side)
    digest = info.meta.get("data", {}).get("digest")
    for images in SETS.values():
        if digest and images.digest == digest:
            with error_prefix(f"--ckpt {info.path}: its training data"):
                return open_scorer(images, Path(info.meta["train"]["data"]["data_path"]))
    return None


@cache
def open_scorer(images: SmallSet, path: Path | None) -> SmallScorer:
    """Open a set once for all networks that were trained on it; a ValueError if its files are missing or damaged."""
    train, test = (load_small(images.name, split, path) for split in SPLITS)
    return SmallScorer(train, test, images)


@cache
def open_clip_scorer(frames: int, side: int) -> ClipScorer:
    """The scorer of moving digits of a size, for all networks of it."""
    train, test = (MovingDigits(split, frames=frames, side=side) for split in SPLITS)
    return ClipScorer(train, test)


def find_checkpoints(places: Sequence[Path]) -> Iterator[Path]:
    """Files as they are; of folders the last checkpoint of every run in them."""
    for place in places:
        if not place.is_dir():
            yield place
            continue
        runs = sorted({path.parent for path in place.rglob("checkpoints/*.safetensors")})
        yield from (max(run.glob("*.safetensors")) for run in runs)


def newest(models: Sequence[TrainedModel]) -> list[TrainedModel]:
    """The last one of several runs of one name and seed, in the order in which names first came."""
    kept = {(model.name, model.seed): model for model in models}
    names = list(dict.fromkeys(model.name for model in models))
    return sorted(kept.values(), key=lambda model: names.index(model.name))


class SamplingSetup(NamedTuple):
    """One way to sample from a model."""

    steps: int  # of the sampler
    interval: int  # evaluations from one that computes the kept state to the next; 1 if all do
    settings: Mapping[str, object]  # as `Pipeline.prepare` takes them

    @property
    def label(self) -> str:
        """Name in tables."""
        scale = self.settings["cfg_scale"]
        reuse = f", {'R' if 'sharing_interval' in self.settings else 'N'} = {self.interval}"
        guidance = "" if scale == 1 else f", scale {scale:g}"
        return f"{self.settings['sampler']}, {self.steps} steps{guidance}{'' if self.interval == 1 else reuse}"


def sampling_setups(
    model: TrainedModel, steps: Sequence[int], intervals: Sequence[int], **settings: object
) -> list[SamplingSetup]:
    """All setups of a model: with ever fewer steps; and with the first number of them, reusing state.

    Under Gaussian diffusion state is reused by Skip-Cache's rule, in a flow where measured similarities say that it
    costs least. Settings are those of `Pipeline.prepare`; without sampler and guidance scale those of `PROTOCOLS`.

    Raises:
        UserError: For settings that do not fit.
    """
    process = model.pipeline.info.process
    fixed: Values = dict(zip(("sampler", "cfg_scale"), PROTOCOLS[process], strict=True))
    fixed |= {name: value for name, value in settings.items() if value is not None}
    if SAMPLERS[fixed["sampler"]].process != process:
        raise UserError(f"--ckpt {model.path}: --sampler {fixed['sampler']}: the network was trained under {process!r}")

    def setup(count: int, interval: int = 1, **reuse: object) -> SamplingSetup:
        spec = f"ddim{count}" if fixed["sampler"] == "ddim" else str(count)
        return SamplingSetup(count, interval, {"num_sampling_steps": spec, **fixed, **reuse})

    setups = [setup(count) for count in steps]
    for each in setups:
        model.pipeline.prepare(**each.settings)
    for interval in intervals if model.pipeline.network.keeps_state else ():
        rule = {"sharing_interval": interval, "sharing": "cheapest"}
        setups.append(setup(steps[0], interval, **(rule if process == "flow" else {"cache_interval": interval})))
    return setups


@dataclass(frozen=True)
class Result:
    """Result of one setup of one model."""

    name: str  # of the model
    seed: int  # of its training
    target: float | None  # of its routers; None without
    setup: str  # its label
    steps: int  # of the sampler
    interval: int  # of reuse; 1 without
    evaluations: int  # of the network (NFE), as the sampler counts them
    full: int  # evaluations that reused nothing
    macs: float  # executed MACs of one image, all its evaluations and both rows of guidance
    dense: float  # the same if nothing had been left out
    block_ratio: float  # executed share of the blocks' attention and MLP
    scores: Scores
    psnr: float | None  # peak signal-to-noise ratio to the images of the model's first setup, in dB; None for these


def sample_images(
    pipeline: Pipeline, run: PreparedRun, labels: npt.NDArray[np.int64], seed: int
) -> tuple[Images, SamplingCost]:
    """Sample images (N, H, W, 1) or clips (N, F, H, W, 1), uint8, of these labels (N,), and count the work."""
    classes = torch.from_numpy(labels)
    with SamplingCost().listening() as cost:
        latents = [
            pipeline.denoise(run, seed, rows.tolist(), {"y": classes[rows]})
            for rows in torch.arange(len(classes)).split(BATCH)
        ]
    writer = writer_of(pipeline.image_shape)
    return writer.to_uint8(pipeline.decode(torch.cat(latents))).cpu().numpy(), cost


def examine(model: TrainedModel, setups: Sequence[SamplingSetup], count: int, seed: int) -> Iterator[Result]:
    """Sample from one model by all setups, from the same noise; the others are compared with the first."""
    labels, reference = model.scorer.labels_in_turn(count), None
    for setup in setups:
        run = model.pipeline.prepare(**setup.settings)
        images, cost = sample_images(model.pipeline, run, labels, seed)
        yield Result(
            name=model.name,
            seed=model.seed,
            target=model.target,
            setup=setup.label,
            steps=setup.steps,
            interval=setup.interval,
            evaluations=len(run.table),
            full=sum(evaluation.refresh for evaluation in run.table),
            macs=cost.executed.total() / count,
            dense=cost.dense.total() / count,
            block_ratio=cost.block_ratio,
            scores=model.scorer.score(images, labels),
            psnr=None if reference is None else psnr(images, reference),
        )
        reference = images if reference is None else reference


def psnr(images: Images, reference: Images) -> float | None:
    """Peak signal-to-noise ratio in dB over all pixels; None for equal images."""
    error = float(np.mean((images.astype(np.float64) - reference) ** 2))
    return 10 * math.log10(255**2 / error) if error else None
