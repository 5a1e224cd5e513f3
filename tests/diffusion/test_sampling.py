"""The table of a run, guidance, reuse, the loop, and noise that belongs to an image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import Evaluation, ImageNoise, Reuse, evaluations, guided, sample_loop
from diffusion.sampling import Denoiser
from models import ModelOutput
from runtime.seeds import image_seed
from tests.golden_data import arrays, assert_close, tiny_dit
from tests.toys import CLIP, RecordingNetwork, TextToy, Toy

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)

# ----------------------------------------------------------------------------------------------------------------------
# The table


def shown(table: tuple[Evaluation, ...]) -> str:
    """One letter per evaluation: G guided, b both rows evaluated without guidance, . conditional rows alone."""
    return "".join("G" if row.scale != 1 else "b" if row.guided else "." for row in table)


def test_a_table_without_guidance_is_the_samplers_times() -> None:
    table = evaluations(TIMES)
    assert table == tuple(Evaluation(t, 1.0, False, True, True) for t in TIMES)
    assert evaluations(TIMES, 1.0, (200, 600), always_both=True) == table
    assert evaluations(()) == ()


def test_guidance_without_an_interval_is_everywhere() -> None:
    assert evaluations(TIMES, 2.0) == tuple(Evaluation(t, 2.0, guided=True) for t in TIMES)
    assert all(row.guided for row in evaluations(TIMES, 0.0))  # the unconditional output is an extrapolation, too


@pytest.mark.parametrize("interval", [(200, 600), (600, 200)])
def test_an_interval_guides_inside_only_and_its_bounds_come_in_any_order(interval: tuple[float, float]) -> None:
    table = evaluations(TIMES, 2.0, interval)
    assert [row.scale for row in table] == [1, 1, 2, 2, 1]
    assert [row.guided for row in table] == [False, False, True, True, False]
    assert shown(evaluations(TIMES, 2.0, interval, always_both=True)) == "bbGGb"


def test_interval_bounds_are_strict() -> None:
    assert shown(evaluations(TIMES, 2.0, (100, 700))) == "..GG."


def test_interval_bounds_are_compared_in_float32() -> None:
    """In float64 the first and last of these times are inside; the released samplers compare in float32."""
    low, high = 0.1, 0.7
    assert shown(evaluations((high - 1e-12, 0.5, low + 1e-12), 2.0, (low, high))) == ".G."


@pytest.mark.parametrize("interval", [(0.5, 0.5), (float("nan"), 1.0), (0.5, 0.5 + 1e-12)])
def test_an_empty_interval_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"the guidance interval \({interval[0]:g}, {interval[1]:g}\) is empty"):
        evaluations(TIMES, 2.0, interval)


WINDOWS = [
    ((True, True, True, True, True), "..GG."),
    ((True, False, False, True, False), "bbGGb"),  # both windows hold a guided evaluation
    ((True, False, True, False, True), "..GG."),
    ((True, True, False, False, True), ".bGG."),
    ((True, False, False, False, False), "bbGGb"),
]


@pytest.mark.parametrize(("refresh", "expected"), WINDOWS)
def test_a_reuse_window_has_the_unconditional_rows_if_any_of_it_is_guided(
    refresh: tuple[bool, ...], expected: str
) -> None:
    table = evaluations(TIMES, 2.0, (200, 600), refresh)
    assert shown(table) == expected and tuple(row.refresh for row in table) == refresh


@pytest.mark.parametrize(
    ("refresh", "expected"), [((True, True, False, True, False), "...GG"), ((True, False, True, True, False), "...GG")]
)
def test_a_time_visited_twice_keeps_its_own_window(refresh: tuple[bool, ...], expected: str) -> None:
    """As by a two-stage solver: its second stage ends where the next step begins."""
    assert shown(evaluations((900.0, 700.0, 700.0, 300.0, 300.0), 2.0, (200, 600), refresh)) == expected


@pytest.mark.parametrize(
    ("refresh", "message"),
    [
        ((True, False), "the refresh schedule has 2 flags for 5 evaluations"),
        ((True,) * 6, "the refresh schedule has 6 flags for 5 evaluations"),
        ((False, True, True, True, True), "the first evaluation of a refresh schedule must be a refresh"),
    ],
)
def test_refresh_schedules_that_do_not_fit_are_refused(refresh: tuple[bool, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluations(TIMES, refresh=refresh)


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
    denoise = guided(tiny_dit(name), {"y": y}, {"y": y_null}, channels=3 if fixture == "forward_with_cfg" else None)
    out = denoise(x, Evaluation(t, scale, guided=True))
    assert_close(out.sample, golden[f"{fixture}_{scale}"].chunk(2)[0])


@pytest.mark.parametrize("scale", [1.5, 3.0])
@pytest.mark.parametrize("shape", [(4, 8, 8), CLIP])
def test_guidance_is_the_formula_in_closed_form(scale: float, shape: tuple[int, ...]) -> None:
    """D0 + s (D1 - D0): by unconditional rows in one batch, and by a second network."""

    def of_label(y: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        return torch.sin(x * (y + 1).view(-1, *(1,) * (x.ndim - 1))) + t

    calls: list[int] = []

    def network(x: Tensor, t: float | Tensor, *, y: Tensor, state: object = None) -> ModelOutput:
        calls.append(len(x))
        return ModelOutput(of_label(y, x, t), "state")

    x, one, zero = torch.randn(2, *shape), torch.tensor([1, 2]), torch.tensor([0, 5])
    expected = of_label(zero, x, 0.3) + scale * (of_label(one, x, 0.3) - of_label(zero, x, 0.3))
    evaluation = Evaluation(0.3, scale, guided=True)
    by_rows = guided(network, {"y": one}, {"y": zero})(x, evaluation)
    assert_close(by_rows.sample, expected, 1e-6)
    assert calls == [4] and by_rows.state == "state"
    by_second = guided(network, {"y": one}, lambda x, t, state=None: ModelOutput(of_label(zero, x, t), "other"))
    out = by_second(x, evaluation)
    assert_close(out.sample, expected, 1e-6)
    assert calls == [4, 2] and out.state == ("state", "other")


def guided_values(scale: float, channels: int | None, out_channels: int = 8) -> list[float]:
    """Channels of a guided evaluation of a network that says 2 for label 1 and 10 for the unconditional 9."""
    denoise = guided(
        RecordingNetwork(out_channels), {"y": torch.tensor([1])}, {"y": torch.tensor([9])}, channels=channels
    )
    out = denoise(torch.zeros(1, 4, 8, 8), Evaluation(5, scale, guided=True))
    return out.sample[0, :, 0, 0].tolist()


@pytest.mark.parametrize(("channels", "guided_channels"), [(None, 4), (3, 3), (1, 1), (0, 0), (4, 4), (6, 4)])
def test_only_the_leading_channels_of_x_are_guided(channels: int | None, guided_channels: int) -> None:
    # 10 + 3 * (2 - 10) = -14
    expected = [-14.0] * guided_channels + [2.0] * (8 - guided_channels)
    assert guided_values(3.0, channels) == expected


def test_guidance_of_a_network_without_variance_channels() -> None:
    assert guided_values(3.0, None, out_channels=4) == [-14.0] * 4
    assert guided_values(3.0, 3, out_channels=4) == [-14.0] * 3 + [2.0]


def test_scale_zero_is_unconditional_and_scale_one_conditional() -> None:
    assert guided_values(0.0, None) == [10.0] * 4 + [2.0] * 4
    assert guided_values(1.0, None) == [2.0] * 8


def test_outputs_of_half_precision_are_mixed_in_float32() -> None:
    outputs = torch.randn(2, 8, 4, 4).bfloat16()
    cond, null = {"y": torch.tensor([1])}, {"y": torch.tensor([9])}
    denoise = guided(lambda x, t, *, y, state: ModelOutput(outputs), cond, null)
    first, second = outputs.float()[:, :4].chunk(2)
    sample = denoise(torch.zeros(1, 4, 4, 4), Evaluation(5, 1.5, guided=True)).sample
    assert_close(sample[:, :4], second + 1.5 * (first - second), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 7])
def test_text_is_guided_by_unconditional_rows_from_the_data(length: int) -> None:
    network = TextToy()
    text, mask = torch.randn(2, length, 16), (torch.arange(length) < torch.tensor([[2], [3]])).float()
    empty, empty_mask = torch.randn(2, length, 16), (torch.arange(length) < 1).float().expand(2, -1)
    x, cond, null = torch.randn(2, *CLIP), {"text": text, "text_mask": mask}, {"text": empty, "text_mask": empty_mask}
    out = guided(network, cond, null)(x, Evaluation(500, 3.0, guided=True))
    (t, seen), *others = network.seen
    assert not others and t == 500
    assert torch.equal(seen["text"], torch.cat([text, empty]))
    assert torch.equal(seen["text_mask"], torch.cat([mask, empty_mask]))
    first, second = (network(x, 500.0, **rows).sample for rows in (cond, null))
    assert_close(out.sample, second + 3 * (first - second), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance: rows, times and state


def test_an_evaluation_without_guidance_is_the_plain_forward() -> None:
    network = RecordingNetwork(8)
    for null in (None, {"y": torch.tensor([9, 9])}):
        out = guided(network, {"y": torch.tensor([1, 2])}, null)(torch.zeros(2, 4, 8, 8), Evaluation(5))
        assert out.sample.shape == (2, 8, 8, 8) and out.state == 2
    assert network.rows == [2, 2]


@pytest.mark.parametrize("t", [5, 5.0, torch.tensor([5, 6])])
def test_guidance_doubles_the_rows_of_tensors_and_shares_numbers(t: float | Tensor) -> None:
    network = RecordingNetwork(8)
    denoise = guided(network, {"y": torch.tensor([1, 2])}, {"y": torch.tensor([9, 8])})
    out = denoise(torch.zeros(2, *CLIP), Evaluation(t, 2.0, guided=True))
    assert out.sample.shape == (2, 3, 8, 8, 12) and network.rows == [4]
    assert out.sample[:, 0, 0, 0, 0].tolist() == [2 * 2 - 10, 2 * 3 - 9]  # unconditional rows may differ
    seen = network.times[0]
    assert seen.tolist() == [5, 6, 5, 6] if isinstance(seen, Tensor) else seen == 5


def test_rows_that_are_evaluated_but_not_guided_leave_the_conditional_output() -> None:
    network = RecordingNetwork(8)
    denoise = guided(network, {"y": torch.tensor([1])}, {"y": torch.tensor([9])})
    out = denoise(torch.zeros(1, 4, 8, 8), Evaluation(5, 1.0, guided=True))
    assert network.rows == [2] and out.state == 2
    assert out.sample.shape == (1, 8, 8, 8) and (out.sample == 2).all()


def test_a_second_network_gets_its_own_state_and_no_more() -> None:
    first, second = RecordingNetwork(4), RecordingNetwork(4, stateful=False)
    y = torch.tensor([1, 2])
    denoise = guided(first, {"y": y}, lambda x, t, state=None: second(x, t, y=y, state=state))
    x, guided_here = torch.zeros(2, 4, 8, 8), Evaluation(5, 2.0, guided=True)
    out = denoise(x, guided_here)
    assert out.state == (2, None)
    assert denoise(x, guided_here._replace(refresh=False), out.state).state == (2, None)
    assert first.fresh == [True, False] and second.fresh == [True, True]
    first.stateful = False
    assert denoise(x, guided_here).state is None  # nothing to reuse in either


@pytest.mark.parametrize(("times", "seen"), [(None, 0.25), ("unit", 0.25), ("index", 0.75)])
def test_process_times_are_converted_for_the_network(times: Any, seen: float) -> None:
    network = Toy(convention="unit")
    cond, null = {"y": torch.tensor([1])}, network.null_conditioning(1)
    t = 250.0 if times == "index" else 0.25
    for second in (null, lambda x, t, state=None: network(x, t, **null)):
        denoise = guided(network, cond, second, times=times)
        assert denoise.time_convention == (times or "unit")
        for value in (t, torch.tensor([t])):
            network.seen.clear()
            denoise(torch.zeros(1, *CLIP), Evaluation(value))
            denoise(torch.zeros(1, *CLIP), Evaluation(value, 2.0, guided=True))
            assert [float(t.max()) for t, _ in network.seen] == [seen] * len(network.seen)


def test_a_second_network_of_other_times_gets_its_own() -> None:
    first, second = Toy(convention="unit"), Toy(convention="index")
    y = {"y": torch.tensor([1])}

    class Bound:
        time_convention = "index"

        def __call__(self, x: Tensor, t: float, state: object = None) -> ModelOutput:
            return second(x, t, **y)

    guided(first, y, Bound(), times="index")(torch.zeros(1, *CLIP), Evaluation(250.0, 2.0, guided=True))
    assert float(first.seen[0][0]) == 0.75 and float(second.seen[0][0]) == 250


def test_what_cannot_be_evaluated_is_refused() -> None:
    x, y = torch.zeros(2, 4, 8, 8), {"y": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="guidance scale 1.5 needs unconditional rows or a second network"):
        guided(RecordingNetwork(8), y)(x, Evaluation(5, 1.5, guided=True))
    with pytest.raises(ValueError, match="evaluation at 5 does not call the network: it needs a forecast"):
        guided(RecordingNetwork(8), y)(x, Evaluation(5, call=False))


@pytest.mark.parametrize(
    ("cond", "second", "message"),
    [
        ({"text": torch.zeros(2, 3, 4)}, None, "the network has no conditioning 'text'; it takes y"),
        ({"y": torch.zeros(2)}, {}, r"the unconditional rows have \[\], the conditional ones \['y'\]"),
        (
            {"y": torch.zeros(2)},
            {"y": torch.zeros(1)},
            r"the unconditional rows of 'y' have shape \(1,\), the conditional ones \(2,\)",
        ),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(cond: Any, second: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guided(Toy(), cond, second)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


class Idle:
    """A sampler that leaves x alone."""

    def __init__(self, times: tuple[float, ...]) -> None:
        self.times = times

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: object) -> Tensor:
        return x.clone()


class Counting(Idle):
    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: object) -> Tensor:
        return x + 1


@pytest.mark.parametrize(("refresh", "expected"), WINDOWS)
def test_a_run_in_an_interval_reuses_state_of_its_own_rows(refresh: tuple[bool, ...], expected: str) -> None:
    """State made on N rows cannot serve 2 N: the recording network refuses state of other rows."""
    network = RecordingNetwork(8)
    denoise = guided(network, {"y": torch.tensor([1])}, {"y": torch.tensor([9])})
    values: list[float] = []

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        assert out.sample.shape == (1, 8, 4, 4)
        values.append(out.sample[0, 0, 0, 0].item())

    table = evaluations(TIMES, 2.0, (200, 600), refresh)
    sample_loop(denoise, Idle(TIMES), torch.zeros(1, 4, 4, 4), table, on_step=on_step)
    assert values == [2, 2, -6, -6, 2]
    assert network.rows == [1 if letter == "." else 2 for letter in expected]
    assert network.fresh == list(refresh)


def test_rows_evaluated_average_one_plus_the_guided_share() -> None:
    times = tuple(float(t) for t in range(999, -1, -10))
    table = evaluations(times, 2.0, (100, 500))
    share = sum(100 < t < 500 for t in times) / len(times)
    assert sum(1 + row.guided for row in table) / len(times) == 1 + share
    assert 0.3 < share < 0.5


def plain(network: RecordingNetwork) -> Denoiser:
    return guided(network, {"y": torch.tensor([1])})


def test_the_loop_passes_state_on_and_drops_it_at_a_refresh() -> None:
    network, refresh = RecordingNetwork(8), (True, False, True, False, False)
    sample_loop(plain(network), Idle(TIMES), torch.zeros(1, 4, 4, 4), evaluations(TIMES, refresh=refresh))
    assert network.fresh == list(refresh)


def test_without_a_refresh_schedule_nothing_is_reused() -> None:
    network = RecordingNetwork(8)
    sample_loop(plain(network), Idle(TIMES), torch.zeros(1, 4, 4, 4), evaluations(TIMES))
    assert network.fresh == [True] * 5


def test_a_cache_is_empty_at_the_start_of_a_run_and_may_reuse_something_else() -> None:
    network, cache = RecordingNetwork(8), Reuse()
    run, x = evaluations(TIMES, refresh=(True, False, False, False, False)), torch.zeros(1, 4, 4, 4)
    sample_loop(plain(network), Idle(TIMES), x, run, cache=cache)
    assert cache.get(run[1]) == 1 and cache.get(run[0]) is None
    cache.put(run[0], ModelOutput(x, state="of another run"))  # which the recording network would refuse
    sample_loop(plain(network), Idle(TIMES), x, run, cache=cache)
    calls: list[str] = []

    class Never(Reuse):
        def clear(self) -> None:
            calls.append("clear")

        def get(self, evaluation: Evaluation, /) -> None:
            calls.append(f"get {evaluation.t:g}")

        def put(self, evaluation: Evaluation, output: ModelOutput, /) -> None:
            calls.append(f"put {output.state}")

    sample_loop(plain(network), Idle(TIMES[:2]), x, run[:2], cache=Never())
    assert calls == ["clear", "get 900", "put 1", "get 700", "put 1"]
    assert network.fresh[-2:] == [True, True]


def test_the_loop_evaluates_the_table_and_reports_every_step() -> None:
    asked: list[tuple[Evaluation, float]] = []
    seen: list[tuple[int, float, float]] = []

    def denoise(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
        asked.append((evaluation, x.item()))
        return ModelOutput(x * 10)

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        seen.append((i, x.item(), out.sample.item()))

    run = evaluations((7, 0.5, 3))
    x = sample_loop(denoise, Counting((7, 0.5, 3)), torch.zeros(1, 1, 1, 1), run, on_step=on_step)
    assert asked == [(run[0], 0), (run[1], 1), (run[2], 2)]
    assert seen == [(0, 1, 0), (1, 2, 10), (2, 3, 20)]
    assert x.item() == 3


def test_a_tensor_from_the_hook_replaces_x() -> None:
    seen: list[float] = []

    def denoise(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
        seen.append(x.item())
        return ModelOutput(x)

    def on_step(i: int, x: Tensor, out: ModelOutput) -> Tensor | None:
        return 100 * x if i == 1 else None

    x = sample_loop(denoise, Counting(TIMES[:3]), torch.zeros(1, 1, 1, 1), evaluations(TIMES[:3]), on_step=on_step)
    assert seen == [0, 1, 200] and x.item() == 201


def test_the_loop_records_no_gradients() -> None:
    class Following(Idle):
        def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: object) -> Tensor:
            return x + sample

    weight = torch.ones(1, requires_grad=True)
    run = evaluations((1,))
    x = sample_loop(lambda x, e, state: ModelOutput(x + weight), Following((1,)), torch.zeros(1, 1, 1, 1), run)
    assert x.item() == 1 and not x.requires_grad


def with_convention(sampler: Idle, convention: str) -> Any:
    sampler.time_convention = convention  # type: ignore[attr-defined]
    return sampler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Idle(TIMES), evaluations(TIMES)[:4]), "the run has 4 evaluations, the sampler 5"),
        (
            lambda: (Idle(TIMES[:4]), evaluations(TIMES, refresh=(True, False, True, True, True))[1:]),
            "the first evaluation of a run must be a refresh",
        ),
        (
            lambda: (with_convention(Idle(TIMES), "unit"), evaluations(TIMES)),
            r"the sampler's times are in 'unit' and `denoise` expects 'index'; give guided\(\.\.\., times=sampler",
        ),
    ],
)
def test_runs_that_do_not_fit_are_refused(make: Callable[[], tuple[Any, Any]], message: str) -> None:
    sampler, run = make()
    network = Toy()
    with pytest.raises(ValueError, match=message):
        sample_loop(guided(network, {"y": torch.tensor([1])}), sampler, torch.zeros(1, *CLIP), run)
    assert not network.seen


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


def test_noise_of_clips_has_their_shape() -> None:
    noise = ImageNoise(0, [3, 4], CLIP)
    x = noise.initial()
    assert x.shape == noise(x).shape == (2, *CLIP) and not torch.equal(x, noise(x))


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
    with pytest.raises(ValueError, match=rf"image index must be in \[0, 2\^32\), not {index}"):
        ImageNoise(0, [index], SHAPE)
