"""Features of all images of a file, by one process or many.

Each rank takes consecutive whole batches, so that the batch of an image, and with it the last bit of its features, does
not depend on the number of ranks. Pool features are gathered on rank 0 in the order of images (the Inception Score's
splits depend on it). Spatial features are added there in the same order, rank after rank, block by block: their sums
have the bits of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from evaluator.inception.backend import FeatureBackend
from evaluator.npz import BadImageFile, ImageFile
from evaluator.statistics import ROWS_PER_UPDATE, Statistics, StatisticsAccumulator
from runtime import distributed
from runtime.distributed import World
from runtime.tensor_file import read_tensors, write_tensors

T = TypeVar("T")
CACHE_KEY = "features"
CACHE_FORMAT = 3  # of cached features; increase it when their layout changes, or their values for the same images


@dataclass(frozen=True)
class FileFeatures:
    """Features of a file's images.

    Attributes:
        pool: (N, 2048) float32, in the order of images.
        spatial: Statistics of the spatial features; None if they were not asked for, or of a single image.
    """

    pool: Tensor
    spatial: Statistics | None


def extract_features(
    file: ImageFile,
    backend: FeatureBackend,
    count: int,
    *,
    batch_size: int,
    spatial: bool,
    world: World,
    title: str,
    unit: str = "image",
) -> FileFeatures | None:
    """Compute the features of the first images (or clips) of a file; all ranks call it together.

    Args:
        file: File with at least `count` images.
        backend: Network that computes the features.
        count: Number of images, >= 1.
        batch_size: Images at a time.
        spatial: Compute statistics of the spatial features, too.
        world: This rank and the number of ranks.
        title: Title of the progress bar.
        unit: Word for one image or clip.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        UserError: On all ranks, if one finds the file damaged or features that are not finite.
    """
    start, stop = share_of_rank(count, batch_size, world.rank, world.size)
    accumulator = StatisticsAccumulator()
    pool: list[Tensor] = []
    spatial_rows: list[Tensor] = []  # not yet added
    with (
        distributed.raise_on_all_ranks(),
        tqdm(total=count, desc=title, unit=unit, disable=None if world.is_main else True) as bar,
    ):
        for images in read_ahead(file.batches(start, stop, batch_size)):
            features = backend.features(images)
            pool.append(features.pool)
            if spatial:
                spatial_rows.append(features.spatial)
                if world.is_main and sum(map(len, spatial_rows)) >= ROWS_PER_UPDATE:
                    add_rows(accumulator, spatial_rows, file.path)
            bar.update(min(len(images) * world.size, count - bar.n))
        rows = torch.cat(pool) if pool else torch.empty(0, 0, device=world.device)
        require_finite(rows, file.path, unit, start)
        if spatial_rows and world.is_main:
            add_rows(accumulator, spatial_rows, file.path)
        kept = torch.cat(spatial_rows) if spatial_rows else torch.empty(0, accumulator.width, device=world.device)
        require_finite(kept, file.path, unit, start)
    all_rows = distributed.rows_on_main(rows)
    for rank in range(1, world.size if spatial else 1):  # rank 0 holds the rows of one rank at a time
        sent = distributed.rows_on_main(kept if world.rank == rank else kept[:0])
        if sent is not None and len(sent):
            accumulator.update(sent)
    if all_rows is None:
        return None
    return FileFeatures(all_rows, accumulator.result() if accumulator.count > 1 else None)


def require_finite(rows: Tensor, path: Path, unit: str, start: int) -> None:
    """Check features (N, D) of image `start` and the next ones.

    Raises:
        BadImageFile: If some are not finite.
    """
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise BadImageFile(
            f"{path}: features of {len(bad)} {unit}(s) are NaN or infinite, first of {unit} {start + bad[0]}; "
            "are the weights damaged?"
        )


def share_of_rank(count: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Range (start, stop) of one rank's images: whole batches, and at least one for rank 0."""
    batches = -(-count // batch_size)
    each, extra = divmod(batches, world_size)
    start = rank * each + min(rank, extra)
    stop = start + each + (rank < extra)
    return min(start * batch_size, count), min(stop * batch_size, count)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items; the next one is made in a thread while the caller uses the current one."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def add_rows(accumulator: StatisticsAccumulator, chunks: list[Tensor], path: Path) -> None:
    """Add rows in large parts, each of which is checked, and empty the list."""
    rows = torch.cat(chunks)
    chunks.clear()
    try:
        accumulator.update(rows)
    except ValueError as error:
        raise BadImageFile(f"{path}: spatial features cannot be used ({error}); are the weights damaged?") from error


# ----------------------------------------------------------------------------------------------------------------------
# Cached features


def save_features(features: FileFeatures, path: Path) -> None:
    """Write features to a file, whole or not at all.

    Raises:
        OSError: If they cannot be written.
    """
    tensors = {"pool": features.pool.cpu().contiguous()}
    if features.spatial is not None:
        tensors |= {"spatial_mean": features.spatial.mean, "spatial_covariance": features.spatial.covariance}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"format": CACHE_FORMAT}, CACHE_KEY)


def load_features(path: Path, *, count: int, spatial: bool, device: torch.device) -> FileFeatures | None:
    """Read features from a file.

    Args:
        path: Path of the file.
        count: Number of images that they must be of.
        spatial: Require statistics of the spatial features, too.
        device: Device of the pool features.

    Returns:
        The features; None if there are none, some are missing, or `save_features` cannot have written them.
    """
    try:
        tensors, _ = read_tensors(path, CACHE_KEY)
        pool, statistics = tensors.pop("pool"), None
        if tensors:
            statistics = Statistics(tensors.pop("spatial_mean"), tensors.pop("spatial_covariance"), count)
    except (OSError, ValueError, KeyError):
        return None
    if tensors or (spatial and statistics is None):
        return None
    if pool.dtype != torch.float32 or pool.ndim != 2 or len(pool) != count or not torch.isfinite(pool).all():
        return None
    return FileFeatures(pool.to(device), statistics if spatial else None)
