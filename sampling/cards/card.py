"""Model cards: a README.md for the hub, from the document of weights and what is given with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from models import family_name
from runtime.json_file import Json, json_lines
from runtime.licences import UNKNOWN, Origin, hub_name
from sampling.cards.loading import LOADING, loading, makes_clips, start_of
from sampling.cards.pictures import show_pictures
from sampling.cards.recipe import show_data, show_recipe, untrained
from sampling.cards.scores import show_scores
from sampling.cards.text import table, warning

LIBRARY = "dit-family"
CURVE_ROWS = 8  # of the table of losses
PAPERS = {
    "DiT": "2212.09748", "DyDiT": "2410.03456", "DDT": "2504.05741", "Skip-DiT": "2411.17616", "Latte": "2401.03048",
    "Skip-Latte": "2411.17616", "LatteT2V": "2401.03048", "Skip-LatteT2V": "2411.17616",
}  # fmt: skip


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
        code_url: Public address of this code; None if it has none.
    """

    name: str
    parameters: int
    scores: Mapping[str, Json] = {}
    losses: tuple[tuple[int, float], ...] = ()
    curves: tuple[Path, ...] = ()
    pictures: tuple[Path, ...] = ()
    for_diffusers: bool = False
    code_url: str | None = None


def read_losses(metrics: Path) -> tuple[tuple[int, float], ...]:
    """Steps and losses in a metrics.jsonl; none if there is no such file."""
    if not metrics.is_file():
        return ()
    losses = []
    for _, record in json_lines(metrics):
        match record:  # others are of a validation, or damaged
            case {"step": int() | float() as step, "loss": int() | float() as loss}:
                losses.append((int(step), float(loss)))
    return tuple(losses)


def model_card(document: Json, content: CardContent) -> str:
    """Write the card of weights.

    Args:
        document: From `sampling.publishing.document_of`.
        content: The rest of the card.

    Returns:
        Markdown, after the hub's metadata.
    """
    model, licence = document["model"], document.get("licence")
    family = family_name(model["name"])
    source = f" (arXiv {PAPERS[family]})" if family in PAPERS else ""
    parts = [
        f"---\n{_metadata(document, content)}\n---\n",
        f"# {content.name.rsplit('/', 1)[-1]}\n",
        f"A {model['name']} of the family {family}{source}, {content.parameters:,} parameters, {_samples(document)}.\n",
        *([] if (line := untrained(document)) is None else [warning(f"{line}, and its samples show them")]),
        f"{LOADING}\n",
        loading(document, content.name, code_url=content.code_url, for_diffusers=content.for_diffusers),
        "## Licence\n",
        f"These weights: {licence or UNKNOWN}.{start_of(document)} The code is Apache-2.0.\n",
        "## Recipe\n",
        *show_recipe(document, content.parameters),
        "## Data\n",
        *show_data(document),
        "## Training curves\n",
        _curves(content),
        "## Scores\n",
        *show_scores(content.scores, document.get("rounded")),
    ]
    if content.pictures:
        parts += ["## Samples\n", *show_pictures(content.pictures, content.name, document["preset"])]
    return "\n".join(parts)


def _metadata(document: Json, content: CardContent) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import ModelCardData  # heavy, and only published folders need it

    origin, kind = document.get("origin"), "video" if makes_clips(document) else "image"
    by_label = "unconditional-image-generation" if kind == "image" else None  # the hub has no task for labels
    task = f"text-to-{kind}" if "text_width" in document["model"] else by_label
    data = ModelCardData(
        license=document.get("licence"),
        library_name="diffusers" if content.for_diffusers else LIBRARY,
        pipeline_tag=task,
        tags=[LIBRARY, family_name(document["model"]["name"]), document["process"]["name"]],
        base_model=None if origin is None else hub_name(Origin(**origin)),
    )
    return data.to_yaml()


def _samples(document: Json) -> str:
    """Phrase about the samples and their conditioning."""
    *frames, channels, height, width = document["data"]["image_shape"]
    size = f"{height} x {width} pixels" + {1: ", grey", 3: ""}.get(channels, f" in {channels} channels")
    kind = next((f"clips of {count} frames of" for count in frames if count > 1), "images of")
    count = document["model"].get("num_classes", 0)
    by = "text" if "text_width" in document["model"] else f"one of {count} classes" if count else "nothing"
    return f"for {kind} {size}; conditional on {by}"


def _curves(content: CardContent) -> str:
    if not content.losses and not content.curves:
        return "No record of training was at hand.\n"
    rows, step = content.losses, max(1, len(content.losses) // CURVE_ROWS)
    kept = [*rows[::step][:CURVE_ROWS], *rows[-1:]]
    lines = [(f"{at:,}", f"{loss:.5g}") for at, loss in dict.fromkeys(kept)]
    shown = table(lines, ("step", "loss")) if lines else ""
    return shown + "".join(f"\n![{curve.stem}]({quote(curve.name)})\n" for curve in content.curves)
