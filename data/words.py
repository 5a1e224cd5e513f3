"""Text encoder without parameters, for captions of a few known words: one number a word, one a place.

A network's first text layer is then its table of words and places, which it learns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
END = "</s>"  # after the last word, so that an empty caption has a token, too
WORDS = (END, *DIGITS, *"a small large moving right left up down on the at top bottom".split())
LENGTH = 8  # tokens; the longest caption of the digits has seven


class Words:
    """Encode captions as tokens of two ones each: that of the word, and that of its place.

    Attributes:
        name: Name of the encoder, as checkpoints and flags have it.
        width: K, numbers of a token.
        length: L, tokens of a caption.
    """

    name = "words"
    width, length = len(WORDS) + LENGTH, LENGTH

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode N captions.

        Returns:
            "text" (N, L, K) float32 of ones and zeros, and "text_mask" (N, L) float32 with ones at tokens.

        Raises:
            ValueError: Naming the word, if one is unknown.
        """
        rows = [[*self._words(prompt)[: LENGTH - 1], END] for prompt in prompts]
        mask = torch.tensor([[float(place < len(row)) for place in range(LENGTH)] for row in rows])
        numbers = torch.tensor([[WORDS.index(word) for word in row + [END] * (LENGTH - len(row))] for row in rows])
        places = one_hot(torch.arange(LENGTH), LENGTH).expand(len(rows), -1, -1)
        text = torch.cat([one_hot(numbers, len(WORDS)), places], dim=-1).float()
        return {"text": text * mask[..., None], "text_mask": mask}

    def read_part(self, prompt: str) -> str | None:
        """The part of a caption that is read, if that is not all of it; None for captions that fit."""
        words = self._words(prompt)
        return " ".join(words[: LENGTH - 1]) if len(words) >= LENGTH else None

    def describe(self) -> dict[str, object]:
        """Name, size, and a digest of the words."""
        digest = hashlib.sha256("\n".join(WORDS).encode()).hexdigest()
        return {"name": self.name, "width": self.width, "length": self.length, "sha256": digest}

    @staticmethod
    def _words(prompt: str) -> list[str]:
        words = prompt.lower().split()
        for word in words:
            if word not in WORDS[1:]:
                raise ValueError(f"unknown word {word!r}; known: {' '.join(WORDS[1:])}")
        return words
