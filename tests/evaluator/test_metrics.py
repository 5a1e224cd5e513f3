"""Metrics and statistics against numbers recorded from the ADM evaluator, closed forms, and invariants."""

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluator.metrics import (
    PrecisionRecall,
    float16_noise,
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    manifold_radii,
    precision_recall,
)
from evaluator.statistics import Statistics, StatisticsAccumulator, feature_statistics
from tests.golden_data import arrays

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "evaluator"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = {case["name"]: case for case in MANIFEST["cases"]}
PAIRS = [name for name, case in CASES.items() if "ref_shape" in case]
DISTANCES = [name for name in PAIRS if name != "f64_one_row"]
MANIFOLDS = [name for name in PAIRS if "precision_float64" in CASES[name]["expected"]]


def load(name):
    with np.load(GOLDEN / CASES[name]["file"]) as file:
        return dict(file)


def expected(name):
    return CASES[name]["expected"]


def gaussian(rng, rows, width, scale=1.0):
    """Correlated Gaussian features."""
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) * scale


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ----------------------------------------------------------------------------------------------------------------------
# The recorded numbers


def test_fixtures_are_whole_and_no_case_is_forgotten():
    others = {"inception_score", "inception_score_underflow", "manifold_chunked_clamped"}
    of_the_reader_and_the_network = {"readers", "tf1_resize_and_scale"}  # in test_npz.py, inception/test_network.py
    assert set(CASES) == set(PAIRS) | others | of_the_reader_and_the_network
    ours = {"manifest.json", "synthetic_features.npz"}
    assert {path.name for path in GOLDEN.iterdir()} - ours == MANIFEST["files"].keys()
    for name in MANIFEST["files"]:
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == MANIFEST["files"][name]["sha256"], name


@pytest.mark.parametrize("name", DISTANCES)
def test_golden_statistics(name):
    arrays = load(name)
    for side in ("ref", "sample"):
        statistics = feature_statistics(arrays[side])
        mean = arrays[f"mu_{side}"]  # float32, and only the first 64 of wide features
        np.testing.assert_allclose(statistics.mean[: len(mean)], mean, rtol=2e-6, atol=1e-6)
        if f"sigma_{side}" in arrays:
            np.testing.assert_allclose(
                statistics.covariance, np.atleast_2d(arrays[f"sigma_{side}"]), rtol=1e-10, atol=1e-10
            )
        else:
            assert statistics.covariance.trace() == pytest.approx(expected(name)[f"sigma_trace_{side}"], rel=1e-12)
            assert statistics.covariance.norm() == pytest.approx(expected(name)[f"sigma_fro_{side}"], rel=1e-12)


def by_statistics(a, b):
    return frechet_distance(feature_statistics(a), feature_statistics(b))


def assert_golden_distance(name, distance):
    # far tighter than the manifest asks: a null space that leaks is off by some 1e-6
    assert distance == pytest.approx(expected(name)["fid_float64_exact"], rel=1e-10, abs=1e-12)
    official = expected(name)["fid_official"]
    assert official is None or distance == pytest.approx(official, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", DISTANCES)
def test_golden_frechet_distance_from_features(name):
    arrays = load(name)
    assert_golden_distance(name, frechet_distance_from_features(arrays["ref"], arrays["sample"]))


WIDE = {"d2048_large_norm", "d2023_spatial"}  # 2,000 eigenvectors take seconds; d2048_few stands for them every day


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in WIDE else ()) for name in DISTANCES]
)
def test_golden_frechet_distance_of_statistics(name):
    arrays = load(name)
    assert_golden_distance(name, by_statistics(arrays["ref"], arrays["sample"]))


@pytest.mark.parametrize("route", [by_statistics, frechet_distance_from_features])
def test_golden_single_row_is_refused(route):
    arrays = load("f64_one_row")
    with pytest.raises(ValueError, match="at least 2 rows of features, not 1"):
        route(arrays["ref"], arrays["sample"])


