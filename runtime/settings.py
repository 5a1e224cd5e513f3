"""Settings: dataclass fields that become flags, help and JSON, and that have an owner.

A program's settings are a dataclass with fields made by `setting`, or dataclasses of such fields (one group of flags
each). In addition to these general settings, alternatives that are chosen by name (a model's family, a process, a
sampler, a loss) own further ones; a `Kind` lists them. One parser takes the flags of all owners. Each owner is built
from its flags once the choice is known, and a flag of another owner is an error that names that owner.
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
from runtime.stores import Address, parse_path

T_co = TypeVar("T_co", covariant=True)
Values = dict[str, Any]  # JSON values, or what flags were parsed to


def setting(
    default: Any,
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
) -> Any:
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
    field: dataclasses.Field[Any]
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


def flags_of(cls: type, path: tuple[str, ...] = ()) -> dict[str, Flag]:
    """All settings of a dataclass and of the groups in it, by flag."""
    flags: dict[str, Flag] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            flags |= flags_of(hint, (*path, field.name))
        elif "help" in field.metadata:
            flag = Flag((*path, field.name), field, hint)
            flags[flag.name] = flag
    return flags


class Given(Generic[T_co]):
    """Settings from the command line and a config file; owners are built when it is known which ones are used.

    Attributes:
        general: General settings of the program.
    """

    def __init__(
        self,
        general: T_co,
        kinds: Sequence[Kind],
        flags: Mapping[str, object] = types.MappingProxyType({}),
        sections: Mapping[str, Values] = types.MappingProxyType({}),
    ) -> None:
        self.general = general
        self._kinds, self._flags, self._sections = {kind.name: kind for kind in kinds}, flags, sections

    def replace(self, **values: object) -> Given[T_co]:
        """Settings with others from Python, by the names of their flags: `replace(cfg_scale=4.0, eta=0.5)`.

        Raises:
            UserError: For an unknown name, or a value of another type or out of range.
        """
        general, flags, nested = flags_of(type(self.general)), dict(self._flags), Values()
        owned = {
            name: flag
            for kind in self._kinds.values()
            for owner in kind.owners
            for name, flag in kind.flags(owner).items()
        }
        for name, value in values.items():
            flag = {**owned, **general}.get(flag_name(name))
            if flag is None:
                raise UserError(f"{name}: unknown setting")
            value = from_json(json.loads(json.dumps(value, default=str)), flag, name)
            if flag.name in general:
                put(nested, flag.path, value)
            else:
                flags[flag.name] = value
        with error_prefix(""):
            return Given(_replace(self.general, nested), [*self._kinds.values()], flags, self._sections)

    def name_in_file(self, kind: str) -> str | None:
        """Name in the config file that chooses an owner."""
        return self._sections.get(kind, {}).get("name")

    def fields(self, kind: str, owner: str) -> Values:
        """Settings given for an owner, by field: those of the config file, overridden by flags."""
        flags = self._kinds[kind].flags(owner)
        typed_values = {flags[name].field.name: value for name, value in self._flags.items() if name in flags}
        return self._fields_in_file(self._kinds[kind], owner) | typed_values

    def _fields_in_file(self, kind: Kind, owner: str) -> Values:
        section = dict(self._sections.get(kind.name, {}))
        name = section.pop("name", None)
        with error_prefix(f"--config: {kind.name}.name"):
            if name is not None and kind.owner_of(name) != owner:
                return {}
        own = {field.name: field.default for field in dataclasses.fields(kind.owners[owner])}
        implied: Mapping[str, object] = {}
        if kind.named is not None and name is not None and getattr(self.general, kind.name) not in (None, name):
            implied = own | dict(kind.named(name))  # the size of another model than the one that a flag chooses
        flags = {flag.field.name: flag for flag in kind.flags(owner).values()}
        values: Values = {}
        for field, content in section.items():
            if field in flags:
                value = from_json(content, flags[field], f"--config: {kind.name}.{field}")
                if field not in implied or implied[field] != value:
                    values[field] = value
            elif kind.sampling or field not in own:  # others are given by the data, such as a shape
                raise UserError(f"--config: unknown setting '{kind.name}.{field}' of {owner}")
        return values

    def prefix(self, kind: str, owner: str) -> str:
        """Flags given for an owner, as they were typed, to start a message about them."""
        flags = self._kinds[kind].flags(owner)
        return " ".join(typed_flag(name, value) for name, value in self._flags.items() if name in flags)

    def build(self, kind: str, owner: str, **defaults: object) -> Any:
        """Build an owner's settings from what was given for it.

        Raises:
            UserError: For invalid values, naming the flags.
        """
        with error_prefix(self.prefix(kind, owner)):
            return self._kinds[kind].owners[owner](**{**defaults, **self.fields(kind, owner)})

    def check_owners(self, **used: str) -> None:
        """Check that flags given for these kinds belong to the owners that are used.

        Args:
            **used: Kind -> owner.

        Raises:
            UserError: Naming the flag and its owners.
        """
        for name, value in self._flags.items():
            for kind, owner in used.items():
                row = self._kinds[kind]
                owners = [each for each in row.owners if name in row.flags(each)]
                if owners and owner not in owners:
                    names = " or ".join(owners)
                    flag = typed_flag(name, value)
                    raise UserError(f"{flag}: is a setting of the {kind} {names}; this run uses {owner}")


def _replace(config: Any, values: Values) -> Any:
    """Replace settings in nested groups, each group at once."""
    parts = {name: _replace(getattr(config, name), v) if isinstance(v, dict) else v for name, v in values.items()}
    return dataclasses.replace(config, **parts)


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def section_of(values: Values, path: tuple[str, ...]) -> Values:
    """Find the section of a setting in nested ones; it is added if it is missing."""
    for name in path[:-1]:
        values = values.setdefault(name, {})
    return values


def put(values: Values, path: tuple[str, ...], value: object) -> None:
    """Store a setting in nested sections."""
    section_of(values, path)[path[-1]] = value


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


def from_json(value: object, flag: Flag, where: str) -> object:
    """Convert a JSON value to the setting's type; a UserError that starts with `where` if it does not fit."""
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
        as_text = items[0] is str  # numbers are names, too
        return tuple(_scalar(str(v) if as_text and type(v) is int else v, items[0], where, flag) for v in value)
    return _scalar(value, kind, where, flag)


def path_parser(flag: Flag) -> Callable[[str], Path]:
    """Function from the text of a path to the path; a UserError for an address where only local paths are taken."""

    def parse(text: str) -> Path:
        path = parse_path(text)
        if isinstance(path, Address) and not flag.field.metadata["remote"]:
            raise UserError(f"{flag.name} {text}: is on an object store, and must be a local path; copy it by hand")
        return path

    return parse


def _scalar(value: object, kind: Any, where: str, flag: Flag) -> object:
    accepted = {float: (float, int), Path: (str,)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} = {value!r}: expected {getattr(kind, '__name__', kind)}")
    return path_parser(flag)(str(value)) if kind is Path else kind(value)


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
