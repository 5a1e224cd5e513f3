"""Pipelines of diffusers, tiny and random, with text encoders and tokenizers of vocabularies in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.diffusers_parts import tiny_transformer

WORDS = ("a", "red", "fox", "in", "the", "snow", "dog", "runs")
SCALED = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCALED |= {"prediction_type": "v_prediction", "clip_sample": False}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def randomised(module: Any) -> Any:
    """The module in evaluation mode, with random values in all parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    return module.eval()


def tiny_autoencoder() -> Any:
    """An autoencoder of the usual factor 8."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return randomised(AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, **kinds))


def word_tokenizer(pad: str, end: str, length: int) -> Any:
    """A tokenizer of whole words, which ends every text with `end` and fills it up with `pad`."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate((pad, end, "[UNK]", *WORDS))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=pad, eos_token=end, unk_token="[UNK]", model_max_length=length
    )


def tiny_t5() -> Any:
    """The encoder of a T5, 16 wide."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return randomised(transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")))


def tiny_hunyuan_pipeline(layers: int = 6) -> Any:
    """A HunyuanDiTPipeline for prompts of `WORDS`."""
    transformers = pytest.importorskip("transformers")
    from diffusers import DDPMScheduler, HunyuanDiTPipeline

    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=16, max_position_embeddings=77))
    return HunyuanDiTPipeline(
        vae=tiny_autoencoder(),
        text_encoder=randomised(clip),
        tokenizer=word_tokenizer("[PAD]", "[SEP]", 77),
        transformer=tiny_transformer("HunyuanDiT2DModel", layers, text_len=77, text_len_t5=256),
        scheduler=DDPMScheduler(**SCALED),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=tiny_t5(),
        tokenizer_2=word_tokenizer("<pad>", "</s>", 256),
    )


def tiny_latte_pipeline() -> Any:
    """A LattePipeline for clips of 3 frames of 64 x 64 pixels, and prompts of `WORDS`."""
    pytest.importorskip("transformers")
    from diffusers import DDIMScheduler, LattePipeline

    return LattePipeline(
        tokenizer=word_tokenizer("<pad>", "</s>", 120),
        text_encoder=tiny_t5(),
        vae=tiny_autoencoder(),
        transformer=tiny_transformer("LatteTransformer3DModel"),
        scheduler=DDIMScheduler(**LINEAR),
    )


def tiny_dit_pipeline() -> Any:
    """A DiTPipeline for pictures of 64 x 64 pixels and 10 classes; its null class is always 1000."""
    from diffusers import DDIMScheduler, DiTPipeline

    transformer = tiny_transformer("DiTTransformer2DModel", num_embeds_ada_norm=1000)
    return DiTPipeline(transformer, tiny_autoencoder(), DDIMScheduler(**LINEAR))
