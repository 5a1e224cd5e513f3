"""Skip-Cache and rotary positions under whole pipelines of diffusers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.caching import skip_cache_flags
from sampling.diffusers_cache import LAYOUTS, enable_skip_cache
from sampling.hunyuan import correct_rotary_table, rotary_table
from tests.diffusers_parts import count_blocks, lists_of_blocks
from tests.diffusers_pipelines import tiny_dit_pipeline, tiny_hunyuan_pipeline, tiny_latte_pipeline

STEPS = 12
Sample = Callable[..., Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hunyuan() -> tuple[Any, Sample]:
    pipeline = tiny_hunyuan_pipeline()

    def sample(prompt: str | list[str] = "a red fox", size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
        shape = {"height": size[0], "width": size[1], "use_resolution_binning": False}
        steps = {"num_inference_steps": STEPS, "guidance_scale": 6.0, "generator": generator(seed)}
        return pipeline(prompt, **shape, **steps, output_type="latent").images

    return pipeline, sample


def latte() -> tuple[Any, Sample]:
    pipeline = tiny_latte_pipeline()

    def sample(prompt: str | list[str] = "a dog runs", seed: int = 0) -> Tensor:
        shape = {"height": 64, "width": 64, "video_length": 3, "clean_caption": False}
        steps = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "generator": generator(seed)}
        return pipeline(prompt, **shape, **steps, output_type="latent").frames

    return pipeline, sample


def dit() -> tuple[Any, Sample]:
    pipeline = tiny_dit_pipeline()

    def sample(labels: str | list[int] = "3", seed: int = 0) -> Tensor:
        labels = [int(labels)] if isinstance(labels, str) else [3, 4]
        pictures = pipeline(labels, num_inference_steps=STEPS, generator=generator(seed), output_type="pt").images
        assert len(pictures) == len(labels)
        return pictures

    return pipeline, sample


@pytest.fixture(params=[hunyuan, latte, dit], ids=["HunyuanDiTPipeline", "LattePipeline", "DiTPipeline"])
def made(request: pytest.FixtureRequest) -> tuple[Any, Sample]:
    pipeline, sample = request.param()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, sample


def test_a_pipeline_runs_the_blocks_that_the_rule_asks_for(made: tuple[Any, Sample]) -> None:
    pipeline, sample = made
    transformer = pipeline.transformer
    layout, ran = LAYOUTS[type(transformer).__name__], count_blocks(transformer)
    plain = sample()
    times = pipeline.scheduler.timesteps.tolist()
    ran.clear()
    with enable_skip_cache(transformer, 2) as cache:
        cached = sample()
        assert torch.equal(sample(), cached)  # the second run sees nothing of the first
    flags = skip_cache_flags(times, 2, layout.schedule)
    ends = len(lists_of_blocks(transformer)) * (2 if layout.skips else 1)
    assert [len(blocks) for blocks in ran] == 2 * [6 * len(lists_of_blocks(transformer)) if f else ends for f in flags]
    assert (cache.full, cache.reused) == (2 * sum(flags), 2 * (len(flags) - sum(flags)))
    assert cached.isfinite().all() and not torch.equal(cached, plain)
    assert torch.equal(sample(), plain)  # the hooks are gone


def test_prompts_and_batches_in_a_row_do_not_mix(made: tuple[Any, Sample]) -> None:
    pipeline, sample = made
    prompts = (
        ("4", "3", ["3", "4"]) if "DiTPipeline" == type(pipeline).__name__ else ("the snow", "a dog", ["a", "red"])
    )
    alone = []
    for prompt in prompts:
        with enable_skip_cache(pipeline.transformer, 3):
            alone.append(sample(prompt))
    with enable_skip_cache(pipeline.transformer, 3):
        for prompt, expected in zip(prompts, alone, strict=True):
            assert torch.equal(sample(prompt), expected)


def test_a_pipeline_that_is_interrupted_leaves_nothing() -> None:
    pipeline, sample = hunyuan()
    pipeline.set_progress_bar_config(disable=True)
    blocks, calls = pipeline.transformer.blocks, []

    def stop(*_: object) -> None:
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with enable_skip_cache(pipeline.transformer, 2):
        expected = sample()
        with blocks[5].register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            sample()
        assert torch.equal(sample(), expected)


def test_the_pipeline_passes_wrong_positions_on_and_the_right_ones_arrive() -> None:
    pipeline, sample = hunyuan()
    pipeline.set_progress_bar_config(disable=True)
    received: list[tuple[Tensor, Tensor]] = []
    block = pipeline.transformer.blocks[0]
    wide, square = (64, 96), (64, 64)
    with block.register_forward_pre_hook(lambda *call: received.append(call[2]["image_rotary_emb"]), with_kwargs=True):
        wrong, same = sample(size=wide), sample(size=square)
        with correct_rotary_table(pipeline.transformer):
            right, also = sample(size=wide), sample(size=square)
    expected = rotary_table(8, (4, 6))
    before, after = received[0], received[2 * STEPS]
    assert not torch.allclose(before[0], expected[0], atol=1e-2)
    assert all(map(torch.equal, after, expected))
    assert wrong.shape == right.shape == (1, 4, 8, 12) and not torch.allclose(wrong, right, rtol=1e-3)
    torch.testing.assert_close(also, same, rtol=1e-3, atol=1e-3)
