"""Encoded captions in a latent store: `00007.text.npy` belongs to the shard 7, `null.text.npy` is the empty caption.

An array is float16 (images, L, K); `00007.text.json` holds its size and sha256, the captions, and the number of tokens
of each, which come first in their row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.latent_files import REMEDY, Json, check_sha256, check_size, is_finite, map_array
from data.npz_file import npy_header
from data.text_encoders import TextEncoder
from runtime.download import sha256_of
from runtime.files import atomic_path
from runtime.json_file import read_json, write_json

NULL = "null"  # in the place of a shard's number
ROWS = 64  # captions encoded at a time
_NAME = re.compile(r"(\d{5}|null)\.text\.(npy|json)")


def text_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Array and description of the captions of a shard, "00007", or of the empty one, "null"."""
    return folder / f"{name}.text.npy", folder / f"{name}.text.json"


def text_files(folder: Path) -> list[Path]:
    """Files that are named like those of captions."""
    return sorted(path for path in folder.glob("*.text.*") if _NAME.fullmatch(path.name))


def write_text(folder: Path, name: str, encoder: TextEncoder, captions: Sequence[str]) -> None:
    """Encode captions and write them: first the array, then the description, which marks it as finished.

    Raises:
        ValueError: Naming the caption, if the encoder refuses it or its numbers do not fit float16.
    """
    array, description = text_paths(folder, name)
    description.unlink(missing_ok=True)
    tokens: list[int] = []
    with atomic_path(array) as temporary, temporary.open("wb") as file:
        file.write(npy_header((len(captions), encoder.length, encoder.width), np.dtype(np.float16)))
        for start in range(0, len(captions), ROWS):
            encoded = encoder.encode(captions[start : start + ROWS])
            rows, counts = encoded["text"].half().numpy(), encoded["text_mask"].sum(dim=1).long().tolist()
            if not torch.equal(encoded["text_mask"], mask_of(counts, encoder.length)):
                raise ValueError(f"the text encoder {encoder.name} does not put the tokens of a text first")
            if not is_finite(rows):
                raise ValueError(f"the text encoder {encoder.name} makes numbers that do not fit float16")
            file.write(np.ascontiguousarray(rows).data)
            tokens += counts
    totals = {"count": len(captions), "bytes": array.stat().st_size, "sha256": sha256_of(array)}
    write_json(description, {**totals, "tokens": tokens, "captions": list(captions)}, indent=None)


def finished_text(folder: Path, name: str, captions: Sequence[str] | None = None) -> Json | None:
    """The description of captions that are complete, and are these; None for any other."""
    array, path = text_paths(folder, name)
    try:
        description = read_json(path)
        same = captions is None or description["captions"] == list(captions)
        return description if same and array.stat().st_size == description["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def text_record(folder: Path, name: str) -> Json:
    """Entry of the index about the captions of a shard; a ValueError if they are not finished."""
    array, path = text_paths(folder, name)
    description = finished_text(folder, name)
    if description is None:
        raise ValueError(f"{array}: not finished; {REMEDY}")
    return {
        array.name: {"bytes": description["bytes"], "sha256": description["sha256"]},
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)},
    }


def mask_of(tokens: Sequence[int], length: int) -> Tensor:
    """Masks (N, L) float32 of texts with so many tokens."""
    return (torch.arange(length) < torch.tensor(tokens)[:, None]).float()


class StoredText:
    """Encoded captions of a shard; the description is compared with its checksum here.

    Args:
        folder: The store.
        name: Name of the shard's files, "00007", or "null".
        files: Their entry in the index.
        count: Number of captions.
        encoder: Description of the encoder.

    Raises:
        ValueError: Naming the file that is missing, or not what was written.
    """

    def __init__(self, folder: Path, name: str, files: Json, count: int, encoder: Json) -> None:
        self._path, description = text_paths(folder, name)
        self._record = {"files": files}
        for path in (self._path, description):
            if path.name not in files:
                raise ValueError(f"{path}: not in the index; {REMEDY}")
            check_size(path, files[path.name]["bytes"])
        check_sha256(description, self._record)
        self._tokens: list[int] = read_json(description)["tokens"]
        self._length, self._shape = encoder["length"], (count, encoder["length"], encoder["width"])
        if len(self._tokens) != count:
            raise ValueError(f"{description}: {len(self._tokens)} captions instead of {count}; {REMEDY}")
        map_array(self._path, self._shape)

    @property
    def sha256(self) -> str:
        """Checksum of the array."""
        recorded: str = self._record["files"][self._path.name]["sha256"]
        return recorded

    def verify(self) -> None:
        """Compare the array with its checksum; a ValueError if it is another."""
        check_sha256(self._path, self._record)

    def rows(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Encoded captions of images of the shard: "text" (n, L, K), and "text_mask" (n, L), float32."""
        array = map_array(self._path, self._shape)
        text = torch.from_numpy(np.stack([array[number] for number in numbers])).float()
        return {"text": text, "text_mask": mask_of([self._tokens[number] for number in numbers], self._length)}
