"""TensorFlow runs the graph as ADM does; the PyTorch network must give its features.

The graph is built here with TensorFlow, from a table of the published one's nodes, shapes and operations. What that
cannot show: that the table is right in every detail. The network follows the file's own wiring, though, and refuses
what it does not know.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.inception_graph import synthetic_graph
from evaluator.inception.network import load_network
from evaluator.inception.tensorflow_backend import TensorFlowBackend
from runtime.errors import UserError
from tests.golden_data import GOLDEN, relative_error
from tests.inception_files import MISTAKES, NARROW, RECORDED, make_images, write_graph, write_npz
from tests.processes import ROOT

pytestmark = pytest.mark.tf

TABLE = json.loads((GOLDEN / "evaluator" / "inception_layers.json").read_text())
TOLERANCE = 1e-4  # of the largest feature
SIZES = [(64, 64), (32, 48), (299, 299), (300, 200), (512, 512)]
FORBIDDEN = ("triton", "torchvision", "timm", "diffusers")


class GraphFromTable:
    """Builds a GraphDef with TensorFlow's own classes.

    Args:
        divisor: of the number of channels.
        scaled: whether gamma counts.
    """

    def __init__(self, divisor: int, scaled: bool) -> None:
        import tensorflow.compat.v1 as tf

        self.tf, self.divisor, self.scaled = tf, divisor, scaled
        self.random = np.random.RandomState(7)
        self.graph = tf.GraphDef()
        self.graph.versions.producer = TABLE["graphdef_versions"]["producer_must_be_below"] - 1

    def node(self, name, op, inputs=(), **attributes):
        node = self.graph.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            node.attr[key].CopyFrom(value)

    def value(self, **kind):
        return self.tf.AttrValue(**kind)

    def ints(self, values):
        return self.value(list=self.tf.AttrValue.ListValue(i=values))

    @property
    def float_type(self):
        return self.value(type=self.tf.float32.as_datatype_enum)

    def constant(self, name, value, dtype=np.float32):
        tensor = self.tf.make_tensor_proto(np.asarray(value, dtype))
        self.node(name, "Const", dtype=self.value(type=tensor.dtype), value=self.value(tensor=tensor))

    def build(self):
        self.preprocessing()
        for step in TABLE["execution_order"]:
            getattr(self, step["kind"])(TABLE[f"{step['kind']}s"][step["index"]])
        self.head()
        return self.graph.SerializeToString()

    def preprocessing(self):
        types = {"T": self.float_type}
        self.node("Cast", "Placeholder", dtype=self.float_type)
        for entry in TABLE["preprocessing"]:
            name, op = entry["name"], entry["op"]
            if op == "Const" and "value" in entry:
                whole = name in ("ExpandDims/dim", "ResizeBilinear/size")
                self.constant(name, entry["value"], np.int32 if whole else np.float32)
            elif op == "ExpandDims":
                self.node(name, op, ["Cast", "ExpandDims/dim"], **types)
            elif op == "ResizeBilinear":
                flag = self.value(b=entry["align_corners"])
                self.node(name, op, ["ExpandDims", "ResizeBilinear/size"], align_corners=flag, **types)
            elif op in ("Sub", "Mul"):
                self.node(name, op, [{"Sub": "ResizeBilinear", "Mul": "Sub"}[op], f"{name}/y"], **types)

    def conv(self, entry):
        nodes = entry["nodes"]
        height, width, channels, out = entry["kernel_hwio"]
        channels, out = (channels if entry["input"] == "Mul" else channels // self.divisor), out // self.divisor
        scale = np.sqrt(2 / (height * width * channels))
        self.constant(nodes["weight"], self.random.standard_normal((height, width, channels, out)) * scale)
        shared = {"T": self.float_type}
        strides = self.ints([1, *entry["strides_hw"], 1])
        padding = self.value(s=entry["padding"].encode())
        self.node(
            nodes["conv"], "Conv2D", [entry["input"], nodes["weight"]], strides=strides, padding=padding, **shared
        )
        self.constant(nodes["beta"], self.random.normal(0.1, 0.2, out))
        self.constant(nodes["gamma"], self.random.uniform(0.5, 1.5, out))
        self.constant(nodes["mean"], self.random.normal(0, 0.3, out))
        self.constant(nodes["variance"], self.random.uniform(0.5, 1.5, out))
        self.node(
            nodes["bn"],
            "BatchNormWithGlobalNormalization",
            [nodes[part] for part in ("conv", "mean", "variance", "beta", "gamma")],
            variance_epsilon=self.value(f=TABLE["conv_block"]["bn_epsilon"]),
            scale_after_normalization=self.value(b=self.scaled),
            **shared,
        )
        self.node(nodes["check"], "CheckNumerics", [nodes["bn"]], message=self.value(s=b"not finite"), **shared)
        self.node(nodes["ident"], "Identity", [nodes["bn"], f"^{nodes['check']}"], **shared)
        self.node(nodes["relu"], "Relu", [nodes["ident"]], **shared)

    def pool(self, entry):
        sizes = {"ksize": self.ints([1, *entry["ksize"], 1]), "strides": self.ints([1, *entry["strides"], 1])}
        padding = self.value(s=entry["padding"].encode())
        self.node(entry["name"], entry["op"], [entry["input"]], T=self.float_type, padding=padding, **sizes)

    def join(self, entry):
        self.constant(entry["concat_dim_node"], entry["axis"], np.int32)
        inputs = [entry["concat_dim_node"], *entry["inputs"]]
        self.node(entry["name"], "Concat", inputs, T=self.float_type, N=self.value(i=len(entry["inputs"])))

    def head(self):
        width, classes = next(entry["shape"] for entry in TABLE["head"] if entry["name"] == "softmax/weights")
        width //= self.divisor
        self.constant("pool_3/_reshape/shape", [1, width], np.int32)
        self.node("pool_3/_reshape", "Reshape", ["pool_3", "pool_3/_reshape/shape"], T=self.float_type)
        self.constant("softmax/weights", self.random.standard_normal((width, classes)) * 0.2 / np.sqrt(width))
        self.node("softmax/logits/MatMul", "MatMul", ["pool_3/_reshape", "softmax/weights"], T=self.float_type)
        self.constant("softmax/biases", self.random.standard_normal(classes))
        self.node("softmax/logits", "BiasAdd", ["softmax/logits/MatMul", "softmax/biases"], T=self.float_type)
        self.node("softmax", "Softmax", ["softmax/logits"], T=self.float_type)


@pytest.fixture(scope="module", params=[True, False], ids=["gamma counts", "gamma is ignored"])
def table_graph(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "table.pb"
    path.write_bytes(GraphFromTable(NARROW, scaled=request.param).build())
    return path


def errors(found, wanted):
    return {name: relative_error(getattr(found, name), getattr(wanted, name)) for name in ("pool", "spatial")}


def assert_backends_agree(path, sizes):
    ours, theirs = load_network(path), TensorFlowBackend(path)
    for size in sizes:
        images = make_images(2, size)
        found, wanted = ours.features(images), theirs.features(images)
        assert found.spatial.shape == (2, 17 * 17 * 7)
        assert max(errors(found, wanted).values()) <= TOLERANCE
        probabilities = theirs.probabilities(wanted.pool)
        assert relative_error(ours.probabilities(wanted.pool), probabilities) <= TOLERANCE


def test_both_backends_agree_on_a_graph_made_by_tensorflow(table_graph):
    assert_backends_agree(table_graph, SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, False])
def test_both_backends_agree_at_full_width(tmp_path, scaled):
    path = tmp_path / "full.pb"
    path.write_bytes(GraphFromTable(1, scaled).build())
    assert_backends_agree(path, [(64, 64), (256, 256), (300, 200)])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show(table_graph, name, monkeypatch):
    spoil, shown_in = MISTAKES[name]
    network, images = load_network(table_graph), make_images(2, (300, 200))
    wanted = TensorFlowBackend(table_graph).features(images)
    spoil(network, monkeypatch)
    found = errors(network.features(images), wanted)
    assert all(found[kind] > 10 * TOLERANCE for kind in shown_in), found


def test_a_batch_may_have_any_number_of_images(table_graph):
    backend, images = TensorFlowBackend(table_graph), make_images(5)
    together = backend.features(images)
    apart = [backend.features(images[i : i + 1]) for i in range(5)]
    assert relative_error(torch.cat([each.pool for each in apart]), together.pool) < 1e-5


def test_the_synthetic_graph_is_the_same_kind_of_file(graph):
    import tensorflow.compat.v1 as tf

    by_table = tf.GraphDef.FromString(GraphFromTable(NARROW, scaled=True).build())
    synthetic = tf.GraphDef.FromString(graph.read_bytes())
    assert synthetic.versions.producer == by_table.versions.producer
    made = {node.name: node for node in synthetic.node}
    for node in by_table.node:
        other = made[node.name]
        assert (other.op, dict(other.attr).keys()) == (node.op, dict(node.attr).keys()), node.name
        for key, value in node.attr.items():
            if key == "value":  # random numbers, of the same shape
                assert other.attr[key].tensor.tensor_shape == value.tensor.tensor_shape, node.name
                assert other.attr[key].tensor.dtype == value.tensor.dtype, node.name
            elif key != "message":
                assert other.attr[key] == value, (node.name, key)
    behind = {name: node.input[0] for name, node in made.items() if node.op in ("Identity", "CheckNumerics")}
    for node in by_table.node:  # the synthetic one has checks before pools too
        assert [behind.get(each, each) for each in made[node.name].input if not each.startswith("^")] == [
            behind.get(each, each) for each in node.input if not each.startswith("^")
        ], node.name


def test_recorded_features_are_tensorflow_s(graph):
    with np.load(RECORDED) as recorded:
        found = TensorFlowBackend(graph).features(make_images(3, (300, 200)))
        for name, limit in (("pool", 1e-5), ("spatial", 1e-5)):
            assert relative_error(getattr(found, name), torch.from_numpy(recorded[name])) < limit


def evaluate(folder, *argv):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    program = (
        "import sys; from evaluator.__main__ import main; from runtime.errors import run;"
        f"status = run(main, 'evaluator', sys.argv[1:]); print('loaded:', *(sys.modules.keys() & {set(FORBIDDEN)}));"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", program, *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_the_evaluator_gives_the_same_scores_with_either(tmp_path, pair, graph):
    reference, samples = map(str, pair)
    common = (reference, samples, "--weights", str(graph), "--cache-dir", "cache")
    documents = {}
    for backend in ("torch", "tensorflow"):
        done = evaluate(tmp_path, *common, "--backend", backend, "--json", f"{backend}.json")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "loaded:"
        documents[backend] = json.loads((tmp_path / f"{backend}.json").read_text())
    assert documents["tensorflow"]["scores"] == pytest.approx(documents["torch"]["scores"], rel=1e-4)
    assert "tensorflow" in documents["tensorflow"]["versions"] and "tensorflow" not in documents["torch"]["versions"]


def test_nan_in_the_weights_is_one_line(tmp_path, pair):
    import tensorflow.compat.v1 as tf

    damaged = tf.GraphDef.FromString(synthetic_graph(divisor=NARROW))
    beta = next(node for node in damaged.node if node.name == "mixed_5/conv/batchnorm/beta")
    beta.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.full(12, np.nan, np.float32)))
    (tmp_path / "nan.pb").write_bytes(damaged.SerializeToString())
    with pytest.raises(
        UserError, match="NaN or infinite from features/mixed_5/conv/CheckNumerics on; are the weights damaged"
    ):
        TensorFlowBackend(tmp_path / "nan.pb").features(make_images(1))


@pytest.mark.parametrize("content", [b"", b"no graph", synthetic_graph(divisor=NARROW)[:100_000]])
def test_files_that_are_no_graph(tmp_path, content):
    (tmp_path / "bad.pb").write_bytes(content)
    with pytest.raises(ValueError, match="TensorFlow does not take it"):
        TensorFlowBackend(tmp_path / "bad.pb")


def test_compressed_samples_of_one_image(tmp_path, graph):
    path = write_npz(tmp_path / "one.npz", make_images(1), compressed=True)
    done = evaluate(
        tmp_path, str(path), str(path), "--weights", str(graph), "--backend", "tensorflow", "--metrics", "is"
    )
    assert done.returncode == 0 and done.stdout.startswith("Inception Score: 1.0"), done.stderr


def test_this_session_has_loaded_nothing_that_could_abort():
    assert [name for name in FORBIDDEN if name in sys.modules] == []


def test_full_width_files_weigh_what_the_published_one_does(tmp_path):
    # the published file has 95,673,916 bytes; all but some thousand of them are numbers
    assert abs(write_graph(tmp_path / "full.pb", divisor=1).stat().st_size - 95_673_916) < 10_000
