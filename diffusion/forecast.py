"""Forecasts in the place of evaluations: polynomials in time through the last outputs, or through the last kept states.

Without training, and for any family. The weights of a polynomial are host numbers; a forecast costs one addition for
each value that it goes through.

Sources: Liu et al., 2025 (TaylorSeer, arXiv 2503.06923), which forecasts features of blocks by finite differences in
step counts; here the Lagrange polynomial in time is used, which is exact on any grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.sampling import Denoiser, Evaluation, Reuse
from models.contract import ModelOutput, State


def forecast_schedule(evaluations: Sequence[Evaluation], interval: int) -> tuple[Evaluation, ...]:
    """Mark the rows of a table that are forecasts: all but the first two, and every N-th from then on.

    Where guidance begins or ends the output jumps, and counting starts over: N = 3 calls the network at 0, 1, 4, 7, ...
    after each such edge.

    Args:
        evaluations: Rows of a sampler that evaluates once a step.
        interval: N; 1 marks none.

    Raises:
        ValueError: If the interval is below 1, or times repeat or turn back.
    """
    if interval < 1:
        raise ValueError(f"the interval must be at least 1, not {interval}")
    times = [float(row.t) for row in evaluations]
    if any((b - a) * (times[1] - times[0]) <= 0 for a, b in pairwise(times)):
        raise ValueError("a forecast needs a sampler that evaluates the network once a step")
    rows: list[Evaluation] = []
    since = 0  # evaluations since the last edge
    for row in evaluations:
        edge = not rows or (row.scale, row.guided) != (rows[-1].scale, rows[-1].guided)
        since = 0 if edge else since + 1
        rows.append(row._replace(call=edge or (since - 1) % interval == 0))
    return tuple(rows)


def lagrange_weights(times: Sequence[float], t: float) -> list[float]:
    """Weights of values at distinct times in the polynomial through them, evaluated at t; they sum to 1."""
    weights = []
    for j, own in enumerate(times):
        weight = 1.0
        for other in (*times[:j], *times[j + 1 :]):
            weight *= (t - other) / (own - other)
        weights.append(weight)
    return weights


class Forecast:
    """A denoiser that forecasts the guided output wherever a row of the table does not call the network.

    Its history is empty at the start of a run, after an edge of guidance, and after a hook has replaced x; a row
    without anything to forecast from is evaluated.

    Args:
        denoise: Denoiser that is called on the other rows.
        order: Degree of the polynomial, at least 0; lower as long as there are fewer outputs.

    Raises:
        ValueError: If the order is negative.
    """

    def __init__(self, denoise: Denoiser, order: int) -> None:
        if order < 0:
            raise ValueError(f"the order of a forecast must be at least 0, not {order}")
        self._denoise, self._order = denoise, order
        self.time_convention = getattr(denoise, "time_convention", None)
        self.clear()

    def clear(self) -> None:
        """Forget all outputs."""
        self._history: list[tuple[float, Tensor]] = []
        self._guidance: tuple[float, bool] | None = None

    def __call__(self, x: Tensor, evaluation: Evaluation, state: State = None, /) -> ModelOutput:
        """Evaluate at x (N, ..., C, H, W), or forecast; a forecast has no state."""
        t, guidance = float(evaluation.t), (evaluation.scale, evaluation.guided)
        if guidance != self._guidance:
            self.clear()
            self._guidance = guidance
        if evaluation.call or not self._history:
            out = self._denoise(x, evaluation._replace(call=True), state)
            self._history = [(t, out.sample), *self._history[: self._order]]
            return out
        times = [time for time, _ in self._history]
        return ModelOutput(weighted([value for _, value in self._history], lagrange_weights(times, t)))


class ForecastState(Reuse):
    """Reuse of a polynomial through the last kept states in the place of the last one.

    Args:
        order: Degree of the polynomial, at least 0, where it is plain reuse.

    Raises:
        ValueError: If the order is negative.
    """

    def __init__(self, order: int) -> None:
        if order < 0:
            raise ValueError(f"the order of a forecast must be at least 0, not {order}")
        super().__init__()
        self._order = order
        self.clear()

    def clear(self) -> None:
        """Forget all states."""
        super().clear()
        self._history: list[tuple[float, State]] = []
        self._guided: bool | None = None

    def get(self, evaluation: Evaluation, /) -> State:
        """State for an evaluation; None to compute it anew."""
        if evaluation.refresh:
            return None
        times = [time for time, _ in self._history]
        return combined([state for _, state in self._history], lagrange_weights(times, float(evaluation.t)))

    def put(self, evaluation: Evaluation, output: ModelOutput, /) -> None:
        """Remember a state that was computed; states of other rows (guidance begins or ends) are forgotten."""
        if not evaluation.refresh:
            return
        kept = self._history if evaluation.guided == self._guided else []
        self._guided = evaluation.guided
        self._history = [(float(evaluation.t), output.state), *kept[: self._order]]


def combined(states: Sequence[State], weights: Sequence[float]) -> State:
    """Weighted sum of states: tensors, or tuples of them (a network's and its guide's), or None."""
    if isinstance(states[0], tuple):
        return tuple(combined(part, weights) for part in zip(*states, strict=True))
    return None if states[0] is None else weighted(states, weights)


def weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of tensors times numbers, in their dtype; a single one is returned as it is."""
    if len(values) == 1:
        return values[0]
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = torch.add(total, value, alpha=weight)
    return total
