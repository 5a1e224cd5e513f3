"""The frozen graph run by TensorFlow, as in ADM's evaluator: the cross-check of the PyTorch network.

Nothing else here imports TensorFlow, because loading Triton's native library after it aborts the process; torchvision,
timm, diffusers and compiled PyTorch load that library.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluator.inception.backend import IMAGES, POOL, SOFTMAX_PRODUCT, SPATIAL, SPATIAL_CHANNELS, Features
from runtime.errors import UserError

PROBABILITY_ROWS = 512  # at a time, as ADM


class TensorFlowBackend:
    """Session on the graph.

    Args:
        path: The `.pb` file.
        device: Device of the features; TensorFlow computes on a GPU if it finds one and this is one.

    Raises:
        UserError: If TensorFlow is not installed.
        OSError: If the file cannot be opened.
        ValueError: If TensorFlow cannot read it, or it lacks nodes of the Inception graph.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._tf = tf = _import_tensorflow()
        from google.protobuf.message import DecodeError  # TensorFlow brings it

        graph_def = tf.GraphDef()
        try:
            graph_def.ParseFromString(path.read_bytes())
            with tf.Graph().as_default() as graph:
                self._images = tf.placeholder(tf.float32, [None, None, None, 3])
                self._features = tf.import_graph_def(
                    graph_def, {f"{IMAGES}:0": self._images}, [f"{POOL}:0", f"{SPATIAL}:0"], name="features"
                )
                product = graph.get_operation_by_name(f"features/{SOFTMAX_PRODUCT}")
                self._pool = tf.placeholder(tf.float32, [None, None])
                self._probabilities = tf.nn.softmax(tf.matmul(self._pool, product.inputs[1]))
        except (ValueError, KeyError, tf.errors.OpError, DecodeError) as error:
            raise ValueError(f"TensorFlow does not take it as the Inception graph ({error})") from error
        options = tf.ConfigProto(allow_soft_placement=True)
        options.gpu_options.allow_growth = True
        options.intra_op_parallelism_threads = torch.get_num_threads()
        if self.device.type == "cpu":
            options.device_count["GPU"] = 0
        self._session = tf.Session(graph=graph, config=options)

    def features(self, images: npt.NDArray[np.uint8]) -> Features:
        """Compute features of (N, H, W, 3) uint8 images."""
        pool, spatial = self._run(self._features, {self._images: images.astype(np.float32)})
        rows = spatial[..., :SPATIAL_CHANNELS]  # (N, 17, 17, 7)
        return Features(self._rows(pool), self._rows(rows))

    def probabilities(self, pool: Tensor) -> Tensor:
        """Compute class probabilities (N, classes) from pool features (N, D), without the bias."""
        parts = pool.cpu().split(PROBABILITY_ROWS)
        runs = [self._run([self._probabilities], {self._pool: part.numpy()}) for part in parts]
        return torch.cat([self._rows(probabilities) for (probabilities,) in runs])

    def _run(self, fetched: Sequence[object], fed: Mapping[object, object]) -> list[npt.NDArray[np.float32]]:
        try:
            arrays: list[npt.NDArray[np.float32]] = self._session.run(fetched, fed)
            return arrays
        except self._tf.errors.InvalidArgumentError as error:
            if error.op is None or error.op.type != "CheckNumerics":
                raise
            raise UserError(
                f"features are NaN or infinite from {error.op.name} on; are the weights damaged?"
            ) from error

    def _rows(self, array: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array.reshape(len(array), -1)).to(self.device)


def _import_tensorflow() -> ModuleType:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow.compat.v1 as tf
    except ImportError as error:
        raise UserError(
            "--backend tensorflow: TensorFlow is not installed here; bash scripts/setup_tensorflow.sh makes "
            ".venv-tensorflow with it (the default, --backend torch, needs none)"
        ) from error
    return tf
