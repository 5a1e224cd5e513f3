"""One evaluation from two files to a JSON, by one process or by all that torchrun started."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from runtime.config import to_dict

from evaluator.features import CACHE_FORMAT, FileFeatures, extract_features, load_features, save_features
from evaluator.inception.backend import Backend
from evaluator.inception.network import load_network
from evaluator.inception.tensorflow_backend import TensorFlowBackend
from evaluator.inception.weights import Weights, find_weights, inspect_weights
from evaluator.inputs import Side, open_sides
from evaluator.report import (
    adm_lines,
    default_output,
    library_versions,
    protocol_path,
    read_protocol,
    scores_as_json,
    write_document,
)
from evaluator.scores import ImageSet, compute_scores
from evaluator.settings import EvaluatorConfig
from runtime import distributed
from runtime.distributed import World
from runtime.errors import UserError, blame
from runtime.files import check_folder, check_writable

PUBLISHED_COUNT = 50_000  # images behind published FIDs


def evaluate(config: EvaluatorConfig, world: World) -> None:
    """Evaluates; all processes call it, main prints and writes.

    Raises:
        UserError: for anything wrong with the files, on all processes.
    """
    watch = Stopwatch()
    with watch.measure("total"):
        reference, samples = open_sides(config.ref_batch, config.sample_batch, config.metric_names, config.num_samples)
        protocol = read_protocol(config.sample_batch)
        output = output_path(config)
        check_folder(config.cache, "--cache-dir")
        with watch.measure("weights"):
            weights = inspect_weights(shared_weights(config, world))
            backend = make_backend(config, weights.path, world.device)
        with ThreadPoolExecutor(1) as thread:
            digesting = thread.submit(digest_on_main, samples, world)  # gigabytes: beside the network's work
            with distributed.fail_together():
                reference_digest = digest_on_main(reference, world)
            cache = config.cache / "features" / features_name(config, reference_digest, weights, world.device)
            with watch.measure("reference"):
                of_reference = features_of(reference, backend, config, world, cache)
            with watch.measure("samples"):
                of_samples = features_of(samples, backend, config, world)
            with distributed.fail_together():
                sample_digest = digesting.result()
            scores: dict[str, float] = {}
            with watch.measure("metrics"), distributed.fail_together():
                if world.is_main:
                    with blame(f"{config.sample_batch} against {config.ref_batch}"):
                        sets = image_set(reference, of_reference, backend), image_set(samples, of_samples, backend)
                        scores = compute_scores(config.metric_names, *sets, config.distance_precision)
            described = [describe(reference, reference_digest), describe(samples, sample_digest)]
    with distributed.fail_together():
        if world.is_main:
            said = remarks(samples, weights)
            for line in said:
                print(f"note: {line}", file=sys.stderr)
            print(adm_lines(scores))  # first: what was computed must not be lost with the file
            document = {
                "format": 1,
                "scores": scores_as_json(scores),
                "reference": described[0],
                "samples": described[1],
                "protocol": protocol,
                "config": to_dict(config),
                "network": {"backend": config.backend, "weights": str(weights.path), "weights_sha256": weights.sha256}
                | {"precision": "float32", "device": world.device.type, "world_size": world.size},
                "versions": library_versions(config.backend),
                "seconds": watch.seconds,
                "remarks": said,
            }
            write_document(document, output)
            print(f"written: {output}", file=sys.stderr)


def output_path(config: EvaluatorConfig) -> Path:
    """Where the result goes.

    Raises:
        UserError: if nothing can be written there, or something that is read would be lost.
    """
    flag = "sample_batch" if config.json is None else "--json"
    path = config.json or default_output(config.sample_batch)
    read = (config.ref_batch, config.sample_batch, protocol_path(config.sample_batch))
    if any(path.resolve() == each.resolve() for each in read):
        raise UserError(f"{flag} {path}: the evaluation reads this file; choose another name")
    check_writable(path, flag)
    return path


def shared_weights(config: EvaluatorConfig, world: World) -> Path:
    """The weight file, which main alone downloads where it is missing."""
    with distributed.fail_together():
        if world.is_main:
            find_weights(config.weights, config.cache, offline=config.offline)
    return find_weights(config.weights, config.cache, offline=True)


def make_backend(config: EvaluatorConfig, weights: Path, device: torch.device) -> Backend:
    """Loads the network.

    Raises:
        UserError: if the file is damaged or something else, or TensorFlow is wanted and absent.
    """
    with blame(str(weights)):
        if config.backend == "tensorflow":
            return TensorFlowBackend(weights, device)
        return load_network(weights, device)


def digest_on_main(side: Side, world: World) -> str:
    """The file's sha256; the other processes do not ask for it.

    Raises:
        UserError: on main, if its images are damaged.
    """
    return side.file.verified_sha256(read_to_end=side.count == side.file.count) if world.is_main else ""


def features_name(config: EvaluatorConfig, digest: str, weights: Weights, device: torch.device) -> str:
    """Name of a cached file, made of everything that decides the features in it."""
    return f"{digest[:16]}-{weights.sha256[:16]}-{config.backend}-{device.type}-v{CACHE_FORMAT}.safetensors"


def features_of(
    side: Side, backend: Backend, config: EvaluatorConfig, world: World, cache: Path | None = None
) -> FileFeatures | None:
    """Features of one side's images, kept ones where there are any; None where nobody needs them, or not on main."""
    if not side.features:
        return None
    kept = None
    with distributed.fail_together():
        if cache is not None and world.is_main:
            kept = kept_features(side, backend, world.device, cache)
    if distributed.broadcast(kept is not None):
        return kept
    made = extract_features(
        side.file,
        backend,
        side.count,
        batch_size=config.images_at_a_time(world.device.type),
        spatial=side.spatial,
        world=world,
        title=side.title,
    )
    if made is not None and cache is not None:
        keep_features(made, cache)
    return made


