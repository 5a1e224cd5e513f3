"""Command line: one parser for the settings of a program and of all owners, its help, and `--config` files."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, TypeVar

from runtime.errors import UserError, is_first
from runtime.given import Given, from_json, path_parser, put, section_of
from runtime.json_file import parse_json
from runtime.settings import Flag, Kind, Values, choices_of, choose_owners, flag_name, flags_of, split_optional, typed

T = TypeVar("T")
Aliases = Mapping[str, Mapping[str, object]]  # value of --model -> flag -> value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flags = self._option_string_actions.items()
        known = {name.lstrip("-"): name for name, action in flags if action.help != argparse.SUPPRESS}
        unknown = re.findall(r"--([\w-]+)", message) if message.startswith("unrecognized arguments") else []
        close = [known[name] for word in unknown for name in get_close_matches(word, known)]
        hint = f"close to it: {', '.join(dict.fromkeys(close))}; " if close else ""
        raise UserError(f"{message} ({hint}see --help)")


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
    """Read settings from a `--config` file, if one is given, and from the command line, which overrides it.

    Args:
        cls: Dataclass of the general settings; it validates itself in `__post_init__` by ValueError.
        argv: Arguments after the program's name.
        program: Name of the program in help, messages and files.
        doc: Docstring of the script: one line, then indented examples.
        kinds: Owners of further settings; the flag "--KIND" (a general setting) chooses one of each.
        aliases: Values of --model that mean several flags.
        migrate: Function that converts JSON of earlier versions.

    Raises:
        UserError: For anything wrong with flags, file or values.
    """
    general = flags_of(cls)
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
            put(values, flag.path, given[name])
    _expand(values, general, of_file, aliases)
    try:
        made = _build(cls, values)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Given(made, kinds, {name: value for name, value in given.items() if name in owned}, of_file)


def _current(parsed: Values, flags: Sequence[Flag], program: str) -> Values:
    """Replace former flags by present ones, with a warning."""
    former = {old: (flag.name, value) for flag in flags for old, value in flag.field.metadata.get("was", {}).items()}
    given: Values = {}
    for name, value in parsed.items():
        if name in former:
            new, stands_for = former[name]
            text = new if stands_for is None else f"{new} {stands_for}"
            if is_first():
                print(
                    f"{program}: warning: {name} is now {text}; the old name goes with the next version",
                    file=sys.stderr,
                )
            given.setdefault(new, value if stands_for is None else stands_for)
        else:
            given[name] = value
    return given


def _expand(values: Values, general: Mapping[str, Flag], owners: Mapping[str, Values], aliases: Aliases) -> None:
    """Replace a model name that means several flags, on the command line or in a config file.

    Raises:
        UserError: If it means a flag that the program does not have, or contradicts one that is given.
    """
    name = str(values.get("model"))
    for flag, value in aliases.get(name, {}).items():
        if flag not in general:
            raise UserError(
                f"--model {name}: means {flag} {value}, which has no effect here; use {aliases[name]['--model']}"
            )
        path = general[flag].path
        given = section_of(values, path).get(path[-1])
        if flag != "--model" and given not in (None, value):
            raise UserError(f"{flag} {given}: contradicts --model {name}, which means {value}")
        put(values, path, value)
    in_file = owners.get("model", {})
    if in_file.get("name") in aliases:
        in_file["name"] = aliases[in_file["name"]]["--model"]


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


def _add_flag(parser: argparse._ActionsContainer, flag: Flag) -> None:
    kind, optional = split_optional(flag.hint)
    help_text = flag.field.metadata["help"].replace("%", "%%")
    read = path_parser(flag) if kind is Path else kind
    if flag.is_positional:
        if typing.get_origin(kind) is tuple:
            read = path_parser(flag)
            parser.add_argument(flag.name, type=read, help=help_text, nargs="+", action=_TupleAction)
        else:
            parser.add_argument(flag.name, type=read, help=help_text)
        return
    options: Values = {"dest": flag.name, "default": argparse.SUPPRESS, "help": f"{help_text} ({_default(flag)})"}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        options |= {
            "type": path_parser(flag) if items[0] is Path else items[0],
            "nargs": "+" if Ellipsis in items else len(items),
        }
        options["action"] = _AddingAction if flag.field.metadata["repeats"] else _TupleAction
        options["metavar"] = items[0].__name__.upper()
    elif choices := choices_of(flag):
        options["choices"] = choices
    else:
        options["type"] = _or_auto(kind) if optional and kind is int else read
        options["metavar"] = "PATH" if kind is Path else kind.__name__.upper()
    known = parser._option_string_actions
    if flag.name not in known:
        parser.add_argument(flag.name, **options)
    elif (choices := choices_of(flag)) and (others := known[flag.name].choices) is not None:
        known[flag.name].choices = tuple(dict.fromkeys([*others, *choices]))  # owners of one kind share flags
    for old, value in flag.field.metadata["was"].items():
        if old not in known:
            action: Values = {} if value is None else {"action": "store_const", "const": value}
            kept = {k: v for k, v in options.items() if value is None and k in ("type", "choices", "nargs", "action")}
            parser.add_argument(old, **{**kept, **action}, dest=old, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _default(flag: Flag) -> str:
    """Describe the default, in one style for all flags."""
    value, shown = flag.field.default, flag.field.metadata["shown"]
    if shown is None and isinstance(value, bool):
        shown = "yes" if value else "no"
    elif shown is None and value in (None, (), ""):
        shown = "none"
    return f"default: {shown or typed(value)}"


def _or_auto(kind: type[int]) -> Callable[[str], int | None]:
    """Make a parser of a number, or of the word "auto" for None."""

    def parse_number(text: str) -> int | None:
        return None if text == "auto" else kind(text)

    parse_number.__name__ = kind.__name__  # for argparse's message
    return parse_number


class _TupleAction(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        assert isinstance(values, Sequence)  # by nargs
        setattr(namespace, self.dest, (*self.before(namespace), *values))

    def before(self, namespace: object) -> tuple[object, ...]:
        """Values that stay from the same flag before."""
        return ()


class _AddingAction(_TupleAction):
    def before(self, namespace: object) -> tuple[object, ...]:
        """All of them."""
        return getattr(namespace, self.dest, ())


# ----------------------------------------------------------------------------------------------------------------------
# Help


def _print_help(
    cls: type, argv: Sequence[str], program: str, doc: str, kinds: Sequence[Kind], aliases: Aliases
) -> None:
    """Print general settings by group, those of owners on the command line, and the names of other owners."""
    names = _names_on_command_line(kinds, argv, aliases)
    owners, general = choose_owners(kinds, names), flags_of(cls).values()
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


def _names_on_command_line(kinds: Sequence[Kind], argv: Sequence[str], aliases: Aliases) -> Values:
    """Parse the flags that choose owners only, so that other arguments may be wrong."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for kind in kinds:
        parser.add_argument(flag_name(kind.name), dest=kind.name)
    names = vars(parser.parse_known_args(argv)[0])
    return {kind: aliases.get(name, {}).get("--model", name) for kind, name in names.items()}


