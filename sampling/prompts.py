"""Prompts: from flags to encoded text, once a job; the encoder is freed afterwards.

A network of our own training sees each text with its own mask, in training as in sampling. The published text-to-video
pipeline cuts prompt and empty prompt to the prompt's length, so that networks of other code get the prompt's mask for
both; it does so for a single prompt, and here for each of several, so that a sample does not depend on the others.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.text_encoders import TextEncoder, check_encoded, open_text_encoder
from models import Network
from models.loading import CheckpointInfo
from runtime import distributed
from runtime.errors import UserError, error_prefix
from runtime.files import read_utf8
from runtime.json_file import Json
from runtime.settings import flag_name, setting

NULL = "null_"  # prefix of the unconditional rows in files of encoded prompts


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Text of the samples, for networks that take text."""

    prompt: tuple[str, ...] = setting((), "prompts; may be repeated", free=True, repeats=True)
    prompt_file: Path | None = setting(None, "file of prompts, one a line", free=True)
    negative_prompt: str | None = setting(
        None, "prompt of the unconditional rows, which guidance leads away from", shown="the empty one", free=True
    )
    prompt_embeds: Path | None = setting(
        None, "encoded prompts, a .safetensors with text, text_mask, null_text and null_text_mask", free=True
    )
    text_encoder: str | None = setting(
        None,
        "text encoder: words, or a folder of diffusers or repository on the hub with a T5",
        shown="the checkpoint's",
        free=True,
    )
    text_precision: Literal["fp32", "bf16"] = setting("fp32", "precision of the text encoder", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        sources = [name for name in ("prompt", "prompt_file", "prompt_embeds") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(map(flag_name, sources))}: give one of them")
        for name in ("negative_prompt", "text_encoder"):
            value = getattr(self, name)
            if self.prompt_embeds is not None and value is not None:
                raise ValueError(f"{flag_name(name)} {value}: has no effect with --prompt-embeds, which is encoded")

    def chosen(self) -> dict[str, object]:
        """Values by flag of what says something about text."""
        return {flag_name(k): v for k, v in vars(self).items() if v not in (None, (), "fp32")}

    def first_chosen(self) -> str | None:
        """The first flag that says something about text, with its value as it is typed; None if none does."""
        for flag, value in self.chosen().items():
            return f"{flag} {value[0] if isinstance(value, tuple) else value}"
        return None

    def read(self) -> tuple[str, ...]:
        """The prompts; none with `prompt_embeds`.

        Raises:
            UserError: If the file cannot be read, or holds none.
        """
        if self.prompt_file is None:
            return self.prompt
        where = f"--prompt-file {self.prompt_file}"
        with error_prefix(where):
            lines = read_utf8(self.prompt_file).splitlines()
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise UserError(f"{where}: no prompts in it; it needs one a line")
        return prompts


class Prompts(NamedTuple):
    """Encoded prompts of a job.

    Attributes:
        texts: P prompts; empty where a file of encoded ones has no texts.
        rows: Conditioning of the prompts, P rows.
        null: That of unconditional rows, P rows; None if a file has none.
        record: JSON values that fix both.
    """

    texts: tuple[str, ...]
    rows: dict[str, Tensor]
    null: dict[str, Tensor] | None
    record: Json

    @property
    def size(self) -> int:
        """P, the number of prompts."""
        return len(self.rows["text"])

    def conditioning(self, numbers: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Conditional and unconditional rows of the samples with these numbers, which take the prompts in turn."""
        taken = [number % self.size for number in numbers]
        cond, null = (
            None if leaves is None else {name: leaf[taken] for name, leaf in leaves.items()}
            for leaves in (self.rows, self.null)
        )
        assert cond is not None
        return cond, null

    def text_of(self, number: int) -> str:
        """Prompt of a sample, in one line; empty if it is not known."""
        return " ".join(self.texts[number % self.size].split()) if self.texts else ""


def open_prompts(
    settings: TextSettings,
    network: Network,
    info: CheckpointInfo,
    device: torch.device,
    texts: Sequence[str],
    *,
    guided: bool = True,
) -> Prompts | None:
    """Encode the prompts of a job on one process, for all; None for a network that takes no text.

    Args:
        settings: The settings.
        network: Network that takes the text.
        info: Description of its checkpoint, which knows the encoder.
        device: Where to encode.
        texts: The prompts that the settings name.
        guided: Unconditional rows are evaluated.

    Raises:
        UserError: For prompts without such a network or the reverse, and for whatever cannot be read or encoded.
    """
    if "text" not in network.conditioning:
        if (chosen := settings.first_chosen()) is not None:
            takes = "labels; give --class-labels" if network.conditioning else "no text"
            raise UserError(f"{chosen}: has no effect, because the network of --ckpt takes {takes}")
        return None
    if settings.negative_prompt is not None and not guided:
        raise UserError(
            f"--negative-prompt {settings.negative_prompt}: has no effect without unconditional rows; give --cfg-scale "
            "above 1"
        )
    if settings.prompt_embeds is not None:
        prompts = read_embeds(settings.prompt_embeds, network)
        if guided and prompts.null is None:
            raise UserError(
                f"--prompt-embeds {settings.prompt_embeds}: has no null_text, which guidance needs; give --cfg-scale 1"
            )
        return prompts
    if not texts:
        raise UserError("--prompt: needed, because the network of --ckpt takes text; or --prompt-file, --prompt-embeds")
    return distributed.on_rank0(lambda: encode_prompts(settings, network, info, device, texts))


def encode_prompts(
    settings: TextSettings, network: Network, info: CheckpointInfo, device: torch.device, texts: Sequence[str]
) -> Prompts:
    """Encode prompts and the negative one, and free the encoder.

    Raises:
        UserError: If the encoder is not known, cannot be loaded or refuses a prompt.
    """
    recorded: Json = (info.meta or {}).get("text", {})
    published = None if info.preset is None else info.preset.text_encoder
    name = settings.text_encoder or recorded.get("name") or published
    if name is None:
        raise UserError(f"--text-encoder: needed, because --ckpt {info.source} does not know its own")
    dtype = torch.bfloat16 if settings.text_precision == "bf16" else torch.float32
    with error_prefix(f"--text-encoder {name}"):
        encoder = open_text_encoder(name, network.config.text_length, device, dtype)
        description = {**encoder.describe(), "precision": settings.text_precision}
        if dtype == torch.float32:
            check_same_encoder(description, recorded, info, chosen=settings.text_encoder is not None)
    unique, negative = list(dict.fromkeys(texts)), settings.negative_prompt or ""
    flag = "--prompt" if settings.prompt_file is None else f"--prompt-file {settings.prompt_file}:"
    for line in [*cut_prompts(encoder, flag, unique), *cut_prompts(encoder, "--negative-prompt", [negative])]:
        print(f"warning: {line}", file=sys.stderr)
    encoded, null = encoder.encode(unique), encoder.encode([negative])
    del encoder
    release_memory(device)
    with error_prefix(f"--text-encoder {name}"):
        check_encoded(encoded, network.config.text_width, network.config.text_length)
    rows = {name: leaf[[unique.index(text) for text in texts]] for name, leaf in encoded.items()}
    mask = rows["text_mask"] if info.is_foreign else null["text_mask"].expand(len(texts), -1)
    record = {"prompts": list(texts), "negative_prompt": negative, "encoder": description}
    return Prompts(tuple(texts), rows, {"text": null["text"].expand_as(rows["text"]), "text_mask": mask}, record)


def check_same_encoder(
    description: Mapping[str, object], recorded: Mapping[str, object], info: CheckpointInfo, *, chosen: bool
) -> None:
    """Compare an encoder with the one that a checkpoint was trained with; another one that was chosen is a warning.

    Raises:
        ValueError: If nothing but the checkpoint names it, and it has changed since.
    """
    if recorded.get("sha256") in (None, description["sha256"]):
        return
    problem = f"is not the text encoder that --ckpt {info.source} was trained with, by its weights"
    if not chosen:
        raise ValueError(f"{problem}; give its own by --text-encoder")
    warnings.warn(f"--text-encoder {description['name']}: {problem}", stacklevel=2)


def cut_prompts(encoder: TextEncoder, flag: str, prompts: Sequence[str]) -> Iterator[str]:
    """Lines about prompts that are longer than the network takes, with where they are cut.

    Raises:
        UserError: For a prompt that the encoder refuses.
    """
    for prompt in prompts:
        shown = prompt if len(prompt) < 60 else f"{prompt[:57]}..."
        with error_prefix(f"{flag} {shown}"):
            part = encoder.read_part(prompt)
        if part is not None:
            end = part if len(part) <= 40 else f"... {part[-40:]}"
            yield f"{flag} {shown}: longer than {encoder.length} tokens; it is read up to '{end}'"


def release_memory(device: torch.device) -> None:
    """Give back the memory of what was dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_embeds(path: Path, network: Network) -> Prompts:
    """Read encoded prompts: `text` (P, L, K), `text_mask` (P, L), and unconditional rows, 1 or P, of the same kind.

    Raises:
        UserError: If the file cannot be read, lacks a tensor, or is of another width or length.
    """
    where = f"--prompt-embeds {path}"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: cannot be read as safetensors ({error})") from error
    names = ("text", "text_mask")
    for name in [*names, *(NULL + name for name in names if any(key.startswith(NULL) for key in tensors))]:
        if name not in tensors:
            raise UserError(f"{where}: lacks {name}; it has {', '.join(sorted(tensors)) or 'nothing'}")
    rows = {name: tensors[name].float() for name in names}
    null = {name: tensors[NULL + name].float() for name in names} if NULL + "text" in tensors else None
    config = network.config
    for leaves in (rows, null or rows):
        try:
            check_encoded(leaves, config.text_width, config.text_length)
        except ValueError as error:
            raise UserError(f"{where}: {error}; scripts/encode_prompts.py makes a file for this --ckpt") from error
        with error_prefix(where):
            if leaves["text"].ndim != 3 or not len(leaves["text"]):
                raise ValueError(f"text is {tuple(leaves['text'].shape)}, and needs one row a prompt: (P, L, K)")
    count = len(rows["text"])
    if null is not None and len(null["text"]) not in (1, count):
        raise UserError(f"{where}: null_text has {len(null['text'])} rows, and needs 1 or those of text, {count}")
    if null is not None:
        null = {name: leaf.expand(count, *leaf.shape[1:]) for name, leaf in null.items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.float().contiguous().numpy().tobytes())
    return Prompts((), rows, null, {"embeds": digest.hexdigest()})


def deciding(prompts: Prompts) -> dict[str, object]:
    """Settings of a job by flag that stand for the prompts: short, and different for other prompts."""
    if "embeds" in prompts.record:
        return {"--prompt-embeds": prompts.record["embeds"]}
    content = json.dumps(prompts.record["prompts"]).encode()
    encoder = {key: value for key, value in prompts.record["encoder"].items() if key != "name"}
    return {
        "--prompt": hashlib.sha256(content).hexdigest(),
        "--negative-prompt": prompts.record["negative_prompt"],
        "--text-encoder": encoder,
    }
