"""Model cards: a README.md for the hub, from the document of weights and what is given with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models import family_name
from runtime.errors import UserError, error_prefix
from runtime.json_file import read_json
from runtime.licences import UNKNOWN

CARD = "README.md"
LIBRARY = "dit-family"
CURVE_ROWS = 8  # of the table of losses
RECIPE = ("data", "optimization", "compute")  # sections of a run's settings
PAPERS = {
    "DiT": "2212.09748", "DyDiT": "2410.03456", "DDT": "2504.05741", "Skip-DiT": "2411.17616", "Latte": "2401.03048",
    "Skip-Latte": "2411.17616", "LatteT2V": "2401.03048", "Skip-LatteT2V": "2411.17616",
}  # fmt: skip

LOAD = """```python
from sampling.pipeline import Pipeline  # in a clone of the dit-family repository

pipeline = Pipeline.from_pretrained("{name}")
{call}
```
"""
LOAD_BY_DIFFUSERS = """The code is part of this repository; read it before you allow it to run.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
{call}
```
"""


class CardContent(NamedTuple):
    """Content of a card, besides the document of the weights.

    Attributes:
        name: Repository or folder, as it is loaded.
        parameters: Number of parameters.
        scores: Documents of the evaluator, or others with "scores", by the name of their file.
        losses: Steps and losses of training.
        curves: Pictures of curves.
        pictures: Pictures of samples.
        for_diffusers: The folder is loaded by diffusers.
    """

    name: str
    parameters: int
    scores: Mapping[str, Mapping[str, Any]] = {}
    losses: tuple[tuple[int, float], ...] = ()
    curves: tuple[Path, ...] = ()
    pictures: tuple[Path, ...] = ()
    for_diffusers: bool = False


def read_scores(path: Path, flag: str = "--scores") -> dict[str, Any]:
    """Read a document of scores.

    Raises:
        UserError: If it cannot be read, or has no scores.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    with error_prefix(flag):
        document = read_json(path, "give the file that the evaluator wrote")
    if not isinstance(document.get("scores"), dict):
        raise UserError(f"{flag} {path}: has no scores; give the file that the evaluator wrote")
    return document


def read_losses(metrics: Path) -> tuple[tuple[int, float], ...]:
    """Steps and losses in a metrics.jsonl; none if there is no such file."""
    if not metrics.is_file():
        return ()
    rows = []
    for line in metrics.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows.append((int(row["step"]), float(row["loss"])))
        except (ValueError, TypeError, KeyError):  # other lines, or one that a kill cut short
            continue
    return tuple(rows)


def without_places(value: Any) -> Any:
    """JSON values with the last part of each path."""
    if isinstance(value, Mapping):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each) for each in value]
    is_place = isinstance(value, str) and (os.path.isabs(value) or Path(value).exists()) and os.sep in value
    return Path(value).name if is_place else value


def model_card(document: Mapping[str, Any], content: CardContent) -> str:
    """Write the card of weights.

    Args:
        document: From `sampling.publishing.document_of`.
        content: The rest of the card.

    Returns:
        Markdown, after the hub's metadata.
    """
    model, origin, licence = document["model"], document.get("origin"), document.get("licence")
    family = family_name(model["name"])
    source = f" (arXiv {PAPERS[family]})" if family in PAPERS else ""
    parts = [
        f"---\n{_metadata(document, content)}\n---\n",
        f"# {content.name.rsplit('/', 1)[-1]}\n",
        f"A {model['name']} of the family {family}{source}, {content.parameters:,} parameters, {_samples(document)}.\n",
        "## Load\n",
        (LOAD_BY_DIFFUSERS if content.for_diffusers else LOAD).format(name=content.name, call=_call(document, content)),
        "## Licence\n",
        f"These weights: {licence or UNKNOWN}."
        + (f" They are, or were trained from, {origin['name']} ({origin['licence'] or UNKNOWN})." if origin else "")
        + " The code is Apache-2.0.\n",
        "## Recipe\n",
        _table(_recipe(document)),
        "## Data\n",
        _table(_data(document)),
        "## Training curves\n",
        _curves(content),
        "## Scores\n",
        *_scores(content.scores),
    ]
    if content.pictures:
        parts += ["## Samples\n", "\n".join(f"![samples]({picture.name})" for picture in content.pictures) + "\n"]
    return "\n".join(parts)


def _metadata(document: Mapping[str, Any], content: CardContent) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import ModelCardData  # heavy, and only published folders need it

    shape, origin = document["data"]["image_shape"], document.get("origin")
    kind = "video" if len(shape) == 4 and shape[0] > 1 else "image"
    by_label = "unconditional-image-generation" if kind == "image" else None  # the hub has no task for labels
    task = f"text-to-{kind}" if "text_width" in document["model"] else by_label
    data = ModelCardData(
        license=document.get("licence"),
        library_name="diffusers" if content.for_diffusers else LIBRARY,
        pipeline_tag=task,
        tags=[LIBRARY, family_name(document["model"]["name"]), document["process"]["name"]],
        origin=None if origin is None else origin["name"],
    )
    return data.to_yaml()


def _samples(document: Mapping[str, Any]) -> str:
    """Phrase about the samples and their conditioning."""
    *frames, channels, height, width = document["data"]["image_shape"]
    size = f"{height} x {width} pixels" + {1: ", grey", 3: ""}.get(channels, f" in {channels} channels")
    kind = next((f"clips of {count} frames of" for count in frames if count > 1), "images of")
    count = document["model"].get("num_classes", 0)
    by = "text" if "text_width" in document["model"] else f"one of {count} classes" if count else "nothing"
    return f"for {kind} {size}; conditional on {by}"


def _call(document: Mapping[str, Any], content: CardContent) -> str:
    """Line that samples."""
    clips = len(document["data"]["image_shape"]) == 4 and document["data"]["image_shape"][0] > 1
    name, field = ("clips", "frames") if clips else ("images", "images")
    if "text_width" in document["model"]:
        arguments = 'prompt=["a dog in the snow"]' if content.for_diffusers else "**rows, null=null"
        prepare = "" if content.for_diffusers else 'rows, null = pipeline.encode_prompts(["a dog in the snow"])\n'
    elif document["model"].get("num_classes", 0):
        arguments, prepare = ("class_labels=[0]" if content.for_diffusers else "labels=[0]"), ""
    else:
        arguments, prepare = ("num_samples=1" if content.for_diffusers else "count=1"), ""
    if content.for_diffusers:
        return f"{prepare}{name} = pipeline({arguments}, seed=0).{field}"
    return f"{prepare}{name} = pipeline.sample({arguments}, seed=0)  # uint8"


def _recipe(document: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    """Rows of the recipe: what the network is, how it was trained, how it is sampled."""
    train, preset = document.get("train", {}), document["preset"]
    yield "model", _fields(document["model"], "name")
    yield "process", _fields(document["process"], "name")
    yield "autoencoder", document["encoder"]["name"]
    if "text" in document:
        yield "text encoder", document["text"].get("name")
    yield "weights", f"{document['weights']}, step {document.get('step', UNKNOWN)}"
    for name in ("loss", "optimizer"):
        yield name, _fields(document[name], "name") if name in document else UNKNOWN
    for section in RECIPE:
        yield from _flat(train.get(section, {}))
    shown = {name: value for name, value in preset.items() if name != "vae" and value not in (None, {})}
    yield "sampling", _fields(shown, "sampler")


def _data(document: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    data, source = document["data"], document.get("train", {}).get("data", {})
    yield "data set", source.get("dataset", UNKNOWN)
    yield "samples", f"{data['images']:,}" if "images" in data else UNKNOWN
    yield "shape", " x ".join(map(str, data["image_shape"]))
    classes = data.get("classes") or ()
    names = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
    yield "classes", f"{len(classes)}: {names}" if classes else document["model"].get("num_classes", "none")
    if data.get("digest"):
        yield "digest", json.dumps(data["digest"])


def _curves(content: CardContent) -> str:
    if not content.losses and not content.curves:
        return "No record of training was at hand.\n"
    rows, step = content.losses, max(1, len(content.losses) // CURVE_ROWS)
    kept = [*rows[::step][:CURVE_ROWS], *rows[-1:]]
    table = _table(((f"{at:,}", f"{loss:.5g}") for at, loss in dict.fromkeys(kept)), ("step", "loss")) if kept else ""
    return table + "".join(f"\n![{curve.stem}]({curve.name})\n" for curve in content.curves)


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Tables of scores, each with its whole protocol."""
    if not scores:
        yield "None are known for these weights. Scores without their protocol are not comparable.\n"
    for name, document in scores.items():
        yield f"### {name}\n"
        yield _table(((key, _number(value)) for key, value in document["scores"].items()), ("score", "value"))
        protocol = {key: value for key, value in document.items() if key != "scores"}
        yield "Protocol:\n"
        yield f"```json\n{json.dumps(without_places(protocol), indent=1)}\n```\n"


def _number(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _fields(values: Mapping[str, Any], first: str) -> str:
    """A name, then the other values: "adamw, lr 0.0001"."""
    rest = ", ".join(f"{key} {value}" for key, value in values.items() if key != first)
    return f"{values[first]}, {rest}" if rest else str(values[first])


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    """Settings of a section, without those that are not set."""
    return ((key, value) for key, value in values.items() if value not in (None, False, [], ()))


def _table(rows: Iterable[tuple[str, object]], head: tuple[str, str] = ("", "")) -> str:
    cells = [head, ("---", "---"), *rows]
    return "".join(f"| {key} | {str(value).replace('|', '/')} |\n" for key, value in cells)
