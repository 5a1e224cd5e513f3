"""Translation of a frozen graph's nodes into modules.

Everything is read from the file: connections, strides, paddings, order of channels, use of gamma. There is no table of
layers that could disagree with it. A graph with any other operation is an error, because running it in part would give
plausible, wrong numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from evaluator.inception.graph_def import Attribute, Node, Numbers
from evaluator.inception.layers import Arithmetic, AveragePool, Concatenate, Convolution, MaxPool, Resize

PASSED_THROUGH = ("Identity", "CheckNumerics")  # the features are checked for NaN instead
CHANNEL_AXIS = 3
Pair = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One module, its inputs and its output.

    Attributes:
        output: Name of the node that it computes.
        inputs: Names of the nodes that it reads.
        module: The computation.
        unused: Names that no later step reads.
    """

    output: str
    inputs: tuple[str, ...]
    module: nn.Module
    unused: tuple[str, ...] = ()


def plan_steps(nodes: Mapping[str, Node], start: str, ends: Sequence[str]) -> list[Step]:
    """Plan the computation of some nodes from one.

    Args:
        nodes: Nodes of the graph by name.
        start: Node that is given.
        ends: Nodes to compute; no step counts them as unused.

    Returns:
        Steps, each after those that it reads.

    Raises:
        ValueError: If a node is missing or not supported.
    """
    planner = _Planner(nodes, start)
    for end in ends:
        planner.visit(end)
    last_reader = {name: step.output for step in planner.steps.values() for name in step.inputs}
    unused: dict[str, tuple[str, ...]] = {}
    for name, reader in last_reader.items():
        if name not in ends:
            unused[reader] = (*unused.get(reader, ()), name)
    return [replace(step, unused=unused.get(step.output, ())) for step in planner.steps.values()]


def find_constant(nodes: Mapping[str, Node], name: str, dimensions: int) -> Numbers:
    """Value of a constant, read directly or through nodes that copy it.

    Raises:
        ValueError: If it is missing, not a constant, or has another number of dimensions.
    """
    array = find_node(nodes, _resolve(nodes, name)).array()
    if array.ndim != dimensions:
        raise ValueError(f"constant {name} is of shape {array.shape}; expected {dimensions} dimensions")
    return array


def find_node(nodes: Mapping[str, Node], name: str) -> Node:
    """Node of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in nodes:
        raise ValueError(f"it has no node {name}")
    return nodes[name]


def _resolve(nodes: Mapping[str, Node], name: str) -> str:
    """Follow nodes that only copy a value, back to the node that computes it."""
    while name in nodes and nodes[name].op in PASSED_THROUGH:
        (name, *_) = nodes[name].inputs
    return name


class _Planner:
    """Walk from the ends backwards; `steps` are then in the order in which they can run."""

    def __init__(self, nodes: Mapping[str, Node], start: str) -> None:
        self.nodes, self.start = nodes, start
        self.steps: dict[str, Step] = {}
        self._visited = set[str]()
        self._translate = {
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
        if name in self._visited:
            raise ValueError(f"node {name} needs its own result")
        self._visited.add(name)
        node = find_node(self.nodes, name)
        if node.op not in self._translate:
            raise ValueError(f"node {name} is a {node.op}; expected one of {', '.join(self._translate)}")
        inputs, module = self._translate[node.op](node)
        inputs = [_resolve(self.nodes, each) for each in inputs]
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
        return [x], Arithmetic(operator.sub if node.op == "Sub" else operator.mul, value)

    def _convolution(self, node: Node) -> tuple[list[str], nn.Module]:
        """Merge a ReLU, its normalisation and its convolution."""
        (normalised,) = self._inputs(node, 1)
        norm = self._required(normalised, "BatchNormWithGlobalNormalization")
        convolved, *constants = self._inputs(norm, 5)
        conv = self._required(convolved, "Conv2D")
        x, kernel = self._inputs(conv, 2)
        dilations = conv.attributes.get("dilations")
        if isinstance(dilations, list) and any(size != 1 for size in dilations):
            raise ValueError(f"node {conv.name} is dilated")
        weight = find_constant(self.nodes, kernel, dimensions=4).astype(np.float64)  # (H, W, C_in, C_out)
        mean, variance, beta, gamma = (
            find_constant(self.nodes, each, dimensions=1).astype(np.float64) for each in constants
        )
        if any(array.shape != weight.shape[3:] for array in (mean, variance, beta, gamma)):
            raise ValueError(f"node {norm.name} does not fit the {weight.shape[3]} channels of {conv.name}")
        epsilon = self._attribute(norm, "variance_epsilon")
        if not isinstance(epsilon, float):
            raise ValueError(f"node {norm.name} has variance_epsilon {epsilon!r}; expected a number")
        scale = 1 / np.sqrt(variance + epsilon)
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
        node = find_node(self.nodes, _resolve(self.nodes, name))
        if node.op != op:
            raise ValueError(f"node {node.name} is a {node.op}; expected a {op}")
        return node

    def _attribute(self, node: Node, name: str) -> Attribute:
        if node.attributes.get(name) is None:
            raise ValueError(f"node {node.name} has no attribute {name}")
        return node.attributes[name]

    def _spatial_pair(self, node: Node, name: str) -> Pair:
        """Read the two middle values of [1, down, across, 1]."""
        values = self._attribute(node, name)
        if not isinstance(values, list) or len(values) != 4 or (values[0], values[3]) != (1, 1):
            raise ValueError(f"node {node.name} has {name} {values!r}; expected [1, down, across, 1]")
        return values[1], values[2]

    def _window(self, node: Node, size: Sequence[int]) -> tuple[Pair, Pair]:
        """Read stride and padding of a window over pixels."""
        if (node.attributes.get("data_format") or b"NHWC") != b"NHWC":
            raise ValueError(f"node {node.name} does not have its channels last")
        stride, padding = self._spatial_pair(node, "strides"), self._attribute(node, "padding")
        if padding == b"VALID":
            return stride, (0, 0)
        if padding == b"SAME" and stride == (1, 1) and all(length % 2 for length in size):
            return stride, (size[0] // 2, size[1] // 2)
        raise ValueError(f"node {node.name} has unsupported padding ({padding!r}, stride {stride})")
