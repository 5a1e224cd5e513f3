"""Our network inside diffusers' LattePipeline: the clips of diffusers' network, and Skip-Cache as in our own loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import DDIMSampler, create_diffusion, evaluations, guided, sample_loop
from diffusion.caching import CacheSchedule, skip_cache
from models.latte_t2v import CACHE_BOUNDS, LatteT2V, LatteT2VConfig
from sampling.diffusers_pipeline import LatteTransformer
from tests.diffusers_pipelines import tiny_latte_pipeline
from tests.golden_data import assert_close
from tests.golden_latte_t2v import golden, recorded_fields, recorded_network
from tests.networks import debug_network, inputs

SHAPE: dict[str, Any] = {"height": 64, "width": 64, "video_length": 3, "output_type": "latent"}
BOUNDS = CacheSchedule(*CACHE_BOUNDS)


@pytest.fixture
def pipeline() -> Any:
    made = tiny_latte_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def sampled(pipeline: Any, prompt: str | list[str] = "a red fox", steps: int = 6) -> Tensor:
    frames: Tensor = pipeline(
        prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **SHAPE
    ).frames
    return frames


def ours(pipeline: Any, **options: Any) -> LatteTransformer:
    """Our network with the weights of the pipeline's."""
    theirs = pipeline.transformer
    fields = {**recorded_fields(), "depth": 2 * theirs.config.num_layers, "text_width": theirs.config.caption_channels}
    network = LatteT2V(LatteT2VConfig(**fields))
    network.load_state_dict(theirs.state_dict())
    return LatteTransformer(network.eval(), **options)


def test_the_pipeline_makes_the_clips_of_diffusers_network(pipeline: Any) -> None:
    prompts = ("a red fox", ["the snow", "a dog runs"])
    expected = [sampled(pipeline, prompt) for prompt in prompts]
    pipeline.register_modules(transformer=ours(pipeline))
    for prompt, clips in zip(prompts, expected, strict=True):
        assert_close(sampled(pipeline, prompt), clips)
    pixels = pipeline("a dog", num_inference_steps=2, **{**SHAPE, "output_type": "pt"}).frames
    assert pixels.shape == (1, 3, 3, 64, 64) and pixels.std() > 0


def test_a_mask_in_two_dimensions_reaches_every_frame() -> None:
    network, recorded = recorded_network(), golden()
    transformer = LatteTransformer(network)
    out = transformer(
        recorded["fwd.x"].transpose(1, 2),
        recorded["fwd.t"],
        recorded["fwd.encoder_hidden_states"],
        recorded["fwd.encoder_attention_mask"],
    )
    assert not isinstance(out, tuple)
    assert_close(out.sample.transpose(1, 2), recorded["fwd.out_mask"])


def test_skip_cache_in_the_pipeline_is_that_of_our_loop_and_runs_do_not_mix(pipeline: Any) -> None:
    network = recorded_network(text_width=12)
    embeds = {name: golden()[f"traj.{name}"] for name in ("prompt_embeds", "negative_prompt_embeds")}
    latents = golden()["traj.latents"]

    def run(transformer: LatteTransformer, text: dict[str, Tensor], steps: int = 10) -> Tensor:
        pipeline.register_modules(transformer=transformer)
        given = {**text, "prompt": None, "negative_prompt": None, "latents": latents.transpose(1, 2)}
        frames: Tensor = pipeline(num_inference_steps=steps, mask_feature=False, **given, **SHAPE).frames
        return frames.transpose(1, 2)

    sampler = DDIMSampler(create_diffusion(), "ddim10")
    denoise = guided(network, *({"text": text} for text in embeds.values()))
    refresh = skip_cache(network, sampler, 2, BOUNDS)
    expected = sample_loop(denoise, sampler, latents, evaluations(sampler.times, 7.5, refresh=refresh))
    cached = LatteTransformer(network, cache_interval=2)
    assert_close(run(cached, embeds), expected)
    assert_close(expected, golden()["traj.N2-700-50.final"])
    other = {name: text.flip(1) for name, text in embeds.items()}
    fresh = run(LatteTransformer(network, cache_interval=2), other)
    assert torch.equal(run(cached, other), fresh) and torch.equal(run(cached, embeds), run(cached, embeds))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps nothing to reuse; give --cache-depth"):
        LatteTransformer(debug_network("LatteT2V"), cache_interval=2)  # type: ignore[arg-type]
    network = debug_network("Skip-LatteT2V")
    x, _, conditioning = inputs(network)
    with pytest.raises(ValueError, match="load the network with temporal_blocks=False"):
        LatteTransformer(network)(  # type: ignore[arg-type]
            x.transpose(1, 2), torch.ones(2), conditioning["text"], enable_temporal_attentions=False
        )
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        LatteTransformer(network, cache_interval=0)  # type: ignore[arg-type]