@pytest.mark.parametrize("name", MANIFOLDS)
def test_golden_precision_recall(name):
    arrays, numbers = load(name), expected(name)
    shares = {"precision": len(arrays["sample"]), "recall": len(arrays["ref"])}
    adm = precision_recall(arrays["ref"], arrays["sample"], precision="adm")._asdict()
    float32 = precision_recall(arrays["ref"], arrays["sample"], precision="float32")._asdict()
    for key, count in shares.items():
        official = numbers["prec_recall_official_fp16path"][key]
        assert adm[key] == pytest.approx(official, abs=2.5 / count)
        assert float32[key] == pytest.approx(official, abs=0.012)
        assert float32[key] == pytest.approx(numbers[f"{key}_float64"], abs=1.5 / count)


@pytest.mark.parametrize("precision", ["adm", "float32"])
@pytest.mark.parametrize("name", MANIFOLDS)
def test_golden_radii(name, precision):
    arrays = load(name)
    for side in ("ref", "sample"):
        recorded = arrays[f"radii_{side}"]
        if name == "d2048_large_norm":
            tolerance = 1e-5 * recorded  # these were computed in float32
        else:
            # 1 % of the largest radius, as the manifest says; but the recorded ones can be no better than the float16
            # sums they come from, which go in steps of 2 around the squared norms of 2,600 in f64_disjoint
            largest_norm = np.square(arrays[side], dtype=np.float32).sum(axis=1).max()
            tolerance = max(1e-2 * recorded.max(), 2 * np.spacing(np.float16(largest_norm)))
        assert (np.abs(manifold_radii(arrays[side], precision=precision).numpy() - recorded) <= tolerance).all()


def test_golden_radii_need_a_third_neighbour():
    arrays = load("f64_too_few_for_k")
    with pytest.raises(ValueError, match=r"k \+ 1 = 4 rows of features, not 3"):
        precision_recall(arrays["ref"], arrays["sample"])


@pytest.mark.parametrize("block_size", [100, 10_000])
def test_golden_blocks_and_clamped_radii(block_size):
    arrays, numbers = load("manifold_chunked_clamped"), expected("manifold_chunked_clamped")
    settings = {"clamp_to_percentile": 50, "block_size": block_size}
    for i, k in enumerate((3, 5)):
        for side in ("ref", "sample"):
            recorded = arrays[f"radii_{side}"][:, i]
            radii = manifold_radii(arrays[side], k, **settings).numpy()
            assert 0.45 < (recorded == 0).mean() < 0.55
            # float16 may put a radius beside the median on either side of it
            assert ((radii == 0) != (recorded == 0)).mean() <= 0.03
            both = (radii > 0) & (recorded > 0)
            np.testing.assert_allclose(radii[both], recorded[both], atol=1e-2 * recorded.max(), rtol=0)
        result = precision_recall(arrays["ref"], arrays["sample"], k, **settings)
        assert result.precision == pytest.approx(numbers["precision"][i], abs=2.5 / 310)
        assert result.recall == pytest.approx(numbers["recall"][i], abs=2.5 / 350)


def softmax(features, weights):
    return (torch.from_numpy(features).double() @ torch.from_numpy(weights).double()).softmax(dim=1)


