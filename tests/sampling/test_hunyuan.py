"""HunYuan-DiT with Skip-Cache against the recorded numbers of the official code, and its rotary positions."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor

from diffusion import AncestralSampler, GaussianDiffusion, evaluations, guided, sample_loop
from models import ModelOutput
from sampling.diffusers_cache import SkipCache, enable_skip_cache
from sampling.hunyuan import correct_rotary_table, rotary_table
from tests.golden_data import assert_close, relative_error, table
from tests.golden_hunyuan import GOLDEN, POLICIES, recorded_transformer, text_of

GUIDANCE = table("hunyuan/config")["guidance"]


def leading(steps: int) -> list[int]:
    """diffusers' "leading" timesteps with an offset of 1, ascending."""
    return [i * (1000 // steps) + 1 for i in range(steps)]


def process_of(steps: int) -> GaussianDiffusion:
    """The released process: the roots of the betas are at equal distances, and v is predicted."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.02), 1000) ** 2
    return GaussianDiffusion(betas, leading(steps), prediction="v", variance="fixed_small")


def cache_of(tag: str, transformer) -> SkipCache | None:
    """The cache of a recorded run, such as "long_N3_branch3"."""
    if tag.endswith("nocache"):
        return None
    interval, _, depth = tag.removeprefix("long_").removeprefix("N").partition("_branch")
    return enable_skip_cache(transformer, int(interval), depth=int(depth or 1))


def count_layers(transformer) -> list[list[int]]:
    """Layers that run, by number, of each evaluation from now on: their attention, in fact."""
    ran: list[list[int]] = []
    transformer.register_forward_pre_hook(lambda *_: ran.append([]))
    for i, block in enumerate(transformer.blocks):
        block.attn1.register_forward_hook(lambda *_, i=i: ran[-1].append(i))
    return ran


def test_the_network_and_its_layers_give_the_recorded_numbers() -> None:
    transformer, layers = recorded_transformer(), {}
    for i in (0, 4, 7):
        transformer.blocks[i].register_forward_hook(lambda *call, i=i: layers.update({i: call[2]}))
    rotary = (GOLDEN["rope.cos"], GOLDEN["rope.sin"])
    with torch.no_grad():
        out = transformer(GOLDEN["fwd.x"], GOLDEN["fwd.t"], **text_of("fwd"), image_rotary_emb=rotary).sample
        tokens, text = dict(layers), text_of("fwd")
        unmasked = {name: torch.ones_like(value) if "mask" in name else value for name, value in text.items()}
        other = transformer(GOLDEN["fwd.x"], GOLDEN["fwd.t"], **unmasked, image_rotary_emb=rotary).sample
    for i, actual in tokens.items():
        assert_close(actual, GOLDEN[f"fwd.block{i}.out"], 1e-5)
    assert_close(out, GOLDEN["fwd.out"], 1e-5)
    assert relative_error(other, out) > 1e-2  # the recorded masks leave tokens out


@torch.no_grad()
def test_a_picture_that_is_not_square_gives_the_recorded_output_with_the_right_table_alone() -> None:
    transformer = recorded_transformer()
    inputs = (GOLDEN["wide.x"], GOLDEN["fwd.t"][:1])
    text = text_of("fwd", slice(1))
    theirs = get_2d_rotary_pos_embed(8, ((6, 0), (27, 32)), (4, 6), output_type="pt")
    wrong = transformer(*inputs, **text, image_rotary_emb=theirs).sample
    assert relative_error(wrong, GOLDEN["wide.out"]) > 1e-2
    with correct_rotary_table(transformer):
        assert_close(transformer(*inputs, **text, image_rotary_emb=theirs).sample, GOLDEN["wide.out"], 1e-5)
    assert torch.equal(transformer(*inputs, **text, image_rotary_emb=theirs).sample, wrong)
    assert not transformer._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("tag", POLICIES)
def test_runs_of_our_own_sampler_give_the_recorded_numbers(tag: str) -> None:
    policy, transformer = POLICIES[tag], recorded_transformer()
    cache, ran = cache_of(tag, transformer), count_layers(transformer)
    rotary, outputs = (GOLDEN["rope.cos"], GOLDEN["rope.sin"]), []

    def network(x: Tensor, t: float, *, state: object = None, **text: Tensor) -> ModelOutput:
        out = transformer(x, torch.tensor([t] * len(x)), **text, image_rotary_emb=rotary).sample
        outputs.append(out.flip(0))  # recorded rows are [negative; prompt]
        return ModelOutput(out[:, :4])  # without the variance, which the process does not use

    negative, prompt = text_of("traj", slice(0, 1)), text_of("traj", slice(1, 2))
    noises: Iterator[Tensor] = iter(GOLDEN["traj.noise"])
    sampler = AncestralSampler(process_of(len(policy)))
    assert list(sampler.times) == [step["t"] for step in policy]
    assert list(sampler.times) == GOLDEN.get(f"traj.{tag}.timesteps", torch.tensor(sampler.times)).tolist()
    final = sample_loop(
        guided(network, prompt, negative),
        sampler,
        GOLDEN["traj.latents"],
        evaluations(sampler.times, GUIDANCE),
        noise_fn=lambda x: next(noises),
    )
    assert ran == [step["blocks"] for step in policy]
    if cache is not None:
        full = sum(step["mode"] == "full" for step in policy)
        assert (cache.full, cache.reused) == (full, len(policy) - full)
    if tag.startswith("long"):
        pixel = torch.stack(outputs)[..., 0, 0]
        assert_close(pixel, GOLDEN[f"traj.{tag}.model_out_slice"], 2e-5)
    else:
        assert_close(torch.stack(outputs), GOLDEN[f"traj.{tag}.model_out"], 2e-5)
    assert_close(final, GOLDEN[f"traj.{tag}.final"], 1e-5)


def test_the_tolerance_of_finals_tells_a_cached_run_from_an_uncached_one() -> None:
    for tag in POLICIES:
        plain = GOLDEN["traj.long_nocache.final" if tag.startswith("long") else "traj.nocache.final"]
        assert tag.endswith("nocache") or relative_error(GOLDEN[f"traj.{tag}.final"], plain) > 5e-5


def test_the_sampler_is_diffusers_ddpm() -> None:
    """Whatever the network says: 12 steps from the same noise, with diffusers' scheduler as it is released."""
    settings = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = DDPMScheduler(**settings, clip_sample=False, prediction_type="v_prediction")
    scheduler.set_timesteps(12)
    sampler, outputs = AncestralSampler(process_of(12)), torch.randn(12, 2, 4, 8, 8)
    assert list(sampler.times) == scheduler.timesteps.tolist()
    x = torch.randn(2, 4, 8, 8)
    theirs = ours = x
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(outputs[i], t, theirs, generator=torch.Generator().manual_seed(i)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        ours = sampler.step(i, ours, outputs[i], lambda _, noise=noise: noise)
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (6, 4), (64, 64), (48, 80), (80, 48), (96, 72), (1, 3)])
def test_positions_are_those_of_a_centred_crop(grid: tuple[int, int]) -> None:
    """Closed form: token k of n is at start + side k / n, and a pair of channels holds one angle."""
    height, width = grid
    cos, sin = rotary_table(16, grid)
    assert cos.shape == sin.shape == (height * width, 16) and cos.dtype == sin.dtype == torch.float32
    scale = 32 / max(grid)
    for row, column in ((0, 0), (height - 1, 0), (0, width - 1), (height // 2, width // 3)):
        places = []
        for k, n in ((column, width), (row, height)):
            side = round(scale * n)
            places.append(round((32 - side) / 2) + side * k / n)
        token = row * width + column
        for channel in range(16):
            axis, pair = channel // 8, channel % 8 // 2
            angle = places[axis] * 10000 ** (-pair / 4)
            assert float(cos[token, channel]) == pytest.approx(math.cos(angle), abs=1e-6)
            assert float(sin[token, channel]) == pytest.approx(math.sin(angle), abs=1e-6)


def test_tables_are_the_recorded_ones_and_those_of_diffusers_for_squares() -> None:
    for name, grid in (("rope", (4, 4)), ("wide.rope", (4, 6))):
        for ours, part in zip(rotary_table(8, grid), ("cos", "sin"), strict=True):
            assert_close(ours, GOLDEN[f"{name}.{part}"], 1e-5)
    theirs = get_2d_rotary_pos_embed(8, ((0, 0), (32, 32)), (64, 64), output_type="pt")
    for ours, reference in zip(rotary_table(8, (64, 64)), theirs, strict=True):
        assert_close(ours, reference, 1e-5)


def test_what_has_no_such_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="6 channels of a head must be divisible by 4"):
        rotary_table(6, (4, 4))
    with pytest.raises(ValueError, match="Linear is not a HunyuanDiT2DModel"):
        correct_rotary_table(torch.nn.Linear(1, 1))
