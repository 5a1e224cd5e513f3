"""From the nodes of a frozen graph to the modules that compute the same.

The wiring is the file's: which layer feeds which, strides, paddings, order of channels, whether gamma counts. No table
of layers stands in between that could disagree with it. A graph with anything but the forms below is refused, because
running it in part would give plausible, wrong numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evaluator.inception.graph_def import Node
from evaluator.inception.layers import AveragePool, Concatenate, Convolution, MaxPool, Multiply, Resize, Subtract

PASSED_THROUGH = ("Identity", "CheckNumerics")  # NaN is looked for in the features instead
CHANNEL_AXIS = 3
Pair = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One module and what it works on.

    Attributes:
        output: name of the node that it computes.
        inputs: names of the nodes that it reads.
        module: the work.
        spent: names that no later step reads.
    """

    output: str
    inputs: tuple[str, ...]
    module: nn.Module
    spent: tuple[str, ...] = ()


def plan_steps(nodes: Mapping[str, Node], start: str, ends: Sequence[str]) -> list[Step]:
    """Everything on the way from one node to others.

    Args:
        nodes: of the graph, by name.
        start: the node whose value will be given.
        ends: the nodes whose values are wanted.

    Returns:
        Steps, each behind those that it reads; values that are wanted are never spent.

    Raises:
        ValueError: if a node is missing or of a form that is not known.
    """
    planner = _Planner(nodes, start)
    for end in ends:
        planner.visit(end)
    last_reader = {name: step.output for step in planner.steps.values() for name in step.inputs}
    spent: dict[str, tuple[str, ...]] = {}
    for name, reader in last_reader.items():
        if name not in ends:
            spent[reader] = (*spent.get(reader, ()), name)
    return [Step(step.output, step.inputs, step.module, spent.get(step.output, ())) for step in planner.steps.values()]


def find_constant(nodes: Mapping[str, Node], name: str, dimensions: int) -> npt.NDArray[Any]:
    """The value of a constant, straight or behind nodes that pass it through.

    Raises:
        ValueError: if it is missing, no constant, or has another number of dimensions.
    """
    array = find_node(nodes, _behind(nodes, name)).array()
    if array.ndim != dimensions:
        raise ValueError(f"constant {name} is of shape {array.shape}; expected {dimensions} dimensions")
    return array


