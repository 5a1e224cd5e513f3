"""Skip-Cache on clips from text: recorded policies and trajectories, finals within 1e-5 of their maximum."""

import re

import pytest
import torch
from torch import Tensor

from diffusion import DDIMSampler, create_diffusion, evaluations, guided, sample_loop
from diffusion.caching import CacheSchedule, skip_cache
from diffusion.sampling import Sampler
from models import FAMILIES, SkipLatteT2V
from tests.golden_data import assert_close, relative_error, table
from tests.golden_latte_t2v import golden, recorded_network

GOLDEN, POLICIES = golden(), table("latte_t2v/policy")
SCALE = table("latte_t2v/config")["guidance"]
BOUNDS = CacheSchedule(*FAMILIES["Skip-LatteT2V"].cache_bounds)


def sampler_of(tag: str) -> Sampler:
    return DDIMSampler(create_diffusion(), f"ddim{len(POLICIES[tag])}")


def refresh_of(tag: str, network: SkipLatteT2V, sampler: Sampler) -> tuple[bool, ...] | None:
    """Refreshes by the official notation N{interval}-{t_high}-{t_low}."""
    match = re.search(r"N(\d+)-(\d+)-(\d+)$", tag)
    if match is None:
        return None
    interval, high, low = map(int, match.groups())
    bounds = BOUNDS._replace(t_high=high, t_low=low)
    assert bounds == BOUNDS or (high, low) != (700, 50), "the default is the family's"
    return skip_cache(network, sampler, interval, bounds)


@torch.no_grad()
@pytest.mark.parametrize("tag", POLICIES)
def test_trajectories_and_the_pairs_that_ran_equal_the_recorded_ones(tag: str) -> None:
    network, sampler, policy = recorded_network(), sampler_of(tag), POLICIES[tag]
    ran: list[list[int]] = []
    outputs: list[Tensor] = []
    network.register_forward_pre_hook(lambda *_: ran.append([]))
    network.register_forward_hook(lambda _, args, out: outputs.append(out.sample.flip(0)))
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, i=i: ran[-1].append(i))
    refresh = refresh_of(tag, network, sampler)
    denoise = guided(
        network, *({"text": GOLDEN[f"traj.{name}"]} for name in ("prompt_embeds", "negative_prompt_embeds"))
    )
    final = sample_loop(denoise, sampler, GOLDEN["traj.latents"], evaluations(sampler.times, SCALE, refresh=refresh))
    assert list(sampler.times) == [step["t"] for step in policy]
    assert ran == [[i for pair in step["pairs"] for i in (2 * pair, 2 * pair + 1)] for step in policy]
    if refresh is not None:
        assert ["full" if fresh else "cached" for fresh in refresh] == [step["mode"] for step in policy]
    stacked = torch.stack(outputs)
    if tag.startswith("long"):
        stacked, recorded = stacked[..., 0, 0].transpose(2, 3), GOLDEN[f"traj.{tag}.model_out_slice"]
    else:
        recorded = GOLDEN[f"traj.{tag}.model_out"]
    assert_close(stacked, recorded, 2e-5)
    assert_close(final, GOLDEN[f"traj.{tag}.final"])


def test_the_tolerance_of_finals_tells_a_cached_run_from_an_uncached_one() -> None:
    for tag in POLICIES:
        plain = "long_nocache" if tag.startswith("long") else "nocache"
        if tag != plain:
            assert relative_error(GOLDEN[f"traj.{tag}.final"], GOLDEN[f"traj.{plain}.final"]) > 5e-5
