"""The lock files and extras of the project."""

from __future__ import annotations

import re
import tomllib
from typing import NamedTuple

from tests.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    name: wanted for name, wanted in PROJECT["optional-dependencies"].items() if name not in ("dev", "tensorflow")
}
HASH = r" \\\n    --hash=sha256:[0-9a-f]{64}"


class Pin(NamedTuple):
    """A line of a lock file, without its hashes; the marker is empty where it is for all systems."""

    name: str
    version: str
    marker: str


def pins(lock: str, name: str | None = None) -> set[Pin]:
    """The pins of a lock file, or those of one package."""
    found = set()
    for line in re.sub(HASH, "", (ROOT / lock).read_text()).splitlines():
        requirement, _, marker = line.partition(" ; ")
        package, _, version = requirement.partition("==")
        found.add(Pin(package, version, marker))
    return {pin for pin in found if name in (None, pin.name)}
