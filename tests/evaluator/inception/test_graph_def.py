"""The reader of frozen graphs: values of every kind, and files that are something else."""

import json
import random
import struct

import numpy as np
import pytest

from benchmarks.inception_graph import synthetic_graph
from evaluator.inception.graph_def import read_graph
from tests.golden_data import GOLDEN

TABLE = json.loads((GOLDEN / "evaluator" / "inception_layers.json").read_text())


def field(number, value):
    """A length-delimited field; the length's seven lower bits come first."""
    length = bytes([len(value)]) if len(value) < 128 else bytes([len(value) & 127 | 128, len(value) >> 7])
    return bytes([number << 3 | 2]) + length + value


def const(name, tensor):
    attribute = field(5, field(1, b"value") + field(2, field(8, tensor)))
    return field(1, field(1, name.encode()) + field(2, b"Const") + attribute)


def read(tmp_path, content):
    (tmp_path / "a.pb").write_bytes(content)
    return read_graph(tmp_path / "a.pb")


def shape(*sizes):
    return field(2, b"".join(field(2, bytes([8, size])) for size in sizes))


FLOAT, DOUBLE, INT32, INT64, STRING = (bytes([8, number]) for number in (1, 2, 3, 9, 7))


@pytest.mark.parametrize(
    ("tensor", "wanted"),
    [
        (FLOAT + shape(2) + field(4, struct.pack("<2f", 1.5, -2)), np.array([1.5, -2], np.float32)),
        (FLOAT + field(5, struct.pack("<f", 128)), np.array(128, np.float32)),
        (FLOAT + b"\x2d" + struct.pack("<f", 128), np.array(128, np.float32)),  # one value, not packed
        (FLOAT + shape(2, 3) + field(5, struct.pack("<2f", 1, 7)), np.array([[1, 7, 7], [7, 7, 7]], np.float32)),
        (DOUBLE + shape(1) + field(6, struct.pack("<d", 0.1)), np.array([0.1])),
        (INT32 + shape(2) + field(7, b"\xab\x02\xab\x02"), np.array([299, 299], np.int32)),
        (INT32 + b"\x38\x03", np.array(3, np.int32)),
        (INT64 + field(10, b"\xff" * 9 + b"\x01"), np.array(-1)),
        (FLOAT + shape(0), np.zeros(0, np.float32)),
    ],
)
def test_constants_in_every_notation(tmp_path, tensor, wanted):
    array = read(tmp_path, const("x", tensor))["x"].array()
    assert array.dtype == wanted.dtype and array.shape == wanted.shape
    assert np.array_equal(array, wanted)


def test_nodes_and_attributes(tmp_path):
    def attribute(key, value):
        return field(5, field(1, key) + field(2, value))

    node = field(1, b"mixed/conv") + field(2, b"Conv2D") + field(3, b"a:0") + field(3, b"^check") + field(3, b"b")
    node += attribute(b"strides", field(1, field(3, b"\x01\x02\x02\x01")))
    node += attribute(b"unpacked", field(1, b"\x18\x05\x18\x06"))
    node += attribute(b"padding", field(2, b"SAME"))
    node += attribute(b"epsilon", b"\x25" + struct.pack("<f", 0.5)) + attribute(b"flag", b"\x28\x00")
    node += attribute(b"shape", field(7, b"")) + attribute(b"nothing", b"")
    (found,) = read(tmp_path, field(1, node) + field(4, b"\x08\x08")).values()
    assert (found.name, found.op, found.inputs) == ("mixed/conv", "Conv2D", ("a", "b"))
    assert found.attributes == {
        "strides": [1, 2, 2, 1], "unpacked": [5, 6], "padding": b"SAME", "epsilon": 0.5,
        "flag": 0, "shape": None, "nothing": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (STRING + field(8, b"jpeg"), "constant x is of TensorFlow's dtype 7"),
        (FLOAT + shape(3) + field(4, bytes(8)), r"constant x has 2 numbers for the shape \(3,\)"),
        (FLOAT + shape(2), r"constant x has 0 numbers for the shape \(2,\)"),
        (FLOAT + shape(3) + field(4, bytes(7)), "buffer size"),
    ],
)
def test_constants_that_cannot_be_read(tmp_path, tensor, message):
    node = read(tmp_path, const("x", tensor))["x"]
    with pytest.raises(ValueError, match=message):
        node.array()


