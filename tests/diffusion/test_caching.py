"""Refresh schedules: every n-th, Skip-Cache's recorded policy and trajectories, and the cheapest."""

from collections.abc import Iterator
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import (
    AncestralSampler,
    DDIMSampler,
    Evaluation,
    FlowMatching,
    HeunSampler,
    create_diffusion,
    evaluations,
    guided,
    sample_loop,
    skip_cache,
)
from diffusion.caching import (
    CLASS_TO_IMAGE,
    CacheSchedule,
    cheapest,
    every_nth,
    reuse_cost,
    sharing_budget,
    skip_cache_flags,
)
from diffusion.sampling import Sampler
from models import ModelOutput, SkipDiT, TimeConvention, create_model
from tests.golden_data import arrays, assert_close, table
from tests.golden_skip_dit import CASES, RECORDED_CACHE_DEPTH, recorded_network

POLICIES = {case: table(f"skip_dit/{case}/policy") for case in CASES}
# With depth 6 the official code keeps 2 x 4 of 6 blocks: all run, and stale tokens still replace fresh ones. Refused
# here (cache_depth 4 must lie in 1..3), so there is nothing to compare.
DEGENERATE = ("c2i_d6", "ddpm_N2")
RUNS = [(case, tag) for case in CASES for tag in POLICIES[case] if (case, tag) != DEGENERATE]
RECORDED = [run for run in RUNS if not run[1].startswith("long")]
OFFICIAL_COSTS = table("skip_dit/official_xl2_skip_keys")["schedule_cost"]
OTHER_BOUNDS = table("skip_dit/counts_t_high_900_tail_below_50")


def of_times(times: tuple[float, ...], convention: TimeConvention = "index") -> Any:
    """Stands in for a sampler where only its times matter."""
    return SimpleNamespace(times=times, time_convention=convention)


KEEPS_STATE: Any = SimpleNamespace(keeps_state=True)


def sampler_of(tag: str) -> Sampler:
    """The sampler that a tag such as "ddpm_N2" or "long_ddim_N3" was recorded with."""
    spec = "ddim100" if tag.startswith("long") else "12"
    return (AncestralSampler if "ddpm" in tag else DDIMSampler)(create_diffusion(), spec)


def refresh_of(tag: str, network: SkipDiT, sampler: Sampler) -> tuple[bool, ...] | None:
    """Its refresh schedule; None if nothing was cached."""
    return None if tag.endswith("nocache") else skip_cache(network, sampler, int(tag.split("_N")[1]))


