"""The page: controls on the left, samples, costs and commands of one or two checkpoints on the right."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from demo.controls import Control, Opened, command_line, controls_for, defaults_for
from demo.generation import Cost, Result, Step, generate, predict
from runtime.errors import UserError

if TYPE_CHECKING:
    import gradio as gr

TITLE = "DiT family"
STYLE = """
.gradio-container {max-width: 1280px !important}
.picture img {image-rendering: pixelated; object-fit: contain}
.command textarea {font-family: ui-monospace, monospace; font-size: 12px}
.error {color: #b00020; font-weight: 600}
"""
GIGA = 1e9


def number(value: float) -> str:
    """A count of operations with its prefix."""
    return f"{value / GIGA:,.2f} G" if value >= GIGA / 100 else f"{value / 1e6:,.2f} M"


def cost_table(costs: Sequence[tuple[Opened, Cost, dict[str, float], Result | None]]) -> str:
    """Costs of all checkpoints as a table of Markdown."""
    rows = [
        ["for one sample", *(opened.name for opened, *_ in costs)],
        ["---", *("---" for _ in costs)],
        ["network evaluations", *(f"{cost.evaluations} ({cost.rows} rows)" for _, cost, *_ in costs)],
        ["MACs, predicted", *(number(cost.macs) for _, cost, *_ in costs)],
    ]
    for title in dict.fromkeys(name for *_, factors, _ in costs for name in factors):
        cells = (f"x {factors[title]:.2f}" if title in factors else "" for *_, factors, _ in costs)
        rows.append([f"by {title.lower()}", *cells])
    if any(result is not None for *_, result in costs):
        results = [result for *_, result in costs]
        rows.append(["MACs, executed", *("" if r is None else number(r.macs) for r in results)])
        rows.append(["seconds a sample", *("" if r is None else f"{r.seconds / r.samples:.3f}" for r in results)])
        rows.append(["seconds in all", *("" if r is None else f"{r.seconds:.2f}" for r in results)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def one_line(error: Exception) -> str:
    """An error for the page."""
    return f'<span class="error">{" ".join(str(error).split())}</span>'


class Page:
    """The page of one or two checkpoints.

    Args:
        opened: The checkpoints.
    """

    def __init__(self, opened: Sequence[Opened]) -> None:
        self.opened, self.controls = [*opened], controls_for(opened)
        self.folder = Path(tempfile.mkdtemp(prefix="dit-family-page-"))
        self.stop = threading.Event()
        self.lock = threading.Lock()  # one run at a time: it has the device to itself, and its seconds mean something

    def values(self, given: Sequence[object]) -> dict[str, object]:
        """Values of the controls by name."""
        pairs = zip(self.controls, given, strict=True)
        return {own.name: int(value) if is_whole(own, value) else value for own, value in pairs}  # type: ignore[call-overload]

    def describe(self, *given: object) -> tuple[str, ...]:
        """Cost, and the command line of each checkpoint, for the values of all controls."""
        values = self.values(given)
        try:
            costs = [(own, *predict(own, values), None) for own in self.opened]
            return (cost_table(costs), *(command_line(own, values) for own in self.opened))
        except UserError as error:
            return (one_line(error), *("" for _ in self.opened))

    def generate(self, *given: object) -> Iterator[tuple[object, ...]]:
        """Sample with every checkpoint; yields status, table, and pictures and files of all."""
        values, count = self.values(given), len(self.opened)
        pictures: list[object] = [None] * count
        files: list[object] = [None] * count
        results: list[Result | None] = [None] * count
        table = ""
        if not self.lock.acquire(blocking=False):
            yield "another run is under way; wait for it, or stop it", table, *pictures, *files
            return
        self.stop.clear()
        try:
            costs = [predict(own, values) for own in self.opened]
            for place, own in enumerate(self.opened):
                folder = self.folder / f"{place}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                for message in generate(own, values, folder, self.stop):
                    if isinstance(message, Step):
                        pictures[place] = rgb(message.picture)
                        status = f"{own.name}: step {message.done} of {message.total}"
                    else:
                        results[place] = message
                        pictures[place], files[place] = str(message.files[-1]), [str(path) for path in message.files]
                        status = f"{own.name}: {message.samples} samples in {message.seconds:.2f} s"
                    rows = zip(self.opened, costs, results, strict=True)
                    table = cost_table([(each, *cost, result) for each, cost, result in rows])
                    yield status, table, *pictures, *files
                if self.stop.is_set():
                    yield "stopped", table, *pictures, *files
                    return
            yield "done", table, *pictures, *files
        except UserError as error:
            yield one_line(error), table, *pictures, *files
        finally:
            self.lock.release()

    def build(self) -> gr.Blocks:
        """Build the page."""
        import gradio as gr

        start = {name: value for own in reversed(self.opened) for name, value in defaults_for(own).items()}
        with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
            gr.Markdown(f"# {TITLE}\n" + " and ".join(f"**{own.name}** ({describe(own)})" for own in self.opened))
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    inputs = [component(gr, own, self.opened, start[own.name]) for own in self.controls]
                    with gr.Row():
                        button = gr.Button("Sample", variant="primary", elem_id="sample")
                        stop = gr.Button("Stop", elem_id="stop")
                with gr.Column(scale=5):
                    status = gr.Markdown("", elem_id="status")
                    with gr.Row():
                        pictures = [
                            gr.Image(
                                label=own.name, elem_id=f"picture-{i}", elem_classes="picture", interactive=False,
                                type="filepath", format="png", height=420,
                                buttons=["download", "fullscreen"],
                            )
                            for i, own in enumerate(self.opened)
                        ]  # fmt: skip
                    table = gr.Markdown(elem_id="cost")
                    commands = [
                        gr.Textbox(
                            label=f"The same with a command: {own.name}", elem_id=f"command-{i}", interactive=False,
                            elem_classes="command", lines=2, buttons=["copy"],
                        )
                        for i, own in enumerate(self.opened)
                    ]  # fmt: skip
                    files = [
                        gr.File(label=f"Files: {own.name}", elem_id=f"files-{i}", interactive=False)
                        for i, own in enumerate(self.opened)
                    ]
            for each in inputs:
                each.change(
                    self.describe, inputs, [table, *commands], show_progress="hidden", trigger_mode="always_last"
                )
            blocks.load(self.describe, inputs, [table, *commands], show_progress="hidden")
            outputs = [status, table, *pictures, *files]
            button.click(self.generate, inputs, outputs, show_progress="hidden")
            stop.click(self.stop.set, None, None, queue=False)
        return blocks

    def close(self) -> None:
        """Remove the page's files."""
        self.stop.set()
        shutil.rmtree(self.folder, ignore_errors=True)


def describe(opened: Opened) -> str:
    """Model, process and weights of a checkpoint."""
    info = opened.pipeline.info
    return f"{info.model}, {info.process}, {info.weights}, {number(sum(opened.pipeline.network.cost().values()))} MACs"


def is_whole(control: Control, value: object) -> bool:
    """True for numbers of controls that take whole ones."""
    whole = control.kind == "whole" or (control.bounds is not None and float(control.bounds[2]).is_integer())
    return whole and value is not None


def rgb(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A picture (H, W, 1 or 3) with three channels."""
    return picture.repeat(3, axis=-1) if picture.shape[-1] == 1 else picture


def component(gr: ModuleType, control: Control, opened: Sequence[Opened], value: object) -> Any:
    """The component of a control."""
    options = {"label": control.label, "info": control.info, "value": value, "elem_id": control.name}
    if control.choices is not None:
        choices = list(dict.fromkeys(choice for own in opened if control.shown(own) for choice in control.choices(own)))
        return gr.Dropdown(choices, multiselect=control.kind == "labels", **options)
    if control.bounds is not None:
        low, high, step = control.bounds
        return gr.Slider(low, high, step=step, **options)
    if control.kind == "whole":
        return gr.Number(precision=0, **options)
    return gr.Textbox(lines=3 if control.kind == "lines" else 1, **options)
