"""One evaluation, from two files to a JSON document, by one process or by all that torchrun started."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from evaluator.features import CACHE_FORMAT, FileFeatures, extract_features, load_features, save_features
from evaluator.inception.backend import FeatureBackend
from evaluator.inception.weights import Weights
from evaluator.inputs import TITLES, EvaluationInput, Openers
from evaluator.job import Job, Stopwatch, digest_on_main, open_job, print_warnings
from evaluator.metrics import float16_noise
from evaluator.npz import ImageFile
from evaluator.parts import check_parts, read_features, write_part
from evaluator.report import describe_in_line, library_versions, protocol_path, write_document
from evaluator.scores import ImageSet, compute_scores
from evaluator.settings import EvaluatorConfig
from evaluator.stages import CLIPS, IMAGES, Stage, clip_warnings, clips_summary
from runtime import distributed
from runtime.distributed import World
from runtime.documents import to_dict
from runtime.errors import error_prefix
from runtime.files import remove_temporary
from runtime.json_file import Json
from runtime.shards import Shard

FORMAT = 2  # of the result; format 1 called the warnings "remarks"
PUBLISHED_COUNT = 50_000  # images of published FIDs
FEATURES = 2048  # from as many images their covariance is singular
FLOAT16_LIMIT = 0.01


def evaluate(config: EvaluatorConfig, world: World, openers: Openers, parts: Sequence[Path] = ()) -> None:
    """Evaluate, or make a part of an evaluation; all ranks call it, rank 0 prints and writes.

    Args:
        config: The settings.
        world: This rank and the number of ranks.
        openers: How folders are opened.
        parts: Folders of all parts, in order, to take features from.

    Raises:
        UserError: For anything wrong with the files, on all ranks.
    """
    watch = Stopwatch()
    with watch.measure("total"):
        job = open_job(config, world, openers, watch)
        if config.shard is not None:
            write_part(job, Shard.parse(config.shard), world)
            return
        digests, scores, rounding = score_files(job, world, watch, parts)
    write_result(job, world, digests, scores, rounding, watch)


def write_result(
    job: Job, world: World, digests: tuple[str, str], scores: dict[str, float], rounding: list[str], watch: Stopwatch
) -> None:
    """Print scores and warnings, and write the document; its arguments are what `score_files` returned."""
    warnings = [each for stage in job.stages for each in list_warnings(stage, job.protocol)]
    warnings = [*dict.fromkeys(warnings), *rounding]
    document: Json = {
        "format": FORMAT,
        "scores": {name.lower().replace(" ", "_"): value for name, value in scores.items()},
        **{
            each.title: describe(each, file, digest) | source
            for each, file, digest, source in zip(job.stages[0].inputs, job.files, digests, job.sources, strict=True)
        },
        "protocol": job.protocol,
        "config": {**to_dict(job.given), "metrics": ",".join(job.metrics)},
        **{stage.name: stage.describe(world) for stage in job.stages},
        "versions": library_versions(job.config.backend),
        "seconds": watch.seconds,
        "warnings": job.order + warnings,
    }
    with distributed.raise_on_all_ranks():
        if world.is_main:
            print_warnings(warnings, world)
            for name, value in scores.items():  # first: a full disk must not lose what was computed
                print(f"{name}: {value:.6f}")
            for stage in job.stages:
                if stage.name == CLIPS:
                    print(clips_summary(stage.inputs))
            for title in TITLES:
                print(describe_in_line(title, document[title]), file=sys.stderr)
            write_document(document, job.output)
            print(f"written: {job.output}", file=sys.stderr)


def score_files(
    job: Job, world: World, watch: Stopwatch, parts: Sequence[Path] = ()
) -> tuple[tuple[str, str], dict[str, float], list[str]]:
    """Compute checksums, scores and warnings about their precision; what is returned counts on rank 0 only."""
    config, metrics, stages = job.config, job.metrics, job.stages
    if parts:
        check_parts(parts, job, world)
    features: dict[str, tuple[FileFeatures | None, FileFeatures | None]] = {}
    with ThreadPoolExecutor(1) as thread:
        # reads gigabytes while the network computes
        pending = thread.submit(digest_on_main, [stage.inputs[1] for stage in stages], world)
        with distributed.raise_on_all_ranks():
            reference_digest = digest_on_main([stage.inputs[0] for stage in stages], world)
        for stage in stages:
            reference, samples = stage.inputs
            name = features_name(stage.network, reference_digest, stage.weights, world.device)
            cache = config.cache / "features" / name
            with watch.measure("reference"):
                of_reference = features_of(reference, stage, world, cache, parts)
            with watch.measure("samples"):
                of_samples = features_of(samples, stage, world, None, parts)
            features[stage.name] = of_reference, of_samples
        with distributed.raise_on_all_ranks():
            sample_digest = pending.result()
    scores: dict[str, float] = {}
    warnings: list[str] = []
    with watch.measure("metrics"), distributed.raise_on_all_ranks():
        if world.is_main:
            with error_prefix(f"{config.sample_batch} against {config.ref_batch}"):
                reference_set, sample_set = (image_set(stages, features, i) for i in range(2))
                scores = compute_scores(metrics, reference_set, sample_set, config.pr_precision)
                if "pr" in metrics and config.pr_precision == "adm":
                    warnings = rounding_warnings(reference_set, sample_set, scores)
    return (reference_digest, sample_digest), scores, warnings


def features_name(network: str, digest: str, weights: Weights, device: torch.device) -> str:
    """Name of a cached file, made of everything that its features depend on."""
    return f"{digest[:16]}-{weights.sha256[:16]}-{network}-{device.type}-v{CACHE_FORMAT}.safetensors"


def features_of(
    source: EvaluationInput, stage: Stage, world: World, cache: Path | None = None, parts: Sequence[Path] = ()
) -> FileFeatures | None:
    """Features of an input, from parts or the cache if they are there; None on other ranks, or if none are needed."""
    if not source.features:
        return None
    if parts:
        return read_features(parts, source, stage, world.device)
    cached = None
    with distributed.raise_on_all_ranks():
        if cache is not None and world.is_main:
            remove_temporary(cache)
            cached = cached_features(source, stage.backend, world.device, cache)
    if distributed.broadcast(cached is not None):
        return cached
    features = extract_features(
        source.file,
        stage.backend,
        source.count,
        batch_size=stage.batch_size,
        spatial=source.spatial,
        world=world,
        title=source.title,
        unit=stage.unit,
    )
    if features is not None and cache is not None:
        try:
            save_features(features, cache)
        except OSError as error:  # only a warning, because this evaluation has them
            print(f"warning: {cache}: cannot keep features there ({error.strerror or error})", file=sys.stderr)
    return features


def cached_features(
    source: EvaluationInput, backend: FeatureBackend, device: torch.device, cache: Path
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


def image_set(stages: Sequence[Stage], features: Mapping[str, Sequence[FileFeatures | None]], index: int) -> ImageSet:
    """Features and statistics of the reference (index 0) or the samples (1), as the metrics take them."""
    images, clips = (features.get(name, (None, None))[index] for name in (IMAGES, CLIPS))
    stage = next((each for each in stages if each.name == IMAGES), None)
    stored, computed = stage.inputs[index].stored if stage else None, images.spatial if images is not None else None
    return ImageSet(
        pool=None if images is None else images.pool,
        pool_statistics=None if stored is None else stored.pool,
        spatial_statistics=computed if stored is None or stored.spatial is None else stored.spatial,
        probabilities=stage.probabilities if stage else None,
        clips=None if clips is None else clips.pool,
    )


def list_warnings(stage: Stage, protocol: object) -> list[str]:
    """Reasons why the scores may not be comparable with published ones."""
    samples, warnings = stage.inputs[1], []
    if protocol is None:
        warnings.append(f"{protocol_path(samples.file.path)}: not there; the settings of the samples are unknown")
    for each in stage.inputs:
        if each.stored is not None and each.stored.spatial is None:
            warnings.append(
                f"{each.file.path}: has mu and sigma only, as JiT's reference, so it is not ADM's; distances to the "
                "two do not compare, nor do statistics of another Inception network (pytorch-fid) with ours"
            )
    if stage.weights.warning is not None:
        warnings.append(f"{stage.weights.warning}: these scores are not comparable with published ones")
    if stage.name == CLIPS:
        warnings += clip_warnings(stage.inputs)
    elif samples.stored is None and samples.count != PUBLISHED_COUNT:
        few = min(each.count for each in stage.inputs if each.stored is None) <= FEATURES
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


def describe(source: EvaluationInput, file: ImageFile, digest: str) -> dict[str, object]:
    """Description of one file, for the JSON; the clips in use are described with their network."""
    described: dict[str, object] = {"path": str(file.path), "sha256": digest, "image_size": file.size}
    if file.frames is not None:
        described |= {"clips_in_file": file.count, "frames": file.frames}
    if source.file.frames is None:
        statistics = "computed" if source.stored is None else "stored in the file"
        described |= {"images": source.count, "images_in_file": source.file.count, "statistics": statistics}
    return described