def network_of(case: str) -> SkipDiT:
    depth = table(f"skip_dit/{case}/config")["model"]["depth"]
    return recorded_network(case, cache_depth=min(RECORDED_CACHE_DEPTH, depth // 2))


def blocks_by_evaluation(network: SkipDiT) -> list[list[int]]:
    """A list that fills with the blocks that ran, one list per evaluation."""
    ran: list[list[int]] = []
    network.register_forward_pre_hook(lambda *_: ran.append([]))
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, i=i: ran[-1].append(i))
    return ran


# ----------------------------------------------------------------------------------------------------------------------
# The recorded runs


@pytest.mark.parametrize(("case", "tag"), RUNS)
def test_the_same_blocks_run_at_the_same_times_as_recorded(case: str, tag: str) -> None:
    network, sampler, policy = network_of(case), sampler_of(tag), POLICIES[case][tag]
    ran = blocks_by_evaluation(network)
    times: list[float] = []
    refresh = refresh_of(tag, network, sampler)

    def denoise(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
        times.append(evaluation.t)
        return network(x, evaluation.t, y=torch.tensor([1]), state=state)

    sample_loop(denoise, sampler, torch.zeros(1, 4, 8, 8), evaluations(sampler.times, refresh=refresh))
    assert times == [step["t"] for step in policy]
    assert ran == [step["blocks"] for step in policy]
    if refresh is not None:
        assert ["full" if fresh else "cached" for fresh in refresh] == [step["mode"] for step in policy]
        assert {len(blocks) for blocks, fresh in zip(ran, refresh, strict=True) if not fresh} == {8}


@pytest.mark.parametrize(("case", "tag"), RECORDED)
def test_trajectories_equal_the_recorded_ones(case: str, tag: str) -> None:
    golden, network, sampler = arrays(f"skip_dit/{case}/io"), network_of(case), sampler_of(tag)
    rows = len(golden["traj.y"]) // 2  # the official loop carries the unconditional rows along
    y, y_null = golden["traj.y"].chunk(2)
    noises: Iterator[Tensor] = iter(golden["traj.noise"][:, :rows])
    path: list[Tensor] = []
    outputs: list[ModelOutput] = []

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        path.append(x)
        outputs.append(out)

    scale = table(f"skip_dit/{case}/config")["cfg_scale"]
    final = sample_loop(
        guided(network, {"y": y}, {"y": y_null}, channels=3),
        sampler,
        golden["traj.x_T"][:rows],
        evaluations(sampler.times, scale, refresh=refresh_of(tag, network, sampler)),
        noise_fn=lambda x: next(noises),
        on_step=on_step,
    )
    recorded = {name.removeprefix(f"traj.{tag}."): golden[name] for name in golden if name.startswith(f"traj.{tag}.")}
    assert_close(torch.stack([out.sample for out in outputs]), recorded["model_out"][:, :rows])
    assert_close(final, recorded["final"][:rows])
    last = create_diffusion("12").pred_xstart(outputs[-1].sample, path[-2], 0)
    assert_close(last, recorded["pred_xstart_last"][:rows])
    if "cache_after_first_step" in recorded:
        assert_close(outputs[0].state, recorded["cache_after_first_step"])  # of both rows


@pytest.fixture(scope="module")
def skip_dit_xl() -> SkipDiT:
    with torch.device("meta"):
        return create_model("Skip-DiT-XL/2")


@pytest.mark.parametrize("key", OFFICIAL_COSTS)
def test_the_published_counts_of_refreshes_are_met(key: str, skip_dit_xl: SkipDiT) -> None:
    steps, interval = key.split("_N")
    refresh = skip_cache(skip_dit_xl, AncestralSampler(create_diffusion(), steps), int(interval))
    official = OFFICIAL_COSTS[key]
    assert (sum(refresh), len(refresh) - sum(refresh)) == (official["full"], official["cached"])


@pytest.mark.parametrize("key", OTHER_BOUNDS)
def test_the_rule_with_other_bounds_equals_the_recorded_one(key: str) -> None:
    """The video networks refresh at every step from t = 900 up, and their low times leave the bound out."""
    _, steps, interval = key.split("_")
    times = AncestralSampler(create_diffusion(), steps).times
    schedule = CacheSchedule(t_high=900, t_low=50, low_inclusive=False)
    flags = skip_cache_flags(times, int(interval.removeprefix("N")), schedule)
    assert [t for t, fresh in zip(times, flags, strict=True) if fresh] == OTHER_BOUNDS[key]["full_t"]
    assert (sum(flags), len(flags) - sum(flags)) == (OTHER_BOUNDS[key]["full_steps"], OTHER_BOUNDS[key]["cached_steps"])


# ----------------------------------------------------------------------------------------------------------------------
# The rule


def shown(flags: tuple[bool, ...]) -> str:
    return "".join(".F"[flag] for flag in flags)


@pytest.mark.parametrize(
    ("times", "interval", "expected"),
    [
        ((900, 800, 700, 600, 500), 1, "FFFFF"),
        ((900, 800, 700, 600, 500), 2, "F.F.F"),
        ((900, 800, 700, 600, 500), 9, "F...."),
        ((60, 40, 20, 10, 0), 3, "F..FF"),  # the first low one is cached, all after it are not
        ((80, 60, 40, 20, 10, 0), 3, "F..FFF"),  # the first low one is a refresh by count
        ((60, 40, 21, 20.5, 20), 5, "F...."),  # the bound is low, nothing above it is
        ((60, 20, 19, 0), 2, "F.FF"),
        ((20, 0), 6, "FF"),  # nothing but low times
        ((999,), 3, "F"),
        ((), 3, ""),
    ],
)
def test_phase(times: tuple[float, ...], interval: int, expected: str) -> None:
    assert shown(skip_cache_flags(times, interval)) == expected


def test_forced_refreshes_count_like_all_others() -> None:
    """So the phase is that of the first evaluation, whatever happens above t_high."""
    times = (950, 900, 850, 800, 750, 700, 650)
    assert shown(skip_cache_flags(times, 3, CLASS_TO_IMAGE._replace(t_high=900))) == "FF.F..F"
    assert shown(skip_cache_flags(times, 3, CLASS_TO_IMAGE._replace(t_high=800))) == "FFFF..F"


def test_the_low_bound_can_be_left_out() -> None:
    times, schedule = (60, 50, 40, 30), CLASS_TO_IMAGE._replace(t_low=50)
    assert shown(skip_cache_flags(times, 4, schedule)) == "F.FF"
    assert shown(skip_cache_flags(times, 4, schedule._replace(low_inclusive=False))) == "F..F"


def test_flow_times_are_read_as_timesteps() -> None:
    """From pure noise (0, timestep 1000) towards data (1, timestep 0): low times start at 0.98."""
    times = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
    assert shown(skip_cache(KEEPS_STATE, of_times(times, "unit"), 4)) == "F...F..FF"


@pytest.mark.parametrize("interval", [1, 2, 3, 6])
def test_the_same_timesteps_refresh_in_either_convention(interval: int) -> None:
    for steps in ("7", "12", "50", "250", "ddim50"):
        sampler = DDIMSampler(create_diffusion(), steps)
        by_index = skip_cache(KEEPS_STATE, sampler, interval)
        in_units = of_times(tuple(1 - t / 1000 for t in sampler.times), "unit")
        assert by_index == skip_cache(KEEPS_STATE, in_units, interval) and by_index[0]


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_below_one_is_refused(interval: int) -> None:
    for refresh in (lambda: skip_cache(KEEPS_STATE, of_times((900.0, 0.0)), interval), lambda: every_nth(10, interval)):
        with pytest.raises(ValueError, match=f"the refresh interval must be at least 1, not {interval}"):
            refresh()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("DiT-debug/2", "give --cache-depth B, the blocks at an end that run when state is reused, or leave"),
        ("DyDiT-debug/2", "no setting makes it; leave this flag out"),
        ("IDiT-debug/2", "no setting makes it; leave this flag out"),
    ],
)
def test_a_network_that_keeps_nothing_is_refused_with_its_family_s_remedy(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"^this network keeps nothing to reuse; {remedy}"):
        skip_cache(create_model(name), of_times((900.0, 0.0)), 2)


