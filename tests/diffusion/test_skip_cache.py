"""Skip-Cache: the recorded policy, and trajectories through the real loop."""

from collections.abc import Iterator

import pytest
import torch
from diffusion.refresh import CLASS_TO_IMAGE, Zones, skip_cache_flags
from torch import Tensor

from diffusion import create_diffusion, guided, sample_loop, skip_cache
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
OTHER_ZONES = table("skip_dit/counts_t_high_900_tail_below_50")


class OfTimes:
    """Stands in for a network where only its times matter."""

    def __init__(self, convention: TimeConvention = "index", *, keeps_state: bool = True) -> None:
        self.time_convention, self.keeps_state = convention, keeps_state


def sampler_of(tag: str) -> Sampler:
    """The sampler that a tag such as "ddpm_N2" or "long_ddim_N3" was recorded with."""
    process = create_diffusion("ddim100" if tag.startswith("long") else "12")
    return process.ancestral() if "ddpm" in tag else process.ddim()


def refresh_of(tag: str, network: SkipDiT, sampler: Sampler) -> tuple[bool, ...] | None:
    """Its refresh schedule; None if nothing was cached."""
    return None if tag.endswith("nocache") else skip_cache(network, sampler.times, int(tag.split("_N")[1]))


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

    def denoise(x: Tensor, t: float | Tensor, state: object = None, /) -> ModelOutput:
        times.append(t)
        return network(x, t, torch.tensor([1]), state)

    sample_loop(denoise, sampler, torch.zeros(1, 4, 8, 8), refresh)
    assert times == [step["t"] for step in policy]
    assert ran == [step["blocks"] for step in policy]
    if refresh is not None:
        assert ["full" if fresh else "cached" for fresh in refresh] == [step["mode"] for step in policy]
        assert {len(blocks) for blocks, fresh in zip(ran, refresh, strict=True) if not fresh} == {8}


@pytest.mark.parametrize(("case", "tag"), RECORDED)
def test_trajectories_equal_the_recorded_ones(case: str, tag: str) -> None:
    golden, network, sampler = arrays(f"skip_dit/{case}/io"), network_of(case), sampler_of(tag)
    rows = len(golden["traj.y"]) // 2  # the official loop carries the unconditional half along
    y, y_null = golden["traj.y"].chunk(2)
    noises: Iterator[Tensor] = iter(golden["traj.noise"][:, :rows])
    path: list[Tensor] = []
    outputs: list[ModelOutput] = []

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        path.append(x)
        outputs.append(out)

    final = sample_loop(
        guided(network, y, y_null, table(f"skip_dit/{case}/config")["cfg_scale"], channels=3),
        sampler,
        golden["traj.x_T"][:rows],
        refresh_of(tag, network, sampler),
        lambda x: next(noises),
        on_step,
    )
    recorded = {name.removeprefix(f"traj.{tag}."): golden[name] for name in golden if name.startswith(f"traj.{tag}.")}
    assert_close(torch.stack([out.sample for out in outputs]), recorded["model_out"][:, :rows])
    assert_close(final, recorded["final"][:rows])
    last = create_diffusion("12").pred_xstart(outputs[-1].sample, path[-2], 0)
    assert_close(last, recorded["pred_xstart_last"][:rows])
    if "cache_after_first_step" in recorded:
        assert_close(outputs[0].state, recorded["cache_after_first_step"])  # of both halves


@pytest.mark.parametrize("key", OFFICIAL_COSTS)
def test_executed_multiply_adds_equal_the_published_costs(key: str) -> None:
    steps, interval = key.split("_N")
    with torch.device("meta"):
        network, plain = create_model("Skip-DiT-XL/2"), create_model("DiT-XL/2")
    refresh = skip_cache(network, create_diffusion(steps).ancestral().times, int(interval))
    official = OFFICIAL_COSTS[key]
    assert (sum(refresh), len(refresh) - sum(refresh)) == (official["full"], official["cached"])
    executed = network.executed_multiply_adds(refresh)
    assert executed == round(official["total_TMACs"] * 1e12)
    always = [True] * len(refresh)
    assert network.executed_multiply_adds(always) / executed == pytest.approx(official["theoretical_speedup_vs_skip"])
    ratio = plain.executed_multiply_adds(always) / executed
    assert ratio == pytest.approx(official["theoretical_speedup_vs_plain_DiT"])


