"""A planned evaluation: both files opened and checked, the networks loaded, nothing computed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from evaluator.inputs import EvaluationInput, Openers, open_files, order_warnings, plan_clips, plan_inputs
from evaluator.npz import ImageFile
from evaluator.report import is_result, path_next_to, protocol_path, read_protocol
from evaluator.scores import METRICS
from evaluator.settings import EvaluatorConfig
from evaluator.stages import Stage, open_clips_stage, open_images_stage
from runtime.distributed import World
from runtime.errors import UserError
from runtime.files import check_folder, check_writable, remove_temporary
from runtime.stores import check_store, fetch, is_there, staged


@dataclass(frozen=True)
class Job:
    """An evaluation before any work.

    Attributes:
        given: The settings.
        config: The same, with local copies of both files.
        files: The reference and the samples.
        metrics: Keys of `METRICS`.
        protocol: Settings of the samples; None if unknown.
        output: Path of the result.
        stages: The networks.
        sources: Descriptions of both files, for the result.
        order: Warnings about the order of the files.
    """

    given: EvaluatorConfig
    config: EvaluatorConfig
    files: tuple[ImageFile, ImageFile]
    metrics: Sequence[str]
    protocol: object
    output: Path
    stages: Sequence[Stage]
    sources: Sequence[dict[str, object]]
    order: list[str]


def open_job(given: EvaluatorConfig, world: World, openers: Openers, watch: Stopwatch) -> Job:
    """Plan an evaluation; a collective operation.

    Raises:
        UserError: For anything wrong with the files, on all ranks.
    """
    config = fetch_files(given)
    real, generated = files = open_both(config, openers)
    metrics = config.metric_names(clips=generated.frames is not None)
    images = plan_inputs(*files, metrics, config.num_samples)
    clips = None
    if any(METRICS[name].clips for name in metrics):
        clips = plan_clips(
            *files, config.num_samples, config.num_reference, config.frame_interval or 1, config.clip_seed or 0
        )
    protocol = read_protocol(config.sample_batch)
    output = output_path(given)
    if world.is_main:
        remove_temporary(staged(output))
    check_folder(config.cache, "--cache-dir")
    with watch.measure("weights"):
        stages = [open_images_stage(config, world, images)] if images else []
        stages += [open_clips_stage(config, world, clips)] if clips else []
    sources = [file.describe_source() for file in files]  # before the work: statistics may be damaged
    order = order_warnings(real, generated, config.num_samples)
    print_warnings(order, world)  # before the work, which may be for nothing
    return Job(given, config, files, metrics, protocol, output, stages, sources, order)


def fetch_files(config: EvaluatorConfig) -> EvaluatorConfig:
    """Settings with local copies of both files, and of the JSON next to the samples, if they are on an object store."""
    samples, protocol = fetch(config.sample_batch, "sample_batch"), protocol_path(config.sample_batch)
    if samples != config.sample_batch:
        protocol_path(samples).unlink(missing_ok=True)  # a copy of one that is no longer there
        if is_there(protocol, "sample_batch"):
            fetch(protocol, "sample_batch")
    return replace(config, ref_batch=fetch(config.ref_batch, "ref_batch"), sample_batch=samples)


def open_both(config: EvaluatorConfig, openers: Openers) -> tuple[ImageFile, ImageFile]:
    """Open the reference and the samples."""
    clips, interval = config.asks_for_clips, config.frame_interval or 1
    return open_files(config.ref_batch, config.sample_batch, openers, of_clips=clips, interval=interval)


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
    check_store(path, flag)
    check_writable(staged(path), flag)
    if is_there(path, flag) and not is_result(fetch(path, flag)):
        raise UserError(f"{flag} {path}: exists, and is no result of the evaluator; move it, or give another --json")
    return path


def digest_on_main(uses: Sequence[EvaluationInput], world: World) -> str:
    """sha256 of the file on rank 0, "" on the others, which do not need it.

    Args:
        uses: The networks' inputs from this file.
        world: This rank and the number of ranks.

    Raises:
        UserError: On rank 0, if its images are damaged.
    """
    if not world.is_main:
        return ""
    whole = [each for each in uses if each.count == each.file.count]
    return (whole or uses)[0].file.verified_sha256(read_to_end=bool(whole))


def print_warnings(warnings: list[str], world: World) -> None:
    """Print warnings, on one rank."""
    for line in warnings if world.is_main else ():
        print(f"warning: {line}", file=sys.stderr)


class Stopwatch:
    """Seconds by name of what was measured."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
