"""Seeds derived from the purpose of random numbers, independent of the order in which they are generated."""

from __future__ import annotations

import hashlib

_MASK32 = 0xFFFFFFFF


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from numbers and words in their order; similar parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def image_seed(seed: int, index: int) -> int:
    """Derive the seed of image `index` in the job `seed`.

    The low half is a bijection of the index: PyTorch's CPU generator reads only the low 32 bits of a seed, where hashes
    of 50,000 images would collide about once in four jobs, and two images would have the same noise.

    Raises:
        ValueError: If the index is negative or needs more than 32 bits.
    """
    if not 0 <= index <= _MASK32:
        raise ValueError(f"image index must be in [0, 2^32), not {index}")
    job = derive_seed("image", seed)
    low = index ^ (job & _MASK32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # rounds of an invertible 32-bit mixer
        low = ((low ^ (low >> shift)) * factor) & _MASK32
    return ((job >> 32) << 32) | (low ^ (low >> 16))
