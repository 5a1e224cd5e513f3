"""Sections of a model card: lines that install the code and load the weights, and what these were made from."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from runtime.errors import UserError
from runtime.hub import CARD
from runtime.json_file import Json
from runtime.licences import UNKNOWN, Origin
from sampling.provenance import project_version

LOAD = """{source}

```bash
{clone}bash scripts/setup.sh {extras} && source .venv/bin/activate
python sample.py --ckpt {name}{flags}
```

```python
from sampling.pipeline import Pipeline  # in the folder of the clone

pipeline = Pipeline.from_pretrained("{name}")
{call}
```

Published with dit-family {version} and PyTorch {torch}; Python 3.11 or newer.
"""
SOURCE = "By the code of dit-family:"
NO_SOURCE = (
    "By the code of dit-family, in a clone of it; no public address of it was known where this card was written."
)
LOAD_BY_DIFFUSERS = """The code is part of this repository; read it before you allow it to run. Python 3.11 or newer:

```bash
pip install torch diffusers{packages}
```

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
{call}
```

Without a network: `hf download {name} --local-dir p` once with one, then `"./p"` in the place of the name.

Arguments: {arguments}. Published with dit-family {version}, PyTorch {torch} and diffusers {diffusers}{where}.
"""
LOADING = "## Load"
ARGUMENTS = (
    "`seed`, `num_inference_steps`, `guidance_scale`, `guidance_interval=(low, high)`, `sampler`, "
    "`output_type` (pil, np, pt, latent)"
)


def loading(document: Json, name: str, *, code_url: str | None, for_diffusers: bool) -> str:
    """Lines that install the code and load the weights, with the versions that they were published with."""
    url, text = code_url, "text_width" in document["model"]
    known = {
        "name": name,
        "call": _call(document, for_diffusers),
        "version": project_version(),
        "torch": torch.__version__,
    }
    if for_diffusers:
        import diffusers  # heavy, and only its pipelines need it

        first = "`prompt`, `negative_prompt`, `text_encoder`" if text else ""
        if not text:
            first = "`class_labels`" if document["model"].get("num_classes", 0) else "`num_samples`"
        return LOAD_BY_DIFFUSERS.format(
            **known,
            arguments=f"{first}, {ARGUMENTS}",
            packages=" transformers sentencepiece" if text else "",
            diffusers=diffusers.__version__,
            where=f" ({url})" if url else "",
        )
    return LOAD.format(
        **known,
        source=SOURCE if url else NO_SOURCE,
        clone=f"git clone {url} dit-family && cd dit-family\n" if url else "",
        extras="base" + " text" * text + " video" * makes_clips(document),
        flags=' --prompt "a dog in the snow"' if text else "",
    )


def makes_clips(document: Json) -> bool:
    """True for weights of samples with several frames."""
    frames = document["data"]["image_shape"][:-3]
    return any(count > 1 for count in frames)


def start_of(document: Json) -> str:
    """Sentence about the weights of others that these are, or that their training started from."""
    origin, first = document.get("origin"), document.get("train", {}).get("run", {}).get("init_from")
    if origin is None:
        return f" Their training started from {first}." if first else ""
    name = origin["name"]
    if first and first.partition("@")[0] == name:
        name = first  # with its revision
    verb = "were trained from" if first else "are, or were trained from,"
    file = f", as {first}" if first and name not in (first, Path(first).stem) else ""
    return f" They {verb} {name}{file} ({origin['licence'] or UNKNOWN})."


def renamed_card(text: str, former: str, name: str) -> str:
    """A card with another name in its title, and in the lines that load the weights.

    Args:
        text: The card, which a person may have added to.
        former: Name that it was written with.
        name: Name that it gets.
    """
    before, title, after = text.partition(f"\n# {former.rsplit('/', 1)[-1]}\n")
    if title:
        text = f"{before}\n# {name.rsplit('/', 1)[-1]}\n{after}"
    before, heading, after = text.partition(f"\n{LOADING}\n")
    section, following, rest = after.partition("\n## ")
    for line in ('"{}"', "--ckpt {}\n", "--ckpt {} ", "hf download {} "):
        section = section.replace(line.format(former), line.format(name))
    text, command = f"{before}{heading}{section}{following}{rest}", "`python sample.py --ckpt {} "  # of captions
    return text.replace(command.format(shlex.quote(former)), command.format(shlex.quote(name)))


def card_of_copy(text: str, origin: Origin) -> str:
    """A card that names another owner's repository, which its weights are copied from, as `base_model` and in words."""
    start = text.partition("---\n")[2].partition("\n---\n")[0]
    lines, is_former = list[str](), False
    for line in start.splitlines():
        is_former = line.startswith("base_model:") or is_former and line.startswith((" ", "-"))
        lines += [] if is_former else [line]
    metadata = "\n".join([*lines, f"base_model: {origin.name}"])
    text = text.replace(f"---\n{start}\n---\n", f"---\n{metadata}\n---\n", 1)
    sentence = f"\n## Licence\n\nThese weights are those of {origin.name}.\n"
    return text.replace("\n## Licence\n", sentence, 1)


def licence_of_card(text: str, where: str) -> str | None:
    """Licence in the metadata of a card; None without.

    Raises:
        UserError: If these are no YAML.
    """
    from huggingface_hub import RepoCard  # heavy, and only published folders need it

    try:
        data = RepoCard(text, ignore_metadata_errors=False).data
    except Exception as error:  # of the parser of YAML, too
        raise UserError(f"{where}: the first lines of {CARD} are no metadata ({str(error).splitlines()[0]})") from error
    licence = data.to_dict().get("license")
    return licence if isinstance(licence, str) else None


def _call(document: Json, for_diffusers: bool) -> str:
    """Line that samples."""
    name, field = ("clips", "frames") if makes_clips(document) else ("images", "images")
    if "text_width" in document["model"]:
        arguments = 'prompt=["a dog in the snow"]' if for_diffusers else "**rows, null=null"
        prepare = "" if for_diffusers else 'rows, null = pipeline.encode_prompts(["a dog in the snow"])\n'
    elif document["model"].get("num_classes", 0):
        arguments, prepare = ("class_labels=[0]" if for_diffusers else "labels=[0]"), ""
    else:
        arguments, prepare = ("num_samples=1" if for_diffusers else "count=1"), ""
    if for_diffusers:
        return f"{prepare}{name} = pipeline({arguments}, seed=0).{field}"
    return f"{prepare}{name} = pipeline.sample({arguments}, seed=0)  # uint8"
