"""The metrics against those of torch-fidelity and torchmetrics on the same features.

Neither is a dependency: `pip install --no-deps torch-fidelity torchmetrics lightning-utilities` makes these tests run.
"""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from evaluator.metrics import frechet_distance_from_features, inception_score, kernel_distance, precision_recall

pytestmark = pytest.mark.slow
needs_fidelity = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
WIDTH = 96


def features(count: int, seed: int) -> torch.Tensor:
    """Features (count, WIDTH) in float32, >= 0 as pooled ones, correlated, of another mean and scale for each seed."""
    mixing = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * (1 + 0.1 * seed)
    noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 + seed))
    return (rows @ mixing + 0.3 * noise + 0.2 * seed).abs()


REFERENCE, SAMPLES, FEW = features(400, 1), features(300, 2), features(50, 3)
LOGITS = torch.randn(300, 10, generator=torch.Generator().manual_seed(4)) * 3
PAIRS = pytest.mark.parametrize("samples", [SAMPLES, FEW], ids=["full rank", "fewer rows than features"])


@needs_fidelity
@PAIRS
def test_fid_is_that_of_torch_fidelity(samples):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (REFERENCE, samples)), verbose=False)
    # its square root of a singular product keeps half the digits
    exactness = 1e-6 if samples is SAMPLES else 1e-5
    (value,) = expected.values()
    assert frechet_distance_from_features(REFERENCE, samples) == pytest.approx(float(value), rel=exactness)


@needs_fidelity
@PAIRS
def test_kid_is_that_of_torch_fidelity(samples):
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = len(samples)  # one subset of all rows
    expected = kid_features_to_metric(
        REFERENCE[:size].double(),
        samples.double(),
        kid_subsets=1,
        kid_subset_size=size,
        verbose=False,
        kid_kernel_poly_degree=3,
    )
    value = float(expected["kernel_inception_distance_mean"])
    assert kernel_distance(REFERENCE[:size], samples) == pytest.approx(value, rel=1e-6, abs=1e-6)


@needs_fidelity
@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_is_that_of_torch_fidelity(splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    expected = isc_features_to_metric(LOGITS, splits=splits, shuffle=False)
    value = float(expected["inception_score_mean"])
    assert inception_score(LOGITS.double().softmax(dim=1), len(LOGITS) // splits) == pytest.approx(value, rel=1e-6)


@needs_fidelity
@PAIRS
def test_precision_and_recall_are_those_of_torch_fidelity(samples):
    from torch_fidelity.metric_prc import prc_features_to_metric

    expected = prc_features_to_metric(samples, REFERENCE, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    actual = precision_recall(REFERENCE, samples, 3, precision="float32")
    assert 0 < actual.precision < 1 and 0 < actual.recall < 1
    assert abs(actual.precision - actual.recall) > 0.01  # an exchange would show
    assert (actual.precision, actual.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


class Lookup(nn.Module):
    """A network whose features of an image are the row that its first pixel names."""

    num_features = WIDTH

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.rows[images[:, 0, 0, 0].long()]


def images(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)


def fill(metric, samples: torch.Tensor):
    """Feed a metric of torchmetrics with REFERENCE and samples as real and generated images."""
    metric.update(images(0, len(REFERENCE)), real=True)
    metric.update(images(len(REFERENCE), len(samples)), real=False)
    return metric


@needs_torchmetrics
def test_fid_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = Lookup(torch.cat([REFERENCE, SAMPLES]).double())
    metric = FrechetInceptionDistance(feature=network, input_img_size=(3, 1, 1)).set_dtype(torch.float64)
    expected = float(fill(metric, SAMPLES).compute())
    assert frechet_distance_from_features(REFERENCE, SAMPLES) == pytest.approx(expected, rel=1e-6)


@needs_torchmetrics
def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    real, generated = REFERENCE[: len(SAMPLES)].double(), SAMPLES.double()
    assert kernel_distance(real, generated) == pytest.approx(float(poly_mmd(real, generated)), rel=1e-6)


@needs_torchmetrics
def test_inception_score_is_that_of_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    class Logits(Lookup):
        num_features = LOGITS.shape[1]

    metric = InceptionScore(feature=Logits(LOGITS.double()), splits=1).set_dtype(torch.float64)
    metric.update(images(0, len(LOGITS)))
    mean, _ = metric.compute()
    assert inception_score(LOGITS.double().softmax(dim=1)) == pytest.approx(float(mean), rel=1e-6)