def test_a_dit_keeps_state_where_it_has_a_cache_depth() -> None:
    assert skip_cache(create_model("DiT-debug/2", cache_depth=1), of_times((900.0, 0.0)), 2) == (True, False)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (DDIMSampler(create_diffusion(), "5", reverse=True), "from 0 to 250"),
        (of_times((999.0, 500.0, 500.0, 250.0, 250.0)), "from 500 to 500"),  # two evaluations a step
        (HeunSampler(FlowMatching(), 2, exact=True), "from 500 to 500"),
        (of_times((999.0, float("nan"), 0.0)), "from 999 to nan"),
    ],
)
def test_a_sampler_that_the_rule_does_not_fit_is_refused(sampler: Any, words: str) -> None:
    message = f"evaluates the network once a step, from noise to image; here the timestep changes {words}"
    with pytest.raises(ValueError, match=message):
        skip_cache(KEEPS_STATE, sampler, 2)


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    """State belongs to the loop: a run that stops half-way, of another batch size, does not touch the next."""
    network, sampler = network_of("c2i_d12"), DDIMSampler(create_diffusion(), "12")
    table, x = evaluations(sampler.times, refresh=skip_cache(network, sampler, 3)), torch.randn(2, 4, 8, 8)

    def run(x: Tensor, stop_at: int | None = None) -> Tensor:
        def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
            if i == stop_at:
                raise KeyboardInterrupt

        denoise = guided(network, {"y": torch.ones(len(x), dtype=torch.long)})
        return sample_loop(denoise, sampler, x, table, on_step=on_step)

    before = run(x)
    with pytest.raises(KeyboardInterrupt):
        run(x[:1], stop_at=4)
    assert torch.equal(run(x), before)


