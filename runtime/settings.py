"""Settings: dataclass fields that become flags, help and JSON, and one parser for all of their owners.

A program's settings are a dataclass whose fields are made by `setting`, or are dataclasses of such fields (a group of
flags each). Beside these general settings, alternatives that are chosen by name (a model's family, a process, a
sampler, a loss) own settings of their own: a `Kind` lists them. One parser takes the flags of all owners; each owner
is built from its own once it is known which one is used, and a flag of another owner is an error that names it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from runtime.errors import UserError, error_prefix

T = TypeVar("T")
Values = dict[str, Any]  # JSON values, or what flags were parsed to
Aliases = Mapping[str, Mapping[str, Any]]  # value of --model -> flag -> value


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
        own = _flags(self.owners[owner])
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
    for kind_name, flag in [*((None, flag) for flag in _flags(cls).values()), *owned]:
        path = flag.path if kind_name is None else (kind_name, *flag.path)
        for name, value in {flag.name: None, **flag.field.metadata.get("was", {})}.items():
            found.setdefault(name, Place(path, kind_name, value))
    return found


def _flags(cls: type, path: tuple[str, ...] = ()) -> dict[str, Flag]:
    """All settings of a dataclass and of the groups in it, by flag."""
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= _flags(hint, (*path, field.name))
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
                values[field] = _from_json(value, by_field[field], f"--config: {kind}.{field}")
            elif not row.sampling and field in {each.name for each in dataclasses.fields(row.owners[owner])}:
                continue  # decided by the data, such as a shape
            else:
                raise UserError(f"--config: unknown setting '{kind}.{field}' of {owner}")
        return values | {flags[f].field.name: value for f, value in self._flags.items() if f in flags}

    def prefix(self, kind: str, owner: str) -> str:
        """The flags given for an owner, as they were typed: the start of a message about them."""
        flags = self._kinds[kind].flags(owner)
        return " ".join(_typed_flag(name, value) for name, value in self._flags.items() if name in flags)

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
                    flag = _typed_flag(name, value)
                    raise UserError(f"{flag}: is a setting of the {kind} {names}; this run uses {owner}")


# ----------------------------------------------------------------------------------------------------------------------
# Parsing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_config(cls: type[T], argv: Sequence[str], *, program: str, doc: str | None) -> T:
    """Read the settings of a program without owners; arguments as for `parse`."""
    return parse(cls, argv, program=program, doc=doc).general


def parse(
    cls: type[T],
    argv: Sequence[str],
    *,
    program: str,
    doc: str | None,
    kinds: Sequence[Kind] = (),
    aliases: Aliases = types.MappingProxyType({}),
    migrate: Callable[[Values], Values] = dict,
) -> Given[T]:
    """Read settings from the command line, on top of `--config FILE` where given.

    Args:
        cls: dataclass of the general settings; it validates itself in `__post_init__` by ValueError.
        argv: arguments after the program's name.
        program: its name in help, messages and files.
        doc: docstring of the script: one line, then examples, which are indented.
        kinds: owners of further settings; the flag "--KIND" (a general setting) chooses one of each.
        aliases: values of --model that stand for other flags.
        migrate: brings the JSON of an earlier version into today's form.

    Raises:
        UserError: for anything wrong with flags, file or values.
    """
    general = _flags(cls)
    of_owners = [flag for kind in kinds for owner in kind.owners for flag in kind.flags(owner).values()]
    owned = {flag.name for flag in of_owners}
    assert not general.keys() & owned, f"flags with two owners: {general.keys() & owned}"
    flags = [*general.values(), *of_owners]
    parser = _Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", dest="--config", metavar="FILE", default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS)
    for flag in flags:
        _add_flag(parser, flag)
    wants_help = "-h" in argv or "--help" in argv
    if wants_help:
        _print_help(cls, argv, program, doc or "", kinds, aliases)
        raise SystemExit(0)
    given = _current(vars(parser.parse_args(argv)), flags, program)
    path = given.pop("--config", None)
    sections, of_file = ({}, {}) if path is None else _read(path, program, migrate, [kind.name for kind in kinds])
    values = _general_values(cls, sections, of_file, f"--config {path}")
    for name, flag in general.items():
        if name in given:
            _put(values, flag.path, given[name])
    _expand(values, general, of_file, aliases)
    try:
        made = _build(cls, values)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Given(made, kinds, {name: value for name, value in given.items() if name in owned}, of_file)


def _current(typed: Values, flags: Sequence[Flag], program: str) -> Values:
    """Flags by their present name; a former one is warned of."""
    former = {old: (flag.name, value) for flag in flags for old, value in flag.field.metadata.get("was", {}).items()}
    given: Values = {}
    for name, value in typed.items():
        if name in former:
            new, stands_for = former[name]
            text = new if stands_for is None else f"{new} {stands_for}"
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"{program}: warning: {name} is now {text}; the old name goes with the next version",
                    file=sys.stderr,
                )
            given.setdefault(new, value if stands_for is None else stands_for)
        else:
            given[name] = value
    return given


def _expand(values: Values, general: Mapping[str, Flag], owners: Mapping[str, Values], aliases: Aliases) -> None:
    """Replace a model name that stands for several flags, on the command line or in a config file.

    Raises:
        UserError: if it stands for a flag that is unknown here, or contradicts one that is given.
    """
    name = values.get("model")
    for flag, value in aliases.get(name, {}).items() if isinstance(name, str) else ():
        if flag not in general:
            raise UserError(f"--model {name}: means {flag} {value}, which has no effect here; use DiT-skip")
        path = general[flag].path
        given = _section(values, path).get(path[-1])
        if flag != "--model" and given not in (None, value):
            raise UserError(f"{flag} {given}: contradicts --model {name}, which means {value}")
        _put(values, path, value)
    in_file = owners.get("model", {})
    if in_file.get("name") in aliases:
        in_file["name"] = aliases[in_file["name"]]["--model"]


def _section(values: Values, path: tuple[str, ...]) -> Values:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    return values


def _put(values: Values, path: tuple[str, ...], value: Any) -> None:
    _section(values, path)[path[-1]] = value


def _build(cls: type[T], values: Values) -> T:
    hints = typing.get_type_hints(cls)
    made = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            made[field.name] = _build(hint, values.get(field.name, {}))
        elif field.name in values:
            made[field.name] = values[field.name]
    return cls(**made)


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """(int | None) -> (int, True); anything else -> (itself, False)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0], True
    return hint, False


