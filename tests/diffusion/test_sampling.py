"""Guidance, reuse windows, the loop, and noise that belongs to an image."""

import pytest
import torch
from torch import Tensor

from diffusion import ImageNoise, guided, sample_loop
from diffusion.sampling import Denoise, check_refresh
from models import ModelOutput
from runtime.seeds import image_seed
from tests.golden_data import arrays, assert_close, tiny_dit
from tests.networks import RecordingNetwork

# ----------------------------------------------------------------------------------------------------------------------
# Guidance: values


@torch.no_grad()
@pytest.mark.parametrize("fixture", ["forward_with_cfg", "forward_cfg_all_channels"])
@pytest.mark.parametrize("scale", [4.0, 1.5])
@pytest.mark.parametrize("name", ["tiny_p2", "tiny_p4_nosigma"])
@pytest.mark.parametrize("doubled_batch", ["cfg_x", "cfg_x_second_half_differs"])
def test_guidance_equals_the_recorded_one(name: str, fixture: str, scale: float, doubled_batch: str) -> None:
    inputs, golden = arrays(f"dit/{name}/inputs"), arrays(f"dit/{name}/outputs")
    (y, y_null), x, t = inputs["cfg_y"].chunk(2), inputs[doubled_batch].chunk(2)[0], inputs["cfg_t"].chunk(2)[0]
    channels = 3 if fixture == "forward_with_cfg" else None
    out = guided(tiny_dit(name), y, y_null, scale, channels)(x, t, None)
    assert_close(out.sample, golden[f"{fixture}_{scale}"].chunk(2)[0])


def denoised(scale: float, channels: int | None, out_channels: int = 8) -> Tensor:
    """One guided evaluation of a network that says 2 for label 1 and 10 for the null class 9; (8,) channel values."""
    denoise = guided(RecordingNetwork(out_channels), torch.tensor([1]), 9, scale, channels)
    return denoise(torch.zeros(1, 4, 8, 8), 5, None).sample[0, :, 0, 0]


@pytest.mark.parametrize(("channels", "guided_channels"), [(None, 4), (3, 3), (1, 1), (0, 0), (4, 4), (6, 4)])
def test_only_the_leading_channels_of_x_are_guided(channels: int | None, guided_channels: int) -> None:
    # 10 + 3 * (2 - 10) = -14
    expected = [-14.0] * guided_channels + [2.0] * (8 - guided_channels)
    assert denoised(3.0, channels).tolist() == expected


def test_guidance_of_a_network_without_variance_channels() -> None:
    assert denoised(3.0, None, out_channels=4).tolist() == [-14.0] * 4
    assert denoised(3.0, 3, out_channels=4).tolist() == [-14.0] * 3 + [2.0]


def test_scale_zero_is_unconditional() -> None:
    assert denoised(0.0, None).tolist() == [10.0] * 4 + [2.0] * 4


def test_a_null_class_may_differ_per_row() -> None:
    denoise = guided(RecordingNetwork(4), torch.tensor([1, 2]), torch.tensor([9, 8]), 2.0)
    sample = denoise(torch.zeros(2, 4, 8, 8), 5, None).sample
    assert sample[:, 0, 0, 0].tolist() == [2 * 2 - 10, 2 * 3 - 9]


def test_halves_of_a_half_precision_network_are_mixed_in_float32() -> None:
    outputs = torch.randn(2, 8, 4, 4).bfloat16()
    denoise = guided(lambda x, t, y, state: ModelOutput(outputs), torch.tensor([1]), 9, 1.5)
    conditional, null = outputs.float()[:, :4].chunk(2)
    sample = denoise(torch.zeros(1, 4, 4, 4), 5, None).sample
    assert_close(sample[:, :4], null + 1.5 * (conditional - null), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance: cost


def test_scale_one_is_the_plain_forward_and_needs_no_null_class() -> None:
    network = RecordingNetwork(8)
    out = guided(network, torch.tensor([1, 2]), None, 1.0)(torch.zeros(2, 4, 8, 8), 5, None)
    assert network.rows == [2]
    assert out.sample.shape == (2, 8, 8, 8) and out.state == 2


def test_guidance_doubles_the_rows_of_tensors_and_shares_numbers() -> None:
    network = RecordingNetwork(8)
    denoise = guided(network, torch.tensor([1, 2]), 9, 1.5)
    for t in (5, 5.0, torch.tensor([5, 5])):
        assert denoise(torch.zeros(2, 4, 8, 8), t, None).sample.shape == (2, 8, 8, 8)
    assert network.rows == [4, 4, 4]


def test_guidance_without_a_null_class_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance scale 1.5 needs a null class"):
        guided(RecordingNetwork(8), torch.tensor([1]), None, 1.5)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance interval. Times run from noise to data; a network without state and one with it

TIMES = (900, 700, 500, 300, 100)


class Idle:
    """A sampler that leaves x alone."""

    def __init__(self, times: tuple[float, ...]) -> None:
        self.times = times

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: object) -> Tensor:
        return x.clone()


