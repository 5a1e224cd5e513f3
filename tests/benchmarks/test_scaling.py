"""The plan's arithmetic against tensors without values, measurements, closed forms, and a minimum found by search."""

import json
import math

import pytest
from torch._subclasses import FakeTensorMode

from benchmarks import scaling
from benchmarks.scaling import NETWORKS, RECORDED, Size, network_size
from runtime.distributed import World
from tests.runs import CPU, open_setup
from training.dry_run import predict_memory

SIZE = Size(parameters=800, macs=10, depth=4, kept=100, recomputed=10)


def test_networks_have_the_sizes_of_their_names() -> None:
    xl2, middle, large = map(network_size, NETWORKS)
    assert (xl2.parameters, xl2.macs) == (675_129_632, 118_621_421_568)
    assert round(middle.parameters / 1e9) == 3 and round(large.parameters / 1e9) == 20
    for size in (middle, large):  # 12 matrices in attention and MLP, and 6 of the modulation, which see one token
        assert size.parameters == pytest.approx(size.macs / 256 * 18 / 12, rel=0.06)


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_activations_are_those_of_the_dry_run(recompute: bool) -> None:
    """The slope over the batch, where weights and their casts do not count; the loss keeps some values more."""
    argv = "--dataset digits --model DiT-digits/2 --device cpu --num-workers 0 --precision bf16".split()
    argv += "--hidden-size 384 --num-heads 6 --depth 6".split()
    argv += ["--grad-checkpointing"] * recompute
    kept = []
    for batch in ("8", "16"):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        setup = open_setup(*argv, "--global-batch-size", batch, fake=fake)
        kept.append(predict_memory(setup, World(0, 1, CPU.device), fake)["kept for the backward pass"])
    config = {"sample_shape": (1, 8, 8), "hidden_size": 384, "num_heads": 6, "num_classes": 10, "depth": 6}
    config["learn_sigma"] = False
    assert (kept[1] - kept[0]) / 8 == pytest.approx(scaling.kept_bytes(config, recompute=recompute), rel=0.05)


def test_kept_activations_of_the_largest_follow_from_two_depths() -> None:
    config = {"hidden_size": 64, "num_heads": 4, "sample_shape": (4, 8, 8)}
    one, two, six = (scaling.kept_bytes({**config, "depth": depth}) for depth in (1, 2, 6))
    assert six == one + 5 * (two - one)


def test_kept_activations_agree_with_memory_measured_on_a_gpu() -> None:
    rows = {row["name"]: row for row in json.loads(RECORDED.read_text())["rows"]}
    measured = (rows["bf16, batch 256"]["memory"] - rows["bf16, batch 32"]["memory"]) / 224
    assert network_size("XL/2").kept == pytest.approx(measured, rel=0.02)


def test_steps_agree_with_those_measured_on_a_gpu() -> None:
    size = network_size("XL/2")
    for batch, seconds in scaling.recorded().step.items():
        planned = scaling.compute_seconds(size, batch, recompute=False)
        planned += scaling.optimizer_seconds(size, "DDP", 1, "H200")
        assert planned == pytest.approx(seconds, rel=0.1)
    assert planned == pytest.approx(seconds)  # the largest batch, from which the rate comes


def test_memory_is_divided_among_those_that_share_it() -> None:
    assert scaling.state_bytes(SIZE, "DDP", 64) == 22 * 800
    assert scaling.state_bytes(SIZE, "FSDP", 64) == 20 * 800 / 64 + 10 * 200
    assert scaling.state_bytes(SIZE, "HSDP", 64) == scaling.state_bytes(SIZE, "FSDP", 8)
    assert scaling.images_that_fit(network_size("20B"), "DDP", 4096, recompute=True) == 0


def test_traffic_is_that_of_rings_and_trees() -> None:
    size = SIZE._replace(parameters=10**9)
    inside = scaling.traffic(size, "DDP", 8)
    assert inside.sent == 2 * 7 / 8 * 4e9 and inside.seconds == pytest.approx(7e9 / 360e9)
    assert scaling.traffic(size, "FSDP", 8) == scaling.traffic(size, "HSDP", 8) == inside
    far = scaling.traffic(size, "FSDP", 64)
    assert far.seconds == pytest.approx(63 / 64 * 8e9 / 320e9 + 3 * 4 * 7 * 5e-6)
    both = scaling.traffic(size, "HSDP", 64)
    assert both.sent == 7e9 + 2 * 7 / 8 * 0.5e9
    assert both.seconds == pytest.approx(max(7e9 / 360e9, 2 * 7 / 8 * 0.5e9 / 40e9 + 4 * 6 * 5e-6))


@pytest.mark.parametrize("parallel", ["DDP", "FSDP", "HSDP"])
def test_bounds_of_the_mfu_enclose_and_meet_where_communication_is_hidden(parallel: scaling.Parallel) -> None:
    size = network_size("XL/2")
    hiding = scaling.hiding_images(size, parallel, 512)
    assert scaling.compute_seconds(size, hiding - 1, recompute=False) < scaling.traffic(size, parallel, 512).seconds
    low, high = scaling.mfu_bounds(size, parallel, 512, hiding)
    assert 0 < low < high < scaling.recorded().rate / scaling.PEAK
    assert high == pytest.approx(scaling.mfu_bounds(size, parallel, 512, 10**6)[1], rel=0.5)


@pytest.mark.parametrize(("pause", "to_failure"), [(0.1, 1e5), (30.0, 4e4), (300.0, 3600.0), (1500.0, 3600.0)])
def test_dalys_interval_loses_least(pause: float, to_failure: float) -> None:
    """Against a search over his exact model, in which no series was cut."""
    tried = [to_failure * 1.002**-k for k in range(-500, 5000)]
    best = min(tried, key=lambda interval: scaling.lost_share(interval, pause, to_failure))
    least = scaling.lost_share(best, pause, to_failure)
    actual = scaling.lost_share(scaling.daly(pause, to_failure), pause, to_failure)
    assert actual == pytest.approx(least, rel=1e-3)
    if pause < to_failure / 1000:
        assert scaling.young(pause, to_failure) == pytest.approx(best, rel=0.03)
        share = math.sqrt(2 * pause / to_failure) + scaling.RESTART / to_failure
        assert least == pytest.approx(share, rel=0.05)


def test_samples_take_as_long_as_the_busiest_gpu() -> None:
    size = network_size("XL/2")
    one, two, many = (scaling.sampling_seconds(size, "DDIM-50", gpus, images=320) for gpus in (1, 3, 4096))
    assert (one / two, one / many) == (pytest.approx(10 / 4), pytest.approx(10))
    decoding = 320 * scaling.DECODE / (0.35 * scaling.PEAK)
    assert one == pytest.approx(320 / 19.0478 + decoding, rel=1e-4)
