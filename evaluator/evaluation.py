"""One evaluation, from two files to a JSON document, by one process or by all that torchrun started."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from evaluator.features import CACHE_FORMAT, FileFeatures, extract_features, load_features, save_features
from evaluator.inception.backend import Backend
from evaluator.inception.network import load_network
from evaluator.inception.tensorflow_backend import TensorFlowBackend
from evaluator.inception.weights import Weights, find_weights, inspect_weights
from evaluator.inputs import EvaluationInput, open_inputs, order_warnings
from evaluator.metrics import float16_noise
from evaluator.report import is_result, library_versions, path_next_to, protocol_path, read_protocol, write_document
from evaluator.scores import ImageSet, compute_scores
from evaluator.settings import EvaluatorConfig
from runtime import distributed
from runtime.distributed import World
from runtime.errors import UserError, error_prefix
from runtime.files import check_folder, check_writable, remove_temporary
from runtime.settings import to_dict

FORMAT = 2  # of the result; format 1 called the warnings "remarks"
PUBLISHED_COUNT = 50_000  # images of published FIDs
FEATURES = 2048  # from as many images their covariance is singular
FLOAT16_LIMIT = 0.01


def evaluate(config: EvaluatorConfig, world: World) -> None:
    """Evaluate; all ranks call it, rank 0 prints and writes.

    Raises:
        UserError: For anything wrong with the files, on all ranks.
    """
    watch = Stopwatch()
    with watch.measure("total"):
        inputs = open_inputs(config.ref_batch, config.sample_batch, config.metric_names, config.num_samples)
        protocol = read_protocol(config.sample_batch)
        output = output_path(config)
        if world.is_main:
            remove_temporary(output)
        check_folder(config.cache, "--cache-dir")
        with watch.measure("weights"):
            weights = inspect_weights(shared_weights(config, world))
            backend = make_backend(config, weights.path, world.device)
        order = order_warnings(*inputs)
        print_warnings(order, world)  # before the work, which may be for nothing
        digests, scores, rounding = score_files(config, world, inputs, weights, backend, watch)
    warnings = [*list_warnings(inputs, weights, protocol), *rounding]
    document = {
        "format": FORMAT,
        "scores": {name.lower().replace(" ", "_"): value for name, value in scores.items()},
        **{each.title: describe(each, digest) for each, digest in zip(inputs, digests, strict=True)},
        "protocol": protocol,
        "config": to_dict(config),
        "network": {
            "backend": config.backend,
            "weights": str(weights.path),
            "weights_sha256": weights.sha256,
            "precision": "float32",
            "device": world.device.type,
            "world_size": world.size,
        },
        "versions": library_versions(config.backend),
        "seconds": watch.seconds,
        "warnings": order + warnings,
    }
    with distributed.raise_on_all_ranks():
        if world.is_main:
            print_warnings(warnings, world)
            for name, value in scores.items():  # first: a full disk must not lose what was computed
                print(f"{name}: {value:.6f}")
            write_document(document, output)
            print(f"written: {output}", file=sys.stderr)


def score_files(
    config: EvaluatorConfig,
    world: World,
    inputs: tuple[EvaluationInput, EvaluationInput],
    weights: Weights,
    backend: Backend,
    watch: Stopwatch,
) -> tuple[tuple[str, str], dict[str, float], list[str]]:
    """Compute checksums, scores and warnings about their precision; what is returned counts on rank 0 only."""
    reference, samples = inputs
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(digest_on_main, samples, world)  # reads gigabytes while the network computes
        with distributed.raise_on_all_ranks():
            reference_digest = digest_on_main(reference, world)
        cache = config.cache / "features" / features_name(config, reference_digest, weights, world.device)
        with watch.measure("reference"):
            of_reference = features_of(reference, backend, config, world, cache)
        with watch.measure("samples"):
            of_samples = features_of(samples, backend, config, world)
        with distributed.raise_on_all_ranks():
            sample_digest = pending.result()
    scores: dict[str, float] = {}
    warnings: list[str] = []
    with watch.measure("metrics"), distributed.raise_on_all_ranks():
        if world.is_main:
            with error_prefix(f"{config.sample_batch} against {config.ref_batch}"):
                sets = image_set(reference, of_reference, backend), image_set(samples, of_samples, backend)
                scores = compute_scores(config.metric_names, *sets, config.pr_precision)
                if "pr" in config.metric_names and config.pr_precision == "adm":
                    warnings = rounding_warnings(*sets, scores)
    return (reference_digest, sample_digest), scores, warnings


def output_path(config: EvaluatorConfig) -> Path:
    """Path of the result.

    Raises:
        UserError: If nothing can be written there, or a file that is read would be overwritten.
    """
    flag = "sample_batch" if config.json is None else "--json"
    path = config.json or path_next_to(config.sample_batch, ".scores.json")
    read = (config.ref_batch, config.sample_batch, protocol_path(config.sample_batch))
    if any(path.resolve() == each.resolve() for each in read):
        raise UserError(f"{flag} {path}: the evaluation reads this file; choose another name")
    check_writable(path, flag)
    if path.exists() and not is_result(path):
        raise UserError(f"{flag} {path}: exists, and is no result of the evaluator; move it, or give another --json")
    return path


def shared_weights(config: EvaluatorConfig, world: World) -> Path:
    """Path of the weight file, which rank 0 alone downloads if it is missing."""
    with distributed.raise_on_all_ranks():
        if world.is_main:
            find_weights(config.weights, config.cache, offline=config.offline)
    return find_weights(config.weights, config.cache, offline=True)


def make_backend(config: EvaluatorConfig, weights: Path, device: torch.device) -> Backend:
    """Load the network.

    Raises:
        UserError: If the file is damaged or something else, or TensorFlow is asked for and absent.
    """
    with error_prefix(str(weights)):
        if config.backend == "tensorflow":
            return TensorFlowBackend(weights, device)
        return load_network(weights, device)


def digest_on_main(source: EvaluationInput, world: World) -> str:
    """sha256 of the file on rank 0, "" on the others, which do not need it.

    Raises:
        UserError: On rank 0, if its images are damaged.
    """
    return source.file.verified_sha256(read_to_end=source.count == source.file.count) if world.is_main else ""


def features_name(config: EvaluatorConfig, digest: str, weights: Weights, device: torch.device) -> str:
    """Name of a cached file, made of everything that its features depend on."""
    return f"{digest[:16]}-{weights.sha256[:16]}-{config.backend}-{device.type}-v{CACHE_FORMAT}.safetensors"


def features_of(
    source: EvaluationInput, backend: Backend, config: EvaluatorConfig, world: World, cache: Path | None = None
) -> FileFeatures | None:
    """Features of an input, from the cache if they are there; None if no metric needs them, and on other ranks."""
    if not source.features:
        return None
    cached = None
    with distributed.raise_on_all_ranks():
        if cache is not None and world.is_main:
            remove_temporary(cache)
            cached = cached_features(source, backend, world.device, cache)
    if distributed.broadcast(cached is not None):
        return cached
    features = extract_features(
        source.file,
        backend,
        source.count,
        batch_size=config.batch_size_on(world.device.type),
        spatial=source.spatial,
        world=world,
        title=source.title,
    )
    if features is not None and cache is not None:
        try:
            save_features(features, cache)
        except OSError as error:  # only a warning, because this evaluation has them
            print(f"warning: {cache}: cannot keep features there ({error.strerror or error})", file=sys.stderr)
    return features


def cached_features(
    source: EvaluationInput, backend: Backend, device: torch.device, cache: Path
) -> FileFeatures | None:
    """Features that an earlier evaluation cached; None if there are none, or not of this network's widths."""
    cached = load_features(cache, count=source.count, spatial=source.spatial, device=device)
    if cached is None:
        return None
    pool, spatial = backend.features(next(source.file.batches(0, 1, 1)))
    fits = cached.pool.shape[1] == pool.shape[1]
    if cached.spatial is not None:
        fits &= len(cached.spatial.mean) == spatial.shape[1]
    return cached if fits else None


