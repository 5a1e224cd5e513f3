"""Features of all images of a file, by one process or many.

The work is cut at batch boundaries: a process takes a run of whole batches, so that every image meets the same
neighbours however many processes there are, and its features are the same to the last bit. Pool features come together
on the main process in the order of images (the Inception Score's splits depend on it). Of spatial features, which
nothing needs one by one, only sums do.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from evaluator.inception.backend import Backend
from evaluator.metrics import ROWS_PER_UPDATE, Statistics, StatisticsAccumulator
from evaluator.npz import BadImageFile, ImageFile
from runtime import distributed
from runtime.distributed import World
from runtime.files import atomic_path

T = TypeVar("T")
CACHE_FORMAT = 1  # of kept features; to be raised when their layout changes, or what is computed from the same images
SPATIAL_NAMES = {"spatial_mean", "spatial_covariance"}


@dataclass(frozen=True)
class FileFeatures:
    """What the network made of a file's images.

    Attributes:
        pool: (N, 2048) float32, in the order of images.
        spatial: statistics of the spatial features; None where nobody asked, or of a single image.
    """

    pool: Tensor
    spatial: Statistics | None


def extract_features(
    file: ImageFile, backend: Backend, count: int, *, batch_size: int, spatial: bool, world: World, title: str
) -> FileFeatures | None:
    """Computes the features of the first images of a file; all processes call it together.

    Args:
        file: holds at least `count` images.
        backend: runs the network.
        count: images, >= 1.
        batch_size: images at a time.
        spatial: whether their statistics are wanted.
        world: this process among its peers.
        title: for the progress bar.

    Returns:
        The features on the main process, None on the others.

    Raises:
        UserError: on all processes, if one finds the file damaged or features that are not finite.
    """
    start, stop = share_of_rank(count, batch_size, world.rank, world.size)
    accumulator = StatisticsAccumulator()
    pool: list[Tensor] = []
    waiting: list[Tensor] = []
    with (
        distributed.fail_together(),
        tqdm(total=count, desc=title, unit="image", disable=None if world.is_main else True) as bar,
    ):
        for images in read_ahead(file.batches(start, stop, batch_size)):
            features = backend.features(images)
            pool.append(features.pool)
            if spatial:
                waiting.append(features.spatial)
                if sum(map(len, waiting)) >= ROWS_PER_UPDATE:
                    _absorb(accumulator, waiting, file.path)
            bar.update(min(len(images) * world.size, count - bar.n))
        rows = torch.cat(pool) if pool else torch.empty(0, 0, device=world.device)
        _require_finite(rows, start, file.path)
        if waiting:
            _absorb(accumulator, waiting, file.path)
    accumulators = distributed.objects_from_all_ranks(accumulator.to("cpu"))
    all_rows = distributed.rows_on_main(rows)
    if all_rows is None:
        return None
    total = StatisticsAccumulator()
    for each in accumulators:
        total.merge(each)
    return FileFeatures(all_rows, total.result() if total.count > 1 else None)


def share_of_rank(count: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The images start .. stop - 1 of one process: whole batches, and the main process is never without."""
    batches = -(-count // batch_size)
    each, extra = divmod(batches, world_size)
    start = rank * each + min(rank, extra)
    stop = start + each + (rank < extra)
    return min(start * batch_size, count), min(stop * batch_size, count)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in a thread while the current one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _absorb(accumulator: StatisticsAccumulator, waiting: list[Tensor], path: Path) -> None:
    """Adds rows in large parts, because each addition touches all 4 million sums; NaN is named by the pool features."""
    rows = torch.cat(waiting)
    waiting.clear()
    try:
        accumulator.update(rows)
    except ValueError as error:
        raise BadImageFile(f"{path}: spatial features cannot be used ({error}); are the weights damaged?") from error


def _require_finite(rows: Tensor, start: int, path: Path) -> None:
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise BadImageFile(
            f"{path}: features of {len(bad)} image(s) are NaN or infinite, first of image {start + bad[0]}; "
            "are the weights damaged?"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def save_features(features: FileFeatures, path: Path) -> None:
    """Keeps features for the next evaluation, whole or not at all.

    Raises:
        OSError: if they cannot be written.
    """
    tensors = {"pool": features.pool.cpu().contiguous()}
    if features.spatial is not None:
        tensors |= {"spatial_mean": features.spatial.mean, "spatial_covariance": features.spatial.covariance}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
    except SafetensorError as error:  # among others, of a full disk
        raise OSError(str(error)) from error


def load_features(path: Path, *, count: int, spatial: bool, device: torch.device) -> FileFeatures | None:
    """Reads kept features.

    Args:
        path: of the file.
        count: images that they must be of.
        spatial: whether statistics of the spatial features are wanted.
        device: where the pool features shall lie.

    Returns:
        The features; None if there are none, without what is wanted, or ones that `save_features` cannot have written.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return _checked(found, count, spatial, device)
    except (OSError, SafetensorError, ValueError):
        return None


def _checked(found: dict[str, Tensor], count: int, spatial: bool, device: torch.device) -> FileFeatures | None:
    """Features from the tensors of a file; None or ValueError if something about them is wrong."""
    has_spatial = SPATIAL_NAMES <= found.keys()
    wanted = {"pool"} | (SPATIAL_NAMES if has_spatial else set())
    if found.keys() != wanted or (spatial and not has_spatial):
        return None
    pool = found["pool"]
    if pool.dtype != torch.float32 or pool.ndim != 2 or len(pool) != count or not torch.isfinite(pool).all():
        return None
    statistics = Statistics(found["spatial_mean"], found["spatial_covariance"], count) if has_spatial else None
    return FileFeatures(pool.to(device), statistics if spatial else None)