def find_node(nodes: Mapping[str, Node], name: str) -> Node:
    """The node of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in nodes:
        raise ValueError(f"it has no node {name}")
    return nodes[name]


def _behind(nodes: Mapping[str, Node], name: str) -> str:
    """Name of the node whose value arrives under another name."""
    while name in nodes and nodes[name].op in PASSED_THROUGH:
        (name, *_) = nodes[name].inputs
    return name


class _Planner:
    """Visits nodes from the end backwards; `steps` then stand in the order in which they can run."""

    def __init__(self, nodes: Mapping[str, Node], start: str) -> None:
        self.nodes, self.start = nodes, start
        self.steps: dict[str, Step] = {}
        self._begun = set[str]()
        self._forms = {
            "ResizeBilinear": self._resize,
            "Sub": self._arithmetic,
            "Mul": self._arithmetic,
            "Relu": self._convolution,
            "MaxPool": self._pool,
            "AvgPool": self._pool,
            "Concat": self._concatenation,
        }

    def visit(self, name: str) -> None:
        if name == self.start or name in self.steps:
            return
        if name in self._begun:
            raise ValueError(f"node {name} needs its own result")
        self._begun.add(name)
        node = find_node(self.nodes, name)
        if node.op not in self._forms:
            raise ValueError(f"node {name} is a {node.op}; expected one of {', '.join(self._forms)}")
        inputs, module = self._forms[node.op](node)
        inputs = [_behind(self.nodes, each) for each in inputs]
        for each in inputs:
            self.visit(each)
        self.steps[name] = Step(name, tuple(inputs), module)

    def _resize(self, node: Node) -> tuple[list[str], nn.Module]:
        images, size = self._inputs(node, 2)
        if node.attributes.get("align_corners") or node.attributes.get("half_pixel_centers"):
            raise ValueError(f"node {node.name} resizes with align_corners or half_pixel_centers")
        height, width = map(int, find_constant(self.nodes, size, dimensions=1))
        return [images], Resize(height, width)

    def _arithmetic(self, node: Node) -> tuple[list[str], nn.Module]:
        x, constant = self._inputs(node, 2)
        value = float(find_constant(self.nodes, constant, dimensions=0))
        return [x], Subtract(value) if node.op == "Sub" else Multiply(value)

    def _convolution(self, node: Node) -> tuple[list[str], nn.Module]:
        """A ReLU of a normalised convolution."""
        (normalised,) = self._inputs(node, 1)
        norm = self._required(normalised, "BatchNormWithGlobalNormalization")
        convolved, *constants = self._inputs(norm, 5)
        conv = self._required(convolved, "Conv2D")
        x, kernel = self._inputs(conv, 2)
        if any(size != 1 for size in conv.attributes.get("dilations") or ()):
            raise ValueError(f"node {conv.name} is dilated")
        weight = find_constant(self.nodes, kernel, dimensions=4).astype(np.float64)  # (H, W, C_in, C_out)
        mean, variance, beta, gamma = (
            find_constant(self.nodes, each, dimensions=1).astype(np.float64) for each in constants
        )
        if any(array.shape != weight.shape[3:] for array in (mean, variance, beta, gamma)):
            raise ValueError(f"node {norm.name} does not fit the {weight.shape[3]} channels of {conv.name}")
        scale = 1 / np.sqrt(variance + self._attribute(norm, "variance_epsilon"))
        if self._attribute(norm, "scale_after_normalization"):
            scale *= gamma
        stride, padding = self._window(conv, weight.shape[:2])
        filters = torch.from_numpy((weight * scale).transpose(3, 2, 0, 1).astype(np.float32))
        return [x], Convolution(filters, torch.from_numpy((beta - mean * scale).astype(np.float32)), stride, padding)

    def _pool(self, node: Node) -> tuple[list[str], nn.Module]:
        (x,) = self._inputs(node, 1)
        size = self._spatial_pair(node, "ksize")
        stride, padding = self._window(node, size)
        return [x], (MaxPool if node.op == "MaxPool" else AveragePool)(size, stride, padding)

    def _concatenation(self, node: Node) -> tuple[list[str], nn.Module]:
        axis, *parts = node.inputs
        if int(find_constant(self.nodes, axis, dimensions=0)) != CHANNEL_AXIS:
            raise ValueError(f"node {node.name} does not concatenate channels")
        return parts, Concatenate()

    def _inputs(self, node: Node, count: int) -> tuple[str, ...]:
        if len(node.inputs) != count:
            raise ValueError(f"node {node.name} reads {len(node.inputs)} nodes; a {node.op} reads {count}")
        return node.inputs

    def _required(self, name: str, op: str) -> Node:
        node = find_node(self.nodes, _behind(self.nodes, name))
        if node.op != op:
            raise ValueError(f"node {node.name} is a {node.op}; expected a {op}")
        return node

    def _attribute(self, node: Node, name: str) -> Any:
        if node.attributes.get(name) is None:
            raise ValueError(f"node {node.name} does not say its {name}")
        return node.attributes[name]

    def _spatial_pair(self, node: Node, name: str) -> Pair:
        """The middle of [1, down, across, 1]."""
        values = self._attribute(node, name)
        if not isinstance(values, list) or len(values) != 4 or (values[0], values[3]) != (1, 1):
            raise ValueError(f"node {node.name} has {name} {values}; expected [1, down, across, 1]")
        return values[1], values[2]

    def _window(self, node: Node, size: Sequence[int]) -> tuple[Pair, Pair]:
        """Stride and padding of a window over pixels."""
        if (node.attributes.get("data_format") or b"NHWC") != b"NHWC":
            raise ValueError(f"node {node.name} has its channels elsewhere than last")
        stride, padding = self._spatial_pair(node, "strides"), self._attribute(node, "padding")
        if padding == b"VALID":
            return stride, (0, 0)
        if padding == b"SAME" and stride == (1, 1) and all(length % 2 for length in size):
            return stride, (size[0] // 2, size[1] // 2)
        raise ValueError(f"node {node.name} pads in a way that is not expected ({padding!r}, stride {stride})")
