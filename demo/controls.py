"""Controls of the page: flags of sample.py, each shown for the networks that take it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from data.words import Words
from diffusion import SAMPLERS
from runtime.distributed import PRECISIONS
from runtime.errors import UserError
from runtime.given import Given
from sample import OFFICIAL_LABELS, PROGRAM, SampleSettings
from sampling.config import parse_settings
from sampling.pipeline import OF_PIPELINE, Pipeline
from sampling.prompts import TextSettings

Values = Mapping[str, object]  # of the page, by name of the control
MAX_STEPS = 250
NONE = "none"
# Flags that further ones may not be: of the files, and of what was opened once
OF_PAGE = ("--output", "--trajectory", "--overwrite", "--config", "--help", "-h")
OF_NETWORK = OF_PIPELINE - {field.name for field in fields(TextSettings)} | {"text_encoder", "text_precision"}


class Opened(NamedTuple):
    """A checkpoint that the page samples from.

    Attributes:
        name: Its title on the page.
        flags: Flags of sample.py that chose it: --ckpt, and others of the network and its encoder.
        pipeline: Opened with them.
    """

    name: str
    flags: tuple[str, ...]
    pipeline: Pipeline

    @property
    def can_be_guided(self) -> bool:
        """True if it has unconditional rows."""
        pipeline = self.pipeline
        if not pipeline.network.conditioning:
            return False
        try:
            return "text" in pipeline.network.conditioning or bool(pipeline.network.null_conditioning(1))
        except ValueError:
            return False

    def parse(self, flags: Sequence[str]) -> Given[SampleSettings]:
        """Parse flags of sample.py with those of the checkpoint.

        Raises:
            UserError: For anything wrong with them.
        """
        return parse_settings(SampleSettings, [*self.flags, *flags], PROGRAM, None)


@dataclass(frozen=True)
class Control:
    """One control.

    Attributes:
        name: Its name among the values.
        label: Its title.
        info: What it does, and what that costs.
        kind: How it is shown.
        shown: For which networks.
        flags: Flags of sample.py for its value and a network; none if the value is the neutral one.
        neutral: Value that leaves the cost alone; None for a control that does not change it.
        choices: Values to choose from, with a text each, for a network.
        bounds: Least and largest value, and the step between values.
    """

    name: str
    label: str
    info: str
    kind: Literal["labels", "text", "lines", "whole", "number", "slider", "choice"]
    shown: Callable[[Opened], bool]
    flags: Callable[[object, Opened], Sequence[str]]
    neutral: object = None
    choices: Callable[[Opened], list[tuple[str, str]]] | None = None
    bounds: tuple[float, float, float] | None = None


def always(opened: Opened) -> bool:
    """For every network."""
    return True


def takes(name: str) -> Callable[[Opened], bool]:
    """For networks with this conditioning."""
    return lambda opened: name in opened.pipeline.network.conditioning


def keeps_state(opened: Opened) -> bool:
    """For networks that keep a state between evaluations."""
    return opened.pipeline.network.keeps_state


def one(flag: str, neutral: object = None) -> Callable[[object, Opened], Sequence[str]]:
    """A flag with one value; left out for the neutral one."""

    def flags(value: object, opened: Opened) -> Sequence[str]:
        return [] if value in (None, "", neutral) else [flag, shown_number(value)]

    return flags


def shown_number(value: object) -> str:
    """A value as it is typed: 4 for 4.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def classes_of(opened: Opened) -> list[tuple[str, str]]:
    """Classes by number and name."""
    names = opened.pipeline.info.classes or ()
    numbers = range(opened.pipeline.num_classes)
    return [(f"{i} {names[i]}" if i < len(names) and names[i] != str(i) else str(i), str(i)) for i in numbers]


def samplers_of(opened: Opened) -> list[tuple[str, str]]:
    """Samplers of the network's process."""
    return [(name, name) for name, row in SAMPLERS.items() if row.process == opened.pipeline.process.name]


def of_sampler(value: object, opened: Opened) -> Sequence[str]:
    """The sampler, if it is one of the network's process; otherwise the network's."""
    return ["--sampler", str(value)] if any(value == name for name, _ in samplers_of(opened)) else []


def labels(value: object, opened: Opened) -> Sequence[str]:
    """Labels; those that sample.py chooses without any."""
    assert isinstance(value, list | tuple)
    return ["--class-labels", *map(str, value)] if value else []


def prompts(value: object, opened: Opened) -> Sequence[str]:
    """A prompt for each line."""
    lines = [line.strip() for line in str(value or "").splitlines() if line.strip()]
    return [word for line in lines for word in ("--prompt", line)]


def interval(value: object, opened: Opened) -> Sequence[str]:
    """Timesteps of guidance, from a text "LOW HIGH"."""
    words = str(value or "").replace(",", " ").split()
    if not words:
        return []
    if len(words) != 2:
        raise UserError(f"--guidance-interval {value}: must be two timesteps, LOW HIGH, such as 200 800")
    return ["--guidance-interval", *words]


