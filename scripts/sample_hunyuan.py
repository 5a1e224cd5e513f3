"""Sample pictures of a prompt with HunYuan-DiT, its middle layers skipped at most steps (Skip-Cache).

    python scripts/sample_hunyuan.py --prompt "a red fox in the snow" --cache N2-700-50
    python scripts/sample_hunyuan.py --prompt "a red fox in the snow" --image-size 768 1280 --num-samples 4

Needs the extra `text` (pip install '.[text]'). Network, text encoders and autoencoder are those of diffusers' pipeline,
downloaded once; defaults are the released ones. See docs/text.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data.pixels import Images, grid, save_png, to_picture, written_by
from data.text_encoders import missing_package
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.download import quiet_hub, why_not_loaded
from runtime.errors import UserError, error_prefix, run
from runtime.files import check_writable
from runtime.seeds import image_seed
from runtime.settings import flag_name, setting
from sampling.diffusers_cache import SkipCache, enable_skip_cache, parse_skip_cache
from sampling.hunyuan import correct_rotary_table

PROGRAM = "sample_hunyuan.py"
PIPELINE = "HunyuanDiTPipeline"
PIXELS = 16  # a token's side


@dataclass(frozen=True, kw_only=True)
class HunyuanSettings:
    """Settings of sample_hunyuan.py."""

    prompt: str | None = setting(None, "text of the pictures, English or Chinese", shown="required")
    negative_prompt: str = setting("", "text that guidance leads away from")
    pipeline: str = setting(
        "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", "folder of diffusers' HunyuanDiTPipeline, or its name on the hub"
    )
    image_size: tuple[int, int] = setting((1024, 1024), "height and width in pixels, multiples of 16")
    num_sampling_steps: int = setting(100, "steps of the pipeline's scheduler")
    cfg_scale: float = setting(6.0, "guidance scale; 1: no guidance")
    cache: str | None = setting(
        None,
        "Skip-Cache, N-HIGH-LOW: all layers run every N-th step, from timestep HIGH on and from LOW down",
        shown="all layers always; published: N2-700-50",
    )
    cache_depth: int | None = setting(None, "layers that run at each end at the other steps", shown="1")
    num_samples: int = setting(1, "number of pictures")
    batch_size: int | None = setting(None, "pictures sampled at a time", shown="all of them")
    seed: int = setting(0, "seed of the noise")
    precision: Literal["fp16", "fp32"] | None = setting(None, "of weights and results", shown="fp16 on GPUs, else fp32")
    device: Literal["cuda", "mps", "cpu"] | None = setting(None, "where to compute", shown="cuda if there is one")
    output: Path = setting(Path("hunyuan.png"), "the picture; several are shown side by side")
    overwrite: bool = setting(False, "replace a picture of other origin")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.prompt is None or not self.prompt.strip():
            raise ValueError("--prompt: required, a text of at least one word")
        for name in ("num_sampling_steps", "num_samples", "batch_size", "cache_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        if any(side < PIXELS or side % PIXELS for side in self.image_size):
            raise ValueError(f"--image-size {self.image_size[0]} {self.image_size[1]}: must be multiples of {PIXELS}")
        if not 1 <= self.cfg_scale < math.inf:
            raise ValueError(f"--cfg-scale {self.cfg_scale}: must be at least 1 (1 is no guidance), and finite")
        if self.cfg_scale == 1 and self.negative_prompt:
            raise ValueError("--negative-prompt: has no effect with --cfg-scale 1")
        if self.cache is None and self.cache_depth is not None:
            raise ValueError(f"--cache-depth {self.cache_depth}: has no effect without --cache")
        if self.cache is not None:
            with error_prefix("--cache"):
                parse_skip_cache(self.cache)
        if self.output.suffix.lower() != ".png":
            raise ValueError(f"--output {self.output}: must end in .png")


def load_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a HunyuanDiTPipeline.

    Raises:
        UserError: If a package is missing, it cannot be loaded, or the folder holds another pipeline.
    """
    if (package := missing_package()) is not None:
        raise UserError(f"--pipeline {name}: needs the package {package}; pip install '.[text]'")
    from diffusers import DiffusionPipeline  # heavy, as transformers is, which it imports

    try:
        with quiet_hub():
            pipeline: Any = DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except Exception as error:  # a config of other code fails in many ways
        raise UserError(f"--pipeline {name}: cannot be loaded{why_not_loaded(name, error)}") from error
    if type(pipeline).__name__ != PIPELINE:
        raise UserError(f"--pipeline {name}: is a {type(pipeline).__name__}, not a {PIPELINE}")
    return pipeline.to(device)


def enable_cache(transformer: torch.nn.Module, config: HunyuanSettings) -> SkipCache:
    """Put the hooks on a transformer, as the flags ask for; without any, they leave nothing out and count.

    Raises:
        UserError: For numbers that the transformer does not take.
    """
    arguments = parse_skip_cache(config.cache) if config.cache is not None else {"interval": 1}
    flags = f"--cache {config.cache}" + (f" --cache-depth {config.cache_depth}" if config.cache_depth else "")
    with error_prefix(flags):
        return enable_skip_cache(transformer, **arguments, depth=config.cache_depth)


def sample(pipeline: Any, config: HunyuanSettings) -> Images:
    """Sample pictures (N, H, W, 3) uint8; number i is the same in any batch."""
    (height, width), pictures = config.image_size, []
    for numbers in torch.arange(config.num_samples).split(config.batch_size or config.num_samples):
        seeds = [image_seed(config.seed, i) for i in numbers.tolist()]
        result = pipeline(
            config.prompt,
            negative_prompt=config.negative_prompt,
            height=height,
            width=width,
            use_resolution_binning=False,
            num_inference_steps=config.num_sampling_steps,
            guidance_scale=config.cfg_scale,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        pictures.append(to_picture(2 * result.images.float() - 1).cpu())
    images: Images = torch.cat(pictures).numpy()
    return images


def main(argv: Sequence[str]) -> None:
    """Parse flags, load the pipeline, sample, write the picture."""
    config = parse_config(HunyuanSettings, argv, program=PROGRAM, doc=__doc__)
    check_writable(config.output, "--output")
    if config.output.exists() and not (config.overwrite or written_by(config.output, PROGRAM)):
        raise UserError(f"--output {config.output}: exists, and is no picture of {PROGRAM}; --overwrite replaces it")
    device = choose_device(config.device)
    precision = config.precision or ("fp32" if device.type == "cpu" else "fp16")
    pipeline = load_pipeline(config.pipeline, device, torch.float16 if precision == "fp16" else torch.float32)
    with ExitStack() as hooks:
        hooks.enter_context(correct_rotary_table(pipeline.transformer))
        cache = hooks.enter_context(enable_cache(pipeline.transformer, config))
        images = sample(pipeline, config)
    save_png(images[0] if len(images) == 1 else grid(images, min(len(images), 4))[0], config.output, PROGRAM)
    unit = "picture" if len(images) == 1 else "pictures"
    print(f"Saved {len(images)} {unit} to {config.output}; evaluations: {cache.full} whole, {cache.reused} cached")


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
