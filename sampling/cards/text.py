"""Parts of a card: tables, warnings and folded JSON, in Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.json_file import Json

DIGITS = 12  # of a digest that are shown


def without_places(value: object) -> object:
    """JSON values with the last part of each path."""
    if isinstance(value, Mapping):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each) for each in value]
    if isinstance(value, str) and os.sep in value and (os.path.isabs(value) or Path(value).exists()):
        return Path(value).name
    return value


def at(document: object, *names: str) -> Any:
    """Value of nested JSON; None where there is none."""
    for name in names:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document


def fields(values: Json, first: str = "name", *, but: Iterable[str] = ()) -> str:
    """A name, then the other values that are set: "adamw, weight decay 0.1"."""
    unset = (key for key, value in values.items() if value is None or value is False or value in ({}, []))
    hidden = {first, *but, *unset}
    shown = {key: value for key, value in values.items() if key not in hidden}
    rest = [key.replace("_", " ") + ("" if value is True else f" {as_text(value)}") for key, value in shown.items()]
    return ", ".join([str(values.get(first)), *rest])


def as_text(value: object) -> str:
    """A value of a setting as text: lists without brackets, numbers to six digits."""
    if isinstance(value, list | tuple):
        return " ".join(map(as_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def precision(compute: Json) -> str:
    """Precision and device of settings; a CPU has no TF32."""
    device, name = compute.get("device") or "CUDA if there was a device, else the CPU", compute.get("precision")
    return f"{'float32' if (name, device) == ('tf32', 'cpu') else name}, on {device}"


def digest(value: object) -> str:
    """Start of a SHA-256, in the type of code."""
    return f"SHA-256 `{str(value)[:DIGITS]}...`"


def table(rows: Iterable[tuple[object, ...]], head: tuple[str, ...] = ("", "")) -> str:
    """Table of rows; cells stay on their line and in their column."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "/").split())


def warning(text: str) -> str:
    """A warning in plain sight."""
    return f"> **Warning:** {' '.join(text.split())}\n"


def folded(title: str, value: object) -> str:
    """JSON that is shown when its title is clicked."""
    content = json.dumps(without_places(value), indent=1)
    return f"<details><summary>{title}</summary>\n\n```json\n{content}\n```\n\n</details>\n"
