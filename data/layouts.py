"""Kinds of folders that are given by mistake, recognised by the names of their files, for messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

ENTRIES = 50  # of each folder that are looked at

# Paths below the folder, and what they belong to; the first that matches counts
OTHER_LATENTS = (
    (r"(.*features|.*labels)/\d+\.npy|\d+\.npy", "fast-DiT (one scaled sample an image, not mirrored)"),
    (r"(.*/)?latents_(rank\d+_shard\d+\.safetensors|stats\.pt)", "LightningDiT (scaled by their statistics)"),
    (r"(.*/)?img-(mean-std|latents|feature)-?\d+\.npy", "REPA or EDM2 (moments of one crop, not mirrored)"),
    (r"(.*/)?[^/]+/[^/]+\.(jpe?g|png)\.pt", "DDT (mean and log-variance, not mirrored)"),
    (r"(.*/)?[^/]+/[^/]+\.npz", "MAR (one archive an image)"),
)
OURS = re.compile(r"(index|manifest)\.json")
SHARD = re.compile(r"\d{5}\.npy")
IMAGE = re.compile(r"(.*/)?[^/]+\.(jpe?g|png|webp|bmp|ppm|pgm|tiff?)", re.IGNORECASE)
TABLES = (
    (re.compile(r"(.*/)?[^/]+\.(parquet|arrow)"), "tables", "huggingface"),
    (re.compile(r"(.*/)?[^/]+\.tar"), "tar files", "webdataset"),
)
VIDEO = re.compile(r"(.*/)?[^/]+\.(mp4|m4v|mov|avi|mkv|webm)", re.IGNORECASE)


def describe_layout(folder: Path) -> str | None:
    """One line about a folder of stored latents, of other latents, images or videos; None for anything else."""
    names = [*_names(folder, depth=3)]
    if any(map(OURS.fullmatch, names)) and any(map(SHARD.fullmatch, names)):
        return f"{folder}: holds latents of scripts/extract_latents.py; train.py takes them by --dataset latents"
    below = sorted(name.rpartition("/")[0] for name in names if re.fullmatch(r".+/manifest\.json", name))
    if below and f"{below[0]}/index.json" in names:
        return f"{folder}: holds latents of scripts/extract_latents.py in its subfolder {below[0]}; give that one"
    for pattern, project in OTHER_LATENTS:
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
            return (
                f"{folder}: holds latents in the format of {project}, which is not read; encode the images again by "
                "scripts/extract_latents.py"
            )
    if any(map(IMAGE.fullmatch, names)):
        return (
            f"{folder}: holds images, not latents; give --dataset imagefolder, or encode them by "
            "scripts/extract_latents.py and give its --output"
        )
    for form, what, dataset in TABLES:
        if any(map(form.fullmatch, names)):
            return f"{folder}: holds {what}; give --dataset {dataset}"
    if any(map(VIDEO.fullmatch, names)):
        return f"{folder}: holds videos; give --dataset videofolder"
    return None


def _names(folder: Path, depth: int, prefix: str = "") -> Iterator[str]:
    """Some paths of files below a folder, relative to it."""
    for path in islice((path for path in folder.iterdir() if path.name[0] != "."), ENTRIES):
        if depth > 1 and path.is_dir():
            yield from _names(path, depth - 1, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