@pytest.mark.parametrize("key", OTHER_ZONES)
def test_the_rule_with_other_zones_equals_the_recorded_one(key: str) -> None:
    """The video networks refresh at every step from t = 900 up, and their tail leaves its bound out."""
    _, steps, interval = key.split("_")
    times = create_diffusion(steps).ancestral().times
    flags = skip_cache_flags(times, int(interval.removeprefix("N")), Zones(t_high=900, t_low=50, low_inclusive=False))
    assert [t for t, fresh in zip(times, flags, strict=True) if fresh] == OTHER_ZONES[key]["full_t"]
    assert (sum(flags), len(flags) - sum(flags)) == (OTHER_ZONES[key]["full_steps"], OTHER_ZONES[key]["cached_steps"])


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
        ((60, 40, 20, 10, 0), 3, "F..FF"),  # the first one in the tail is cached, all behind it are not
        ((80, 60, 40, 20, 10, 0), 3, "F..FFF"),  # the first one in the tail is a refresh by count
        ((60, 40, 21, 20.5, 20), 5, "F...."),  # the bound belongs to the tail, nothing above it does
        ((60, 20, 19, 0), 2, "F.FF"),
        ((20, 0), 6, "FF"),  # nothing but tail
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


def test_a_bound_of_the_tail_can_be_left_out() -> None:
    times, zones = (60, 50, 40, 30), CLASS_TO_IMAGE._replace(t_low=50)
    assert shown(skip_cache_flags(times, 4, zones)) == "F.FF"
    assert shown(skip_cache_flags(times, 4, zones._replace(low_inclusive=False))) == "F..F"


@pytest.mark.parametrize("steps", ["7", "12", "50", "250", "ddim50"])
@pytest.mark.parametrize("interval", [1, 2, 3, 6])
def test_a_network_on_the_unit_scale_refreshes_at_the_same_steps(steps: str, interval: int) -> None:
    process = create_diffusion(steps)
    by_index = skip_cache(OfTimes(), process.ddim().times, interval)
    by_unit = skip_cache(OfTimes("unit"), process.ddim(convention="unit").times, interval)
    assert by_index == by_unit and by_index[0]


def test_a_flow_s_times_are_read_on_the_index_scale() -> None:
    """From pure noise (unit 0, index 1000) towards data (unit 1, index 0): the tail zone starts at unit 0.98."""
    times = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
    assert shown(skip_cache(OfTimes("unit"), times, 4)) == "F...F..FF"


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_below_one_is_refused(interval: int) -> None:
    with pytest.raises(ValueError, match=f"the refresh interval must be at least 1, not {interval}"):
        skip_cache(OfTimes(), (900.0, 0.0), interval)


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
        skip_cache(create_model(name), (900.0, 0.0), 2)


def test_a_cache_depth_is_what_a_dit_keeps_state_by() -> None:
    assert skip_cache(create_model("DiT-debug/2", cache_depth=1), (900.0, 0.0), 2) == (True, False)


@pytest.mark.parametrize(
    ("network", "times", "words"),
    [
        (OfTimes(), create_diffusion("5").ddim_reverse().times, "from 0 to 250"),
        (OfTimes(), (999.0, 500.0, 500.0, 250.0, 250.0), "from 500 to 500"),  # two evaluations a step
        (OfTimes("unit"), (0.0, 0.5, 0.5, 0.75), "from 500 to 500"),
        (OfTimes(), (999.0, float("nan"), 0.0), "from 999 to nan"),
    ],
)
def test_a_sampler_that_the_rule_does_not_fit_is_refused(
    network: OfTimes, times: tuple[float, ...], words: str
) -> None:
    message = f"needs a sampler that evaluates the network once a step, from noise to image; here time goes {words}"
    with pytest.raises(ValueError, match=message):
        skip_cache(network, times, 2)


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    """State belongs to the loop: a run that stops half-way, of another batch size, does not touch the next."""
    network, sampler = network_of("c2i_d12"), create_diffusion("12").ddim()
    refresh, x = skip_cache(network, sampler.times, 3), torch.randn(2, 4, 8, 8)

    def run(x: Tensor, stop_at: int | None = None) -> Tensor:
        def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
            if i == stop_at:
                raise KeyboardInterrupt

        return sample_loop(guided(network, torch.ones(len(x), dtype=torch.long), None, 1.0), sampler, x, refresh,
                           on_step=on_step)  # fmt: skip

    before = run(x)
    with pytest.raises(KeyboardInterrupt):
        run(x[:1], stop_at=4)
    assert torch.equal(run(x), before)
