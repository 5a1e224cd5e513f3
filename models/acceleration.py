"""Faster evaluations that compute the same: lower precision with weights cast once, CUDA graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from models.contract import ModelOutput

Evaluate = Callable[..., ModelOutput]  # called as (x, t, y, state)
COMPILE_BACKEND = "inductor"
Capture = Callable[[Callable[[], ModelOutput]], tuple[Callable[[], None], ModelOutput]]


def can_compile(device_type: str) -> bool:
    """Whether torch.compile finds what it generates code with: on a CPU a C++ compiler."""
    return device_type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def autocast(network: Evaluate, device: torch.device, dtype: torch.dtype) -> Evaluate:
    """The network, and nothing around it, in lower precision."""

    def evaluate(*args: Any) -> ModelOutput:
        with torch.autocast(device.type, dtype):
            return network(*args)

    return evaluate


@torch.no_grad()
def cast_weights_once(network: nn.Module, dtype: torch.dtype, evaluate: Callable[[], object]) -> int:
    """Keeps in lower precision the weights that autocast would cast at every evaluation; results stay the same.

    What runs in lower precision is seen, not guessed: layers that a network keeps out of autocast stay as they are.

    Args:
        network: whose linear maps and convolutions are cast in place.
        dtype: of autocast.
        evaluate: runs the network under autocast, once.

    Returns:
        How many layers were cast.
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
    for layer in lower:
        layer.to(dtype)
    return len(lower)


class _Recording(NamedTuple):
    replay: Callable[[], None]
    output: ModelOutput  # overwritten by every replay
    state: Any  # a copy of the output's state at a place of its own, which later recordings read; or what was given


class GraphedNetwork:
    """Evaluations recorded once and then replayed, each as one launch instead of hundreds.

    A recording belongs to a time, a batch shape, and the place of the state it reads, so whatever a network decides on
    the host (routing, skipped blocks) is part of it. The first batch records, at the cost of about three evaluations
    each; it pays for small batches of one shape that are drawn again and again with one schedule. Weights must not
    move afterwards.

    Args:
        network: called with a number for t, without gradients. Others pass through.
        capture: makes a recording of a function without arguments.
    """

    def __init__(self, network: Evaluate, capture: Capture | None = None) -> None:
        self._network, self._capture = network, capture or CudaCapture()
        self._inputs: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._recordings: dict[Hashable, _Recording] = {}

    @property
    def recordings(self) -> int:
        """How many evaluations were recorded."""
        return len(self._recordings)

    def __call__(self, x: Tensor, t: float | Tensor, y: Tensor, state: Any = None) -> ModelOutput:
        """As the network; the state is overwritten when the same evaluation comes again."""
        if isinstance(t, Tensor):
            return self._network(x, t, y, state)
        if x.shape not in self._inputs:
            self._inputs[x.shape] = x.clone(), y.clone()
        fixed_x, fixed_y = self._inputs[x.shape]
        fixed_x.copy_(x)
        fixed_y.copy_(y)
        key = (t, x.shape, *map(_place, tree_flatten(state)[0]))
        if key not in self._recordings:
            replay, output = self._capture(lambda: self._network(fixed_x, t, fixed_y, state))
            kept = output.state if output.state is state else tree_map(_copy, output.state)
            self._recordings[key] = _Recording(replay, output, kept)
        recording = self._recordings[key]
        recording.replay()
        if recording.state is not recording.output.state:
            for kept, new in zip(*(tree_flatten(s)[0] for s in (recording.state, recording.output.state)), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)
        # Recordings share memory, so whatever leaves one is copied out of it.
        return tree_map(_copy, recording.output._replace(state=None))._replace(state=recording.state)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _place(leaf: Any) -> Hashable:
    return (leaf.data_ptr(), leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


class CudaCapture:
    """Records CUDA graphs that share one pool of memory, on one stream of its own."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], ModelOutput]) -> tuple[Callable[[], None], ModelOutput]:
        """Runs once to set up kernels, then records a second run.

        Returns:
            What replays it, and the output that replays overwrite.
        """
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            run()
            self._stream.synchronize()
            # Another thread may decode and copy meanwhile; what it allocates is none of this recording's business.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = run()
            finally:
                graph.capture_end()
        before.wait_stream(self._stream)
        return graph.replay, output
