"""Weights in files of other code: which entry is meant, names without wrappers, and what can be checked.

One function decides, `read_foreign`; the layouts that it knows are the tables below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.json_file import Json, parse_json
from runtime.weight_files import file_in, read_content

# Entries and prefixes with averaged weights, by their names in other projects; numbers may follow ("model_ema1")
AVERAGES = (
    "ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema", "ema_params", "ema_weights",
    "module_ema", "net_ema", "ema_net", "ema_network", "averaged_model", "model_avg", "swa_model", "ema_denoiser",
)  # fmt: skip
# Entries and prefixes with the weights themselves, likeliest first
PLAIN = (
    "current_model_state", "model", "state_dict", "model_state_dict", "net", "network", "module", "params", "weights",
    "denoiser", "online_model",
)  # fmt: skip
# Parts that wrappers add to names: DDP, torch.compile, FSDP, activation checkpointing, DeepSpeed
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Parts that are not of the network: counters of averages, projectors of REPA
LEFT_OUT = ("n_averaged", "projectors.", "initted", "step")
# Buffers that other code saves and never reads: of text-to-video networks
NEVER_READ = {"caption_projection.y_embedding"}
AVERAGE_WORDS = {
    "ema", "emas", "ewma", "average", "averages", "averaged", "avg", "swa", "shadow", "polyak", "teacher",
}  # fmt: skip
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of snake_case and CamelCase
MOMENTS = re.compile(r"(exp|square|sq|grad)_avg")  # averages that an optimizer keeps of gradients
OTHER_ENTRIES = re.compile(r"opt|sched|loops|callback|scaler|args|config|hparams", re.IGNORECASE)
FACTS = ("epoch", "step", "global_step", "train_steps", "iteration", "iter")


class ForeignWeights(NamedTuple):
    """One set of weights of another project's file.

    Attributes:
        weights: Parameter name -> tensor, on the CPU, without the names of wrappers.
        group: "ema" or "model", or the entry that was asked for by name.
        entry: Entry or prefix of the file that they are from; empty for a plain state dict.
        notes: What was found, and left out, for the user.
        verified: The format has checksums, and they were compared.
        config: Content of a config.json in the same folder.
    """

    weights: dict[str, Tensor]
    group: str
    entry: str
    notes: tuple[str, ...] = ()
    verified: bool = False
    config: Json | None = None

    @property
    def verification(self) -> str:
        """Phrase for the user."""
        return "checksums of the file compared" if self.verified else "unverified: the file has no checksums"


def read_foreign(path: Path, weights: str = "ema", flag: str = "--ckpt") -> ForeignWeights:
    """Read one set of weights.

    Args:
        path: A .pt, .pth, .ckpt or .bin file, a safetensors file, a safetensors index, or a folder with one of these.
        weights: "ema" for the average if there is one, "model" for the weights themselves if there are any, or the name
            of an entry.
        flag: Flag in messages.

    Raises:
        UserError: If the file is missing, damaged, holds objects that could run code, or it is not clear which weights
            are meant.
    """
    path, where = file_in(path, flag), f"{flag} {path}"
    content, compare = read_content(path, where)
    if not any(_sets_of_tensors(content)):
        raise UserError(f"{where}: not a file of weights by name")
    entry, tensors = choose_entry(content, weights, where)
    averaged = is_average(entry) or entry in _averages(content)
    if weights == "ema" and not averaged and (place := hidden_average(content)):
        raise UserError(
            f"{where}: {place!r} may be an average, and is not one of weights by name; --weights model does without it"
        )
    plain, left_out = {}, []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{where}: {name} is sparse or without numbers; save it as a dense tensor on the CPU")
        short = unwrapped(name)
        if short.startswith(LEFT_OUT) and ("." in short or tensor.ndim == 0):
            left_out.append(short.partition(".")[0])
        elif short in NEVER_READ:
            left_out.append(short)
        else:
            plain[short] = tensor
    verified = compare(plain.values())
    notes = [f"weights {entry!r}" if entry else "a plain state dict"]
    notes += [f"{name} {int(number)}" for name in FACTS if isinstance(number := content.get(name), int)]
    notes += [f"without {', '.join(sorted(set(left_out)))}"] if left_out else []
    group = weights if weights not in ("ema", "model") else "ema" if averaged else "model"
    return ForeignWeights(plain, group, entry, tuple(notes), verified, _config_next_to(path))


def _config_next_to(path: Path) -> Json | None:
    """Content of the config.json in the folder of a file; None if there is none that can be read."""
    try:
        content = parse_json((path.parent / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def choose_entry(content: Mapping[str, object], weights: str, where: str) -> tuple[str, dict[str, Tensor]]:
    """Choose one set of weights of a file's content: an entry, or the names with one prefix.

    Returns:
        Name of the entry or prefix, empty for all names of a plain state dict, and the tensors.

    Raises:
        UserError: If several averages are there, one is not understood, or the one asked for is missing.
    """
    for depth in range(3):
        sets: dict[str, Mapping[str, object]] = dict(_sets_of_tensors(content))
        by_prefix = "" in sets
        if by_prefix:
            tensors = {unwrapped(name, start=True): tensor for name, tensor in _tensors(content).items()}
            sets = {**_by_prefix(tensors)}
            if not sets:
                return "", tensors
        name = choose_name([*sets], weights, where, by_prefix=by_prefix, nested=depth > 0)
        chosen = sets[name]
        if by_prefix or "" in dict(_sets_of_tensors(chosen)):
            tensors = _tensors(chosen)
            inner = _by_prefix({unwrapped(key, start=True): tensor for key, tensor in tensors.items()})
            if not by_prefix and inner:  # a state dict under its name, with two networks by prefix
                content = chosen
                continue
            return name, tensors
        content = chosen
    raise UserError(f"{where}: its weights are nested too deep")


def choose_name(names: list[str], weights: str, where: str, *, by_prefix: bool, nested: bool) -> str:
    """Choose among the names of entries or prefixes.

    Raises:
        UserError: If it is not clear which one is meant.
    """
    listed = f"its {'prefixes' if by_prefix else 'entries'} are {', '.join(names)}"
    if weights not in ("ema", "model") and not nested:
        if weights not in names:
            raise UserError(f"{where}: holds no weights {weights!r}; {listed}")
        return weights
    averages = _averages(names)
    plain = sorted((name for name in names if name in PLAIN), key=PLAIN.index)
    if weights == "model" and plain:
        return plain[0]
    if len(averages) > 1 and "ema" not in averages:
        raise UserError(f"{where}: holds several averages; choose one by --weights; {listed}")
    if averages:
        return "ema" if "ema" in averages else averages[0]
    doubtful = [name for name in names if looks_like_average(name)]
    if doubtful and weights != "model":
        raise UserError(
            f"{where}: {doubtful[0]!r} may be an average, and is not known here; choose by --weights; {listed}"
        )
    if plain:
        return plain[0]
    if len(names) == 1:
        return names[0]
    raise UserError(f"{where}: it is not clear which weights are meant; choose by --weights; {listed}")


def is_average(name: str) -> bool:
    """True for the known name of averaged weights."""
    return name.rstrip("0123456789").rstrip("_.-") in AVERAGES or name in AVERAGES


def looks_like_average(name: str) -> bool:
    """True if a part of a name says that it is an average."""
    return not AVERAGE_WORDS.isdisjoint(word.lower() for word in WORDS.findall(name))


def hidden_average(content: Mapping[str, object]) -> str:
    """Place of an average that cannot be chosen; empty if there is none.

    Such are lists without names (score_sde, diffusers' EMAModel), and what callbacks and optimizers keep.
    """
    return next(_averages_within(content, "", 3), "")


def _averages_within(value: object, place: str, depth: int) -> Iterator[str]:
    inside: Iterable[tuple[object, object]] = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, inner in inside:
        name = str(key).partition("{")[0]  # the settings of a callback of Lightning follow its name
        here = f"{place}.{name}" if place else name
        if looks_like_average(name) and not MOMENTS.search(name) and _has_numbers(inner):
            yield here
        elif depth and not (isinstance(inner, Mapping) and any(isinstance(each, Tensor) for each in inner.values())):
            yield from _averages_within(inner, here, depth - 1)


def _has_numbers(value: object) -> bool:
    """True for tensors of more than single numbers, at any depth of mappings and lists."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    each = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_numbers, each))


def _averages(names: Iterable[str]) -> list[str]:
    """The known averages among names of entries."""
    names = [*names]
    known = [name for name in names if isinstance(name, str) and is_average(name)]
    # Lightning's callback WeightAveraging puts the average in the place of the weights, and these under another name
    swapped = {"current_model_state", "state_dict"} <= {*names}
    return known or (["state_dict"] if swapped else [])


def unwrapped(name: str, *, start: bool = False) -> str:
    """Remove what wrappers add to a name, wherever it is, or at its start alone."""
    parts = name.split(".")
    if start:
        while len(parts) > 1 and parts[0] in WRAPPERS:
            parts = parts[1:]
        return ".".join(parts)
    return ".".join(part for part in parts if part not in WRAPPERS) or name


def _sets_of_tensors(content: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Entries that are, or hold, tensors by name; or all of it under the name "", if it is a state dict itself."""
    entries = [
        (name, value)
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Mapping) and not OTHER_ENTRIES.search(name) and _holds(value)
    ]
    if entries:
        yield from entries
    elif any(isinstance(value, Tensor) for value in content.values()):
        yield "", _tensors(content)


def _tensors(content: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors among entries."""
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _holds(value: Mapping[str, object], depth: int = 0) -> bool:
    """True for a mapping of names with tensors, directly or a level or two below."""
    if not all(isinstance(name, str) for name in value):
        return False
    if any(isinstance(each, Tensor) for each in value.values()):
        return True
    return depth < 2 and any(isinstance(each, Mapping) and _holds(each, depth + 1) for each in value.values())


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the first part of their names, where that is the name of a set of weights."""
    sets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        if dot and (is_average(first) or first in PLAIN or looks_like_average(first)):
            sets.setdefault(first, {})[rest] = tensor
    return sets
