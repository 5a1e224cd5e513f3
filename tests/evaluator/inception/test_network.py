"""The PyTorch network against recorded numbers of TensorFlow: resizing, features; and graphs it must refuse."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.inception_graph import synthetic_graph
from evaluator.inception.graph_def import Node, read_graph
from evaluator.inception.network import InceptionNetwork, load_network
from evaluator.inception.resize import resize_bilinear
from tests.golden_data import GOLDEN, relative_error
from tests.inception_files import MISTAKES, RECORDED, make_images, write_graph

FOLDER = GOLDEN / "evaluator"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
RESIZE = next(case for case in CASES if case["name"] == "tf1_resize_and_scale")["expected"]
TOLERANCE = 1e-4  # of the largest feature


def errors(found, wanted):
    return {name: relative_error(getattr(found, name), torch.from_numpy(wanted[name])) for name in ("pool", "spatial")}


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


# ----------------------------------------------------------------------------------------------------------------------
# Resizing


@pytest.mark.parametrize("index", range(len(RESIZE["sizes"])))
def test_golden_resize_and_scale(index):
    with np.load(FOLDER / "tf1_resize_and_scale.npz") as file:
        image, places, wanted, mean = (file[f"{name}{index}"] for name in ("in", "pix", "val", "mean"))
    assert list(image.shape[:2]) == RESIZE["sizes"][index]
    resized = resize_bilinear(torch.from_numpy(image)[None].float(), 299, 299)[0]
    scaled = (resized - 128) * 0.0078125
    rows, columns, channels = torch.from_numpy(places).long().T
    assert (scaled[rows, columns, channels] - torch.from_numpy(wanted)).abs().max() == 0
    assert scaled.double().mean() == pytest.approx(float(mean), abs=RESIZE["atol"])


def test_resizing_leaves_its_input_alone():
    images = torch.rand(2, 7, 5, 3)
    copy = images.clone()
    assert resize_bilinear(images, 20, 3).shape == (2, 20, 3, 3)
    assert torch.equal(images, copy)


# ----------------------------------------------------------------------------------------------------------------------
# Features


def test_golden_features(graph, recorded):
    assert hashlib.sha256(graph.read_bytes()).hexdigest() == str(recorded["graph_sha256"])
    found = load_network(graph).features(make_images(3, (300, 200)))
    assert found.pool.dtype == found.spatial.dtype == torch.float32
    assert max(errors(found, recorded).values()) < 1e-5


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show(graph, recorded, name, monkeypatch):
    spoil, shown_in = MISTAKES[name]
    network = load_network(graph)
    spoil(network, monkeypatch)
    found = errors(network.features(make_images(3, (300, 200))), recorded)
    assert all(found[kind] > 10 * TOLERANCE for kind in shown_in), found


def test_gamma_counts_only_if_the_graph_says_so(graph, recorded, tmp_path):
    ignored = load_network(write_graph(tmp_path / "ignored.pb", scale_after_normalization=False))
    found = errors(ignored.features(make_images(3, (300, 200))), recorded)
    assert min(found.values()) > 10 * TOLERANCE


def test_full_float32_whatever_training_has_chosen(graph, recorded):
    network = load_network(graph)
    torch.set_float32_matmul_precision("medium")  # bfloat16 on this processor, TF32 on a GPU
    try:
        features = network.features(make_images(3, (300, 200)))
        probabilities = network.probabilities(features.pool)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert max(errors(features, recorded).values()) < 1e-5
    exact = (features.pool.double() @ network.classifier.double()).softmax(dim=1)
    assert relative_error(probabilities, exact) < 1e-5


def test_batches_do_not_matter(graph):
    network, images = load_network(graph), make_images(9)
    together = network.features(images)
    apart = [network.features(images[i : i + 1]) for i in range(9)]
    for name in ("pool", "spatial"):
        assert relative_error(torch.cat([getattr(each, name) for each in apart]), getattr(together, name)) < 1e-5


def test_the_bias_of_the_classifier_is_left_out(graph):
    network, nodes = load_network(graph), read_graph(graph)
    pool = torch.rand(5, 128) * 5
    logits = pool @ torch.from_numpy(nodes["softmax/weights"].array().copy())
    bias = torch.from_numpy(nodes["softmax/biases"].array().copy())
    found = network.probabilities(pool)
    assert found.shape == (5, 1008) and relative_error(found, logits.softmax(dim=1)) < 1e-5
    assert relative_error(found, (logits + bias).softmax(dim=1)) > 0.1


def test_values_that_no_later_layer_reads_are_freed(graph):
    """Outputs are freed after their last reader, so that memory is that of a few layers."""
    network = load_network(graph)
    unused = [name for step in network.steps for name in step.unused]
    outputs = [step.output for step in network.steps]
    assert len(unused) == len(set(unused)) == len(outputs) - 1  # all but pool_3 and mixed_6/conv, and the images too
    position = {name: number for number, name in enumerate(["ExpandDims", *outputs])}
    for number, step in enumerate(network.steps, start=1):
        assert all(position[name] < number for name in step.inputs)
        assert set(step.unused) <= set(step.inputs)


def test_the_network_is_frozen(graph):
    network = load_network(graph)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.gpu
def test_cuda_gives_the_features_of_the_cpu(graph):
    images = make_images(5, (64, 64))
    on_cpu, on_gpu = (load_network(graph, device).features(images) for device in ("cpu", "cuda"))
    assert relative_error(on_gpu.pool.cpu(), on_cpu.pool) < TOLERANCE
    assert relative_error(on_gpu.spatial.cpu(), on_cpu.spatial) < TOLERANCE


# ----------------------------------------------------------------------------------------------------------------------
# Graphs that are refused


def changed(nodes, name, **changes):
    """The graph with one node replaced."""
    node = nodes[name]
    values = {"op": node.op, "inputs": node.inputs, "attributes": dict(node.attributes)} | changes
    return {**nodes, name: Node(name, **values)}


def with_attribute(nodes, name, key, value):
    return changed(nodes, name, attributes={**nodes[name].attributes, key: value})


@pytest.fixture(scope="module")
def nodes(graph):
    return read_graph(graph)


REFUSED = {
    "no node pool_3": lambda n: {k: v for k, v in n.items() if k != "pool_3"},
    "no node conv_1/conv2d_params": lambda n: {k: v for k, v in n.items() if k != "conv_1/conv2d_params"},
    "no node softmax/logits/MatMul": lambda n: {k: v for k, v in n.items() if k != "softmax/logits/MatMul"},
    "node mixed/join is a Add; expected one of": lambda n: changed(n, "mixed/join", op="Add"),
    "node conv/Conv2D is a DepthwiseConv2dNative; expected a Conv2D": lambda n: changed(
        n, "conv/Conv2D", op="DepthwiseConv2dNative"
    ),
    "node conv/batchnorm is a Add; expected a BatchNorm": lambda n: changed(n, "conv/batchnorm", op="Add"),
    "node conv/batchnorm reads 2 nodes; a BatchNormWithGlobalNormalization reads 5": lambda n: changed(
        n, "conv/batchnorm", inputs=n["conv/batchnorm"].inputs[:2]
    ),
    "node conv/batchnorm has no attribute scale_after_normalization": lambda n: with_attribute(
        n, "conv/batchnorm", "scale_after_normalization", None
    ),
    "node conv/batchnorm does not fit the 2 channels": lambda n: changed(
        n, "conv/batchnorm", inputs=(*n["conv/batchnorm"].inputs[:4], "conv_3/batchnorm/gamma")
    ),
    "node conv/Conv2D is dilated": lambda n: with_attribute(n, "conv/Conv2D", "dilations", [1, 2, 2, 1]),
    "node conv/Conv2D has unsupported padding": lambda n: with_attribute(n, "conv/Conv2D", "padding", b"SAME"),
    "node conv/Conv2D does not have its channels last": lambda n: with_attribute(
        n, "conv/Conv2D", "data_format", b"NCHW"
    ),
    "node pool has strides .2, 2.; expected": lambda n: with_attribute(n, "pool", "strides", [2, 2]),
    "node ResizeBilinear resizes with": lambda n: with_attribute(n, "ResizeBilinear", "half_pixel_centers", 1),
    "node mixed/join does not concatenate channels": lambda n: changed(
        n, "mixed/join", inputs=("ExpandDims/dim", *n["mixed/join"].inputs[1:])
    ),
    "constant ResizeBilinear/size is of shape .2,.; expected 0 dimensions": lambda n: changed(
        n, "Sub", inputs=("ResizeBilinear", "ResizeBilinear/size")
    ),
    "node conv_1/conv2d_params is not a constant": lambda n: changed(n, "conv_1/conv2d_params", op="VariableV2"),
    "needs its own result": lambda n: changed(n, "conv/Conv2D", inputs=("conv_2", "conv/conv2d_params")),
    "node softmax/logits/MatMul is not a product": lambda n: changed(n, "softmax/logits/MatMul", op="Add"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_graphs_of_another_form_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        InceptionNetwork(REFUSED[message](nodes))


def test_a_file_that_ends_early_is_refused(tmp_path):
    (tmp_path / "a.pb").write_bytes(synthetic_graph(divisor=16)[:500_000])
    with pytest.raises(ValueError, match="not a frozen TensorFlow graph, or damaged"):
        load_network(tmp_path / "a.pb")