def test_golden_inception_score():
    arrays, numbers = load("inception_score"), expected("inception_score")
    probabilities = softmax(arrays["features"], arrays["weights"])
    np.testing.assert_allclose(probabilities[:8], arrays["softmax_first8"], rtol=1e-5, atol=1e-8)
    for size, official in numbers["score_by_split_size"].items():
        score = inception_score(probabilities, int(size))
        assert score == pytest.approx(official, rel=1e-5)
        assert score == pytest.approx(numbers["score_by_split_size_float64"][size], rel=1e-12)
    assert inception_score(probabilities) == inception_score(probabilities, 5000)
    assert inception_score(probabilities[:1]) == pytest.approx(numbers["score_single_row"], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_inception_score_survives_underflow(dtype):
    arrays, numbers = load("inception_score_underflow"), expected("inception_score_underflow")
    probabilities = softmax(arrays["features"], arrays["weights"]).to(dtype)
    assert dtype == torch.float64 or (probabilities == 0).any()
    assert inception_score(probabilities) == pytest.approx(numbers["score_float64"], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Mean and covariance


def assert_same_statistics(a, b):
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, np.asfortranarray])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_statistics_are_those_of_numpy(rng, convert, dtype):
    features = gaussian(rng, 50, 7).astype(dtype)
    statistics = feature_statistics(convert(features))
    assert statistics.count == 50
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.T, dtype=np.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cuts", [[1, 2, 40, 64], [7, 14, 21], [13], list(range(1, 100))])
def test_cuts_into_updates_do_not_change_a_bit(rng, monkeypatch, cuts):
    features = gaussian(rng, 100, 6)
    exact = feature_statistics(features)
    monkeypatch.setattr("evaluator.statistics.ROWS_PER_UPDATE", 7)
    whole, accumulator = feature_statistics(features), StatisticsAccumulator()
    for batch in np.split(features, cuts):
        accumulator.update(batch)
        batch[:] = 0  # the caller's memory may be used again
    cut = accumulator.result()
    assert torch.equal(cut.mean, whole.mean) and torch.equal(cut.covariance, whole.covariance)
    assert_same_statistics(whole, exact)


def test_results_are_snapshots(rng):
    accumulator = StatisticsAccumulator()
    accumulator.update(gaussian(rng, 20, 4))
    first = accumulator.result()
    mean, covariance = first.mean.clone(), first.covariance.clone()
    accumulator.update(gaussian(rng, 20, 4) + 5)
    assert torch.equal(first.mean, mean) and torch.equal(first.covariance, covariance)
    assert accumulator.result().count == 40


def test_a_large_mean_does_not_cancel(rng):
    features = rng.normal(size=(1000, 3))
    accumulator = StatisticsAccumulator()
    for batch in np.split(features + 1e8, 10):
        accumulator.update(batch)
    np.testing.assert_allclose(accumulator.result().covariance, np.cov(features.T), rtol=1e-6, atol=1e-6)


def test_odd_but_legal_arrays_are_read_silently(rng):
    features = rng.normal(size=(20, 4))
    read_only = features.copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (read_only, features[::-1][::-1], torch.from_numpy(features).requires_grad_(True)):
            assert frechet_distance_from_features(same, features) == pytest.approx(0, abs=1e-12)
            assert precision_recall(same, features) == (1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Frechet distance


def statistics_of(mean, covariance):
    return Statistics(torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64))


def test_frechet_distance_of_diagonal_gaussians(rng):
    mean_a, mean_b = rng.normal(size=(2, 9))
    a, b = rng.uniform(0.1, 5, size=(2, 9))
    distance = frechet_distance(statistics_of(mean_a, np.diag(a**2)), statistics_of(mean_b, np.diag(b**2)))
    assert distance == pytest.approx(np.sum((mean_a - mean_b) ** 2 + (a - b) ** 2), rel=1e-12)


@pytest.mark.parametrize("null", [(), (0,), (0, 5)])
def test_frechet_distance_of_commuting_gaussians(rng, null):
    basis, _ = np.linalg.qr(rng.normal(size=(9, 9)))
    a, b = rng.uniform(0.1, 5, size=(2, 9))
    a[list(null)] = 0
    b[list(null[1:])] = 0
    zero = np.zeros(9)
    distance = frechet_distance(
        statistics_of(zero, basis * a**2 @ basis.T), statistics_of(zero, basis * b**2 @ basis.T)
    )
    assert distance == pytest.approx(np.sum((a - b) ** 2), rel=1e-12)


def test_frechet_distance_of_correlated_planes():
    # tr sqrt(S_a S_b) of 2 x 2 matrices is sqrt(tr(S_a S_b) + 2 sqrt(det S_a det S_b)); these do not commute
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.5]])
    assert not np.allclose(a @ b, b @ a)
    overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    distance = frechet_distance(statistics_of([1, 0], a), statistics_of([0, 3], b))
    assert distance == pytest.approx(10 + np.trace(a + b) - 2 * overlap, rel=1e-12)