def image_set(source: EvaluationInput, features: FileFeatures | None, backend: Backend) -> ImageSet:
    """Features and statistics of an input, as the metrics take them."""
    stored, computed = source.stored, features.spatial if features is not None else None
    return ImageSet(
        pool=None if features is None else features.pool,
        pool_statistics=None if stored is None else stored.pool,
        spatial_statistics=computed if stored is None or stored.spatial is None else stored.spatial,
        probabilities=backend.probabilities,
    )


def print_warnings(warnings: list[str], world: World) -> None:
    """Print warnings, on one rank."""
    for line in warnings if world.is_main else ():
        print(f"warning: {line}", file=sys.stderr)


def list_warnings(inputs: tuple[EvaluationInput, EvaluationInput], weights: Weights, protocol: object) -> list[str]:
    """Reasons why the scores may not be comparable with published ones."""
    samples, warnings = inputs[1], []
    if protocol is None:
        warnings.append(f"{protocol_path(samples.file.path)}: not there; the settings of the samples are unknown")
    for each in inputs:
        if each.stored is not None and each.stored.spatial is None:
            warnings.append(
                f"{each.file.path}: has mu and sigma only, so it is not ADM's; statistics of another Inception network "
                "(pytorch-fid) are not comparable with ours"
            )
    if weights.warning is not None:
        warnings.append(f"{weights.warning}: these scores are not comparable with published ones")
    if samples.stored is None and samples.count != PUBLISHED_COUNT:
        few = min(each.count for each in inputs if each.stored is None) <= FEATURES
        advice = f"; with {FEATURES:,} or fewer it says little, and KID is better" if few else ""
        warnings.append(
            f"FID falls with the number of images: here {samples.count:,}, in papers {PUBLISHED_COUNT:,}{advice}"
        )
    return warnings


def rounding_warnings(reference: ImageSet, samples: ImageSet, scores: dict[str, float]) -> list[str]:
    """Warning if float16 decides precision and recall, with the exact ones."""
    noise = float16_noise(reference.rows(), samples.rows())
    if noise <= FLOAT16_LIMIT:
        return []
    exact = compute_scores(["pr"], reference, samples, "float32")
    if all(abs(value - scores[name]) <= FLOAT16_LIMIT for name, value in exact.items()):
        return []
    values = ", ".join(f"{name} {value:.4f}" for name, value in exact.items())
    return [
        f"precision and recall are rounding noise: float16's step is {noise:.1%} of the mean squared distance of these "
        f"features; --pr-precision float32 gives {values}"
    ]


def describe(source: EvaluationInput, digest: str) -> dict[str, object]:
    """Description of one file, for the JSON."""
    return {
        "path": str(source.file.path),
        "sha256": digest,
        "images": source.count,
        "images_in_file": source.file.count,
        "image_size": source.file.size,
        "statistics": "computed" if source.stored is None else "stored in the file",
    }


class Stopwatch:
    """Seconds by name of what was measured."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
