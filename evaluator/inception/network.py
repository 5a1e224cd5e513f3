"""The frozen Inception graph as a PyTorch network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evaluator.inception.backend import IMAGES, POOL, SOFTMAX_PRODUCT, SPATIAL, SPATIAL_CHANNELS, Features
from evaluator.inception.graph_def import Node, read_graph
from evaluator.inception.plan import find_constant, find_node, plan_steps
from evaluator.statistics import full_float32

PROBABILITY_ROWS = 4096  # at a time


class InceptionNetwork(nn.Module):
    """The part of a frozen graph that computes the features, and the classifier's weights; in evaluation mode.

    Args:
        nodes: Nodes of the graph by name.

    Raises:
        ValueError: If a node is missing or not supported.
    """

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        super().__init__()
        self.steps = plan_steps(nodes, IMAGES, (POOL, SPATIAL))
        self.layers = nn.ModuleList(step.module for step in self.steps)
        product = find_node(nodes, SOFTMAX_PRODUCT)
        if product.op != "MatMul" or len(product.inputs) != 2:
            raise ValueError(f"node {product.name} is not a product of two matrices")
        classifier = find_constant(nodes, product.inputs[1], dimensions=2)  # (D, classes)
        self.classifier = nn.Parameter(torch.from_numpy(classifier.astype(np.float32)))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """Compute features.

        Args:
            images: (N, H, W, 3) numbers in [0, 255], of any size.

        Returns:
            Pool (N, 2048) and spatial features (N, 2023), float32.
        """
        values = {IMAGES: images.float()}
        for step in self.steps:
            values[step.output] = step.module(*(values[name] for name in step.inputs))
            for name in step.unused:
                del values[name]
        # TensorFlow's order: channels last
        spatial = values[SPATIAL][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # (N, 17, 17, 7)
        return Features(values[POOL].flatten(start_dim=1), spatial.flatten(start_dim=1))

    @torch.no_grad()
    def features(self, images: npt.NDArray[np.uint8]) -> Features:
        """Compute features of (N, H, W, 3) uint8 images on the network's device, in full float32."""
        with full_float32():
            return self(torch.from_numpy(images).to(self.classifier.device))

    @torch.no_grad()
    def probabilities(self, pool: Tensor) -> Tensor:
        """Compute class probabilities (N, classes) from pool features (N, D), without the bias, in full float32."""
        with full_float32():
            parts = pool.to(self.classifier.device).split(PROBABILITY_ROWS)
            return torch.cat([(part @ self.classifier).softmax(dim=1) for part in parts])


def load_network(path: Path, device: torch.device | str = "cpu") -> InceptionNetwork:
    """Build the network of a frozen graph.

    Args:
        path: The `.pb` file.
        device: Device of the network.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is damaged, or not the Inception graph.
    """
    return InceptionNetwork(read_graph(path)).to(device)