def test_only_constants_have_values(tmp_path):
    nodes = read(tmp_path, field(1, field(1, b"relu") + field(2, b"Relu")))
    with pytest.raises(ValueError, match="node relu is not a constant"):
        nodes["relu"].array()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no operation in it"),
        (b"<html>404 Not Found</html>", "damaged"),
        (b"\x0a", "ends inside a number"),
        (b"\x0a\x05abc", "a field of 5 bytes ends after the end"),
        (b"\x03\x00", "damaged .*(field number 0|unknown kind)"),
        (b"\xff" * 20, "a number without an end"),
        (b"\x10\x01", "no operation in it"),
        (field(1, b"\x08\x05"), "a number where bytes were expected"),
        (field(1, field(1, b"\xff\xfe")), "damaged"),
        (field(1, field(5, field(2, b""))), "damaged"),
    ],
)
def test_other_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"not a frozen TensorFlow graph.*{message}"):
        read(tmp_path, content)


def test_a_damaged_file_is_an_error_or_other_numbers_but_never_a_crash(tmp_path):
    whole = synthetic_graph(divisor=16)[:60_000]
    draw = random.Random(0)
    for _ in range(60):
        content = bytearray(whole[: draw.randrange(len(whole))])
        for _ in range(3):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            for node in read(tmp_path, bytes(content)).values():
                if node.op == "Const":
                    node.array()
        except ValueError:
            pass


# ----------------------------------------------------------------------------------------------------------------------
# The synthetic file against the table of the published one


@pytest.fixture(scope="module")
def full_width(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "full.pb"
    path.write_bytes(synthetic_graph())
    return read_graph(path)


def behind(nodes, name):
    while nodes[name].op in ("Identity", "CheckNumerics"):
        name = nodes[name].inputs[0]
    return name


def test_the_synthetic_graph_has_every_convolution_of_the_published_one(full_width):
    for entry in TABLE["convs"]:
        names = entry["nodes"]
        assert full_width[names["weight"]].array().shape == tuple(entry["kernel_hwio"])
        conv, norm = full_width[names["conv"]], full_width[names["bn"]]
        assert conv.op == "Conv2D" and behind(full_width, conv.inputs[0]) == entry["input"]
        assert conv.inputs[1] == names["weight"]
        assert conv.attributes["strides"] == [1, *entry["strides_hw"], 1]
        assert conv.attributes["padding"] == entry["padding"].encode()
        assert norm.op == "BatchNormWithGlobalNormalization"
        assert norm.inputs == tuple(names[part] for part in ("conv", "mean", "variance", "beta", "gamma"))
        assert norm.attributes["variance_epsilon"] == np.float32(TABLE["conv_block"]["bn_epsilon"])
        assert all(full_width[each].array().shape == (entry["kernel_hwio"][3],) for each in norm.inputs[1:])
        assert [full_width[names[part]].op for part in ("check", "ident", "relu")] == [
            "CheckNumerics", "Identity", "Relu"
        ]  # fmt: skip
    assert sum(node.op == "Conv2D" for node in full_width.values()) == len(TABLE["convs"]) == 94


def test_the_synthetic_graph_has_every_pool_and_join(full_width):
    for entry in TABLE["pools"]:
        node = full_width[entry["name"]]
        assert (node.op, behind(full_width, node.inputs[0])) == (entry["op"], entry["input"])
        assert node.attributes["ksize"] == [1, *entry["ksize"], 1]
        assert node.attributes["strides"] == [1, *entry["strides"], 1]
        assert node.attributes["padding"] == entry["padding"].encode()
    for entry in TABLE["joins"]:
        node = full_width[entry["name"]]
        assert (node.op, list(node.inputs)) == ("Concat", [entry["concat_dim_node"], *entry["inputs"]])
        assert full_width[entry["concat_dim_node"]].array() == entry["axis"]


def test_the_synthetic_graph_has_the_published_ends_and_number_of_parameters(full_width):
    for entry in TABLE["preprocessing"] + TABLE["head"]:
        if entry["name"].startswith(("DecodeJpeg", "Cast")):
            continue  # what decodes a file; the evaluator comes in behind it
        node = full_width[entry["name"]]
        assert node.op == entry["op"]
        if "value" in entry:
            assert node.array().tolist() == entry["value"]
        if "shape" in entry:
            assert node.array().shape == tuple(entry["shape"])
    numbers = [node.array() for node in full_width.values() if node.op == "Const"]
    assert sum(a.size for a in numbers if a.dtype == np.float32 and a.ndim) == TABLE["parameter_count"]


def test_the_same_seed_gives_the_same_file():
    options = {"divisor": 16, "scale_after_normalization": False}
    assert synthetic_graph(**options) == synthetic_graph(**options) != synthetic_graph(**options, seed=1)
