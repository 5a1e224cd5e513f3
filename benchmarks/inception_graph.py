"""Graph file with the layers of the published one and random weights.

For tests and benchmarks, which must not depend on a download: nodes, shapes and operations are those of the published
graph (without `DecodeJpeg`, which the evaluation does not run), weights are random, and gamma is not 1. Scores made
with it mean nothing.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, and the node names of
inception-2015-12-05.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PRODUCER = 8  # TensorFlow refuses BatchNormWithGlobalNormalization in graphs that say 9 or more
IMAGE_SIZE, NUM_CLASSES = 299, 1008
EPSILON = 0.001
DTYPES = {"float32": 1, "int32": 3}  # TensorFlow's numbers
Dtype = type[np.float32] | type[np.int32]


class Layer(NamedTuple):
    """Convolution of a given width, kernel, stride and padding."""

    width: int
    height: int = 1
    breadth: int = 1
    stride: int = 1
    padding: str = "SAME"


class Graph:
    """Builder of a GraphDef.

    Args:
        seed: Seed of the weights.
        divisor: Divisor of all numbers of channels but those of images and classes; 1 is the published width.
        scale_after_normalization: Use gamma.
    """

    def __init__(self, seed: int, divisor: int, scale_after_normalization: bool) -> None:
        self.random = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
        self.divisor, self.scale_after_normalization = divisor, scale_after_normalization
        self.channels = {"Mul": 3}  # of each output
        self._nodes: list[bytes] = []

    def add(self, name: str, op: str, inputs: Sequence[str] = (), **attributes: bytes) -> str:
        """Add a node and return its name; attributes are encoded AttrValues."""
        entries = [_bytes(1, key.encode()) + _bytes(2, value) for key, value in sorted(attributes.items())]
        texts = [_bytes(1, name.encode()), _bytes(2, op.encode()), *(_bytes(3, each.encode()) for each in inputs)]
        self._nodes.append(b"".join([*texts, *(_bytes(5, entry) for entry in entries)]))
        return name

    def constant(self, name: str, value: npt.ArrayLike, dtype: Dtype = np.float32) -> str:
        """Add a Const."""
        array: npt.NDArray[np.float32 | np.int32] = np.asarray(value, dtype)
        return self.add(name, "Const", dtype=_type(dtype), value=_bytes(8, _tensor(array)))

    def conv(self, scope: str, x: str, layer: Layer) -> str:
        """Add the ten nodes of a convolution with normalisation and ReLU; return the ReLU's name, the scope."""
        width, channels = layer.width // self.divisor, self.channels[x]
        kernel = (layer.height, layer.breadth)
        filters = self.random.standard_normal((*kernel, channels, width)) * np.sqrt(2 / (channels * np.prod(kernel)))
        self.constant(f"{scope}/conv2d_params", filters)
        strides = _integers([1, layer.stride, layer.stride, 1])
        inputs = [x, f"{scope}/conv2d_params"]
        self.add(f"{scope}/Conv2D", "Conv2D", inputs, T=FLOAT, padding=_text(layer.padding), strides=strides)
        norm = f"{scope}/batchnorm"
        self.constant(f"{norm}/beta", self.random.normal(0.1, 0.2, width))
        self.constant(f"{norm}/gamma", self.random.uniform(0.5, 1.5, width))
        self.constant(f"{norm}/moving_mean", self.random.normal(0, 0.3, width))
        self.constant(f"{norm}/moving_variance", self.random.uniform(0.5, 1.5, width))
        parts = [f"{scope}/Conv2D", *(f"{norm}/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma"))]
        settings = {
            "scale_after_normalization": _boolean(self.scale_after_normalization),
            "variance_epsilon": _key(4, 5) + struct.pack("<f", EPSILON),
        }
        self.add(norm, "BatchNormWithGlobalNormalization", parts, T=FLOAT, **settings)
        self.checked(scope, norm)
        self.add(scope, "Relu", [f"{scope}/control_dependency"], T=FLOAT)
        self.channels[scope] = width
        return scope

    def chain(self, tower: str, x: str, layers: Sequence[Layer]) -> str:
        """Add convolutions in sequence: conv, conv_1, ..."""
        for number, layer in enumerate(layers):
            x = self.conv(f"{tower}/conv{f'_{number}' if number else ''}", x, layer)
        return x

    def checked(self, scope: str, x: str) -> str:
        """Add the two nodes that check for NaN."""
        self.add(f"{scope}/CheckNumerics", "CheckNumerics", [x], T=FLOAT, message=_text(f"{scope}: not finite"))
        return self.add(f"{scope}/control_dependency", "Identity", [x, f"^{scope}/CheckNumerics"], T=FLOAT)

    def pool(self, name: str, op: str, x: str, size: int = 3, stride: int = 1, padding: str = "SAME") -> str:
        """Add a MaxPool or AvgPool."""
        self.channels[name] = self.channels[x]
        sizes = {"ksize": _integers([1, size, size, 1]), "strides": _integers([1, stride, stride, 1])}
        return self.add(name, op, [self.checked(name, x)], T=FLOAT, padding=_text(padding), **sizes)

    def join(self, block: str, parts: Sequence[str]) -> str:
        """Add a Concat of channels."""
        name = f"{block}/join"
        self.channels[name] = sum(self.channels[part] for part in parts)
        self.constant(f"{name}/concat_dim", 3, np.int32)
        return self.add(name, "Concat", [f"{name}/concat_dim", *parts], N=_key(3, 0) + _varint(len(parts)), T=FLOAT)

    def encode(self) -> bytes:
        """Encode the file."""
        return b"".join([*(_bytes(1, node) for node in self._nodes), _bytes(4, _key(1, 0) + _varint(PRODUCER))])


