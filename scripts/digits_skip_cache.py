"""Samples digits with Skip-Cache at several intervals, scores them, and prints quality beside executed multiply-adds.

    python scripts/digits_skip_cache.py --ckpt skip/0003000.safetensors plain/0003000.safetensors

Checkpoints of the same model are taken as seeds of it: the table shows their mean and, in brackets, the smallest and
the largest. All networks get the same noise and remember tokens at the same place, `--cache-depth` blocks from the end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.digits import NUM_CLASSES, load_digits
from data.pixels import to_uint8
from diffusion import GaussianDiffusion, ImageNoise, create_diffusion, guided, sample_loop, skip_cache
from diffusion.sampling import Sampler
from evaluator.digits import score_digits
from models import Network, TimeConvention
from models.loading import restore
from models.skip_dit import default_cache_depth
from runtime.checkpoint import Checkpoint, read_checkpoint
from runtime.config import flag_name, parse_config, setting, to_dict
from runtime.errors import UserError, blame, run
from runtime.files import atomic_path, check_writable

BATCH = 250
SAMPLERS: dict[str, Callable[[GaussianDiffusion, TimeConvention], Sampler]] = {
    "ddim": lambda process, convention: process.ddim(clip_denoised=True, convention=convention),
    "ddpm": lambda process, convention: process.ancestral(clip_denoised=True, convention=convention),
}


@dataclass(frozen=True)
class CachedDigitsConfig:
    """Settings of digits_skip_cache.py."""

    ckpt: tuple[Path, ...] = setting((), "checkpoints of train.py, trained on the digits (required)")
    cache_interval: tuple[int, ...] = setting((2, 3, 4, 5, 6), "intervals N, beside no caching")
    cache_depth: int | None = setting(None, "blocks kept at an end; a quarter of the depth, and 4 at most")
    num_samples: int = setting(1000, "digits per checkpoint and interval, of all classes in turn")
    sampler: str = setting("ddim", "DDIM, or ancestral sampling", tuple(SAMPLERS))
    num_sampling_steps: str = setting("ddim50", "step spec")
    cfg_scale: float = setting(1.1, "guidance scale; 1 is none")
    seed: int = setting(0, "seed of the noise")
    output_dir: Path = setting(Path("results/digits_skip_dit"), "where the table goes, as Markdown and JSON")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if not self.ckpt:
            raise ValueError("--ckpt: required; scripts/digits_skip_dit.sh trains some")
        if self.num_samples < 4:
            raise ValueError(f"--num-samples {self.num_samples}: scores need at least 4")
        if not 1 <= self.cfg_scale < math.inf:
            raise ValueError(f"--cfg-scale {self.cfg_scale}: must be at least 1 (1 is no guidance), and finite")
        if min(self.cache_interval, default=1) < 1:
            raise ValueError(f"{flag_name('cache_interval')} {min(self.cache_interval)}: must be at least 1")
        with blame(f"--num-sampling-steps {self.num_sampling_steps}"):
            create_diffusion(self.num_sampling_steps)


@dataclass(frozen=True)
class CachedScores:
    """One checkpoint sampled with one interval.

    Attributes:
        model: registry name.
        ckpt: file.
        interval: N; None without caching.
        multiply_adds: executed for one image, both rows of guidance counted.
        accuracy: share that the independent classifier takes for the digit asked for.
        frechet_distance: to the training digits.
        recall: of the training digits.
        psnr: against the samples without caching, in dB; None without caching, or where they are equal.
    """

    model: str
    ckpt: str
    interval: int | None
    multiply_adds: int
    accuracy: float
    frechet_distance: float
    recall: float
    psnr: float | None


def open_digits_network(path: Path, cache_depth: int | None) -> tuple[str, Network, Checkpoint]:
    """Name, network that keeps state, and checkpoint.

    Raises:
        UserError: if the file is not a digits checkpoint of train.py, or its family keeps no state.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.meta is None or tuple(checkpoint.meta["data"]["image_shape"]) != (1, 8, 8):
        raise UserError(f"--ckpt {path}: not a checkpoint of train.py that was trained on the digits")
    settings = checkpoint.meta["model"]
    kept = default_cache_depth(settings.get("depth", 1)) if cache_depth is None else cache_depth
    return settings["name"], restore(checkpoint, f"--ckpt {path}", cache_depth=kept), checkpoint


