"""Settings: dataclass fields that become flags, help and JSON, and that have an owner.

A program's settings are a dataclass with fields made by `setting`, or dataclasses of such fields (one group of flags
each). In addition to these general settings, alternatives that are chosen by name (a model's family, a process, a
sampler, a loss) own further ones; a `Kind` lists them. One parser takes the flags of all owners. Each owner is built
from its flags once the choice is known, and a flag of another owner is an error that names that owner.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

from runtime.errors import error_prefix

T = TypeVar("T")
Values = dict[str, Any]  # JSON values, or what flags were parsed to
Owners = Mapping[str, tuple[str, Any]]  # kind of owner -> chosen name and its settings


def setting(
    default: T,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    flag: str | None = None,
    shown: str | None = None,
    was: Mapping[str, object] | None = None,
    free: bool = False,
    sampling: bool = False,
    repeats: bool = False,
    remote: bool = False,
) -> T:
    """Make a dataclass field that is a setting.

    Args:
        default: Default of the field.
        help: Phrase for `--help`; the default is added to it.
        choices: Allowed values; not needed for a `Literal` type.
        flag: Official name of the flag, if it differs from the field's.
        shown: Text for the default in `--help`, if the value does not explain itself.
        was: Former flags, accepted with a warning: flag -> value that it means, or None if it takes a value.
        free: True if results do not depend on it: it may change when a run is resumed or a job continued.
        sampling: True for an owner's setting that does not change its weights, and that sampling offers, too.
        repeats: True for a flag of several values that adds to those of the same flag before it.
        remote: True for a path that may be an address on an object store.
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "shown": shown, "was": was or {}, "free": free}
    metadata |= {"sampling": sampling, "repeats": repeats, "remote": remote}
    return dataclasses.field(default=default, metadata=metadata)


def positional(help: str, *, remote: bool = False) -> Any:
    """Make a dataclass field without a default that is given by its position, not by a flag."""
    return dataclasses.field(metadata={"help": help, "remote": remote})


def flag_name(field: str) -> str:
    """Flag of a field's name: `global_batch_size` -> "--global-batch-size"."""
    return "--" + field.replace("_", "-")


class Kind(NamedTuple):
    """Owners of settings, one of which is chosen by a name.

    Attributes:
        name: Name of the kind, such as "process"; also the flag that chooses, and the section in JSON.
        owners: Owner -> dataclass of its settings.
        owner_of: Map from the value that chooses (a model's name) to the owner (its family).
        follows: Another kind, and the map from its owner to this kind's owner if no value chooses one.
        named: Map from the value that chooses to the settings that it implies (a model's size).
        sampling: True to offer only settings for sampling.
    """

    name: str
    owners: Mapping[str, type]
    owner_of: Callable[[str], str] = str
    follows: tuple[str, Callable[[str], str]] | None = None
    named: Callable[[str], Mapping[str, object]] | None = None
    sampling: bool = False

    def flags(self, owner: str) -> dict[str, Flag]:
        """Flags of one owner by name."""
        own = flags_of(self.owners[owner])
        return {name: flag for name, flag in own.items() if flag.field.metadata["sampling"] or not self.sampling}


def choose_owners(kinds: Sequence[Kind], names: Mapping[str, str | None]) -> dict[str, str]:
    """Resolve the owner of each kind: chosen by its name, or following from another kind's owner.

    Args:
        kinds: Kinds; one that follows comes after the one that it follows.
        names: Kind -> value that chooses, absent or None without one. Other entries have no effect.

    Raises:
        UserError: For a name without an owner.
    """
    owners: dict[str, str] = {}
    for kind in kinds:
        name = names.get(kind.name)
        if name is not None:
            with error_prefix(f"{flag_name(kind.name)} {name}"):
                owners[kind.name] = kind.owner_of(name)
                if owners[kind.name] not in kind.owners:
                    raise ValueError(f"unknown; choose from {', '.join(kind.owners)}")
        elif kind.follows is not None and kind.follows[0] in owners:
            leader, owner_of_leader = kind.follows
            owners[kind.name] = owner_of_leader(owners[leader])
    return owners


class Flag(NamedTuple):
    """A setting as a flag.

    Attributes:
        path: Names of the groups, then of the field.
        field: The dataclass field.
        hint: Type of the field.
    """

    path: tuple[str, ...]
    field: dataclasses.Field[object]
    hint: object

    @property
    def is_positional(self) -> bool:
        """True for an argument that is given by its position."""
        return self.field.default is dataclasses.MISSING

    @property
    def name(self) -> str:
        """Name with dashes; a positional argument has none."""
        if self.is_positional:
            return self.field.name
        return self.field.metadata["flag"] or flag_name(self.field.name)


class Place(NamedTuple):
    """Place of a flag's value in JSON.

    Attributes:
        path: Names of the sections, then of the field.
        kind: Kind of the owners; None for general settings.
        stands_for: Value of a former flag that takes none; None otherwise.
    """

    path: tuple[str, ...]
    kind: str | None
    stands_for: object


def places(cls: type, kinds: Sequence[Kind]) -> dict[str, Place]:
    """Places of all flags of a program in JSON, former names included: flag -> place."""
    by_flag: dict[str, Place] = {}
    owned = ((kind.name, flag) for kind in kinds for owner in kind.owners for flag in kind.flags(owner).values())
    for kind_name, flag in [*((None, flag) for flag in flags_of(cls).values()), *owned]:
        path = flag.path if kind_name is None else (kind_name, *flag.path)
        for name, value in {flag.name: None, **flag.field.metadata.get("was", {})}.items():
            by_flag.setdefault(name, Place(path, kind_name, value))
    return by_flag


def flags_of(cls: type) -> Mapping[str, Flag]:
    """All settings of a dataclass and of the groups in it, by flag."""
    return _flags_of(cls, ())


@cache
def _flags_of(cls: type, path: tuple[str, ...]) -> Mapping[str, Flag]:
    flags: dict[str, Flag] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            flags |= _flags_of(hint, (*path, field.name))
        elif "help" in field.metadata:
            flag = Flag((*path, field.name), field, hint)
            flags[flag.name] = flag
    return types.MappingProxyType(flags)


def split_optional(hint: object) -> tuple[Any, bool]:
    """Split None from a type: (int | None) -> (int, True), int -> (int, False)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0], True
    return hint, False


def choices_of(flag: Flag) -> tuple[str, ...] | None:
    """Allowed values of a setting; None if any is allowed."""
    kind, _ = split_optional(flag.hint)
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else flag.field.metadata.get("choices")


def typed(value: object) -> str:
    """Format a value as a user types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def typed_flag(name: str, value: object) -> str:
    """Format a flag with its value as a user types it."""
    if isinstance(value, bool):
        return name if value else f"--no-{name.removeprefix('--')}"
    return f"{name} {typed(value)}"
