"""Reader of frozen TensorFlow graphs that does not need TensorFlow.

A `.pb` file is one protocol buffer message, GraphDef. Only the part of the wire format that such files use is here: a
field is a key (number and kind), then a varint, four or eight bytes, or a length and that many bytes. Tensors stay
views of the file's bytes until they are read.

Sources: Protocol Buffers, "Encoding"; TensorFlow's graph.proto, node_def.proto, attr_value.proto, tensor.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of fields

# TensorFlow's number of a dtype -> NumPy's name, and the field of TensorProto that holds short tensors of it
DTYPES = {1: ("<f4", 5), 2: ("<f8", 6), 3: ("<i4", 7), 9: ("<i8", 10)}

Field = int | memoryview  # value of a field
Attribute = int | float | bytes | list[int] | memoryview | None  # a memoryview is a tensor that was not read yet
Numbers = npt.NDArray[np.floating | np.integer]


@dataclass(frozen=True)
class Node:
    """One operation of a graph.

    Attributes:
        name: Unique name, such as "mixed_6/conv".
        op: Kind of operation, such as "Conv2D".
        inputs: Names of the nodes that it reads, without order-only ("control") inputs.
        attributes: Attributes by name.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def array(self) -> Numbers:
        """Read the value of a constant.

        Raises:
            ValueError: If this is not a constant, or its dtype is not supported.
        """
        tensor = self.attributes.get("value")
        if self.op != "Const" or not isinstance(tensor, memoryview):
            raise ValueError(f"node {self.name} is not a constant")
        return _read_tensor(tensor, self.name)


def read_graph(path: Path) -> dict[str, Node]:
    """Read the nodes of a frozen graph, in the order of the file.

    Args:
        path: Path of a `.pb` file.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is damaged or something else.
    """
    try:
        nodes = [_read_node(value) for number, value in _fields(memoryview(path.read_bytes())) if number == 1]
    except (ValueError, KeyError, struct.error) as error:
        raise ValueError(f"not a frozen TensorFlow graph, or damaged ({error})") from error
    if not nodes:
        raise ValueError("not a frozen TensorFlow graph: no operation in it")
    return {node.name: node for node in nodes}


def _fields(message: Field) -> Iterator[tuple[int, Field]]:
    """Yield the number and value of each field: an int, or the bytes."""
    message = _bytes(message)
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {position}")
        if kind == VARINT:
            value, position = _read_varint(message, position)
            yield number, value
            continue
        if kind == BYTES:
            length, position = _read_varint(message, position)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"unknown kind of field, {kind}, at byte {position}")
        if position + length > len(message):
            raise ValueError(f"a field of {length:,} bytes ends after the end")
        yield number, message[position : position + length]
        position += length


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Read seven bits per byte, lowest first, until the eighth is 0; return the number and the next position."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it ends inside a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number without an end at byte {position}")


def _repeated(message: Field) -> dict[int, list[Field]]:
    """Collect the values of each field by its number, in the order of the message."""
    values: dict[int, list[Field]] = {}
    for number, value in _fields(message):
        values.setdefault(number, []).append(value)
    return values


def _read_node(message: Field) -> Node:
    parts = _repeated(message)
    name, op = (_text(parts.get(number, [memoryview(b"")])[-1]) for number in (1, 2))
    inputs = [_text(value) for value in parts.get(3, [])]
    entries = [dict(_fields(value)) for value in parts.get(5, [])]
    attributes = {_text(entry[1]): _read_attribute(entry.get(2, memoryview(b""))) for entry in entries}
    return Node(name, op, tuple(text.split(":")[0] for text in inputs if not text.startswith("^")), attributes)


def _bytes(value: Field) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes were expected")
    return value


def _text(value: Field) -> str:
    return str(_bytes(value), "utf-8")


def _read_attribute(message: Field) -> Attribute:
    """Read an AttrValue; None for kinds that are not supported."""
    for number, value in _fields(message):
        if number == 1:
            return _read_integers(value, field=3)
        if number == 2:
            return bytes(_bytes(value))
        if number == 4:
            (number_32,) = struct.unpack("<f", _bytes(value))
            return float(number_32)
        if number in (3, 5, 6, 8):
            return value
    return None


def _read_integers(message: Field, field: int) -> list[int]:
    """Read all values of a repeated field of integers, packed into bytes or one by one."""
    integers: list[int] = []
    for value in _repeated(message).get(field, []):
        if isinstance(value, int):
            integers.append(value)
            continue
        position = 0
        while position < len(value):
            integer, position = _read_varint(value, position)
            integers.append(integer)
    return [integer - (1 << 64) if integer >= 1 << 63 else integer for integer in integers]


def _read_tensor(message: memoryview, name: str) -> Numbers:
    """Read a TensorProto: all bytes in one field, or a short list with its last value repeated."""
    parts = _repeated(message)
    dtype = parts.get(1, [0])[-1]
    if not isinstance(dtype, int) or dtype not in DTYPES:
        raise ValueError(f"constant {name} is of TensorFlow's dtype {dtype}; expected one of {sorted(DTYPES)}")
    numpy_dtype, short_field = DTYPES[dtype]
    shape = parts.get(2, [memoryview(b"")])[-1]
    sizes = [[0, *_read_integers(size, field=1)][-1] for number, size in _fields(shape) if number == 2]
    count = math.prod(sizes)
    if 4 in parts and len(content := _bytes(parts[4][-1])):
        values = np.frombuffer(content, numpy_dtype)
    else:
        if numpy_dtype.startswith("<i"):
            values = np.array(_read_integers(message, short_field), numpy_dtype)
        else:
            values = np.frombuffer(b"".join(map(_bytes, parts.get(short_field, []))), numpy_dtype)
        if 1 <= len(values) < count:
            values = np.concatenate([values, np.full(count - len(values), values[-1])])
    if len(values) != count:
        raise ValueError(f"constant {name} has {len(values):,} numbers for the shape {tuple(sizes)}")
    return values.reshape(sizes)
