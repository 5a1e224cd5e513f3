"""Encoders of prompts and captions: `words`, and T5 through transformers, from a folder or the hub.

    encoder = open_text_encoder("maxin-cn/Latte-1", length=120)
    encoder.encode(["a dog in the sun"])         # {"text": (1, 120, 4096), "text_mask": (1, 120)}

An encoder is needed only once a job, or once a data set: networks take encoded text.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data.words import Words
from runtime.download import quiet_hub, why_not_loaded

ROWS = 8  # prompts that T5 encodes at a time
LENGTH = 120  # tokens of a T5, as the published networks take them
NEEDED = ("transformers", "sentencepiece")


class TextEncoder(Protocol):
    """A text encoder: any object with these members."""

    name: str  # value of --text-encoder
    width: int  # K, numbers of a token
    length: int  # L, tokens of every prompt: it is cut or filled up

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode N prompts: "text" (N, L, K) float32, and "text_mask" (N, L) float32 with ones at tokens."""

    def read_part(self, prompt: str) -> str | None:
        """The part of a prompt that is read, if that is not all of it; None for prompts that fit."""

    def describe(self) -> dict[str, object]:
        """JSON values that fix the encoded text: "name", "width", "length", "sha256"."""


def missing_package() -> str | None:
    """Name the first package of the extra `text` that is not installed; None if all are."""
    return next((package for package in NEEDED if importlib.util.find_spec(package) is None), None)


def clean(prompt: str) -> str:
    """Clean a prompt: character references resolved, lower case, single spaces.

    Note:
        The published pipelines also take out links, handles and file names, which prompts rarely have.
    """
    return " ".join(html.unescape(html.unescape(prompt)).lower().split())


class T5:
    """The encoder of a T5, with its tokenizer.

    Prompts are cleaned, cut to L tokens of which the last is the end, and filled up.

    Args:
        name: Folder of diffusers, or name of a repository on the hub, with text_encoder and tokenizer in it.
        length: L.
        device: Where to compute.
        dtype: Precision of the weights; the result is float32.

    Raises:
        ValueError: If a package is missing, or one of the two cannot be loaded.
    """

    def __init__(
        self, name: str, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if (package := missing_package()) is not None:
            raise ValueError(f"T5 needs the package {package}; pip install '.[text]', or give --prompt-embeds")
        self.name, self.length, self._device = name, length, device
        self._tokenizer, self._model = _load(name, dtype)
        self._model.eval().requires_grad_(False).to(device)
        self.width: int = self._model.config.d_model

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode N prompts: "text" (N, L, K) float32, and "text_mask" (N, L) float32, on the CPU."""
        texts, masks = [], []
        for start in range(0, len(prompts), ROWS):
            cleaned = [clean(prompt) for prompt in prompts[start : start + ROWS]]
            tokens = self._tokenizer(
                cleaned, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).to(self._device)
            hidden = self._model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            texts.append(hidden.float().cpu())
            masks.append(tokens.attention_mask.float().cpu())
        return {"text": torch.cat(texts), "text_mask": torch.cat(masks)}

    def read_part(self, prompt: str) -> str | None:
        """The part of a prompt that is read, if that is not all of it; None for prompts that fit."""
        tokens: list[int] = self._tokenizer(clean(prompt), verbose=False).input_ids
        if len(tokens) <= self.length:
            return None
        part: str = self._tokenizer.decode(tokens[: self.length - 1], skip_special_tokens=True)
        return part

    def describe(self) -> dict[str, object]:
        """Name, size, and a digest of the weights."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} ".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return {"name": self.name, "width": self.width, "length": self.length, "sha256": digest.hexdigest()}


def _load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load tokenizer and encoder; a ValueError of one line for any failure, and for weights that do not fill it."""
    for part in ("text_encoder", "tokenizer") if Path(name).is_dir() else ():
        if not (Path(name) / part).is_dir():
            raise ValueError(f"{name} has no folder {part}; give a folder of diffusers with text_encoder and tokenizer")
    from transformers import AutoTokenizer, T5EncoderModel  # heavy, and only prompts of T5 need it
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with quiet_hub():
            tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer")
            loaded: Any = T5EncoderModel.from_pretrained(
                name, subfolder="text_encoder", dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # a config of other code fails in many ways
        problem = why_not_loaded(name, error)
        raise ValueError(f"cannot load text_encoder and tokenizer of {name!r}{problem}") from error
    finally:
        logging.set_verbosity(level)
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"the weights in {name}/text_encoder lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return tokenizer, model


def open_text_encoder(
    name: str, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Open a text encoder: `words`, or a folder of diffusers or repository on the hub with a T5 in it.

    Args:
        name: Value of `--text-encoder`.
        length: L, tokens of a prompt, as the network takes them.
        device: Where to compute.
        dtype: Precision of the weights.

    Raises:
        ValueError: If it cannot be loaded, or makes texts of another length.
    """
    encoder: TextEncoder = Words() if name == Words.name else T5(name, length, device, dtype)
    if encoder.length != length:
        raise ValueError(
            f"the text encoder {name} makes {encoder.length} tokens, and the network takes {length}; give the one that "
            "it was trained with"
        )
    return encoder


def default_length(name: str) -> int:
    """Tokens of a caption where nothing says otherwise: the only number of `words`, that of published networks."""
    return Words.length if name == Words.name else LENGTH


def check_encoded(text: Mapping[str, Tensor], width: int, length: int) -> None:
    """Check that encoded text is what a network takes.

    Args:
        text: "text" (..., L, K) and "text_mask" (..., L).
        width: K.
        length: L.

    Raises:
        ValueError: If it has another width or length, or a mask that does not fit.
    """
    shape = tuple(text["text"].shape)
    if shape[-1] != width:
        raise ValueError(f"text is {shape[-1]} numbers wide, and the network takes {width}")
    if shape[-2] != length:
        raise ValueError(f"text has {shape[-2]} tokens, and the network takes {length}")
    if tuple(text["text_mask"].shape) != shape[:-1]:
        raise ValueError(f"text_mask is {tuple(text['text_mask'].shape)}, and the text {shape}: it needs {shape[:-1]}")
    if not bool(text["text"].isfinite().all()):
        raise ValueError("text has NaN or infinity")
    if not bool(((text["text_mask"] == 0) | (text["text_mask"] == 1)).all()):
        raise ValueError("text_mask must be 1 at tokens and 0 elsewhere")
