"""Graph file with the layers of the published one and random weights.

For tests and benchmarks, which must not depend on a download: nodes, shapes and operations are those of the published
graph (without `DecodeJpeg`, which the evaluation does not run), weights are random, and gamma is not 1. Scores made
with it mean nothing.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, and the node names of
inception-2015-12-05.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

PRODUCER = 8  # TensorFlow refuses BatchNormWithGlobalNormalization in graphs that say 9 or more
IMAGE_SIZE, NUM_CLASSES = 299, 1008
EPSILON = 0.001
Dtype = type[np.float32] | type[np.int32]


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
        entries = [_entry(key, value) for key, value in sorted(attributes.items())]
        texts = [_bytes(1, name.encode()), _bytes(2, op.encode()), *(_bytes(3, each.encode()) for each in inputs)]
        self._nodes.append(b"".join([*texts, *(_bytes(5, entry) for entry in entries)]))
        return name

    def constant(self, name: str, value: npt.ArrayLike, dtype: Dtype = np.float32) -> str:
        """Add a Const."""
        array: npt.NDArray[np.float32 | np.int32] = np.asarray(value, dtype)
        return self.add(name, "Const", dtype=_type(dtype), value=_bytes(8, _tensor(array)))

    def conv(
        self, scope: str, x: str, width: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, padding: str = "SAME"
    ) -> str:
        """Add the ten nodes of a convolution with normalisation and ReLU; return the ReLU's name, the scope."""
        width //= self.divisor
        channels = self.channels[x]
        filters = self.random.standard_normal((*kernel, channels, width)) * np.sqrt(2 / (channels * np.prod(kernel)))
        self.constant(f"{scope}/conv2d_params", filters)
        strides = _integers([1, stride, stride, 1])
        inputs = [x, f"{scope}/conv2d_params"]
        self.add(f"{scope}/Conv2D", "Conv2D", inputs, T=FLOAT, padding=_text(padding), strides=strides)
        norm = f"{scope}/batchnorm"
        self.constant(f"{norm}/beta", self.random.normal(0.1, 0.2, width))
        self.constant(f"{norm}/gamma", self.random.uniform(0.5, 1.5, width))
        self.constant(f"{norm}/moving_mean", self.random.normal(0, 0.3, width))
        self.constant(f"{norm}/moving_variance", self.random.uniform(0.5, 1.5, width))
        parts = [f"{scope}/Conv2D", *(f"{norm}/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma"))]
        scaled = _boolean(self.scale_after_normalization)
        self.add(
            norm, "BatchNormWithGlobalNormalization", parts,
            T=FLOAT, scale_after_normalization=scaled, variance_epsilon=_float(EPSILON),
        )  # fmt: skip
        self.checked(scope, norm)
        self.add(scope, "Relu", [f"{scope}/control_dependency"], T=FLOAT)
        self.channels[scope] = width
        return scope

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
        return self.add(name, "Concat", [f"{name}/concat_dim", *parts], N=_number(len(parts)), T=FLOAT)

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


def write_synthetic_graph(path: Path, divisor: int = 1, seed: int = 0) -> Path:
    """Write a `synthetic_graph` to a file and return its path."""
    path.write_bytes(synthetic_graph(divisor, seed))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The network


