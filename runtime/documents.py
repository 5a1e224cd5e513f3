"""Settings as JSON documents, such as config.json, and comparisons of two of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from runtime.settings import Kind, Values, flags_of, places


def to_dict(config: Any) -> Values:
    """Convert settings to JSON values."""
    values: Values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def document(config: object, **owners: tuple[str, object]) -> Values:
    """General settings and those of owners as nested JSON, which `--config` reads.

    Args:
        config: General settings.
        **owners: Kind -> name that was chosen, and the settings (None without any).
    """
    return {**to_dict(config), **sections_of(owners)}


def sections_of(owners: Mapping[str, tuple[str, object]]) -> dict[str, Values]:
    """Settings of owners as nested JSON: kind -> name and settings, which may be None for those without any."""
    return {
        kind: {"name": name, **({} if settings is None else to_dict(settings))}
        for kind, (name, settings) in owners.items()
    }


def defaults_of(cls: type) -> Values:
    """Default of each setting, "group.field" -> JSON value; not validated, as the number of processes may not fit."""
    values = {".".join(flag.path): flag.field.default for flag in flags_of(cls).values()}
    return dict(json.loads(json.dumps(values, default=str)))


def free_settings(cls: type) -> set[str]:
    """Settings on which results do not depend, as "group.field" (or "field" outside groups)."""
    return {".".join(flag.path) for flag in flags_of(cls).values() if flag.field.metadata.get("free")}


def flag_of(cls: type, kinds: Sequence[Kind], path: str) -> str:
    """Flag of a setting that is given as "section.field" or, for an owner, "section.name"; the path without one."""
    known = places(cls, kinds).items()
    return next((flag for flag, place in known if ".".join(place.path) == path.removesuffix(".name")), path)


def flatten(values: Mapping[str, object]) -> dict[str, object]:
    """Nested JSON as "section.field" -> value."""

    def walk(node: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(values, ""))


def differences(
    then: Mapping[str, object], now: Mapping[str, object], free: Collection[str] = (), name: Callable[[str], str] = str
) -> list[str]:
    """Describe the settings that changed, one phrase each.

    Args:
        then: Former settings as nested JSON.
        now: Present settings as nested JSON; those that are only in `then` are ignored.
        free: Settings that may change, as in `free_settings`.
        name: Map from "section.field" to the name in the phrase.
    """
    before, after = flatten(then), flatten(now)
    return [
        f"{name(key)} was {before.get(key)!r}, now {value!r}"
        for key, value in after.items()
        if key not in free and before.get(key) != value
    ]
