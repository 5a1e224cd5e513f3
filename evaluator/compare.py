"""Comparison of two results: the points in which their protocols differ, and the scores that may be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evaluator.report import name_layout
from evaluator.scores import METRICS
from evaluator.small.report import MEANINGS
from runtime.documents import flatten
from runtime.errors import UserError
from runtime.json_file import Json, parse_json
from runtime.settings import positional

SCORES = {"inception_score": "is", "precision": "pr", "recall": "pr"}  # metrics of scores with another name
OF_IMAGES = tuple(name for name, metric in METRICS.items() if not metric.clips)
OF_CLIPS = tuple(name for name, metric in METRICS.items() if metric.clips)
OF_SMALL = tuple(name for name in MEANINGS if name not in SCORES)  # of small images and clips
OF_REFERENCE = (*(name for name, metric in METRICS.items() if metric.of_reference), *OF_SMALL)
PLACES = ("sample_dir", "output", "overwrite", "version", "name")  # settings that decide no pixel
DIGITS = 12  # of a digest that are shown


@dataclass(frozen=True)
class CompareConfig:
    """Settings of the comparison."""

    first: Path = positional("result of the evaluator, .scores.json")
    second: Path = positional("another one")


class Point(NamedTuple):
    """A point of the protocol.

    Attributes:
        name: Its name.
        metrics: Metrics that cannot be compared where it differs.
        read: Function from a result to the value; None where the result does not say.
        required: True if scores cannot be compared either where a result does not say.
    """

    name: str
    metrics: Collection[str]
    read: Callable[[Json], object]
    required: bool = True


def _at(*path: str) -> Callable[[Json], object]:
    """Read a nested value; None where there is none."""

    def read(document: Json) -> object:
        value: object = document
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return read


def _count(document: Json) -> object:
    """Number of samples: images, or clips."""
    images = _at("samples", "images")(document)
    return _at("samples", "clips_in_file")(document) if images is None else images


def _labels(document: Json) -> object:
    """Labels of the samples as the sampling job chose them."""
    job = _at("protocol", "config", "job")(document)
    if not isinstance(job, Mapping) or "balanced_labels" not in job:
        return None
    kind = "balanced" if job["balanced_labels"] else "random"
    return f"{kind}, of {job['class_labels']} only" if job.get("class_labels") else kind


def _compression(document: Json) -> object:
    """Lossy formats of the samples; arrays have none."""
    formats = _at("samples", "formats")(document)
    return ", ".join(sorted({*formats} - {"PNG", "BMP", "PPM"})) or "none" if isinstance(formats, Mapping) else "none"


POINTS = (
    Point("image size", (*METRICS, *OF_SMALL), _at("samples", "image_size")),
    Point("number of images", ("is", "fid", "sfid", "pr", *OF_SMALL), _count),  # KID has no bias
    Point("compression of the samples", METRICS, _compression),
    Point("labels of the samples", (*METRICS, *OF_SMALL), _labels, required=False),
    Point("statistics of the samples", ("fid", "sfid"), _at("samples", "statistics")),
    Point("images of the reference", ("pr",), _at("reference", "images")),
    Point("weights of the network", (*OF_IMAGES, *OF_SMALL), _at("network", "weights_sha256")),
    Point("precision of the network", (*OF_IMAGES, *OF_SMALL), _at("network", "precision")),
    Point("--pr-precision", ("pr",), _at("config", "pr_precision")),
    Point("weights of the video network", OF_CLIPS, _at("video_network", "weights_sha256")),
    Point("precision of the video network", OF_CLIPS, _at("video_network", "precision")),
    *(
        Point(f"{name} of the video network", OF_CLIPS, _at("video_network", name))
        for name in ("features", "frames", "resize", "covariance", "samples")
    ),
    Point("clips of the reference", OF_CLIPS, _at("video_network", "reference")),
)
NOTES = (  # they move the last digits only
    ("backend", _at("network", "backend")),
    ("device", _at("network", "device")),
    ("torch", _at("versions", "torch")),
)


class Difference(NamedTuple):
    """A point in which two results differ, in words, and the metrics that it makes incomparable."""

    name: str
    metrics: Collection[str]
    text: str


def compare(config: CompareConfig) -> None:
    """Print the points in which the protocols of two results differ, and which of their scores may be compared.

    Raises:
        UserError: If a file is no result, or some of the scores may not be compared.
    """
    paths = (config.first, config.second)
    a, b = (_read_result(path) for path in paths)
    differences = list(find_differences(a, b))
    for path, document in zip(paths, (a, b), strict=True):
        print(f"{path}: samples {_at('samples', 'path')(document)}")
    for each in differences:
        print(f"differs: {each.name}: {each.text}")
    for name, read in NOTES:
        if read(a) != read(b):
            print(f"also differs, by rounding: {name}: {_shown(read(a))} against {_shown(read(b))}")
    for line in _sampling_differences(a, b):
        print(f"samples made with other settings: {line}")
    refused: dict[str, None] = {}
    for name in a["scores"]:
        if name in b["scores"]:
            reasons = [each.name for each in differences if SCORES.get(name, name) in each.metrics]
            verdict = f"not comparable: {', '.join(reasons)}" if reasons else "comparable"
            print(f"{name}: {a['scores'][name]:.6f} against {b['scores'][name]:.6f} ({verdict})")
            refused |= dict.fromkeys([name] if reasons else [])
    if not {*a["scores"]} & {*b["scores"]}:
        raise UserError(f"{paths[0]} and {paths[1]}: no score is in both; evaluate both with the same --metrics")
    if refused:
        raise UserError(f"{paths[0]} and {paths[1]}: not comparable: {', '.join(refused)}")


def find_differences(a: Json, b: Json) -> Iterator[Difference]:
    """Yield the points in which the protocols of two results differ; those of metrics that neither has are left out."""
    used = {SCORES.get(name, name) for name in {*a["scores"]} & {*b["scores"]}}
    affected = [name for name in OF_REFERENCE if name in used and not _same_reference(a, b, name)]
    if affected:
        yield Difference("reference", affected, f"{_shown_reference(a)} against {_shown_reference(b)}")
    for point in POINTS:
        metrics = [name for name in point.metrics if name in used]
        first, second = point.read(a), point.read(b)
        unknown = first is None or second is None
        if metrics and (first != second or (unknown and point.required)):
            harmless = unknown and not point.required
            yield Difference(point.name, () if harmless else metrics, f"{_shown(first)} against {_shown(second)}")


def _same_reference(a: Json, b: Json, metric: str) -> bool:
    """True for one file, or for the same statistics where the metric reads no images."""
    first, second = a["reference"], b["reference"]
    if first.get("sha256") and first.get("sha256") == second.get("sha256"):
        return True
    if metric in OF_SMALL or not METRICS[metric].statistics:
        return False
    read = _at("statistics_sha256", "spatial" if METRICS[metric].spatial else "pool")
    return read(first) is not None and read(first) == read(second)


def _sampling_differences(a: Json, b: Json) -> Iterator[str]:
    """Yield settings in which the sampling jobs differ, which is what scores are compared for."""
    protocols = [document.get("protocol") for document in (a, b)]
    for document, protocol in zip((a, b), protocols, strict=True):
        if not isinstance(protocol, Mapping):
            yield f"not recorded for {_at('samples', 'path')(document)}"
            return
    first, second = (
        flatten({name: value for name, value in protocol.items() if name not in ("run", "versions")})
        for protocol in protocols
        if isinstance(protocol, Mapping)
    )
    for name in {**first, **second}:
        if first.get(name) != second.get(name) and name.split(".")[-1] not in PLACES:
            yield f"{name.removeprefix('config.')}: {_shown(first.get(name))} against {_shown(second.get(name))}"


def _shown_reference(document: Json) -> str:
    reference = document["reference"]
    layout = name_layout(reference.get("keys", ()))
    return f"{reference.get('path')} ({f'keys: {layout}; ' * bool(layout)}sha256 {_shown(reference.get('sha256'))})"


def _shown(value: object) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, str):
        is_digest = len(value) == 64 and not {*value} - {*"0123456789abcdef"}
        return value[:DIGITS] if is_digest else value
    return json.dumps(value)


def _read_result(path: Path) -> Json:
    """Read a result.

    Raises:
        UserError: If it is none.
    """
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    parts = {"format": int, "scores": dict, "reference": dict, "samples": dict}
    if not isinstance(document, dict) or not all(isinstance(document.get(name), kind) for name, kind in parts.items()):
        raise UserError(f"{path}: is no result of the evaluator; give a .scores.json that it wrote")
    for name, value in document["scores"].items():
        if not isinstance(value, int | float):
            raise UserError(f"{path}: scores.{name} is no number; evaluate again")
    return document
