"""Sampling runs of diffusers' HunYuan-DiT with Skip-Cache by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion import AncestralSampler, Evaluation, ImageNoise, create_diffusion, evaluations, sample_loop
from diffusion.caching import TEXT, skip_cache_flags
from models import ModelOutput
from sampling.diffusers_cache import enable_skip_cache
from sampling.hunyuan import correct_rotary_table

MODEL = "HunyuanDiT2DModel"
# Of the released network, DiT-g/2
RELEASED = {"num_layers": 40, "mlp_ratio": 4.3637, "cross_attention_dim": 1024, "cross_attention_dim_t5": 2048}
RELEASED |= {"hidden_size": 1408, "num_heads": 16, "input_size": 128}
TOKENS = {"clip": 77, "t5": 256}


def hunyuan_transformer(device: torch.device, hidden_size: int, num_heads: int, input_size: int, **config: Any) -> Any:
    """Build the network with random weights and the right positions, for latents of 4 x `input_size` x `input_size`.

    Args:
        device: Device of the weights.
        hidden_size: Width; the text encoders' are in proportion to the released ones.
        num_heads: Number of attention heads, of channels divisible by 4.
        input_size: Side of the latents.
        **config: Other fields of diffusers' config.

    Raises:
        ValueError: If the width does not fit the heads.
    """
    from diffusers import HunyuanDiT2DModel  # heavy, and only this benchmark needs it

    if hidden_size % (4 * num_heads):
        raise ValueError(f"hidden_size {hidden_size} must be divisible by 4 times the number of heads, {num_heads}")
    scale = hidden_size / RELEASED["hidden_size"]
    with device:
        transformer: Any = HunyuanDiT2DModel(
            num_attention_heads=num_heads,
            attention_head_dim=hidden_size // num_heads,
            hidden_size=hidden_size,
            num_layers=config.pop("num_layers", RELEASED["num_layers"]),
            mlp_ratio=RELEASED["mlp_ratio"],
            cross_attention_dim=8 * round(scale * RELEASED["cross_attention_dim"] / 8),
            cross_attention_dim_t5=64 * max(1, round(scale * RELEASED["cross_attention_dim_t5"] / 64)),
            in_channels=4,
            patch_size=2,
            sample_size=input_size,
            text_len=TOKENS["clip"],
            text_len_t5=TOKENS["t5"],
            use_style_cond_and_image_meta_size=False,
            **config,
        )
    correct_rotary_table(transformer)
    return transformer.eval()


@dataclass(frozen=True)
class HunyuanRun:
    """An unguided run of ancestral steps with random text.

    Attributes:
        images: Images that are sampled at a time.
        transformer: From `hunyuan_transformer`.
        steps: Number of steps.
        interval: All layers run every so many steps, within the published bounds.
        depth: Layers that run at each end.
        precision: Of the network.
    """

    images: int
    transformer: Any
    steps: int
    interval: int
    depth: int = 1
    precision: str = "fp32"

    @property
    def sampler(self) -> AncestralSampler:
        """Steps at the published places: 991, 981, ..., 1 if there are 100."""
        stride = 1000 // self.steps
        return AncestralSampler(create_diffusion().restricted([i * stride + 1 for i in range(self.steps)]))

    @property
    def refresh(self) -> list[bool]:
        """One flag per step, whether all layers run."""
        return list(skip_cache_flags(self.sampler.times, self.interval, TEXT))

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Attention of the layers: a layer that is left out is called all the same."""
        return [block.attn1 for block in self.transformer.blocks]

    @property
    def macs(self) -> int:
        """MACs of one image, counted by PyTorch."""
        whole, cached = evaluation_macs(self.transformer, self.depth)
        return sum(whole if fresh else cached for fresh in self.refresh)

    def latents(self) -> Tensor:
        """Sample latents (N, 4, h, w)."""
        config, sampler = self.transformer.config, self.sampler
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = ImageNoise(0, range(self.images), shape, self.transformer.device)
        text = random_text(self.transformer, self.images)

        def denoise(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
            return ModelOutput(evaluate(self.transformer, x, evaluation.t, text))

        with enable_skip_cache(self.transformer, self.interval, depth=self.depth):
            return sample_loop(denoise, sampler, noise.initial(), evaluations(sampler.times), noise_fn=noise)


def hunyuan_runs(
    transformer: nn.Module, steps: int, intervals: Sequence[int], images: int, depth: int
) -> dict[str, HunyuanRun]:
    """Prepare a run for every interval.

    Raises:
        ValueError: For a depth or number of steps that is out of range.
    """
    if not 1 <= steps <= 999:
        raise ValueError(f"the number of steps must be 1 to 999, not {steps}")
    enable_skip_cache(transformer, 1, depth=depth).remove()
    return {f"N = {n}": HunyuanRun(images, transformer, steps, n, depth) for n in intervals}


@cache
def random_text(transformer: Any, rows: int) -> dict[str, Tensor]:
    """Text arguments of a number of rows, the same at every call."""
    config, device = transformer.config, transformer.device
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int, width: int) -> Tensor:
        return torch.randn(rows, tokens, width, generator=generator).to(device)

    return {
        "encoder_hidden_states": normal(config.text_len, config.cross_attention_dim),
        "encoder_hidden_states_t5": normal(config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask": torch.ones(rows, config.text_len, dtype=torch.int64, device=device),
        "text_embedding_mask_t5": torch.ones(rows, config.text_len_t5, dtype=torch.int64, device=device),
    }


def evaluate(transformer: Any, x: Tensor, t: float | Tensor, text: dict[str, Tensor]) -> Tensor:
    """Output of an evaluation at x (N, 4, h, w), (N, 8, h, w)."""
    output: Tensor = transformer(x, torch.full((len(x),), float(t), device=x.device), **text).sample
    return output


@cache
@torch.no_grad()
def evaluation_macs(transformer: Any, depth: int) -> tuple[int, int]:
    """MACs of an evaluation of one sample, of all layers and of `depth` at each end; counted without computing."""
    with torch.device("meta"):
        empty: Any = type(transformer).from_config(transformer.config)
    correct_rotary_table(empty)
    shape = (1, empty.config.in_channels, empty.config.sample_size, empty.config.sample_size)
    with FlopCounterMode(display=False) as counter:
        evaluate(empty, torch.empty(shape, device="meta"), 500.0, random_text(empty, 1))
    counts = counter.get_flop_counts()
    middle = range(depth, len(empty.blocks) - depth)
    left_out = sum(sum(counts[f"{MODEL}.blocks.{i}"].values()) for i in middle)
    whole = counter.get_total_flops()
    return whole // 2, (whole - left_out) // 2  # a MAC is two operations there