def evaluated(
    network: RecordingNetwork,
    interval: tuple[float, float],
    refresh: tuple[bool, ...] | None,
    times: tuple[float, ...] = TIMES,
) -> list[float]:
    """Runs the loop on one image; returns the first channel of every evaluation (2: plain; -6: guided at scale 2)."""
    denoise = guided(network, torch.tensor([1]), 9, 2.0, None, interval, times, refresh)
    values: list[float] = []

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        assert out.sample.shape == (1, 8, 4, 4)
        values.append(out.sample[0, 0, 0, 0].item())

    sample_loop(denoise, Idle(times), torch.zeros(1, 4, 4, 4), refresh, on_step=on_step)
    return values


def test_an_interval_guides_only_inside_and_evaluates_one_half_outside() -> None:
    network = RecordingNetwork(8, stateful=False)
    assert evaluated(network, (200, 600), None) == [2, 2, -6, -6, 2]
    assert network.rows == [1, 1, 2, 2, 1]


def test_interval_bounds_are_strict() -> None:
    network = RecordingNetwork(8, stateful=False)
    assert evaluated(network, (100, 700), None) == [2, 2, -6, -6, 2]


def test_interval_bounds_are_compared_in_float32() -> None:
    """In float64 the first and last of these times lie inside; the released samplers compare in float32."""
    low, high = 0.1, 0.7
    times = (high - 1e-12, 0.5, low + 1e-12)
    network = RecordingNetwork(8, stateful=False)
    assert evaluated(network, (low, high), None, times) == [2, -6, 2]
    assert network.rows == [1, 2, 1]


@pytest.mark.parametrize(
    ("refresh", "rows"),
    [
        ((True, True, True, True, True), [1, 1, 2, 2, 1]),
        ((True, False, False, True, False), [2, 2, 2, 2, 2]),  # both windows hold a guided evaluation
        ((True, False, True, False, True), [1, 1, 2, 2, 1]),
        ((True, True, False, False, True), [1, 2, 2, 2, 1]),
        ((True, False, False, False, False), [2, 2, 2, 2, 2]),
    ],
)
def test_a_reuse_window_runs_both_halves_if_any_of_it_is_guided(refresh: tuple[bool, ...], rows: list[int]) -> None:
    """State made on N rows cannot serve 2 N: the recording network refuses state of other rows."""
    network = RecordingNetwork(8)
    assert evaluated(network, (200, 600), refresh) == [2, 2, -6, -6, 2]
    assert network.rows == rows
    assert network.fresh == list(refresh)


def test_a_network_without_state_evaluates_both_halves_only_where_they_are_used() -> None:
    network = RecordingNetwork(8, stateful=False)
    assert evaluated(network, (200, 600), (True, False, False, True, False)) == [2, 2, -6, -6, 2]
    assert network.rows[1:] == [1, 2, 2, 1]


@pytest.mark.parametrize("refresh", [(True, True, False, True, False), (True, False, True, True, False)])
def test_a_time_visited_twice_keeps_its_own_window(refresh: tuple[bool, ...]) -> None:
    """As by a two-stage solver, whose second stage ends where the next step begins."""
    times = (900, 700, 700, 300, 300)
    network = RecordingNetwork(8)
    assert evaluated(network, (200, 600), refresh, times) == [2, 2, 2, -6, -6]
    assert network.fresh == list(refresh)
    assert network.rows[3:] == [2, 2]


def test_rows_evaluated_average_one_plus_the_guided_share() -> None:
    times = tuple(range(999, -1, -10))
    network = RecordingNetwork(8, stateful=False)
    interval = (100, 500)
    share = sum(interval[0] < t < interval[1] for t in times) / len(times)
    evaluated(network, interval, None, times)
    assert sum(network.rows) / len(times) == 1 + share
    assert 0.3 < share < 0.5


def test_an_interval_without_times_is_refused() -> None:
    with pytest.raises(ValueError, match="a guidance interval needs the sampler's times"):
        guided(RecordingNetwork(8), torch.tensor([1]), 9, 2.0, None, (200, 600))


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def network_bound(network: RecordingNetwork) -> Denoise:
    return guided(network, torch.tensor([1]), None, 1.0)


def test_the_loop_hands_state_on_and_drops_it_at_a_refresh() -> None:
    network = RecordingNetwork(8)
    sample_loop(network_bound(network), Idle(TIMES), torch.zeros(1, 4, 4, 4), (True, False, True, False, False))
    assert network.fresh == [True, False, True, False, False]


def test_without_a_refresh_schedule_nothing_is_reused() -> None:
    network = RecordingNetwork(8)
    sample_loop(network_bound(network), Idle(TIMES), torch.zeros(1, 4, 4, 4))
    assert network.fresh == [True] * 5