def kept_features(side: Side, backend: Backend, device: torch.device, cache: Path) -> FileFeatures | None:
    """What an earlier evaluation kept of one side; None where there is nothing, or nothing of this network's widths."""
    kept = load_features(cache, count=side.count, spatial=side.spatial, device=device)
    if kept is None:
        return None
    pool, spatial = backend.features(next(side.file.batches(0, 1, 1)))
    fits = kept.pool.shape[1] == pool.shape[1]
    if kept.spatial is not None:
        fits &= len(kept.spatial.mean) == spatial.shape[1]
    return kept if fits else None


def keep_features(made: FileFeatures, cache: Path) -> None:
    """Spares the next evaluation the work; this one does not depend on it."""
    try:
        save_features(made, cache)
    except OSError as error:
        print(f"note: {cache}: cannot keep features there ({error.strerror or error})", file=sys.stderr)


def image_set(side: Side, features: FileFeatures | None, backend: Backend) -> ImageSet:
    """What the metrics are told about one side."""
    stored, computed = side.stored, features.spatial if features is not None else None
    return ImageSet(
        pool=None if features is None else features.pool,
        pool_statistics=None if stored is None else stored.pool,
        spatial_statistics=computed if stored is None else stored.spatial,
        probabilities=backend.probabilities,
    )


def remarks(samples: Side, weights: Weights) -> list[str]:
    """What a reader of the numbers must be told."""
    found = [] if weights.doubt is None else [f"{weights.doubt}: these scores compare with nobody's"]
    if samples.stored is None and samples.count != PUBLISHED_COUNT:
        found.append(f"FID falls with the number of images: here {samples.count:,}, in papers {PUBLISHED_COUNT:,}")
    return found


def describe(side: Side, digest: str) -> dict[str, Any]:
    """One file, for the JSON."""
    return {
        "path": str(side.file.path),
        "sha256": digest,
        "images": side.count,
        "images_in_file": side.file.count,
        "image_size": side.file.size,
        "statistics": "computed" if side.stored is None else "stored in the file",
    }


class Stopwatch:
    """Seconds of named stretches of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Times the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
