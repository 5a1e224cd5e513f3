"""Shards of a job for batch queues: independent jobs, each with its own files, that are merged afterwards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime.errors import UserError

SHOWN = 60  # characters of a setting in a message
REMEDY = "run the command of this shard again"  # for a part that is damaged or not finished


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`, counted from 1; written "2/3"."""

    index: int
    count: int

    def __str__(self) -> str:
        """As it is given to --shard."""
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "2/3".

        Raises:
            ValueError: Naming --shard, if it is no such text, or there is no such shard.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if match is None:
            raise ValueError(f"--shard {text}: must be i/n, such as 1/3 for the first of three")
        shard = cls(*map(int, match.groups()))
        if not 1 <= shard.index <= shard.count:
            raise ValueError(f"--shard {text}: the first number must be from 1 to the second one")
        return shard

    def range(self, total: int, unit: str) -> range:
        """Consecutive numbers out of `total`; the sizes of all shards differ by at most one.

        Args:
            total: Number of pieces in total.
            unit: Words for them, with the flag that sets their size.

        Raises:
            UserError: If there are more shards than pieces.
        """
        if self.count > total:
            raise UserError(f"--shard {self}: the job has {total:,} {unit}; give at most {total:,} shards")
        return range(*self.share(total))

    def share(self, total: int) -> tuple[int, int]:
        """First number and the one past the last, where a shard may have none."""
        return (self.index - 1) * total // self.count, self.index * total // self.count

    def path(self, path: Path) -> Path:
        """Path of this shard's file or folder: "a.2-of-3.npz" for "a.npz"."""
        return path.parent / f"{path.stem}.{self.index}-of-{self.count}{path.suffix}"


class Part(NamedTuple):
    """A finished shard, as it is read for a merge.

    Attributes:
        path: Its file or folder.
        shard: Its number, among how many.
        settings: What must be the same in all parts of a job, by flag or name.
    """

    path: Path
    shard: Shard
    settings: Mapping[str, object]


def order_parts(parts: Sequence[Part]) -> list[Part]:
    """Check that these are all parts of one job; returns them by number.

    Raises:
        UserError: If one is of another job, given twice, or missing.
    """
    first, by_number = parts[0], dict[int, Part]()
    for part in parts:
        if part.shard.count != first.shard.count:
            raise UserError(f"{part.path}: is shard {part.shard}, but {first.path} {first.shard}; give one job's parts")
        for name in {**first.settings, **part.settings}:
            theirs, ours = part.settings.get(name), first.settings.get(name)
            if theirs != ours:
                raise UserError(
                    f"{part.path}: of another job: {name} is {_shown(theirs)}, in {first.path} {_shown(ours)}"
                )
        twice = by_number.setdefault(part.shard.index, part)
        if twice is not part:
            raise UserError(f"{part.path}: is shard {part.shard}, as {twice.path} is; give every shard once")
    missing = [str(Shard(i, first.shard.count)) for i in range(1, first.shard.count + 1) if i not in by_number]
    if missing:
        raise UserError(
            f"{first.path}: shards {', '.join(missing)} of this job are missing; give the parts of all shards"
        )
    return [by_number[number] for number in sorted(by_number)]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