@pytest.mark.parametrize("rows", [5, 12, 13, 300], ids=["few", "as many as features", "one more", "many"])
@pytest.mark.parametrize("route", [by_statistics, frechet_distance_from_features])
def test_frechet_distance_invariants(rng, route, rows):
    a, b = gaussian(rng, rows, 12), gaussian(rng, rows + 2, 12) + 1
    distance = route(a, b)
    rotation, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    assert distance > 1
    assert route(a, a) == pytest.approx(0, abs=1e-10)
    assert route(b, a) == pytest.approx(distance, rel=1e-9)
    assert route(rng.permutation(a), rng.permutation(b)) == pytest.approx(distance, rel=1e-9)
    assert route(a @ rotation + 7, b @ rotation + 7) == pytest.approx(distance, rel=1e-9)
    assert route(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-9)
    shift = np.arange(12.0)
    assert route(a, a + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)


@pytest.mark.parametrize("rows", [(5, 8), (5, 200), (200, 5), (40, 41), (200, 300)])
def test_both_routes_agree(rng, rows):
    a, b = gaussian(rng, rows[0], 40), gaussian(rng, rows[1], 40)
    assert by_statistics(a, b) == pytest.approx(frechet_distance_from_features(a, b), rel=1e-10)


def test_a_constant_feature_and_few_rows(rng):
    few, many = gaussian(rng, 5, 12), gaussian(rng, 200, 12)
    many[:, 3] = 1.5
    assert frechet_distance_from_features(few, many) == pytest.approx(by_statistics(few, many), rel=1e-10)


def test_nothing_is_added_to_singular_covariances():
    zero = np.zeros((4, 4))
    assert frechet_distance(statistics_of(np.zeros(4), zero), statistics_of([3, 0, 4, 0], zero)) == 25
    tiny = 1e-12 * np.eye(4)
    assert frechet_distance(statistics_of(np.zeros(4), zero), statistics_of(np.zeros(4), tiny)) == pytest.approx(4e-12)


