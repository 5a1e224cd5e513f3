"""Parts of an evaluation that --shard cut, and their merge into the scores of one evaluation, to the last bit.

A part is a folder with a description, `evaluation.json`, and the features of its images, in files of some hundred
rows. Parts end where batches do, because the last bits of features depend on the images of a batch. Sums are not
stored: those of a block of 4,096 rows take as much space as the rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from evaluator.features import CACHE_FORMAT, FileFeatures, add_rows, read_ahead, require_finite
from evaluator.inputs import EvaluationInput
from evaluator.job import Job, digest_on_main
from evaluator.settings import EvaluatorConfig
from evaluator.stages import Stage
from evaluator.statistics import StatisticsAccumulator
from runtime import distributed
from runtime.distributed import World
from runtime.documents import to_dict
from runtime.errors import UserError
from runtime.files import check_writable, sweep
from runtime.given import from_json
from runtime.json_file import Json, read_json, write_json
from runtime.settings import flags_of
from runtime.shards import REMEDY, Part, Shard, order_parts
from runtime.stores import Address
from runtime.tensor_file import read_tensors, write_tensors

DESCRIPTION = "evaluation.json"
KEY = "evaluation"  # of the document in a file of rows
ROWS_PER_FILE = {"image": 256, "clip": 16}  # about; also the shares of processes are cut so
OF_CONFIG = ("num_samples", "num_reference", "frame_interval", "clip_seed", "pr_precision", "backend")


class Rows(NamedTuple):
    """Some consecutive images of an input; their features are one file of a part."""

    start: int
    stop: int

    def path(self, folder: Path, source: EvaluationInput, stage: Stage) -> Path:
        """Path of the file."""
        return folder / f"{stage.name}-{source.title}-{self.start:09d}.safetensors"


def rows_of(source: EvaluationInput, stage: Stage, shard: Shard) -> list[Rows]:
    """The files of a shard's share of an input: whole batches; none if there are fewer batches than shards."""
    if not source.features:
        return []
    size = stage.batch_size
    (first, last), each = shard.share(-(-source.count // size)), max(1, ROWS_PER_FILE[stage.unit] // size)
    edges = [*range(first, last, each), last]
    return [Rows(i * size, min(j * size, source.count)) for i, j in zip(edges, edges[1:], strict=False)]


def job_settings(job: Job, world: World) -> Json:
    """Settings that are equal in all parts, by flag or name; the files' digests take a pass through each."""
    digests = []
    for number in range(2):
        with distributed.raise_on_all_ranks():
            digests.append(digest_on_main([stage.inputs[number] for stage in job.stages], world))
    settings: Json = {
        "the reference (sha256)": digests[0],
        "the file of samples (sha256)": digests[1],
        "--metrics": ",".join(job.metrics),
        **{f"--{name.replace('_', '-')}": getattr(job.config, name) for name in OF_CONFIG},
        "--device": world.device.type,
        "torch": str(torch.__version__),
        "the format of features": CACHE_FORMAT,
    }
    for stage in job.stages:
        settings[f"the {stage.unit} network's weights (sha256)"] = stage.weights.sha256
        settings[f"--batch-size of {stage.unit}s"] = stage.batch_size
    return distributed.broadcast(settings)


# ----------------------------------------------------------------------------------------------------------------------
# Making a part


def write_part(job: Job, shard: Shard, world: World) -> None:
    """Compute the features of a shard's share, as far as they are not there; all ranks call it together.

    Raises:
        UserError: On all ranks, if there are more shards than batches, the folder holds something else, or a file
            is damaged.
    """
    folder = part_folder(job.output, shard)
    needed = [(source, stage) for stage in job.stages for source in stage.inputs if source.features]
    if not needed:
        raise UserError(f"--shard {shard}: both files hold statistics, and no features are needed; leave it out")
    source, stage = max(needed, key=lambda pair: -(-pair[0].count // pair[1].batch_size))
    shard.range(-(-source.count // stage.batch_size), f"batches of {stage.batch_size} (--batch-size)")
    settings = job_settings(job, world)
    with distributed.raise_on_all_ranks():
        if world.is_main:
            check_writable(folder / DESCRIPTION, "--json")
            sweep(folder)
            _check_folder(folder, settings)
            config = {**to_dict(job.given), "device": world.device.type}
            write_json(folder / DESCRIPTION, {"shard": str(shard), "config": config, "settings": settings})
    with distributed.raise_on_all_ranks():
        for source, stage in needed:
            files = rows_of(source, stage, shard)
            own = files[world.rank * len(files) // world.size : (world.rank + 1) * len(files) // world.size]
            _write_rows(folder, own, source, stage, _mark(settings), show=world.is_main)
    if world.is_main:
        print(f"Part {shard} of the evaluation: {folder}; scripts/merge.py makes the scores of all parts")


def part_folder(output: Path, shard: Shard) -> Path:
    """Folder of a part: a.scores.2-of-3 for the result a.scores.json.

    Raises:
        UserError: If the result is to be on an object store.
    """
    if isinstance(output, Address):
        raise UserError(f"--shard {shard}: a part is a local folder, but the result is {output}; give a local --json")
    path = shard.path(output)
    return path.with_suffix("") if path.suffix == ".json" else path


def _check_folder(folder: Path, settings: Mapping[str, object]) -> None:
    """Check that a folder is empty, or of the same job."""
    if not (folder / DESCRIPTION).exists():
        if any(folder.iterdir()):
            raise UserError(f"{folder}: exists, and is no part of an evaluation; move it, or give another --json")
        return
    for name, value in read_description(folder)[1]["settings"].items():
        if settings.get(name) != value:
            raise UserError(
                f"{folder}: is a part of another evaluation: {name} is {value}, here {settings.get(name)}; delete it, "
                "or give another --json"
            )


def _write_rows(
    folder: Path, files: Sequence[Rows], source: EvaluationInput, stage: Stage, mark: int, *, show: bool
) -> None:
    """Write files of consecutive rows, from the first one on that is not there."""
    done = 0
    while done < len(files) and _is_whole(folder, files[done], source, stage, mark):
        done += 1
    if done:
        first, last = files[0].start, files[done - 1].stop
        print(f"{source.title}: features of {stage.unit}s {first:,} to {last - 1:,} are there")
    if done == len(files):
        return
    start, stop, size = files[done].start, files[-1].stop, stage.batch_size
    batches = read_ahead(source.file.batches(start, stop, size))
    with tqdm(total=stop - start, desc=source.title, unit=stage.unit, disable=None if show else True) as bar:
        for rows in files[done:]:
            found: dict[str, list[Tensor]] = {"pool": [], "spatial": []}
            for _ in range(rows.start, rows.stop, size):
                features = stage.backend.features(next(batches))
                found["pool"].append(features.pool)
                if source.spatial:
                    found["spatial"].append(features.spatial)
                bar.update(len(features.pool))
            tensors = {name: torch.cat(parts).cpu() for name, parts in found.items() if parts}
            for tensor in tensors.values():
                require_finite(tensor, source.file.path, stage.unit, rows.start)
            path = rows.path(folder, source, stage)
            try:
                write_tensors(path, tensors, {"mark": mark, "rows": list(rows)}, KEY)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror or error}); {REMEDY}") from error
    next(batches, None)  # a compressed file compares its checksum at its end


def _mark(settings: Mapping[str, object]) -> int:
    """Number that tells the rows of one job from those of another."""
    return zlib.crc32(repr(sorted((name, str(value)) for name, value in settings.items())).encode())


def _is_whole(folder: Path, rows: Rows, source: EvaluationInput, stage: Stage, mark: int) -> bool:
    try:
        _read_rows(folder, rows, source, stage, mark)
    except UserError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Reading parts


def read_description(folder: Path) -> tuple[Part, Json]:
    """Read the description of a part.

    Raises:
        UserError: If it is damaged, or none is there.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder}: no part of an evaluation (no {DESCRIPTION})")
    try:
        described = read_json(path, f"delete it, and {REMEDY}")
        settings = dict(described["settings"])
        return Part(folder, Shard.parse(described["shard"]), settings), described
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and {REMEDY}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def open_parts(folders: Sequence[Path], output: Path) -> tuple[EvaluatorConfig, list[Path]]:
    """Check that these are all parts of one evaluation.

    Args:
        folders: Folders of all parts, in any order.
        output: Path of the result.

    Returns:
        Settings of the whole evaluation, and the folders in order.

    Raises:
        UserError: If they do not belong together, one is missing, or given twice.
    """
    read = [read_description(folder) for folder in folders]
    ordered = [part.path for part in order_parts([part for part, _ in read])]
    values, where = read[0][1].get("config", {}), f"{folders[0] / DESCRIPTION}: config"
    flags = {flag.field.name: flag for flag in flags_of(EvaluatorConfig).values()}
    known = {name: from_json(values.get(name), flag, f"{where}.{name}") for name, flag in flags.items()}
    return EvaluatorConfig(**{**known, "shard": None, "json": output}), ordered  # type: ignore[arg-type]


def check_parts(folders: Sequence[Path], job: Job, world: World) -> None:
    """Check that parts, in order, are finished, and of these files, networks and versions.

    Raises:
        UserError: Naming the part, and what is missing or differs.
    """
    for number, folder in enumerate(folders, start=1):
        for source, stage, rows in _all_rows(job, Shard(number, len(folders))):
            path = rows.path(folder, source, stage)
            if not path.is_file():
                raise UserError(f"{folder}: not finished, {path.name} is missing; {REMEDY}, which completes it")
    settings = job_settings(job, world)
    for name, value in read_description(folders[0])[0].settings.items():
        if settings.get(name) != value:
            raise UserError(
                f"{folders[0]}: {name} was {value}, and is {settings.get(name)} here; merge with the files, versions "
                "and kind of device that made the parts"
            )


def _all_rows(job: Job, shard: Shard) -> Iterator[tuple[EvaluationInput, Stage, Rows]]:
    for stage in job.stages:
        for source in stage.inputs:
            for rows in rows_of(source, stage, shard):
                yield source, stage, rows


def read_features(folders: Sequence[Path], source: EvaluationInput, stage: Stage, device: torch.device) -> FileFeatures:
    """Join the features of an input from all parts, in order; spatial ones are added file by file.

    Raises:
        UserError: If a file is damaged, or of another job.
    """
    accumulator = StatisticsAccumulator()
    pool: list[Tensor] = []
    for number, folder in enumerate(folders, start=1):
        mark = _mark(read_description(folder)[0].settings)
        for rows in rows_of(source, stage, Shard(number, len(folders))):
            tensors = _read_rows(folder, rows, source, stage, mark)
            pool.append(tensors["pool"].to(device))
            if source.spatial:
                add_rows(accumulator, [tensors["spatial"].to(device)], source.file.path)
    return FileFeatures(torch.cat(pool), accumulator.result() if accumulator.count > 1 else None)


def _read_rows(folder: Path, rows: Rows, source: EvaluationInput, stage: Stage, mark: int) -> dict[str, Tensor]:
    """Read a file of rows.

    Raises:
        UserError: If it is damaged, or does not belong here.
    """
    path = rows.path(folder, source, stage)
    try:
        tensors, document = read_tensors(path, KEY)
        names = {"pool", "spatial"} if source.spatial else {"pool"}
        if (document["mark"], document["rows"]) != (mark, list(rows)):
            raise ValueError("it is of another job")
        if tensors.keys() != names or any(len(tensor) != rows.stop - rows.start for tensor in tensors.values()):
            raise ValueError("it holds other rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and {REMEDY}") from error
    return tensors
