"""A network as a pipeline of diffusers. `sampling.bundle` writes this source, with all that it needs, into folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from torch import Tensor

from data.encoders import LatentScaling
from data.pixels import to_picture, to_uint8
from data.text_encoders import open_text_encoder
from diffusion.guidance import guided
from diffusion.registry import PROCESSES, SAMPLERS, make_sampler
from diffusion.sampling import ImageNoise, Sampler, evaluations, sample_loop
from diffusion.schedules import convert_time
from models.contract import ModelOutput, Network
from runtime.json_file import Json

DECODED_AT_A_TIME = 16


class FamilyTransformer(ModelMixin, ConfigMixin):
    """A network as a model of diffusers; a subclass names its family's classes.

    Args:
        dit_family: Document of the weights; its "model" has the fields of the family's config.
    """

    network_class: ClassVar[type[Network]]
    config_class: ClassVar[type]

    @register_to_config
    def __init__(self, dit_family: Json) -> None:
        super().__init__()
        fields = {name: value for name, value in dit_family["model"].items() if name != "name"}
        self.network = self.network_class(self.config_class(**fields)).requires_grad_(False)
        if dit_family.get("time_convention"):
            self.network.time_convention = dit_family["time_convention"]  # type: ignore[misc]  # of this one network

    def forward(self, x: Tensor, t: float | Tensor, **conditioning: Tensor) -> ModelOutput:
        """Evaluate the network; see its `forward`."""
        return self.network(x, t, **conditioning)


class FamilyPipeline(DiffusionPipeline):
    """Pipeline for images or clips, by class, by text, or unconditional.

    Args:
        transformer: The network, with the document of its weights.
        vae: Its autoencoder; None for networks on pixels.
    """

    transformer: Any
    vae: Any
    _execution_device: torch.device
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(self, transformer: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)  # type: ignore[attr-defined]  # of diffusers

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        num_samples: int | None = None,
        num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str | None = None,
        output_type: str = "pil",
        **settings: object,
    ) -> SimpleNamespace:
        """Sample; where nothing else is given, as the weights were published.

        Args:
            class_labels: Class of each sample, of networks with classes.
            prompt: Prompts, of networks with text, in the place of `prompt_embeds`, `prompt_attention_mask`,
                `negative_prompt_embeds` and `negative_prompt_attention_mask`; (N, L, K) and (N, L) each.
            seed: Seed of the noise; sample i has noise (seed, i), whatever else is sampled.
            num_samples: Number of samples of networks without conditioning.
            num_inference_steps: Number of steps, or a spec such as "ddim50".
            guidance_scale: Scale of classifier-free guidance; 1 is none.
            guidance_interval: Guide only between these timesteps, 0 clean and 1000 noise.
            sampler: One of `SAMPLERS` of the network's process.
            output_type: "pil"; "np" or "pt", in [0, 1]; "latent".
            **settings: Settings of the sampler by name, `negative_prompt`, `text_encoder`, and encoded prompts.

        Returns:
            An object with `images`, or `frames` of clips: (N, H, W, C) and (N, F, H, W, C) of "np", the channels
            before height of "pt", lists of "pil".

        Raises:
            ValueError: For anything that does not fit the network.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} must be pil, np, pt or latent")
        network, document = self.transformer.network, self.transformer.config.dit_family
        text = {name: settings.pop(name) for name in TEXT_OPTIONS if name in settings}
        rows, null, count = self.conditioning(class_labels, prompt, num_samples, text)
        if count < 1:
            raise ValueError("nothing to sample: give at least one label, prompt or number of samples")
        chosen = own_sampler(document, network, sampler, num_inference_steps, settings, pixels=self.vae is None)
        scale, interval, preset = guidance_scale, guidance_interval, document["preset"]
        if scale is not None and not scale >= 1:
            raise ValueError(f"guidance_scale {scale}: must be at least 1, which is no guidance")
        if scale is None:
            scale = preset["cfg_scale"] if rows else 1.0
            interval = interval or preset["interval"]
        if interval is not None:
            low, high = sorted(convert_time(bound, "index", chosen.time_convention) for bound in interval)
            interval = (low, high)
        table = evaluations(chosen.times, scale, interval)
        times = [convert_time(t, chosen.time_convention, network.time_convention) for t in chosen.times]
        denoise = guided(
            network.for_sampling(times),
            rows,
            null if any(each.guided for each in table) else None,
            times=chosen.time_convention,
            channels=preset["channels"],
        )
        noise = ImageNoise(seed, range(count), network.sample_shape, self._execution_device)
        latents = sample_loop(denoise, chosen, noise.initial(), table, noise_fn=noise)
        return self.output(latents, output_type)

    def conditioning(
        self,
        class_labels: Sequence[int] | None,
        prompt: str | Sequence[str] | None,
        num_samples: int | None,
        text: Mapping[str, Any],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, int]:
        """Conditioning, that of the unconditional rows (None if the network has none), and the number of samples.

        Raises:
            ValueError: For conditioning of another kind, or labels that are no classes.
        """
        network = self.transformer.network
        kind = "text" if "text" in network.conditioning else "y" if network.conditioning else "none"
        given = {
            "y": class_labels is not None,
            "text": prompt is not None or bool(text),
            "none": num_samples is not None,
        }
        wrong = [name for name, is_given in given.items() if is_given != (name == kind)]
        if wrong:
            needs = {"y": "class_labels", "text": "prompt or prompt_embeds", "none": "num_samples"}
            raise ValueError(f"this network takes {needs[kind]}, and nothing else of {', '.join(needs.values())}")
        device = self._execution_device
        if kind == "y":
            labels, classes = torch.as_tensor(class_labels), network.config.num_classes
            if labels.is_floating_point() or labels.ndim != 1 or not ((labels >= 0) & (labels < classes)).all():
                raise ValueError(f"class_labels {class_labels}: must be a list of whole numbers, 0 to {classes - 1}")
            has_null = network.config.class_dropout_prob > 0
            return {"y": labels.to(device)}, network.null_conditioning(len(labels)) if has_null else None, len(labels)
        if kind == "none":
            return {}, None, int(num_samples or 0)
        rows, null = self.encode(prompt, text) if prompt is not None else encoded(text)
        move = {name: leaf.to(device, torch.float32) for name, leaf in rows.items()}
        return move, null and {name: leaf.to(device, torch.float32) for name, leaf in null.items()}, len(rows["text"])

    def encode(
        self, prompt: str | Sequence[str], text: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encode prompts, and the negative one, with the encoder of the weights or `text_encoder`.

        Raises:
            ValueError: If it is not known, or cannot be loaded.
        """
        document, config = self.transformer.config.dit_family, self.transformer.network.config
        name = text.get("text_encoder") or document.get("text", {}).get("name") or document["preset"]["text_encoder"]
        if name is None:
            raise ValueError("text_encoder: needed, because the weights do not know their own")
        encoder = open_text_encoder(name, config.text_length, self._execution_device)
        rows = encoder.encode([prompt] if isinstance(prompt, str) else list(prompt))
        null = encoder.encode([text.get("negative_prompt") or ""])
        # Networks of the released code see the unconditional text with the prompt's mask
        mask = rows["text_mask"] if document.get("foreign") else null["text_mask"].expand_as(rows["text_mask"])
        return rows, {"text": null["text"].expand_as(rows["text"]), "text_mask": mask}

    def output(self, latents: Tensor, output_type: str) -> SimpleNamespace:
        """Samples of latents in the form that is asked for."""
        pixels = latents if output_type == "latent" else self.decode(latents)
        is_clip = pixels.ndim == 5 and pixels.shape[1] > 1
        if pixels.ndim == 5 and not is_clip:
            pixels = pixels[:, 0]
        samples: object = pixels
        if output_type in ("np", "pt"):
            unit = (pixels / 2 + 0.5).clamp(0, 1)
            samples = unit if output_type == "pt" else unit.movedim(-3, -1).cpu().numpy()
        if output_type == "pil":
            samples = pictures((to_picture if is_clip else to_uint8)(pixels).cpu().numpy())
        return SimpleNamespace(**{"frames" if is_clip else "images": samples})

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents as pixels (N, ..., C, H, W) float32, about [-1, 1]."""
        if self.vae is None:
            return latents
        scaling = LatentScaling.from_config(self.transformer.config.dit_family["autoencoder"], latents.shape[-3])
        z = scaling.undo(latents).flatten(0, -4).to(self.vae.dtype)
        pixels = torch.cat([self.vae.decode(part).sample.float() for part in z.split(DECODED_AT_A_TIME)])
        return pixels.unflatten(0, latents.shape[:-3])


def own_sampler(
    document: Json,
    network: Network,
    name: str | None,
    steps: int | str | None,
    settings: Mapping[str, object],
    *,
    pixels: bool,
) -> Sampler:
    """Build a sampler of the network's process.

    Args:
        document: Document of the weights.
        network: The network.
        name: Name in `SAMPLERS`; None for that of the document, with its settings.
        steps: Number of steps, or a spec; None for the published ones.
        settings: Settings of the sampler by name.
        pixels: The network models pixels, to which predictions are clamped.

    Raises:
        ValueError: For a sampler or settings that do not exist, or of another process.
    """
    preset = document["preset"]
    name = name or preset["sampler"]
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    row, published = SAMPLERS[name], name == preset["sampler"]
    known = [field.name for field in dataclasses.fields(row.settings)]
    for setting_name in settings:
        if setting_name not in known:
            raise ValueError(f"{setting_name}: no setting of sampler {name!r}; it has {', '.join(known)}")
    fields = {field: value for field, value in document["process"].items() if field != "name"}
    process = PROCESSES[document["process"]["name"]](**fields).make(network.out_channels != network.sample_shape[-3])
    own = row.settings(**{**(preset["options"] if published else {}), **settings})
    spec = steps if steps is not None else preset["steps"] if published else row.steps
    return make_sampler(name, process, str(spec), own, pixels=pixels)


ENCODED = ("prompt", "negative_prompt")  # starts of the names of conditional and unconditional text
TEXT_OPTIONS = (
    "negative_prompt", "text_encoder", "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)  # fmt: skip


def encoded(text: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Conditioning of encoded prompts, and of the unconditional rows if there are any.

    Raises:
        ValueError: If an embedding has no mask.
    """
    found: list[dict[str, Tensor] | None] = []
    for start in ENCODED:
        embeds, mask = (text.get(f"{start}_{part}") for part in ("embeds", "attention_mask"))
        if (embeds is None) != (mask is None) or (embeds is None and start == "prompt"):
            raise ValueError(f"{start}_embeds and {start}_attention_mask: give both")
        found.append(None if embeds is None or mask is None else {"text": embeds, "text_mask": mask})
    rows, null = found
    assert rows is not None
    if null is not None:
        null = {name: leaf.expand_as(rows[name]) for name, leaf in null.items()}
    return rows, null


def pictures(samples: np.ndarray) -> Image.Image | list[object]:
    """Pictures of (..., H, W, C) uint8, in lists as deep as the axes in front.

    Raises:
        ValueError: For other numbers of channels than 1 and 3.
    """
    if samples.ndim > 3:
        return [pictures(each) for each in samples]
    if samples.shape[-1] not in (1, 3):
        raise ValueError(f"samples of {samples.shape[-1]} channels are no pictures; give output_type np or pt")
    return Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