def synthetic_graph(divisor: int = 1, seed: int = 0, scale_after_normalization: bool = True) -> bytes:
    """Make a graph.

    Args:
        divisor: Divisor of the published numbers of channels; 1, 2, 4, 8 or 16.
        seed: Seed of the weights.
        scale_after_normalization: Use gamma.

    Returns:
        The bytes of a `.pb` file: 95.7 MB for divisor 1, 1.7 MB for 8.
    """
    graph = Graph(seed, divisor, scale_after_normalization)
    _preprocessing(graph)
    _head(graph, _body(graph, _stem(graph)))
    return graph.encode()


# ----------------------------------------------------------------------------------------------------------------------
# The network


def _preprocessing(graph: Graph) -> None:
    graph.add("Cast", "Placeholder", dtype=FLOAT)
    graph.constant("ExpandDims/dim", 0, np.int32)
    graph.add("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], T=FLOAT)
    graph.constant("ResizeBilinear/size", [IMAGE_SIZE, IMAGE_SIZE], np.int32)
    inputs = ["ExpandDims", "ResizeBilinear/size"]
    graph.add("ResizeBilinear", "ResizeBilinear", inputs, T=FLOAT, align_corners=_boolean(False))
    graph.constant("Sub/y", 128.0)
    graph.add("Sub", "Sub", ["ResizeBilinear", "Sub/y"], T=FLOAT)
    graph.constant("Mul/y", 0.0078125)
    graph.add("Mul", "Mul", ["Sub", "Mul/y"], T=FLOAT)


def _stem(graph: Graph) -> str:
    x = graph.conv("conv", "Mul", Layer(32, 3, 3, 2, "VALID"))
    x = graph.conv("conv_1", x, Layer(32, 3, 3, 1, "VALID"))
    x = graph.conv("conv_2", x, Layer(64, 3, 3))
    x = graph.pool("pool", "MaxPool", x, 3, 2, "VALID")
    x = graph.conv("conv_3", x, Layer(80, 1, 1, 1, "VALID"))
    x = graph.conv("conv_4", x, Layer(192, 3, 3, 1, "VALID"))
    return graph.pool("pool_1", "MaxPool", x, 3, 2, "VALID")


def _body(graph: Graph, x: str) -> str:
    for block, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        towers = {
            "": [Layer(64)],
            "/tower": [Layer(48), Layer(64, 5, 5)],
            "/tower_1": [Layer(64), Layer(96, 3, 3), Layer(96, 3, 3)],
        }
        x = _block(graph, block, x, towers, pooled)
    reduction = {
        "": [Layer(384, 3, 3, 2, "VALID")],
        "/tower": [Layer(64), Layer(96, 3, 3), Layer(96, 3, 3, 2, "VALID")],
    }
    x = _block(graph, "mixed_3", x, reduction)
    for block, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        one, row, column = Layer(inner), Layer(inner, 1, 7), Layer(inner, 7, 1)
        towers = {
            "": [Layer(192)],
            "/tower": [one, row, Layer(192, 7, 1)],
            "/tower_1": [one, column, row, column, Layer(192, 1, 7)],
        }
        x = _block(graph, block, x, towers, pooled=192)
    reduction = {
        "/tower": [Layer(192), Layer(320, 3, 3, 2, "VALID")],
        "/tower_1": [Layer(192), Layer(192, 1, 7), Layer(192, 7, 1), Layer(192, 3, 3, 2, "VALID")],
    }
    x = _block(graph, "mixed_8", x, reduction)
    forked = {"": [Layer(320)], "/tower": [Layer(384)], "/tower_1": [Layer(448), Layer(384, 3, 3)]}
    x = _block(graph, "mixed_9", x, forked, pooled=192, fork=True)
    return _block(graph, "mixed_10", x, forked, pooled=192, pool="MaxPool", fork=True)  # so is the published graph


def _block(
    graph: Graph,
    block: str,
    x: str,
    towers: Mapping[str, Sequence[Layer]],
    pooled: int | None = None,
    pool: str = "AvgPool",
    fork: bool = False,
) -> str:
    """Concatenate towers of convolutions and one of a pool, which halves the resolution unless `pooled` is its width.

    With `fork`, all towers but the first end in two parallel convolutions.
    """
    parts: list[str] = []
    for suffix, layers in towers.items():
        end = graph.chain(block + suffix, x, layers)
        if fork and suffix:
            parts.append(graph.conv(f"{block}{suffix}/mixed/conv", end, Layer(384, 1, 3)))
            parts.append(graph.conv(f"{block}{suffix}/mixed/conv_1", end, Layer(384, 3, 1)))
        else:
            parts.append(end)
    if pooled is None:
        parts.append(graph.pool(f"{block}/pool", "MaxPool", x, 3, 2, "VALID"))
    else:
        parts.append(graph.conv(f"{block}/tower_2/conv", graph.pool(f"{block}/tower_2/pool", pool, x), Layer(pooled)))
    return graph.join(block, parts)


def _head(graph: Graph, x: str) -> None:
    pool = graph.pool("pool_3", "AvgPool", x, 8, 1, "VALID")
    width = graph.channels[pool]
    graph.constant("pool_3/_reshape/shape", [1, width], np.int32)
    graph.add("pool_3/_reshape", "Reshape", [pool, "pool_3/_reshape/shape"], T=FLOAT)
    graph.constant("softmax/weights", graph.random.standard_normal((width, NUM_CLASSES)) * (0.2 / np.sqrt(width)))
    graph.add("softmax/logits/MatMul", "MatMul", ["pool_3/_reshape", "softmax/weights"], T=FLOAT)
    graph.constant("softmax/biases", graph.random.standard_normal(NUM_CLASSES))
    graph.add("softmax/logits", "BiasAdd", ["softmax/logits/MatMul", "softmax/biases"], T=FLOAT)
    graph.add("softmax", "Softmax", ["softmax/logits"], T=FLOAT)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, 2) + _varint(len(value)) + value


def _boolean(value: bool) -> bytes:
    return _key(5, 0) + _varint(value)


def _text(value: str) -> bytes:
    return _bytes(2, value.encode())


def _integers(values: Iterable[int]) -> bytes:
    return _bytes(1, _bytes(3, b"".join(map(_varint, values))))


def _type(dtype: Dtype) -> bytes:
    return _key(6, 0) + _varint(DTYPES[dtype.__name__])


def _tensor(array: npt.NDArray[np.float32 | np.int32]) -> bytes:
    shape = b"".join(_bytes(2, _key(1, 0) + _varint(size)) for size in array.shape)
    return _key(1, 0) + _varint(DTYPES[array.dtype.name]) + _bytes(2, shape) + _bytes(4, array.tobytes())


FLOAT = _type(np.float32)