def _choices(flag: Flag) -> tuple[str, ...] | None:
    kind, _ = _split_optional(flag.hint)
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else flag.field.metadata.get("choices")


def _add_flag(parser: argparse._ActionsContainer, flag: Flag) -> None:
    kind, optional = _split_optional(flag.hint)
    help_text = flag.field.metadata["help"].replace("%", "%%")
    if flag.is_positional:
        parser.add_argument(flag.name, type=kind, help=help_text)
        return
    options: Values = {"dest": flag.name, "default": argparse.SUPPRESS, "help": f"{help_text} ({_default(flag)})"}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        options |= {"type": items[0], "nargs": "+" if Ellipsis in items else len(items), "action": _TupleAction}
        options["metavar"] = items[0].__name__.upper()
    elif choices := _choices(flag):
        options["choices"] = choices
    else:
        options["type"] = _or_auto(kind) if optional and kind is int else kind
        options["metavar"] = "PATH" if kind is Path else kind.__name__.upper()
    known = parser._option_string_actions
    if flag.name not in known:
        parser.add_argument(flag.name, **options)
    elif (choices := _choices(flag)) and (others := known[flag.name].choices) is not None:
        known[flag.name].choices = tuple(dict.fromkeys([*others, *choices]))  # owners of one kind share flags
    for old, value in flag.field.metadata["was"].items():
        if old not in known:
            action: Values = {} if value is None else {"action": "store_const", "const": value}
            kept = {k: v for k, v in options.items() if value is None and k in ("type", "choices", "nargs", "action")}
            parser.add_argument(old, **{**kept, **action}, dest=old, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _default(flag: Flag) -> str:
    """The default in one style for all flags."""
    value, shown = flag.field.default, flag.field.metadata["shown"]
    if shown is None and isinstance(value, bool):
        shown = "yes" if value else "no"
    elif shown is None and value in (None, (), ""):
        shown = "none"
    return f"default: {shown or _typed(value)}"


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _typed_flag(name: str, value: Any) -> str:
    """A flag with its value, as a user types it."""
    if isinstance(value, bool):
        return name if value else f"--no-{name.removeprefix('--')}"
    return f"{name} {_typed(value)}"


def _or_auto(kind: type[int]) -> Callable[[str], int | None]:
    """A number, or the word "auto" for none."""

    def parse_number(text: str) -> int | None:
        return None if text == "auto" else kind(text)

    parse_number.__name__ = kind.__name__  # for argparse's message
    return parse_number


class _TupleAction(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


# ----------------------------------------------------------------------------------------------------------------------
# Help


def _print_help(
    cls: type, argv: Sequence[str], program: str, doc: str, kinds: Sequence[Kind], aliases: Aliases
) -> None:
    """Print the general settings by group, those of the owners on the command line, and the names of all others."""
    names = _names_on_command_line(kinds, argv, aliases)
    owners, general = choose_owners(kinds, names), _flags(cls).values()
    groups: dict[str, list[Flag]] = {"general": []}
    for flag in general:
        groups.setdefault(" ".join(flag.path[:-1]).replace("_", " ") or "general", []).append(flag)
    for kind in (kind for kind in kinds if kind.name in owners):
        named = kind.named(names[kind.name]) if kind.named is not None else {}
        flags = [_with_default(flag, named) for flag in kind.flags(owners[kind.name]).values()]
        groups |= {f"{kind.name} {owners[kind.name]}": flags} if flags else {}
    others = [
        f"  {flag_name(kind.name) + ' NAME':<20}{', '.join(owner for owner in kind.owners if kind.flags(owner))}"
        for kind in kinds
        if kind.name not in owners and (kind.name,) in {flag.path for flag in general}
    ]
    summary, _, rest = doc.strip().partition("\n")
    examples = [line for line in rest.splitlines() if line.startswith("    ")]
    epilog = ["settings of owners; add the flag to --help to see them:", *others, ""] if others else []
    parser = argparse.ArgumentParser(
        prog=program,
        usage=" ".join([program, *(flag.name.upper() for flag in general if flag.is_positional), "[FLAGS]"]),
        description=summary,
        epilog="\n".join([*epilog, *(["examples:", *examples] if examples else [])]),
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        if title == "general":
            group.add_argument(
                "-h",
                "--help",
                action="store_true",
                help=f"show this text{'; with --model ...: theirs too' if kinds else ''}",
            )
            group.add_argument(
                "--config", metavar="FILE", help="JSON of settings as this script writes it, below flags"
            )
        for flag in flags:
            _add_flag(group, flag)
    print(parser.format_help(), end="")


def _names_on_command_line(kinds: Sequence[Kind], argv: Sequence[str], aliases: Aliases) -> dict[str, Any]:
    """Values of the flags that choose owners; all other arguments may be wrong."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for kind in kinds:
        parser.add_argument(flag_name(kind.name), dest=kind.name)
    names = vars(parser.parse_known_args(argv)[0])
    return {kind: aliases.get(name, {}).get("--model", name) for kind, name in names.items()}


def _with_default(flag: Flag, named: Mapping[str, Any]) -> Flag:
    """A flag with another default, if there is one for its field."""
    field = copy.copy(flag.field)
    field.default = named.get(field.name, field.default)
    return flag._replace(field=field)


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
    return {".".join(flag.path) for flag in _flags(cls).values() if flag.field.metadata.get("free")}


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


def _read(
    path: str, program: str, migrate: Callable[[Values], Values], kinds: Collection[str]
) -> tuple[Values, dict[str, Values]]:
    """Read a config file: sections of general settings, and those of owners by kind."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected one JSON object of settings")
    if isinstance(values.get("config"), dict):
        values = values["config"]  # a result's JSON, which holds more than the settings
    values = migrate(values)
    script = values.pop("script", program)
    if script != program:
        hint = (
            f"; give its checkpoint: --ckpt {Path(path).parent}/checkpoints/NUMBER.safetensors"
            if script == "train.py"
            else ""
        )
        raise UserError(f"--config {path}: settings of {script}, not of {program}{hint}")
    owners: dict[str, Values] = {}
    for kind in kinds:
        content = values.pop(kind, None)
        if not isinstance(content, str | dict | None):
            raise UserError(f"--config {path}: {kind} = {content!r}: expected a name, or an object with one")
        if content is not None:
            owners[kind] = {"name": content} if isinstance(content, str) else dict(content)
    return {name: value for name, value in values.items() if name not in ("format", "version")}, owners


def _general_values(cls: type, sections: Values, owners: Mapping[str, Values], where: str) -> Values:
    """General settings out of a config file; the names of owners count as settings of the same name."""
    flags = {flag.path: flag for flag in _flags(cls).values()}
    groups = {path[0] for path in flags if len(path) > 1}
    values: Values = {
        kind: _from_json(content["name"], flags[kind,], f"{where}: {kind}.name")
        for kind, content in owners.items()
        if "name" in content and (kind,) in flags
    }
    for section, content in sections.items():
        if section in groups and isinstance(content, dict):
            for name, value in content.items():
                if (section, name) not in flags:
                    raise UserError(f"{where}: unknown setting '{section}.{name}'")
                _put(values, (section, name), _from_json(value, flags[section, name], f"{where}: {section}.{name}"))
        elif (section,) in flags:
            values[section] = _from_json(content, flags[section,], f"{where}: {section}")
        else:
            raise UserError(f"{where}: unknown setting {section!r}")
    return values


def _from_json(value: Any, flag: Flag, where: str) -> Any:
    kind, optional = _split_optional(flag.hint)
    if value is None and optional:
        return None
    choices = _choices(flag)
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
