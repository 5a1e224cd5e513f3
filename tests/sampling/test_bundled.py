"""The pipeline of exported folders, here in our own process: its pictures in eight bits, and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import FAMILIES
from sampling import bundled
from sampling.pipeline import Pipeline
from sampling.publishing import document_of
from tests.checkpoints import write_network
from tests.networks import debug_name, debug_network


def both(family: str, folder: Path, **fields: Any) -> tuple[Pipeline, Any]:
    """Our pipeline of a random network, and that of diffusers with the same weights."""
    path = write_network(folder / "a.safetensors", debug_name(family), debug_network(family, **fields))
    ours, row = Pipeline.from_pretrained(path, device="cpu"), FAMILIES[family]
    members = {"network_class": row.network, "config_class": row.config}
    document = document_of(ours.network, ours.info, ours.encoder, None, "a")
    transformer = type("Transformer", (bundled.FamilyTransformer,), members)(dit_family=document)
    transformer.network.load_state_dict(ours.network.state_dict())
    return ours, bundled.FamilyPipeline(transformer.eval())


@pytest.mark.parametrize(("family", "shape"), [("DiT", (3, 8, 8)), ("DiT", (1, 8, 8)), ("Latte", (4, 3, 8, 8))])
def test_pictures_are_ours_to_the_bit(family: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    ours, theirs = both(family, tmp_path, sample_shape=shape)
    expected = ours.sample([0, 1], seed=5, num_sampling_steps=3)
    (samples,) = vars(theirs([0, 1], seed=5, num_inference_steps=3)).values()
    pictures = [[np.asarray(frame) for frame in each] if len(shape) == 4 else np.asarray(each) for each in samples]
    assert np.array_equal(np.stack(pictures).reshape(expected.shape), expected)
    (array,) = vars(theirs([0, 1], seed=5, num_inference_steps=3, output_type="np")).values()
    assert array.shape == expected.shape and array.min() >= 0 and array.max() <= 1


def test_latents_are_returned_as_they_are(tmp_path: Path) -> None:
    ours, theirs = both("DiT", tmp_path)
    run = ours.prepare(num_sampling_steps=3)
    latents = theirs(torch.tensor([1]), seed=5, num_inference_steps=3, output_type="latent").images
    assert torch.equal(latents, ours.denoise(run, 5, [0], {"y": torch.tensor([1])}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "takes class_labels, and nothing else of"),
        ({"class_labels": [0], "num_samples": 1}, "takes class_labels, and nothing else of"),
        ({"class_labels": [10]}, "whole numbers, 0 to 9"),
        ({"class_labels": [-1]}, "whole numbers, 0 to 9"),
        ({"class_labels": [0.5]}, "whole numbers, 0 to 9"),
        ({"class_labels": []}, "whole numbers, 0 to 9|nothing to sample"),
        ({"class_labels": [0], "num_inference_steps": 0}, "0"),
        ({"class_labels": [0], "guidance_scale": 0.5}, "guidance_scale 0.5: must be at least 1"),
        ({"class_labels": [0], "sampler": "dpm"}, "unknown sampler 'dpm'; known: ddpm"),
        ({"class_labels": [0], "sampler": "euler"}, "of process 'flow', not 'gaussian'"),
        ({"class_labels": [0], "eta": 0.5}, "eta: no setting of sampler 'ddpm'; it has clip_denoised, grid"),
        ({"class_labels": [0], "output_type": "jpg"}, "output_type 'jpg' must be"),
        ({"class_labels": [0], "num_inference_steps": 2}, "samples of 4 channels are no pictures"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, pipeline = both("DiT", tmp_path)
    with pytest.raises(ValueError, match=words):
        pipeline(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt_embeds": torch.zeros(1, 5, 12)}, "prompt_embeds and prompt_attention_mask: give both"),
        ({"negative_prompt_embeds": torch.zeros(1, 5, 12)}, "prompt_embeds and prompt_attention_mask: give both"),
        ({"prompt": "a dog"}, "text_encoder: needed"),
        (
            {"prompt_embeds": torch.zeros(1, 5, 12), "prompt_attention_mask": torch.ones(1, 5)},
            "needs unconditional rows",
        ),
    ],
)
def test_mistakes_about_text_are_named(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, pipeline = both("LatteT2V", tmp_path)
    with pytest.raises(ValueError, match=words):
        pipeline(**arguments, num_inference_steps=2)
