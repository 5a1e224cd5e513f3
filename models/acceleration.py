"""Faster evaluations with the same results: low precision with weights cast once, CUDA graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from models.contract import ModelOutput, NetworkLike, State

COMPILE_BACKEND = "inductor"
Capture = Callable[[Callable[[], ModelOutput]], tuple[Callable[[], None], ModelOutput]]


def can_compile(device_type: str) -> bool:
    """Check that torch.compile can generate code; on a CPU it needs a C++ compiler."""
    return device_type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


class AutocastNetwork:
    """A network evaluated on its device under autocast to a dtype, its conditioning passed through."""

    def __init__(self, network: NetworkLike, device: torch.device, dtype: torch.dtype) -> None:
        self._network, self._device, self._dtype = network, device, dtype
        self.time_convention, self.conditioning = network.time_convention, network.conditioning

    def __call__(self, x: Tensor, t: float | Tensor, *, state: State = None, **conditioning: Tensor) -> ModelOutput:
        """Evaluate the network under autocast."""
        with torch.autocast(self._device.type, self._dtype):
            return self._network(x, t, state=state, **conditioning)

    def embedded_time(self, t: float) -> Tensor | None:
        """Return the network's."""
        return self._network.embedded_time(t)


@torch.no_grad()
def cast_weights_once(network: nn.Module, dtype: torch.dtype, evaluate: Callable[[], object]) -> int:
    """Store the weights that autocast would cast at every evaluation in low precision; results stay the same.

    Linear maps and convolutions get new parameters. `evaluate` runs the network once under autocast to this dtype, to
    see which of them autocast reaches; the others stay as they are.

    Returns:
        The number of layers that were cast.
    """
    lower: set[nn.Module] = set()

    def note(layer: nn.Module, inputs: object, output: Tensor) -> None:
        if output.dtype == dtype:
            lower.add(layer)

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    for layer in lower:  # by new parameters, which tensors without values can be, too
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(layer, name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))
    return len(lower)


class _Recording(NamedTuple):
    replay: Callable[[], None]
    output: ModelOutput  # overwritten by every replay
    state: State  # a copy of the output's state that later recordings read, or the state that was given


class GraphedNetwork:
    """Evaluations recorded once and then replayed, each as one launch instead of hundreds.

    A recording belongs to the names and shapes of x and all conditioning tensors, and to the address of the state it
    reads, so the decisions that a network makes on the host (skipped blocks, say) are part of it; one serves all times
    where the network has an embedding of them, else it belongs to its time. Each costs about three evaluations. Weights
    must not be moved afterwards.

    Args:
        network: Evaluated with a number for t, without gradients. Calls with a tensor for t pass through.
        capture: Makes a recording of a function without arguments.
    """

    def __init__(self, network: NetworkLike, capture: Capture | None = None) -> None:
        self._network, self._capture = network, capture or CudaCapture()
        self.time_convention, self.conditioning = network.time_convention, network.conditioning
        self._inputs: dict[Hashable, dict[str, Tensor]] = {}
        self._recordings: dict[Hashable, _Recording] = {}

    @property
    def recordings(self) -> int:
        """Number of recorded evaluations."""
        return len(self._recordings)

    def __call__(self, x: Tensor, t: float | Tensor, *, state: State = None, **conditioning: Tensor) -> ModelOutput:
        """Evaluate the network; the returned state is overwritten when the same evaluation is repeated."""
        if isinstance(t, Tensor):
            return self._network(x, t, state=state, **conditioning)
        embedded = self._network.embedded_time(t)
        inputs = {"x": x, **conditioning} | ({} if embedded is None else {"t": embedded})
        shapes = tuple((name, value.shape, value.dtype) for name, value in sorted(inputs.items()))
        fixed = self._fixed(shapes, inputs)
        key = (t if embedded is None else None, shapes, *map(_place, tree_flatten(state)[0]))
        if key not in self._recordings:
            x, time_input = fixed["x"], fixed.get("t", t)
            rest = {name: fixed[name] for name in conditioning}
            replay, output = self._capture(lambda: self._network(x, time_input, state=state, **rest))
            kept = output.state if output.state is state else tree_map(_copy, output.state)
            self._recordings[key] = _Recording(replay, output, kept)
        recording = self._recordings[key]
        recording.replay()
        if recording.state is not recording.output.state:
            for kept, new in zip(*(tree_flatten(s)[0] for s in (recording.state, recording.output.state)), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)
        # Recordings share memory, so what is returned is copied out of it.
        out: ModelOutput = tree_map(_copy, recording.output._replace(state=None))._replace(state=recording.state)
        return out

    def embedded_time(self, t: float) -> Tensor | None:
        """Return the network's."""
        return self._network.embedded_time(t)

    def _fixed(self, shapes: Hashable, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the inputs to the tensors that recordings of these shapes read."""
        if shapes not in self._inputs:
            self._inputs[shapes] = {name: value.clone() for name, value in inputs.items()}
            return self._inputs[shapes]
        for name, value in inputs.items():
            self._inputs[shapes][name].copy_(value)
        return self._inputs[shapes]


def _copy(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _place(leaf: object) -> Hashable:
    return (leaf.data_ptr(), leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


class CudaCapture:
    """Recorder of CUDA graphs that share one memory pool, on one side stream."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], ModelOutput]) -> tuple[Callable[[], None], ModelOutput]:
        """Run once to set up kernels, then record a second run.

        Returns:
            The function that replays it, and the output that replays overwrite.
        """
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            run()
            self._stream.synchronize()
            # Thread-local, because another thread may decode and copy during the recording.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = run()
            finally:
                graph.capture_end()
        before.wait_stream(self._stream)
        return graph.replay, output
