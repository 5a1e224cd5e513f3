"""Skip-Cache on clips: recorded policies and trajectories, finals within 1e-5 of their maximum."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from diffusion import AncestralSampler, DDIMSampler, create_diffusion, evaluations, guided, sample_loop
from diffusion.caching import CacheSchedule, skip_cache
from diffusion.sampling import Sampler
from models import FAMILIES, ModelOutput, SkipLatte
from tests.golden_data import arrays, assert_close, relative_error, table
from tests.golden_latte import CASES, recorded_network

POLICIES = {case: table(f"latte/{case}/policy") for case in CASES}
RUNS = [(case, tag) for case in CASES for tag in POLICIES[case] if not tag.startswith("counts")]
COUNTS = [(case, tag) for case in CASES for tag in POLICIES[case] if tag.startswith("counts")]
BOUNDS = CacheSchedule(*FAMILIES["Skip-Latte"].cache_bounds)


def network_of(case: str, tag: str) -> SkipLatte:
    return recorded_network(case, cache_depth=int(tag.partition("_branch")[2] or 1))


def sampler_of(case: str, tag: str) -> Sampler:
    spec = str(len(POLICIES[case][tag]))
    return (AncestralSampler if "ddpm" in tag else DDIMSampler)(create_diffusion(), spec)


def refresh_of(tag: str, network: SkipLatte, sampler: Sampler) -> tuple[bool, ...] | None:
    if tag.endswith("nocache"):
        return None
    return skip_cache(network, sampler, int(tag.split("_N")[1].partition("_")[0]), BOUNDS)


@torch.no_grad()
@pytest.mark.parametrize(("case", "tag"), RUNS)
def test_trajectories_and_the_blocks_that_ran_equal_the_recorded_ones(case: str, tag: str) -> None:
    golden, network, sampler = arrays(f"latte/{case}/io"), network_of(case, tag), sampler_of(case, tag)
    conditional = "y" in network.conditioning
    rows = len(golden["traj.x_T"]) // (1 + conditional)  # the official loop carries the unconditional rows along
    # One fixture has its labels under another name
    y, y_null = golden.get("traj.y", golden.get("cfg.y", torch.zeros(2))).chunk(2)
    scale = table(f"latte/{case}/config")["cfg_scale"] if conditional else 1.0
    noises: Iterator[Tensor] = iter(golden["traj.noise"][:, :rows])
    ran: list[list[int]] = []
    network.register_forward_pre_hook(lambda *_: ran.append([]))
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, i=i: ran[-1].append(i))
    outputs: list[ModelOutput] = []
    refresh = refresh_of(tag, network, sampler)
    denoise = guided(network, {"y": y}, {"y": y_null}, channels=4) if conditional else guided(network, {})
    final = sample_loop(
        denoise,
        sampler,
        golden["traj.x_T"][:rows],
        evaluations(sampler.times, scale, refresh=refresh),
        noise_fn=lambda x: next(noises),
        on_step=lambda i, x, out: outputs.append(out),
    )
    policy = POLICIES[case][tag]
    assert ran == [step["blocks"] for step in policy]
    if refresh is not None:
        assert ["full" if fresh else "cached" for fresh in refresh] == [step["mode"] for step in policy]
    recorded = golden[f"traj.{tag}.model_out"][:, :rows]
    assert_close(torch.stack([out.sample for out in outputs]), recorded, 2e-5)
    assert_close(final, golden[f"traj.{tag}.final"][:rows], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_tolerance_of_finals_tells_a_cached_run_from_an_uncached_one(case: str) -> None:
    golden = arrays(f"latte/{case}/io")
    finals = {tag: golden[f"traj.{tag}.final"] for c, tag in RUNS if c == case}
    plain = {tag.partition("_")[0]: final for tag, final in finals.items() if tag.endswith("nocache")}
    for tag, final in finals.items():
        sampler = tag.partition("_")[0]
        if not tag.endswith("nocache") and sampler in plain:
            assert relative_error(final, plain[sampler]) > 5e-5


@pytest.mark.parametrize(("case", "tag"), COUNTS)
def test_refreshes_of_long_runs_are_the_recorded_ones(case: str, tag: str) -> None:
    _, steps, interval = tag.split("_")
    sampler, expected = AncestralSampler(create_diffusion(), steps), POLICIES[case][tag]
    refresh = skip_cache(recorded_network(case), sampler, int(interval.removeprefix("N")), BOUNDS)
    assert [t for t, fresh in zip(sampler.times, refresh, strict=True) if fresh] == expected["full_t"]
    assert (sum(refresh), len(refresh) - sum(refresh)) == (expected["full_steps"], expected["cached_steps"])