def test_the_distance_is_never_negative(rng):
    for _ in range(20):
        features = gaussian(rng, 100, 30, scale=100)
        assert 0 <= frechet_distance_from_features(features, features[::-1]) < 1e-7


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(2), np.zeros((3, 3)), r"\(D,\) and \(D, D\) with D >= 1, not \(2,\) and \(3, 3\)"),
        (np.zeros((1, 2)), np.zeros((2, 2)), r"not \(1, 2\) and"),
        (np.zeros(2, np.float32), np.zeros((2, 2)), "must be float64, not torch.float32"),
        (np.array([0, np.nan]), np.eye(2), "NaN"),
        (np.zeros(2), np.full((2, 2), np.inf), "infinity"),
        (np.zeros(0), np.zeros((0, 0)), r"with D >= 1, not \(0,\)"),
        (np.zeros(2), np.eye(2, dtype=complex), "must be float64, not torch.float64 and torch.complex128"),
        (np.zeros(3), np.triu(np.full((3, 3), 2.0)), "covariance is not symmetric: .* by up to 2; is it a triangle"),
        (np.zeros(3), np.tril(np.full((3, 3), -2.0)), "covariance is not symmetric"),
        (np.zeros(2), np.array([[5.0, 1.0], [1.001, 5.0]]), "not symmetric: .* by up to 0.001;"),
    ],
)
def test_statistics_that_cannot_be(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        Statistics(torch.from_numpy(mean), torch.from_numpy(covariance))


def test_rounding_of_other_programs_is_no_asymmetry(rng):
    rows = gaussian(rng, 3000, 20).astype(np.float32)
    covariance = np.cov(rows, rowvar=False, dtype=np.float32)
    lower = np.tril(covariance) + np.triu(np.nextafter(covariance, np.float32(np.inf)), 1)
    assert not np.array_equal(lower, lower.T)
    assert frechet_distance(statistics_of(np.zeros(20), lower), statistics_of(np.zeros(20), covariance)) < 1e-4
    assert len(statistics_of([0, 0], np.array([[2.0, 1.0], [1.00019, 2.0]])).mean) == 2
    assert len(statistics_of([0, 0], np.zeros((2, 2))).mean) == 2  # all images alike


def test_a_matrix_that_is_no_covariance_is_refused():
    covariance, wrong = statistics_of([0, 0], np.eye(2)), statistics_of([0, 0], np.diag([1.0, -0.5]))
    for a, b in ((covariance, wrong), (wrong, covariance)):
        with pytest.raises(ValueError, match="not a covariance: its eigenvalues reach from -0.5 to 1"):
            frechet_distance(a, b)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((0, 3)), r"\(N, D\) with N, D >= 1, not of shape \(0, 3\)"),
        (np.zeros((3, 0)), r"not of shape \(3, 0\)"),
        (np.zeros(3), r"not of shape \(3,\)"),
        (np.array([[1, np.nan], [np.inf, 2], [3, 4]]), "NaN or infinity in 2 of 3 rows"),
    ],
)
def test_features_that_cannot_be(features, message):
    good = np.eye(5, 2)
    for call in (
        lambda: feature_statistics(features),
        lambda: frechet_distance_from_features(good, features),
        lambda: precision_recall(good, features, 1),
        lambda: inception_score(features),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_widths_must_agree(rng):
    a, b = rng.normal(size=(10, 3)), rng.normal(size=(10, 4))
    accumulator = StatisticsAccumulator()
    accumulator.update(a)
    for call in (
        lambda: accumulator.update(b),
        lambda: by_statistics(a, b),
        lambda: frechet_distance_from_features(a, b),
        lambda: precision_recall(a, b),
    ):
        with pytest.raises(ValueError, match="different numbers of features: 3 and 4"):
            call()
    assert_same_statistics(accumulator.result(), feature_statistics(a))


def test_no_rows_have_no_statistics():
    with pytest.raises(ValueError, match="at least 2 rows of features, not 0"):
        StatisticsAccumulator().result()


# ----------------------------------------------------------------------------------------------------------------------
# Inception Score


def test_inception_score_bounds():
    assert inception_score(np.full((100, 10), 0.1)) == pytest.approx(1, rel=1e-12)
    assert inception_score(np.eye(10)[np.arange(100) % 10]) == pytest.approx(10, rel=1e-12)
    assert inception_score(np.eye(10)[np.zeros(100, int)]) == pytest.approx(1, rel=1e-12)


def test_splits_are_consecutive_and_weigh_the_same():
    rows = np.eye(4)[[0, 1, 2, 3, 0, 0]]  # a split of four classes, then a short one of a single class
    assert inception_score(rows, 4) == pytest.approx((4 + 1) / 2, rel=1e-12)
    assert inception_score(np.eye(2)[[0, 0, 1, 1]], 2) == pytest.approx(1, rel=1e-12)
    assert inception_score(np.eye(2)[[0, 1, 0, 1]], 2) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("rows", [[[2.0, -1.0]], [[0.2, 0.3]], [[3.0, 4.0]]])
def test_logits_are_not_probabilities(rows):
    with pytest.raises(ValueError, match="pass softmax outputs, not logits"):
        inception_score(np.array(rows))


def test_a_split_has_rows():
    with pytest.raises(ValueError, match="split_size must be at least 1, not 0"):
        inception_score(np.eye(2), 0)


# ----------------------------------------------------------------------------------------------------------------------
# Precision and recall


def by_definition(reference, samples, k):
    """Precision and recall as the paper states them, in float64."""

    def covered(points, centres):
        own = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(own, axis=1)[:, k]
        return np.mean((np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii).any(axis=1))

    return PrecisionRecall(covered(samples, reference), covered(reference, samples))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_is_its_definition(rng, k):
    reference, samples = rng.normal(size=(90, 4)), 0.7 * rng.normal(size=(70, 4)) + 0.5
    result = precision_recall(reference, samples, k, precision="float32")
    assert result == pytest.approx(by_definition(reference, samples, k))
    assert 0.2 < result.recall < result.precision
    assert precision_recall(samples, reference, k, precision="float32") == result[::-1]


@pytest.mark.parametrize("precision", ["adm", "float32"])
def test_identical_and_disjoint_sets(rng, precision):
    features = rng.normal(size=(60, 8))
    assert precision_recall(features, features, precision=precision) == (1, 1)
    assert precision_recall(features, rng.permutation(features), precision=precision) == (1, 1)
    assert precision_recall(features, features + 50, precision=precision) == (0, 0)


@pytest.mark.parametrize("precision", ["adm", "float32"])
@pytest.mark.parametrize("block_size", [3, 40, 64])
def test_blocks_do_not_matter(rng, precision, block_size):
    reference, samples = rng.normal(size=(64, 8)), rng.normal(size=(50, 8)) + 0.3
    settings = {"precision": precision, "block_size": block_size}
    torch.testing.assert_close(
        manifold_radii(reference, **settings), manifold_radii(reference, precision=precision), rtol=1e-5, atol=1e-6
    )
    assert precision_recall(reference, samples, **settings) == precision_recall(reference, samples, precision=precision)


def test_radii_are_squared_distances():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert manifold_radii(line, 1).tolist() == [1, 1, 4, 16]
    assert manifold_radii(line, 3).tolist() == [49, 36, 16, 49]
    assert manifold_radii(line, 3, clamp_to_percentile=50).tolist() == [0, 36, 16, 0]
    assert manifold_radii(line, 3, clamp_to_percentile=100).tolist() == [49, 36, 16, 49]


@pytest.mark.parametrize("precision", ["adm", "float32"])
def test_rounding_makes_no_distance_negative(rng, precision):
    nearly_equal = 50 + 0.01 * rng.normal(size=(200, 8))
    assert manifold_radii(nearly_equal, precision=precision).min() >= 0


def test_adm_rounds_distances_to_float16(rng):
    features = (rng.normal(size=(200, 64)) + 3).astype(np.float32)
    adm, float32 = (manifold_radii(features, precision=precision) for precision in ("adm", "float32"))
    assert torch.equal(adm, adm.half().float())
    assert not torch.equal(adm, float32)
    torch.testing.assert_close(adm, float32, rtol=0, atol=2)


@pytest.mark.parametrize("squared_norm", [1e6, 5e4], ids=["norms overflow", "only twice the product overflows"])
def test_adm_falls_back_to_float32(rng, squared_norm):
    features = rng.normal(size=(50, 16)) + np.sqrt(squared_norm / 16)
    adm, float32 = (manifold_radii(features, precision=precision) for precision in ("adm", "float32"))
    assert torch.equal(adm, float32)
    assert adm.min() > 0


def test_fast_products_of_the_training_script_do_not_reach_the_distances(rng):
    features = rng.normal(size=(100, 256)) + 1
    wanted = manifold_radii(features, precision="float32")
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(manifold_radii(features, precision="float32"), wanted)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"k": 6}, r"k \+ 1 = 7 rows of features, not 6"),
        ({"precision": "float16"}, "'adm' or 'float32', not 'float16'"),
        ({"clamp_to_percentile": 101}, r"in \[0, 100\], not 101"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
    ],
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(np.eye(6), np.eye(6), **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["adm", "float32"])
def test_cuda_gives_the_numbers_of_the_cpu(rng, precision):
    reference, samples = gaussian(rng, 300, 32), gaussian(rng, 250, 32)
    on_gpu = precision_recall(reference, samples, precision=precision, device="cuda")
    assert on_gpu == pytest.approx(precision_recall(reference, samples, precision=precision), abs=2.5 / 250)
    a, b = torch.from_numpy(reference).cuda(), torch.from_numpy(samples).cuda()
    for route in (by_statistics, frechet_distance_from_features):
        assert route(a, b) == pytest.approx(route(reference, samples), rel=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Kernel distance


def kernel_distance_by_loops(a, b):
    def mean(u, v, same):
        values = [(x @ y / len(x) + 1) ** 3 for i, x in enumerate(u) for j, y in enumerate(v) if not same or i != j]
        return np.mean(values)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


@pytest.mark.parametrize("block_size", [3, 10_000])
def test_kernel_distance_by_its_definition(rng, block_size):
    a, b = rng.normal(size=(12, 5)), rng.normal(size=(9, 5)) + 0.5
    found = kernel_distance(a.astype(np.float32), b.astype(np.float32), block_size=block_size)
    assert found == pytest.approx(kernel_distance_by_loops(a, b), rel=1e-5, abs=1e-6)
    assert kernel_distance(b, a) == pytest.approx(found, rel=1e-5)


def test_kernel_distance_has_no_bias(rng):
    same = [kernel_distance(rng.normal(size=(20, 8)), rng.normal(size=(30, 8))) for _ in range(300)]
    assert min(same) < 0 and abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert kernel_distance(rng.normal(size=(20, 8)), rng.normal(size=(30, 8)) + 2) > 10 * max(same)


def test_kernel_distance_refuses_what_it_cannot_use(rng):
    with pytest.raises(ValueError, match="at least 2 rows of features, not 1"):
        kernel_distance(rng.normal(size=(5, 3)), rng.normal(size=(1, 3)))
    with pytest.raises(ValueError, match="different numbers of features: 3 and 4"):
        kernel_distance(rng.normal(size=(5, 3)), rng.normal(size=(5, 4)))


# ----------------------------------------------------------------------------------------------------------------------


def test_importing_metrics_loads_nothing_heavy():
    heavy = {"torchvision", "timm", "diffusers", "tensorflow", "sklearn", "scipy", "matplotlib"}
    program = f"import sys, evaluator.metrics; print(*(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(("offset", "noisy"), [(0.0, False), (0.5, True), (7.0, True), (8.0, False)])
def test_float16_noise_tells_where_the_precisions_differ(rng, offset, noisy):
    """At 8 squared norms overflow, and distances are computed in float32."""
    sets = [(rng.normal(size=(200, 512)) / 10 + offset).astype(np.float32) for _ in range(2)]
    adm, exact = (np.array(precision_recall(*sets, precision=precision)) for precision in ("adm", "float32"))
    assert (float16_noise(*sets) > 0.01) == noisy == (np.abs(adm - exact).max() > 0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Frechet video distance: covariances divided by the number of rows


def test_recorded_frechet_video_distance():
    recorded = arrays("skip_dit_video/fvd")
    real, generated = recorded["frechet.real"], recorded["frechet.generated"]
    expected = float(recorded["frechet.distance"])
    assert frechet_distance_from_features(real, generated, biased=True) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_from_features(real, generated) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("n", "m"), [(40, 55), (5, 55), (5, 6)])
def test_biased_distance_in_closed_form(n, m):
    # of features along one axis only, the distance is (difference of means)^2 + (difference of deviations)^2
    random = np.random.default_rng(0)
    a, b = np.zeros((n, 7)), np.zeros((m, 7))
    a[:, 2], b[:, 2] = random.normal(0, 1, n), random.normal(3, 2, m)
    for biased in (True, False):
        deviations = [rows[:, 2].std(ddof=0 if biased else 1) for rows in (a, b)]
        expected = (a.mean() * 7 - b.mean() * 7) ** 2 + (deviations[0] - deviations[1]) ** 2
        assert frechet_distance_from_features(a, b, biased=biased) == pytest.approx(expected, rel=1e-9)


def test_trace_of_equally_many_rows_shrinks():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(30, 4)), random.normal(size=(30, 4)) @ np.diag([1, 2, 3, 4])
    shift = float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum())
    unbiased, biased = (frechet_distance_from_features(a, b, biased=each) - shift for each in (False, True))
    assert biased == pytest.approx(unbiased * 29 / 30, rel=1e-9)