CONTROLS = (
    Control("class_labels", "Classes", "one picture each", "labels", takes("y"), labels, choices=classes_of),
    Control("prompt", "Prompts", "one a line, one sample each", "lines", takes("text"), prompts),
    Control(
        "negative_prompt", "Negative prompt", "what guidance leads away from", "text", takes("text"),
        one("--negative-prompt"),
    ),
    Control(
        "num_samples", "Samples", "cost grows with their number", "whole",
        lambda opened: not opened.pipeline.network.conditioning, one("--num-samples"),
    ),
    Control("seed", "Seed", "of the noise", "whole", always, one("--seed")),
    Control(
        "sampler", "Sampler", "order 2 (heun, edm) evaluates twice a step", "choice", always, of_sampler,
        choices=samplers_of,
    ),
    Control(
        "steps", "Steps", "cost grows with their number", "slider", always, one("--num-sampling-steps"),
        bounds=(1, MAX_STEPS, 1),
    ),
    Control(
        "cfg_scale", "Guidance scale", "1: none; above, twice the cost", "slider",
        lambda opened: opened.can_be_guided, lambda value, opened: ["--cfg-scale", shown_number(value)],
        neutral=1, bounds=(1, 12, 0.1),
    ),
    Control(
        "guidance_interval", "Guidance interval", "guide between these timesteps alone, such as 200 800", "text",
        lambda opened: opened.can_be_guided, interval, neutral="",
    ),
    Control(
        "cache_interval", "Cache interval", "Skip-Cache: all blocks run every N-th evaluation", "slider", keeps_state,
        one("--cache-interval", 1), neutral=1, bounds=(1, 6, 1),
    ),
    Control(
        "sharing_interval", "Sharing interval", "the encoder runs once in R evaluations", "slider", keeps_state,
        one("--sharing-interval", 1), neutral=1, bounds=(1, 6, 1),
    ),
    Control(
        "cache_forecast", "Forecast of kept state", "order of its polynomial; costs nothing", "choice", keeps_state,
        one("--cache-forecast", NONE), choices=lambda opened: [(x, x) for x in (NONE, "0", "1", "2")],
    ),
    Control(
        "forecast", "Forecast of the output", "N,O: the network runs every N steps", "choice", always,
        one("--forecast", NONE), neutral=NONE,
        choices=lambda opened: [(x, x) for x in (NONE, "2,1", "3,1", "3,2", "5,2")],
    ),
    Control(
        "precision", "Precision", "bf16: faster on a GPU, slower on most CPUs", "choice", always,
        one("--precision"), choices=lambda opened: [(x, x) for x in PRECISIONS],
    ),
    Control("more", "Further flags", "of sample.py, such as --guidance-schedule linear", "text", always,
            lambda value, opened: split(value)),
)  # fmt: skip


def split(value: object) -> list[str]:
    """Words of a command line.

    Raises:
        UserError: For a quote that does not end, and for flags of what the page has opened or writes.
    """
    try:
        words = shlex.split(str(value or ""))
    except ValueError as error:
        raise UserError(f"further flags: {error}") from error
    for word in words:
        flag = word.partition("=")[0]
        if flag in OF_PAGE or (flag.startswith("--") and flag[2:].replace("-", "_") in OF_NETWORK):
            raise UserError(f"further flags: {flag} chooses files or the network, which the page has opened")
    return words


def controls_for(opened: Sequence[Opened]) -> list[Control]:
    """Controls that at least one of these networks takes."""
    return [control for control in CONTROLS if any(map(control.shown, opened))]


def flags_for(opened: Opened, values: Values) -> list[str]:
    """Flags of sample.py for the values of the page; those that a network does not take are left out."""
    flags = list[str]()
    for control in CONTROLS:
        if control.name in values and control.shown(opened):
            flags += control.flags(values[control.name], opened)
    return flags


def defaults_for(opened: Opened) -> dict[str, object]:
    """Values that the page starts with: what sample.py takes without flags, with fewer samples of many classes."""
    prepared = opened.pipeline.prepare()
    config, count = prepared.config, opened.pipeline.num_classes
    scale, bounds = config.guidance.cfg_scale, config.guidance.guidance_interval
    return {
        "class_labels": [str(i) for i in (OFFICIAL_LABELS[:4] if count == 1000 else range(min(count, 10)))],
        "prompt": first_prompt(opened),
        "negative_prompt": "",
        "num_samples": 4,
        "seed": 0,
        "sampler": config.sampler,
        "steps": len(set(prepared.sampler.times)),
        "cfg_scale": scale if opened.can_be_guided else 1.0,
        "guidance_interval": "" if bounds is None else " ".join(map(shown_number, bounds)),
        "cache_interval": config.caching.cache_interval or 1,
        "sharing_interval": config.caching.sharing_interval or 1,
        "cache_forecast": NONE,
        "forecast": NONE,
        "precision": config.compute.precision,
        "more": "",
    }


def first_prompt(opened: Opened) -> str:
    """A prompt that the text encoder of a checkpoint knows."""
    text = (opened.pipeline.info.meta or {}).get("text") or {}
    if text.get("name") == Words.name:
        return "a large seven moving up" if len(opened.pipeline.image_shape) == 4 else "a large seven"
    return "a small cat sitting on a wooden table"


def command_line(opened: Opened, values: Values, output: Path = Path("sample.png")) -> str:
    """The command that makes the same picture."""
    flags = [*opened.flags, *flags_for(opened, values)]
    return shlex.join(["python", PROGRAM, *flags, "--output", str(output)])
