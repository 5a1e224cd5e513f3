"""Dataclass <-> command line <-> JSON.

A script states its settings once, as a frozen dataclass with a comment per field. The flags, the help text, the JSON
that a run leaves behind and the `--config` that reads it back all follow from the fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime.errors import UserError

T = TypeVar("T")

# Official model names that stand for a model of the registry and a sampling setting.
ALIASES: dict[str, dict[str, Any]] = {
    "DiT-skip": {"model": "Skip-DiT-XL/2"},
    **{f"DiT-cache-{n}": {"model": "Skip-DiT-XL/2", "cache_interval": n} for n in range(2, 7)},
}

# What tells the settings of a training run from those of other scripts.
OF_TRAINING = frozenset({"results_dir", "max_steps", "global_batch_size"})


def setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with a help text and, for strings, the allowed values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def positional(help: str) -> Any:
    """A dataclass field without a default that is given by its place, not by a flag."""
    return dataclasses.field(metadata={"help": help, "choices": None})


def flag_name(field: str) -> str:
    """The flag of a field: `global_batch_size` -> "--global-batch-size"."""
    return "--" + field.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_config(cls: type[T], argv: Sequence[str], *, program: str, description: str) -> T:
    """Reads a config from the command line, on top of `--config FILE` where given.

    Args:
        cls: a dataclass whose fields come from `setting` and `positional`; it validates itself in `__post_init__` by
            ValueError.
        argv: arguments behind the program's name.
        program: name in the help text.
        description: first paragraph of the help text.

    Raises:
        UserError: for anything wrong with flags, file or values.
    """
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", help="JSON of settings, as this script writes it; flags override it"
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_flag(parser, field, hints[field.name])
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    values = {**(_read(cls, path, hints) if path else {}), **given}
    try:
        return cls(**expand_alias(values, hints))
    except ValueError as error:
        raise UserError(str(error)) from error


def expand_alias(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Replaces an official model name under "model" by the settings it stands for.

    Args:
        values: setting -> value, as far as given.
        known: all settings that there are.

    Returns:
        The settings, those behind the name included; the same ones if the name is no alias.

    Raises:
        ValueError: if the name carries a setting that is unknown here, or contradicts one that is given.
    """
    name = values.get("model")
    expansion = ALIASES.get(name, {}) if isinstance(name, str) else {}
    for field, value in expansion.items():
        if field not in known:
            flag = f"{flag_name(field)} {value}"
            raise ValueError(f"--model {name}: means {flag}, which has no effect here; use DiT-skip")
        if field != "model" and values.get(field) not in (None, value):
            raise ValueError(f"{flag_name(field)} {values[field]}: contradicts --model {name}, which means {value}")
    return {**values, **expansion}


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """(int | None) -> (int, True); anything else -> (itself, False)."""
    if isinstance(hint, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0], True
    return hint, False


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    kind, optional = _split_optional(hint)
    help_text = field.metadata["help"].replace("%", "%%")
    if field.default is dataclasses.MISSING:
        parser.add_argument(field.name, type=kind, help=help_text)
        return
    if field.default not in (None, (), ""):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_text += f" (default: {shown})"
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_text}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        options |= {"type": items[0], "nargs": "+" if Ellipsis in items else len(items), "action": _TupleAction}
        options["metavar"] = items[0].__name__.upper()
    else:
        options |= {"type": _or_auto(kind) if optional and kind is int else kind, "choices": field.metadata["choices"]}
        if not field.metadata["choices"]:
            options["metavar"] = "PATH" if kind is Path else kind.__name__.upper()
    parser.add_argument(flag_name(field.name), **options)


def _or_auto(kind: type[int]) -> Callable[[str], int | None]:
    """A number, or the word "auto" for none."""

    def parse(text: str) -> int | None:
        return None if text == "auto" else kind(text)

    parse.__name__ = kind.__name__  # for argparse's message
    return parse


class _TupleAction(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _read(cls: type[Any], path: str, hints: dict[str, Any]) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected one JSON object of settings")
    if isinstance(values.get("config"), dict):
        values = values["config"]  # a result's JSON, which tells more than the settings
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            if "ckpt" in fields and values.keys() >= OF_TRAINING:
                checkpoint = Path(path).parent / "checkpoints" / "NUMBER.safetensors"
                raise UserError(
                    f"--config {path}: settings of a training run; give its checkpoint: --ckpt {checkpoint}"
                )
            raise UserError(f"--config {path}: unknown setting {name!r}")
        values[name] = _from_json(value, hints[name], fields[name].metadata["choices"], f"--config {path}: {name}")
    return values


def _from_json(value: Any, hint: Any, choices: Sequence[str] | None, where: str) -> Any:
    kind, optional = _split_optional(hint)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        items = typing.get_args(kind)
        if Ellipsis not in items and len(value) != len(items):
            raise UserError(f"{where} = {value!r}: expected {len(items)} values")
        return tuple(_from_json(item, items[0], None, where) for item in value)
    accepted = {float: (float, int), Path: (str,)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} = {value!r}: expected {getattr(kind, '__name__', kind)}")
    if choices and value not in choices:
        raise UserError(f"{where} = {value!r}: choose from {', '.join(choices)}")
    return kind(value)
