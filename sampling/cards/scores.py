"""Scores in a card: read, compared with the weights that they are of, and shown with their protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.errors import UserError, error_prefix
from runtime.json_file import Json, read_json
from sampling.cards.text import as_text, at, digest, fields, folded, precision, table, warning

UNKNOWN_WEIGHTS = "from which weights is not recorded"
WRITERS = "give the file that the evaluator, digits_report.py or clips_report.py wrote"
REUSE = ("cache_interval", "sharing_interval", "cache_forecast", "forecast")
FEW = 2048  # images: the features of Inception have as many dimensions


def read_scores(path: Path, flag: str = "--scores") -> Json:
    """Read a document of scores.

    Raises:
        UserError: If it cannot be read, or has no scores.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    with error_prefix(flag):
        document = read_json(path, WRITERS)
    if not isinstance(document.get("scores"), dict):
        raise UserError(f"{flag} {path}: has no scores; {WRITERS}")
    return document


def check_scores(document: Json, weights: Json, where: str) -> None:
    """Check that scores are of these weights, as far as both say which file they are from.

    Args:
        document: The scores.
        weights: Document of the weights, from `sampling.publishing.document_of`.
        where: Flag and file, for the message.

    Raises:
        UserError: If they are of others.
    """
    checkpoint = at(document, "protocol", "checkpoint")
    if at(checkpoint, "sha256") is None:
        return
    scored = {checkpoint["sha256"], *(each["sha256"] for each in checkpoint.get("sources") or ())}
    same_file = bool(scored & {each["sha256"] for each in weights["sources"]})
    group, own = _group(document), str(weights["weights"])
    same_group = group in (None, own) or (group == "ema" and own.startswith("ema"))
    if not (same_file and same_group):
        model = checkpoint.get("model") or at(document, "protocol", "config", "model", "name")
        of = ", ".join(str(each) for each in (model, group) if each is not None)
        instead = f" ({own})" if same_file else ""
        raise UserError(f"{where}: of {checkpoint.get('file')} ({of}), not of these weights{instead}")


def show_scores(scores: Mapping[str, Json], rounded: str | None = None) -> Iterator[str]:
    """Tables of scores, each with its protocol; of weights that were rounded to a lower precision, or not."""
    if not scores:
        yield "None are known for these weights. Scores without their protocol are not comparable.\n"
    for name, document in scores.items():
        yield f"### {name}\n"
        meanings = document.get("meanings") or {}
        rows = [(key, _number(value), meanings.get(key, "")) for key, value in document["scores"].items()]
        yield table(rows, ("score", "value", "")) if meanings else table([row[:2] for row in rows], ("score", "value"))
        yield from (warning(line) for line in _warnings(document))
        scored = at(document, "protocol", "checkpoint", "rounded")
        if scored != rounded:
            yield warning(f"measured with weights {_rounding(scored)}; those here are {_rounding(rounded)}")
        yield table(_protocol(document), ("how it was measured", ""))
        yield folded("The whole document", document)


def _rounding(dtype: str | None) -> str:
    return "not rounded" if dtype is None else f"rounded to {dtype}"


def _warnings(document: Json) -> Iterator[str]:
    lines, count = document.get("warnings") or (), _count(document, "samples")
    if not lines and isinstance(count, int) and count <= FEW:
        yield f"{count:,} samples are few, and such scores say little"
    yield from map(str, lines)


def _protocol(document: Json) -> Iterator[tuple[str, object]]:
    """Rows of the table: what was compared with what, and how the samples were made."""
    reference, protocol = (document.get(name) or {} for name in ("reference", "protocol"))
    yield "samples", _amount(document, "samples") or "number not recorded"
    real = _amount(document, "reference")
    yield "reference", f"{at(reference, 'path') or 'not recorded'}" + (real and f"; {real}")
    if at(reference, "sha256"):
        yield "its digest", digest(reference["sha256"])
    checkpoint, config = at(protocol, "checkpoint"), at(protocol, "config") or {}
    if at(checkpoint, "sha256") is None:
        yield "weights", UNKNOWN_WEIGHTS
    else:
        step, group = checkpoint.get("step"), _group(document)
        named = [checkpoint.get("file"), None if step is None else f"step {step:,}", group]
        yield "weights", ", ".join([*(str(each) for each in named if each), digest(checkpoint["sha256"])])
    yield from _sampling(config)
    for name, title in (("network", "evaluator's network"), ("video_network", "evaluator's video network")):
        if network := document.get(name):
            yield title, _network(network)


def _sampling(config: Json) -> Iterator[tuple[str, object]]:
    """Rows about the sampling job; none where its settings are not known."""
    if not config:
        yield "settings of the samples", "not recorded"
        return
    sampler, guidance, job = (config.get(name) or {} for name in ("sampler", "guidance", "job"))
    other = f"table {config['solver_table']}" if config.get("solver_table") else "not recorded"
    yield "sampler", fields(sampler) if sampler else other
    yield "steps", config.get("num_sampling_steps", "not recorded")
    if "cfg_scale" in guidance:
        scale, channels = as_text(guidance["cfg_scale"]), guidance.get("guidance_channels")
        kind = "" if guidance.get("guidance", "cfg") == "cfg" else f", {guidance['guidance']}"
        yield "guidance scale", scale + kind + (f", of {channels} channels" if channels else "")
        interval = guidance.get("guidance_interval")
        yield "guidance interval", "everywhere" if interval is None else f"timesteps {as_text(interval)}"
    caching = config.get("caching") or {}
    for name in REUSE:
        if caching.get(name) is not None:
            yield name.replace("_", " "), caching[name]
    if "balanced_labels" in job:
        only = f", of {as_text(job['class_labels'])} only" if job.get("class_labels") else ""
        yield "labels", ("every class equally often" if job["balanced_labels"] else "random") + only
    if "global_seed" in job:
        yield "seed of noise and labels", job["global_seed"]
    if compute := config.get("compute"):
        yield "precision of sampling", precision(compute)


def _network(network: Json) -> str:
    named = [
        network.get("features"),
        network.get("weights") and Path(network["weights"]).name,
        network.get("precision"),
    ]
    sha = network.get("weights_sha256")
    return ", ".join(str(each) for each in named if each) + (f"; {digest(sha)}" if sha else "")


def _group(document: Json) -> str | None:
    """Set of weights that was scored, as far as it is recorded."""
    recorded = at(document, "protocol", "checkpoint", "weights")
    return recorded or at(document, "protocol", "config", "checkpoint", "weights")


def _count(document: Json, title: str) -> int | None:
    """Number of images or clips of the samples or the reference; None if it is not recorded."""
    places = ((title, "images"), ("video_network", title, "clips"), (title, "clips_in_file"))
    return next((count for place in places if (count := at(document, *place)) is not None), None)


def _amount(document: Json, title: str) -> str:
    """Number, length and size of the samples or the reference; empty if the number is not recorded."""
    count, size, frames = _count(document, title), at(document, title, "image_size"), at(document, title, "frames")
    if count is None:
        return ""
    sides = size if isinstance(size, list | tuple) else [size, size]
    pixels = f", {sides[0]} x {sides[1]} pixels" if size else ""
    return f"{count:,} {f'clips of {frames} frames' if frames else 'images'}{pixels}"


def _number(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