def test_the_loop_evaluates_at_the_samplers_times_and_reports_every_step() -> None:
    asked: list[tuple[float | Tensor, float]] = []
    seen: list[tuple[int, float, float]] = []

    class Counting(Idle):
        def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: object) -> Tensor:
            return x + 1

    def denoise(x: Tensor, t: float | Tensor, state: None = None, /) -> ModelOutput:
        asked.append((t, x.item()))
        return ModelOutput(x * 10)

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        seen.append((i, x.item(), out.sample.item()))

    x = sample_loop(denoise, Counting((7, 0.5, 3)), torch.zeros(1, 1, 1, 1), on_step=on_step)
    assert asked == [(7, 0), (0.5, 1), (3, 2)]
    assert seen == [(0, 1, 0), (1, 2, 10), (2, 3, 20)]
    assert x.item() == 3


def test_the_loop_records_no_gradients() -> None:
    class Following(Idle):
        def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: object) -> Tensor:
            return x + sample

    weight = torch.ones(1, requires_grad=True)
    x = sample_loop(lambda x, t, state: ModelOutput(x + weight), Following((1,)), torch.zeros(1, 1, 1, 1))
    assert x.item() == 1 and not x.requires_grad


@pytest.mark.parametrize(
    ("refresh", "message"),
    [
        ((True, False), "the refresh schedule has 2 flags for 3 evaluations"),
        ((True,) * 4, "the refresh schedule has 4 flags for 3 evaluations"),
        ((False, True, True), "the first evaluation of a refresh schedule must be a refresh"),
    ],
)
def test_refresh_schedules_that_do_not_fit_are_refused(refresh: tuple[bool, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_refresh(refresh, 3)
    with pytest.raises(ValueError, match=message):
        sample_loop(network_bound(RecordingNetwork(8)), Idle((3, 2, 1)), torch.zeros(1, 4, 4, 4), refresh)
    with pytest.raises(ValueError, match=message):
        guided(RecordingNetwork(8), torch.tensor([1]), 9, 2.0, None, (0, 5), (3, 2, 1), refresh)


def test_refresh_schedules_that_fit_are_accepted() -> None:
    check_refresh(None, 3)
    check_refresh((), 0)
    check_refresh((True, False, False), 3)


# ----------------------------------------------------------------------------------------------------------------------
# Noise of numbered images

SHAPE = (4, 8, 8)


def dealt(indices: list[int], seed: int = 0, steps: int = 20) -> Tensor:
    """All noise of these images: (N, 1 + steps, C, H, W), the starting noise first."""
    noise = ImageNoise(seed, indices, SHAPE)
    x = noise.initial()
    return torch.stack([x, *(noise(x).clone() for _ in range(steps))], dim=1)


def test_noise_does_not_depend_on_how_images_are_batched() -> None:
    whole = dealt([7, 8, 9, 40_000])
    assert torch.equal(whole, torch.cat([dealt([7]), dealt([8, 9]), dealt([40_000])]))
    assert torch.equal(whole.flip(0), dealt([40_000, 9, 8, 7]))


def test_the_order_of_an_images_numbers_never_changes() -> None:
    """Samples of earlier versions depend on it: the starting noise, then 16 steps at a time."""
    generator = torch.Generator().manual_seed(image_seed(3, 7))
    blocks = [torch.randn(SHAPE, generator=generator)[None]]
    blocks += [torch.empty(16, *SHAPE).normal_(generator=generator) for _ in range(2)]
    assert torch.equal(dealt([7], seed=3, steps=32)[0], torch.cat(blocks))


def test_noise_depends_on_the_seed_and_never_repeats() -> None:
    # 1 + 20 steps: across a refill of the buffer. A repeated draw would make two rows equal.
    draws = torch.cat([dealt([0, 1, 2]), dealt([0, 1, 2], seed=1)]).flatten(0, 1).flatten(1)
    assert draws.unique(dim=0).shape[0] == 2 * 3 * 21


def test_noise_is_standard_normal() -> None:
    noise = ImageNoise(0, range(50), SHAPE)
    x = noise.initial()
    draws = torch.stack([x, *(noise(x).clone() for _ in range(20))])  # 268,800 numbers
    for values in (draws[0], draws[1:], draws[:, :, 0]):
        error = len(values.flatten()) ** -0.5
        assert abs(values.mean()) < 4 * error
        assert abs(values.var() - 1) < 4 * 2**0.5 * error
        assert abs((values**4).mean() - 3) < 4 * 96**0.5 * error
    # Neither neighbouring images nor neighbouring steps know of each other.
    for pairs in (draws[:, 1:] * draws[:, :-1], draws[1:] * draws[:-1]):
        assert abs(pairs.mean()) < 4 * len(pairs.flatten()) ** -0.5


def test_noise_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    dealt([0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cpu_generator_reads_the_low_half_of_a_seed_only() -> None:
    """Why `image_seed` is more than a hash (tests/runtime/test_seeds.py); if this fails, it may become one."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(8, generator=first), torch.randn(8, generator=second))


def test_jobs_of_different_seeds_share_no_image() -> None:
    low = [{image_seed(seed, i) & 0xFFFFFFFF for i in range(20_000)} for seed in range(4)]
    assert len(set.union(*low)) == 4 * 20_000


@pytest.mark.parametrize("index", [-1, 2**32])
def test_image_numbers_outside_32_bits_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match=rf"image index must lie in \[0, 2\^32\), not {index}"):
        ImageNoise(0, [index], SHAPE)
