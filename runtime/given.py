"""Values of settings, as flags and files give them; owners are built from theirs once they are chosen."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from runtime.errors import UserError, error_prefix
from runtime.settings import Flag, Kind, Values, choices_of, flag_name, flags_of, split_optional, typed_flag
from runtime.stores import Address, parse_path

T_co = TypeVar("T_co", covariant=True)


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
        owned = defaultdict[str, list[Flag]](list)  # several owners may have a flag of one name
        for kind in self._kinds.values():
            for owner in kind.owners:
                for name, flag in kind.flags(owner).items():
                    owned[name].append(flag)
        for name, value in values.items():
            own = flag_name(name)
            possible = [general[own]] if own in general else owned.get(own)
            if possible is None:
                raise UserError(f"{name}: unknown setting")
            flag, value = from_any(json.loads(json.dumps(value, default=str)), possible, name)
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


def section_of(values: Values, path: tuple[str, ...]) -> Values:
    """Find the section of a setting in nested ones; it is added if it is missing."""
    for name in path[:-1]:
        values = values.setdefault(name, {})
    return values


def put(values: Values, path: tuple[str, ...], value: object) -> None:
    """Store a setting in nested sections."""
    section_of(values, path)[path[-1]] = value


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


def from_any(value: object, flags: Sequence[Flag], where: str) -> tuple[Flag, object]:
    """Convert a JSON value for the first of these flags that takes it; raises the error of the first if none does."""
    errors = list[UserError]()
    for flag in flags:
        try:
            return flag, from_json(value, flag, where)
        except UserError as error:
            errors.append(error)
    raise errors[0]


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
