"""Licences of weights: what they inherit, and what may be published under which."""

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError
from runtime.licences import Origin, licence_to_publish, origin_of
from runtime.releases import RELEASES

NON_COMMERCIAL = Origin("DiT-XL-2-256x256", "cc-by-nc-4.0")


def test_releases_have_the_licences_that_their_authors_state() -> None:
    licences = {release.name: release.licence for release in RELEASES}
    assert licences["DiT-XL-2-512x512"] == "cc-by-nc-4.0" and licences["Latte-skip"] == "apache-2.0"
    assert {name for name, licence in licences.items() if licence is None} == {
        "dydit_0.7", "new_dydit0.7", "new_dydit0.5", "DDT-XL-22en6de-R256", "DDT-XL-22en6de-R512",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "origin", "licence"),
    [
        ("mit", None, "mit"),
        (None, NON_COMMERCIAL, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", NON_COMMERCIAL, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", Origin("DiT-XL-2-skip", "apache-2.0"), "cc-by-nc-4.0"),
        ("apache-2.0", Origin("mine.pt", None), "apache-2.0"),  # no release: the user knows
    ],
)
def test_a_licence_that_fits_is_taken(chosen: str | None, origin: Origin | None, licence: str) -> None:
    assert licence_to_publish(chosen, origin) == licence


@pytest.mark.parametrize(
    ("chosen", "origin", "words"),
    [
        (None, None, "--license: needed"),
        (None, Origin("mine.pt", None), "--license: needed.*mine.pt"),
        ("Apache 2.0", None, "--license Apache 2.0: not an identifier"),
        ("apache-2.0", NON_COMMERCIAL, "against.*DiT-XL-2-256x256 .cc-by-nc-4.0.; give --license cc-by-nc-4.0"),
        ("mit", Origin("new_dydit0.5", None), "--license mit:.*new_dydit0.5.*without a licence"),
        (None, Origin("DDT-XL-22en6de-R256", None), "--license unknown:.*without a licence"),
    ],
)
def test_publishing_without_one_or_against_it_is_refused(chosen: str | None, origin: Origin | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        licence_to_publish(chosen, origin)


MODEL: dict[str, Any] = {"model": {"name": "DiT-B/2"}}


@pytest.mark.parametrize(
    ("file", "meta", "origin"),
    [
        ("DiT-XL-2-256x256.pt", None, NON_COMMERCIAL),
        ("other.pt", None, Origin("other.pt", None)),
        ("a.safetensors", {**MODEL, "origin": None}, None),
        ("a.safetensors", {**MODEL, "origin": NON_COMMERCIAL.as_json()}, NON_COMMERCIAL),
        ("a", {**MODEL, "name": "me/b", "licence": "mit", "origin": None}, Origin("me/b", "mit")),
        # of an earlier version
        ("a.safetensors", {**MODEL, "train": {"run": {"init_from": "x/DiT-XL-2-256x256.pt"}}}, NON_COMMERCIAL),
        ("a.safetensors", {**MODEL, "train": {"run": {"init_from": None}}}, None),
        ("a.safetensors", MODEL, None),
    ],
)
def test_origins_are_passed_on(file: str, meta: dict[str, Any] | None, origin: Origin | None) -> None:
    assert origin_of(Path(file), meta) == origin
