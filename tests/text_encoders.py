"""A tiny T5 with random weights and a vocabulary of its own, saved as diffusers saves one."""

from pathlib import Path

import torch

VOCABULARY = ["<pad>", "</s>", "<unk>", *"a dog cat in the sun runs sleeps & ' s".split()]
WIDTH = 16


def save_t5(folder: Path, seed: int = 0) -> Path:
    """Write text_encoder and tokenizer into a folder, and return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=WIDTH, d_kv=4, num_heads=4, d_ff=32, num_layers=2, is_gated_act=True,
        dense_act_fn="gelu_new", feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder
