"""Settings: dataclass fields that become flags, help and JSON, and belong to owners.

A program's settings are a dataclass whose fields are made by `setting`, or are dataclasses of such fields (a group of
flags each). Beside these general settings, alternatives that are chosen by name (a model's family, a process, a
sampler, a loss) own settings of their own: a `Kind` lists them. One parser takes the flags of all owners; each owner
is built from its own once it is known which one is used, and a flag of another owner is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from runtime.errors import UserError, error_prefix

T = TypeVar("T")
Values = dict[str, Any]  # JSON values, or what flags were parsed to


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    flag: str | None = None,
    shown: str | None = None,
    was: Mapping[str, Any] | None = None,
    free: bool = False,
    sampling: bool = False,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: the field's default.
        help: one sentence for `--help`; the default is added to it.
        choices: allowed values; those of a `Literal` type need not be repeated.
        flag: official name of the flag where it differs from the field's.
        shown: the default in words, where the value does not say it.
        was: former flags, each with the value that it stands for, or None if it takes one. Accepted with a warning.
        free: the result does not depend on it: it may change when a run is resumed or a job continued.
        sampling: an owner's setting that does not change its weights, and that sampling offers too.
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "shown": shown, "was": was or {}, "free": free}
    return dataclasses.field(default=default, metadata={**metadata, "sampling": sampling})


def positional(help: str) -> Any:
    """A dataclass field without a default that is given by its place, not by a flag."""
    return dataclasses.field(metadata={"help": help})


def flag_name(field: str) -> str:
    """The flag of a field's name: `global_batch_size` -> "--global-batch-size"."""
    return "--" + field.replace("_", "-")


class Kind(NamedTuple):
    """Owners of settings, of which a name chooses one.

    Attributes:
        name: what they are, such as "process"; their section in JSON.
        owners: name -> dataclass of its settings.
        owner_of: from the value that chooses (a model's name) to the owner's name (its family).
        follows: another kind, and from its owner to the owner where no value chooses one.
        named: from the value that chooses to the settings that it stands for (a model's size).
        sampling: only settings that are offered when sampling.
    """

    name: str
    owners: Mapping[str, type]
    owner_of: Callable[[str], str] = str
    follows: tuple[str, Callable[[str], str]] | None = None
    named: Callable[[str], Mapping[str, Any]] | None = None
    sampling: bool = False

    def flags(self, owner: str) -> dict[str, Flag]:
        """Flags of one owner by name."""
        own = flags_of(self.owners[owner])
        return {name: flag for name, flag in own.items() if flag.field.metadata["sampling"] or not self.sampling}


def choose_owners(kinds: Sequence[Kind], names: Mapping[str, Any]) -> dict[str, str]:
    """Owner of each kind: the one that its name chooses, or the one that follows from another kind's.

    Args:
        kinds: a kind that follows comes after the one that it follows.
        names: kind -> value that chooses; absent or None where there is none. Other entries have no effect.

    Raises:
        UserError: for a name without an owner.
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
    """A setting as a flag; `path` leads from the program's settings to the field, `hint` is its type."""

    path: tuple[str, ...]
    field: dataclasses.Field[Any]
    hint: Any

    @property
    def is_positional(self) -> bool:
        """True for an argument that is given by its place."""
        return self.field.default is dataclasses.MISSING

    @property
    def name(self) -> str:
        """With its dashes; a positional argument's has none."""
        if self.is_positional:
            return self.field.name
        return self.field.metadata["flag"] or flag_name(self.field.name)


class Place(NamedTuple):
    """Where a flag's value is kept in JSON.

    Attributes:
        path: sections, then the field.
        kind: whose owners have the setting; None for general ones.
        stands_for: what a former flag without a value means; None if it takes one.
    """

    path: tuple[str, ...]
    kind: str | None
    stands_for: object


def places(cls: type, kinds: Sequence[Kind]) -> dict[str, Place]:
    """Places of all flags of a program in JSON, former names included: flag -> place."""
    found: dict[str, Place] = {}
    owned = ((kind.name, flag) for kind in kinds for owner in kind.owners for flag in kind.flags(owner).values())
    for kind_name, flag in [*((None, flag) for flag in flags_of(cls).values()), *owned]:
        path = flag.path if kind_name is None else (kind_name, *flag.path)
        for name, value in {flag.name: None, **flag.field.metadata.get("was", {})}.items():
            found.setdefault(name, Place(path, kind_name, value))
    return found


def flags_of(cls: type, path: tuple[str, ...] = ()) -> dict[str, Flag]:
    """All settings of a dataclass and of the groups in it, by flag."""
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= flags_of(hint, (*path, field.name))
        elif "help" in field.metadata:
            flag = Flag((*path, field.name), field, hint)
            found[flag.name] = flag
    return found


