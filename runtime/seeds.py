"""Seeds derived from what a number is for, instead of from who asks first."""

from __future__ import annotations

import hashlib

_MASK32 = 0xFFFFFFFF


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and words; order matters, and neighbours share nothing."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` in the job `seed`.

    PyTorch's CPU generator reads only the low 32 bits of a seed, where hashes of 50,000 images would collide about
    once in four jobs, and two images would share all their noise. So the low half is a bijection of the index.

    Raises:
        ValueError: if the index is negative or needs more than 32 bits.
    """
    if not 0 <= index <= _MASK32:
        raise ValueError(f"image index must lie in [0, 2^32), not {index}")
    job = derive_seed("image", seed)
    low = index ^ (job & _MASK32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # rounds of an invertible 32-bit mixer
        low = ((low ^ (low >> shift)) * factor) & _MASK32
    return ((job >> 32) << 32) | (low ^ (low >> 16))
