"""Sampling for the page: the code of sample.py, watched step by step, with its cost before and after."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.costs import reused_cost
from benchmarks.counting import SamplingCost
from data.pixels import GAP, Images
from demo.controls import Opened, Values, controls_for, flags_for
from models import ModelOutput
from runtime.errors import UserError, error_prefix
from sample import PROGRAM, SampleSettings, columns_of, make, overviews, shown
from sampling.pipeline import Pipeline
from sampling.run import PreparedRun

PREVIEWS = 12  # pictures of samples on the way, at most


class Cost(NamedTuple):
    """Work of a run.

    Attributes:
        evaluations: Calls of the network in a run.
        rows: Rows that they evaluate for one sample; guidance makes two of one.
        macs: Multiply-accumulate operations for one sample.
    """

    evaluations: int
    rows: int
    macs: float


class Step(NamedTuple):
    """Samples on the way, as a picture (H, W, C) uint8, after so many of all steps."""

    picture: Images
    done: int
    total: int


class Result(NamedTuple):
    """Samples.

    Attributes:
        files: The files that sample.py writes: the picture; of clips an animation, too.
        samples: Number of samples.
        seconds: Duration of sampling and decoding, without the pictures on the way.
        macs: Operations that were executed for one sample.
        predicted: What was expected.
    """

    files: tuple[Path, ...]
    samples: int
    seconds: float
    macs: float
    predicted: Cost


class Stopped(Exception):
    """The page asked for an end."""


def cost_of(run: PreparedRun) -> Cost:
    """Count the work of a prepared run, for one sample; of routed networks with everything on."""
    full, reused = (sum(parts.values()) for parts in (run.network.cost(), reused_cost(run.network)))
    called = [evaluation for evaluation in run.table if evaluation.call]
    rows = [2 if evaluation.guided and run.guide is None else 1 for evaluation in called]
    macs = sum(n * (full if e.refresh else reused) for e, n in zip(called, rows, strict=True))
    return Cost(len(called), sum(rows), macs)


def with_settings(opened: Opened, values: Values) -> tuple[Pipeline, SampleSettings]:
    """The pipeline of a checkpoint with the settings of the page; its weights are shared.

    Raises:
        UserError: For settings that do not go together.
    """
    given, base = opened.parse(flags_for(opened, values)), opened.pipeline
    return Pipeline(base.network, base.info, base.encoder, given, base.guide), given.general


def predict(opened: Opened, values: Values) -> tuple[Cost, dict[str, float]]:
    """Predict the cost of one sample, and the share of it that each control adds or saves.

    Returns:
        The cost, and for each control that is not neutral its factor: the cost over that with the control neutral.

    Raises:
        UserError: For settings that do not go together.
    """

    def cost(values: Values) -> Cost:
        pipeline, config = with_settings(opened, {**values, "precision": "fp32"})  # a copy of the network less
        return cost_of(pipeline.prepare(config.image.chosen_strength))

    whole, factors = cost(values), {}
    for control in controls_for([opened]):
        if control.neutral is not None and str(values.get(control.name)) not in (str(control.neutral), "1.0"):
            neutral: dict[str, object] = {**values, control.name: control.neutral}
            if control.name == "cfg_scale":
                neutral["guidance_interval"] = ""  # which has no effect without guidance
            try:
                factors[control.label] = whole.macs / cost(neutral).macs
            except UserError:
                continue  # another control needs this one
    return whole, factors


class Work:
    """Sampling in another thread, which sends pictures, the result, or an error.

    Args:
        pipeline: Opened with the settings.
        config: The settings.
        folder: Where the files go.
        stop: Set to end at the next step.
    """

    def __init__(self, pipeline: Pipeline, config: SampleSettings, folder: Path, stop: threading.Event) -> None:
        picture = replace(config.picture, output=folder / "sample.png", overwrite=True)
        self.pipeline, self.config, self.stop = pipeline, replace(config, picture=picture), stop
        with error_prefix(""):
            self.texts = config.text.read()
            self.writer = config.clips.writer(pipeline.image_shape, pipeline.info.path)
            self.paths = overviews(self.writer, picture, config.clips)
        self.run = pipeline.prepare(config.image.chosen_strength)
        self.messages: queue.SimpleQueue[Step | Result | BaseException] = queue.SimpleQueue()
        self._spent = 0.0  # seconds of pictures on the way

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            self.messages.put(self._made())
        except BaseException as error:  # of any kind: it is raised where the messages are read
            self.messages.put(error)

    def _made(self) -> Result:
        started = time.perf_counter()
        with SamplingCost().listening() as counted:
            made = make(self.pipeline, self.config, self.texts, self._watch)
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)
        seconds, samples = time.perf_counter() - started - self._spent, made.moments[-1]
        for path in self.paths:
            noted = {"software": PROGRAM, "note": made.note}
            self.writer.save(samples, path, made.columns, gap=GAP, texts=made.captions, **noted)
        macs = sum(counted.executed.values()) / len(samples)
        return Result(self.paths, len(samples), seconds, macs, cost_of(self.run))

    def _watch(self, i: int, x: Tensor, out: ModelOutput) -> None:
        if self.stop.is_set():
            raise Stopped
        total = len(self.run.table)
        if (i + 1) % max(1, total // PREVIEWS) == 0 and i + 1 < total:
            started = time.perf_counter()
            samples = shown(self.pipeline, x, self.run)
            sheet = self.writer.sheet(samples, columns_of(self.config.picture, len(samples)))
            self.messages.put(Step(sheet, i + 1, total))
            self._spent += time.perf_counter() - started


def generate(opened: Opened, values: Values, folder: Path, stop: threading.Event) -> Iterator[Step | Result]:
    """Sample what the page asks for, as sample.py would.

    Args:
        opened: The checkpoint.
        values: Values of the controls.
        folder: Where the files go.
        stop: Set to end at the next step.

    Yields:
        A `Step` now and then, and the `Result`; none after a stop.

    Raises:
        UserError: For settings that do not fit.
    """
    work = Work(*with_settings(opened, values), folder, stop)
    work.start()
    while True:
        message = work.messages.get()
        if isinstance(message, Stopped):
            return
        if isinstance(message, BaseException):
            raise message
        yield message
        if isinstance(message, Result):
            return