def _preprocessing(graph: Graph) -> None:
    graph.add("Cast", "Placeholder", dtype=FLOAT)
    graph.constant("ExpandDims/dim", 0, np.int32)
    graph.add("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], T=FLOAT)
    graph.constant("ResizeBilinear/size", [IMAGE_SIZE, IMAGE_SIZE], np.int32)
    resized = graph.add(
        "ResizeBilinear",
        "ResizeBilinear",
        ["ExpandDims", "ResizeBilinear/size"],
        T=FLOAT,
        align_corners=_boolean(False),
    )
    graph.constant("Sub/y", 128.0)
    graph.add("Sub", "Sub", [resized, "Sub/y"], T=FLOAT)
    graph.constant("Mul/y", 0.0078125)
    graph.add("Mul", "Mul", ["Sub", "Mul/y"], T=FLOAT)


def _stem(graph: Graph) -> str:
    x = graph.conv("conv", "Mul", 32, (3, 3), 2, "VALID")
    x = graph.conv("conv_1", x, 32, (3, 3), 1, "VALID")
    x = graph.conv("conv_2", x, 64, (3, 3))
    x = graph.pool("pool", "MaxPool", x, 3, 2, "VALID")
    x = graph.conv("conv_3", x, 80, (1, 1), 1, "VALID")
    x = graph.conv("conv_4", x, 192, (3, 3), 1, "VALID")
    return graph.pool("pool_1", "MaxPool", x, 3, 2, "VALID")


def _body(graph: Graph, x: str) -> str:
    for block, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        x = _block_of_35(graph, block, x, pooled)
    x = _reduction_to_17(graph, "mixed_3", x)
    for block, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        x = _block_of_17(graph, block, x, inner)
    x = _reduction_to_8(graph, "mixed_8", x)
    x = _block_of_8(graph, "mixed_9", x, "AvgPool")
    return _block_of_8(graph, "mixed_10", x, "MaxPool")  # so is the published graph


def _chain(graph: Graph, tower: str, x: str, *layers: tuple[int, tuple[int, int]]) -> str:
    """Add convolutions in sequence: conv, conv_1, ..., each (width, kernel)."""
    for number, (width, kernel) in enumerate(layers):
        x = graph.conv(f"{tower}/conv{f'_{number}' if number else ''}", x, width, kernel)
    return x


def _pooled(graph: Graph, block: str, x: str, width: int, op: str = "AvgPool") -> str:
    return graph.conv(f"{block}/tower_2/conv", graph.pool(f"{block}/tower_2/pool", op, x), width)


def _block_of_35(graph: Graph, block: str, x: str, pooled: int) -> str:
    parts = [
        graph.conv(f"{block}/conv", x, 64),
        _chain(graph, f"{block}/tower", x, (48, (1, 1)), (64, (5, 5))),
        _chain(graph, f"{block}/tower_1", x, (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        _pooled(graph, block, x, pooled),
    ]
    return graph.join(block, parts)


def _reduction_to_17(graph: Graph, block: str, x: str) -> str:
    straight = graph.conv(f"{block}/conv", x, 384, (3, 3), 2, "VALID")
    tower = _chain(graph, f"{block}/tower", x, (64, (1, 1)), (96, (3, 3)))
    tower = graph.conv(f"{block}/tower/conv_2", tower, 96, (3, 3), 2, "VALID")
    return graph.join(block, [straight, tower, graph.pool(f"{block}/pool", "MaxPool", x, 3, 2, "VALID")])


def _block_of_17(graph: Graph, block: str, x: str, inner: int) -> str:
    one, row, column = (1, 1), (1, 7), (7, 1)
    parts = [
        graph.conv(f"{block}/conv", x, 192),
        _chain(graph, f"{block}/tower", x, (inner, one), (inner, row), (192, column)),
        _chain(graph, f"{block}/tower_1", x, (inner, one), (inner, column), (inner, row), (inner, column), (192, row)),
        _pooled(graph, block, x, 192),
    ]
    return graph.join(block, parts)


def _reduction_to_8(graph: Graph, block: str, x: str) -> str:
    tower = _chain(graph, f"{block}/tower", x, (192, (1, 1)))
    tower = graph.conv(f"{block}/tower/conv_1", tower, 320, (3, 3), 2, "VALID")
    tower_1 = _chain(graph, f"{block}/tower_1", x, (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
    tower_1 = graph.conv(f"{block}/tower_1/conv_3", tower_1, 192, (3, 3), 2, "VALID")
    return graph.join(block, [tower, tower_1, graph.pool(f"{block}/pool", "MaxPool", x, 3, 2, "VALID")])


def _block_of_8(graph: Graph, block: str, x: str, pool: str) -> str:
    straight = graph.conv(f"{block}/conv", x, 320)
    tower = _chain(graph, f"{block}/tower", x, (384, (1, 1)))
    pair = [
        graph.conv(f"{block}/tower/mixed/conv", tower, 384, (1, 3)),
        graph.conv(f"{block}/tower/mixed/conv_1", tower, 384, (3, 1)),
    ]
    tower_1 = _chain(graph, f"{block}/tower_1", x, (448, (1, 1)), (384, (3, 3)))
    pair_1 = [
        graph.conv(f"{block}/tower_1/mixed/conv", tower_1, 384, (1, 3)),
        graph.conv(f"{block}/tower_1/mixed/conv_1", tower_1, 384, (3, 1)),
    ]
    return graph.join(block, [straight, *pair, *pair_1, _pooled(graph, block, x, 192, pool)])


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


def _entry(key: str, value: bytes) -> bytes:
    return _bytes(1, key.encode()) + _bytes(2, value)


def _number(value: int) -> bytes:
    return _key(3, 0) + _varint(value)


def _boolean(value: bool) -> bytes:
    return _key(5, 0) + _varint(value)


def _float(value: float) -> bytes:
    return _key(4, 5) + struct.pack("<f", value)


def _text(value: str) -> bytes:
    return _bytes(2, value.encode())


def _integers(values: Iterable[int]) -> bytes:
    return _bytes(1, _bytes(3, b"".join(map(_varint, values))))


def _type(dtype: Dtype) -> bytes:
    return _key(6, 0) + _varint({np.float32: 1, np.int32: 3}[dtype])


def _tensor(array: npt.NDArray[np.float32 | np.int32]) -> bytes:
    shape = b"".join(_bytes(2, _key(1, 0) + _varint(size)) for size in array.shape)
    number = {"float32": 1, "int32": 3}[array.dtype.name]
    return _key(1, 0) + _varint(number) + _bytes(2, shape) + _bytes(4, array.tobytes())


FLOAT = _type(np.float32)