class Given(Generic[T]):
    """What was given for the owners of settings, until it is known which of them are used.

    Attributes:
        general: the program's own settings.
    """

    def __init__(self, general: T, kinds: Sequence[Kind], flags: Values, sections: Mapping[str, Values]) -> None:
        self.general = general
        self._kinds, self._flags, self._sections = {kind.name: kind for kind in kinds}, flags, sections

    def name_in_file(self, kind: str) -> str | None:
        """The name that a config file chooses, for a kind that no flag chooses."""
        return self._sections.get(kind, {}).get("name")

    def fields(self, kind: str, owner: str) -> Values:
        """Settings given for an owner, by field: those of a config file about it, and above them flags."""
        row = self._kinds[kind]
        flags = row.flags(owner)
        section = dict(self._sections.get(kind, {}))
        name = section.pop("name", None)
        by_field = {flag.field.name: flag for flag in flags.values()}
        values: Values = {}
        for field, value in section.items() if name is None or row.owner_of(name) == owner else ():
            if field in by_field:
                values[field] = from_json(value, by_field[field], f"--config: {kind}.{field}")
            elif not row.sampling and field in {each.name for each in dataclasses.fields(row.owners[owner])}:
                continue  # decided by the data, such as a shape
            else:
                raise UserError(f"--config: unknown setting '{kind}.{field}' of {owner}")
        return values | {flags[f].field.name: value for f, value in self._flags.items() if f in flags}

    def prefix(self, kind: str, owner: str) -> str:
        """The flags given for an owner, as they were typed: the start of a message about them."""
        flags = self._kinds[kind].flags(owner)
        return " ".join(typed_flag(name, value) for name, value in self._flags.items() if name in flags)

    def build(self, kind: str, owner: str, **defaults: object) -> Any:
        """Build an owner's settings from what was given for it.

        Raises:
            UserError: naming the flags, for values that it refuses.
        """
        with error_prefix(self.prefix(kind, owner)):
            return self._kinds[kind].owners[owner](**{**defaults, **self.fields(kind, owner)})

    def check_owners(self, **used: str) -> None:
        """Check that flags given for these kinds belong to the owners that are used.

        Args:
            **used: kind -> owner.

        Raises:
            UserError: naming the flag and its owners.
        """
        for name, value in self._flags.items():
            for kind, owner in used.items():
                row = self._kinds[kind]
                owners = [each for each in row.owners if name in row.flags(each)]
                if owners and owner not in owners:
                    names = " or ".join(owners)
                    flag = typed_flag(name, value)
                    raise UserError(f"{flag}: is a setting of the {kind} {names}; this run uses {owner}")


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def to_dict(config: Any) -> Values:
    """The settings as JSON values."""
    values: Values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def document(config: Any, **owners: tuple[str, Any]) -> Values:
    """General settings and those of owners as nested JSON, as `--config` reads it back.

    Args:
        config: the general settings.
        **owners: kind -> name that was chosen, and the settings (None where it has none).
    """
    sections = {
        kind: {"name": name, **({} if settings is None else to_dict(settings))}
        for kind, (name, settings) in owners.items()
    }
    return {**to_dict(config), **sections}


def free_settings(cls: type) -> set[str]:
    """Settings on which results do not depend, as "group.field" (or "field" outside groups)."""
    return {".".join(flag.path) for flag in flags_of(cls).values() if flag.field.metadata.get("free")}


def flag_of(cls: type, kinds: Sequence[Kind], path: str) -> str:
    """The flag of a setting that is given as "section.field" or, of an owner, "section.name"; the path if none."""
    known = places(cls, kinds).items()
    return next((flag for flag, place in known if ".".join(place.path) == path.removesuffix(".name")), path)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested JSON as "section.field" -> value."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(values, ""))


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = (), name: Callable[[str], str] = str
) -> list[str]:
    """Settings that changed, a phrase each.

    Args:
        then: nested JSON values.
        now: the same of today; settings that are only in `then` are ignored.
        free: those that may change, as in `free_settings`.
        name: what a setting is called in messages, from "section.field".
    """
    before, after = flatten(then), flatten(now)
    return [
        f"{name(key)} was {before.get(key)!r}, now {value!r}"
        for key, value in after.items()
        if key not in free and before.get(key) != value
    ]


def from_json(value: Any, flag: Flag, where: str) -> Any:
    """Value of a setting from JSON; a UserError that starts with `where` if it is none."""
    kind, optional = split_optional(flag.hint)
    if value is None and optional:
        return None
    choices = choices_of(flag)
    if choices is not None:
        if value not in choices:
            raise UserError(f"{where} = {value!r}: choose from {', '.join(choices)}")
        return value
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        count = "" if Ellipsis in items else f"{len(items)} "
        if not isinstance(value, list) or (count and len(value) != len(items)):
            raise UserError(f"{where} = {value!r}: expected {count}values in a list")
        return tuple(_scalar(item, items[0], where) for item in value)
    return _scalar(value, kind, where)


def _scalar(value: Any, kind: Any, where: str) -> Any:
    accepted = {float: (float, int), Path: (str,)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} = {value!r}: expected {getattr(kind, '__name__', kind)}")
    return kind(value)


def split_optional(hint: Any) -> tuple[Any, bool]:
    """(int | None) -> (int, True); anything else -> (itself, False)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0], True
    return hint, False


def choices_of(flag: Flag) -> tuple[str, ...] | None:
    """Allowed values of a setting; None if there is no list of them."""
    kind, _ = split_optional(flag.hint)
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else flag.field.metadata.get("choices")


def typed(value: object) -> str:
    """A value as a user types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def typed_flag(name: str, value: Any) -> str:
    """A flag with its value, as a user types it."""
    if isinstance(value, bool):
        return name if value else f"--no-{name.removeprefix('--')}"
    return f"{name} {typed(value)}"