def _with_default(flag: Flag, named: Mapping[str, object]) -> Flag:
    """Replace the default of a flag, if there is another one for its field."""
    field = copy.copy(flag.field)
    field.default = named.get(field.name, field.default)
    return flag._replace(field=field)


# ----------------------------------------------------------------------------------------------------------------------
# Config files


def _read(
    path: str, program: str, migrate: Callable[[Values], Values], kinds: Collection[str]
) -> tuple[Values, dict[str, Values]]:
    """Read a config file: the sections of general settings, and those of owners by kind."""
    try:
        values = parse_json(Path(path).read_text())
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
    """Convert general settings of a config file; the name of an owner is the setting of that kind."""
    flags = {flag.path: flag for flag in flags_of(cls).values()}
    groups = {path[0] for path in flags if len(path) > 1}
    values: Values = {
        kind: from_json(content["name"], flags[kind,], f"{where}: {kind}.name")
        for kind, content in owners.items()
        if "name" in content and (kind,) in flags
    }
    for section, content in sections.items():
        if section in groups and isinstance(content, dict):
            for name, value in content.items():
                if (section, name) not in flags:
                    raise UserError(f"{where}: unknown setting '{section}.{name}'")
                put(values, (section, name), from_json(value, flags[section, name], f"{where}: {section}.{name}"))
        elif (section,) in flags:
            values[section] = from_json(content, flags[section,], f"{where}: {section}")
        else:
            raise UserError(f"{where}: unknown setting {section!r}")
    return values