# ----------------------------------------------------------------------------------------------------------------------
# Every n-th


@pytest.mark.parametrize(
    ("evaluations", "interval", "refreshed"),
    [(7, 3, [0, 3, 6]), (6, 3, [0, 3]), (4, 1, [0, 1, 2, 3]), (4, 9, [0]), (0, 2, [])],
)
def test_every_nth_refreshes_at_multiples(evaluations: int, interval: int, refreshed: list[int]) -> None:
    assert every_nth(evaluations, interval) == flags(evaluations, refreshed)


def flags(evaluations: int, chosen: list[int]) -> tuple[bool, ...]:
    return tuple(i in chosen for i in range(evaluations))


# ----------------------------------------------------------------------------------------------------------------------
# The cheapest schedule


def random_similarity(rng: np.random.Generator, count: int) -> Any:
    """Cosines of a random walk's places, as those of a trajectory's states."""
    walk = rng.normal(size=(count, 6)).cumsum(axis=0) + 3
    walk /= np.linalg.norm(walk, axis=1, keepdims=True)
    return walk @ walk.T


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_of_the_same_budget_is_cheaper(seed: int) -> None:
    """Against every schedule there is."""
    similarity = random_similarity(np.random.default_rng(seed), 9)
    for budget in range(1, 10):
        refresh = cheapest(similarity, budget)
        assert sum(refresh) == budget and refresh[0] and len(refresh) == 9
        others = [flags(9, [0, *rest]) for rest in combinations(range(1, 9), budget - 1)]
        assert reuse_cost(similarity, refresh) == pytest.approx(min(reuse_cost(similarity, o) for o in others))
        assert refresh in others


def test_a_long_schedule_is_cheaper_than_uniform_and_random_ones() -> None:
    rng = np.random.default_rng(0)
    similarity = random_similarity(rng, 250)
    for interval in (2, 5, 10, 25):
        refresh = cheapest(similarity, sharing_budget(250, interval))
        assert reuse_cost(similarity, refresh) <= reuse_cost(similarity, every_nth(250, interval))
        for _ in range(20):
            chosen = rng.choice(np.arange(1, 250), sum(refresh) - 1, replace=False).tolist()
            assert reuse_cost(similarity, refresh) <= reuse_cost(similarity, flags(250, [0, *chosen]))


def test_the_cost_counts_each_evaluation_once() -> None:
    similarity = 1 - np.arange(16.0).reshape(4, 4)  # error[i, j] = 4 i + j
    assert reuse_cost(similarity, (True, False, True, False)) == 0 + 4 + 10 + 14
    assert reuse_cost(similarity, (True,) * 4) == 0 + 5 + 10 + 15


def test_of_equal_schedules_the_first_is_taken() -> None:
    assert cheapest(np.ones((5, 5)), 2) == (True, True, False, False, False)


@pytest.mark.parametrize(("evaluations", "interval", "budget"), [(250, 1, 250), (250, 5, 50), (10, 3, 3), (7, 7, 1)])
def test_the_budget_is_rounded_down(evaluations: int, interval: int, budget: int) -> None:
    assert sharing_budget(evaluations, interval) == budget


@pytest.mark.parametrize("interval", [0, -1, 11])
def test_an_interval_that_leaves_no_refresh_is_refused(interval: int) -> None:
    message = rf"the sharing interval must be in 1\.\.10, the number of evaluations, not {interval}"
    with pytest.raises(ValueError, match=message):
        sharing_budget(10, interval)


def test_budgets_and_matrices_that_do_not_fit_are_refused() -> None:
    for budget in (0, 6):
        with pytest.raises(ValueError, match=f"{budget} refreshes do not fit 5 evaluations"):
            cheapest(np.ones((5, 5)), budget)
    for matrix in (np.ones((5, 4)), np.full((5, 5), np.nan)):
        with pytest.raises(ValueError, match="similarities must be finite and of every two evaluations"):
            cheapest(matrix, 2)