def draw(
    network: Network, sampler: Sampler, refresh: tuple[bool, ...], config: CachedDigitsConfig
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Digits (N, 8, 8, 1) uint8 of all classes in turn, and their labels (N,) int64."""
    labels = torch.arange(config.num_samples) % NUM_CLASSES
    prepared = network.for_sampling(sampler.times)
    null_class = network.null_class if config.cfg_scale > 1 else None
    batches = []
    for rows in torch.arange(config.num_samples).split(BATCH):
        noise = ImageNoise(config.seed, rows.tolist(), (1, 8, 8))
        denoise = guided(prepared, labels[rows], null_class, config.cfg_scale)
        batches.append(to_uint8(sample_loop(denoise, sampler, noise.initial(), refresh, noise)))
    return torch.cat(batches).numpy(), labels.numpy()


def psnr(images: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> float | None:
    """Peak signal-to-noise ratio in dB over all pixels; None for equal images."""
    error = float(np.mean((images.astype(np.float64) - reference) ** 2))
    return 10 * math.log10(255**2 / error) if error else None


def score(path: Path, config: CachedDigitsConfig) -> list[CachedScores]:
    """Samples one checkpoint without caching and with every interval."""
    name, network, checkpoint = open_digits_network(path, config.cache_depth)
    assert checkpoint.meta is not None
    process = {key: value for key, value in checkpoint.meta["process"].items() if key != "name"}
    sampler = SAMPLERS[config.sampler](create_diffusion(config.num_sampling_steps, **process), network.time_convention)
    train, test = load_digits("train"), load_digits("test")
    rows: list[CachedScores] = []
    reference = None
    for interval in (None, *config.cache_interval):
        refresh = skip_cache(network, sampler.times, interval or 1)
        images, labels = draw(network, sampler, refresh, config)
        reference = images if reference is None else reference
        scores = score_digits(images, labels, train=train, test=test)
        assert scores.accuracy is not None
        rows.append(
            CachedScores(
                model=name,
                ckpt=str(path),
                interval=interval,
                multiply_adds=network.executed_multiply_adds(refresh) * (2 if config.cfg_scale > 1 else 1),
                accuracy=scores.accuracy,
                frechet_distance=scores.frechet_distance,
                recall=scores.recall,
                psnr=None if interval is None else psnr(images, reference),
            )
        )
        print(f"{path}: {'no caching' if interval is None else f'N = {interval}'} done", file=sys.stderr)
    return rows


def table(rows: Sequence[CachedScores]) -> str:
    """A row for every model and interval, seeds drawn together."""
    columns: dict[str, tuple[Callable[[CachedScores], float | None], str]] = {
        "recognised": (lambda row: row.accuracy, ".3f"),
        "Frechet distance": (lambda row: row.frechet_distance, ".2f"),
        "recall": (lambda row: row.recall, ".3f"),
        "PSNR to uncached, dB": (lambda row: row.psnr, ".1f"),
    }
    lines = [
        f"| model | N | M multiply-adds | fewer by | {' | '.join(columns)} |",
        f"|---|---|---:|---:|{'---|' * len(columns)}",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model]
        uncached = next(row.multiply_adds for row in of_model if row.interval is None)
        for interval in dict.fromkeys(row.interval for row in of_model):
            seeds = [row for row in of_model if row.interval == interval]
            cost = seeds[0].multiply_adds
            shown = [spread([value(row) for row in seeds], form) for value, form in columns.values()]
            lines.append(
                f"| {model} | {interval or 'uncached'} | {cost / 1e6:,.1f} | {uncached / cost:.2f} x "
                f"| {' | '.join(shown)} |"
            )
    return "\n".join(lines)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean, and in brackets the smallest and the largest of several; empty where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{sum(known) / len(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ({min(known):{form}} to {max(known):{form}})"


def main(argv: Sequence[str]) -> None:
    """Parses flags, samples, scores, prints and writes the table."""
    config = parse_config(CachedDigitsConfig, argv, program="digits_skip_cache.py", description=__doc__.split("\n")[0])
    check_writable(config.output_dir / f"skip_cache_{config.sampler}.json", "--output-dir")
    for path in config.ckpt:
        open_digits_network(path, config.cache_depth)  # all of them, before any work
    rows = [row for path in config.ckpt for row in score(path, config)]
    text = table(rows)
    document: dict[str, Any] = {"settings": to_dict(config), "rows": [dataclasses.asdict(row) for row in rows]}
    for suffix, content in (("json", json.dumps(document, indent=2)), ("md", text)):
        with atomic_path(config.output_dir / f"skip_cache_{config.sampler}.{suffix}") as temporary:
            temporary.write_text(content + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(run(main, "digits_skip_cache.py"))
