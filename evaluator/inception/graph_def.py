"""Frozen TensorFlow graphs, read without TensorFlow.

A `.pb` file is one protocol buffer message, GraphDef. Of the wire format only what such a file uses is here: fields are
a key (number and kind), then a varint, four or eight bytes, or a length and that many bytes. Tensors stay views of the
file's bytes until somebody asks for them.

Sources: Protocol Buffers, "Encoding"; TensorFlow's graph.proto, node_def.proto, attr_value.proto, tensor.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of fields

# TensorFlow's number of a dtype -> NumPy's name, and the field of TensorProto that holds short tensors of it
DTYPES = {1: ("<f4", 5), 2: ("<f8", 6), 3: ("<i4", 7), 9: ("<i8", 10)}


@dataclass(frozen=True)
class Node:
    """One operation of a graph.

    Attributes:
        name: unique, such as "mixed_6/conv".
        op: kind of operation, such as "Conv2D".
        inputs: names of the nodes it reads; order-only ("control") inputs are left out.
        attributes: numbers, bytes, lists of whole numbers, or tensors still to be read, by name.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def array(self) -> npt.NDArray[Any]:
        """The value of a constant, read-only.

        Raises:
            ValueError: if this is no constant, or its numbers are of a dtype no such graph needs.
        """
        tensor = self.attributes.get("value")
        if self.op != "Const" or not isinstance(tensor, memoryview):
            raise ValueError(f"node {self.name} is no constant")
        return _read_tensor(tensor, self.name)


def read_graph(path: Path) -> dict[str, Node]:
    """Reads the nodes of a frozen graph, in the order of the file.

    Args:
        path: a `.pb` file.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is damaged or something else.
    """
    try:
        nodes = [_read_node(value) for number, value in _fields(memoryview(path.read_bytes())) if number == 1]
    except (ValueError, KeyError, struct.error) as error:
        raise ValueError(f"not a frozen TensorFlow graph, or damaged ({error})") from error
    if not nodes:
        raise ValueError("not a frozen TensorFlow graph: no operation in it")
    return {node.name: node for node in nodes}


def _fields(message: int | memoryview) -> Iterator[tuple[int, Any]]:
    """Yields the number and raw value of each field: an int, or the bytes."""
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
            raise ValueError(f"a field of {length:,} bytes ends behind the end")
        yield number, message[position : position + length]
        position += length


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first, the eighth says that more follow; returns the number and the next position."""
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


def _read_node(message: memoryview) -> Node:
    name, op = "", ""
    inputs: list[str] = []
    attributes: dict[str, Any] = {}
    for number, value in _fields(message):
        if number == 1:
            name = _text(value)
        elif number == 2:
            op = _text(value)
        elif number == 3:
            inputs.append(_text(value))
        elif number == 5:
            entry = dict(_fields(value))
            attributes[_text(entry[1])] = _read_attribute(entry.get(2, memoryview(b"")))
    data_inputs = tuple(text.split(":")[0] for text in inputs if not text.startswith("^"))
    return Node(name, op, data_inputs, attributes)


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes were expected")
    return value


def _text(value: int | memoryview) -> str:
    return str(_bytes(value), "utf-8")


def _read_attribute(message: memoryview) -> Any:
    """An AttrValue: bytes, a number, a list of whole numbers, or the bytes of a tensor; None for the other kinds."""
    for number, value in _fields(message):
        if number == 1:
            return _read_integers(value, field=3)
        if number == 2:
            return bytes(_bytes(value))
        if number == 4:
            return struct.unpack("<f", _bytes(value))[0]
        if number in (3, 5, 6, 8):
            return value
    return None


def _read_integers(message: memoryview, field: int) -> list[int]:
    """All values of a repeated field of integers, packed into one run of bytes or one by one."""
    found: list[int] = []
    for number, value in _fields(message):
        if number == field and isinstance(value, int):
            found.append(_signed(value))
        elif number == field:
            position = 0
            while position < len(value):
                integer, position = _read_varint(value, position)
                found.append(_signed(integer))
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _read_tensor(message: memoryview, name: str) -> npt.NDArray[Any]:
    """A TensorProto as an array: all its bytes in one run, or a short list whose last value fills the rest."""
    parts: dict[int, list[Any]] = {}
    for number, value in _fields(message):
        parts.setdefault(number, []).append(value)
    dtype = parts.get(1, [0])[-1]
    if dtype not in DTYPES:
        raise ValueError(f"constant {name} is of TensorFlow's dtype {dtype}; expected one of {sorted(DTYPES)}")
    numpy_dtype, short_field = DTYPES[dtype]
    shape = parts.get(2, [memoryview(b"")])[-1]
    sizes = [_signed(dict(_fields(size)).get(1, 0)) for number, size in _fields(shape) if number == 2]
    count = math.prod(sizes)
    if 4 in parts and len(parts[4][-1]):
        values = np.frombuffer(parts[4][-1], numpy_dtype)
    else:
        if numpy_dtype.startswith("<i"):
            values = np.array(_read_integers(message, short_field), numpy_dtype)
        else:
            values = np.frombuffer(b"".join(parts.get(short_field, [])), numpy_dtype)
        if 1 <= len(values) < count:
            values = np.concatenate([values, np.full(count - len(values), values[-1])])
    if len(values) != count:
        raise ValueError(f"constant {name} has {len(values):,} numbers for the shape {tuple(sizes)}")
    return values.reshape(sizes)
