"""Licences of weights: what they inherit, and what may be published under which."""

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError
from runtime.licences import Origin, hub_name, licence_to_publish, origin_of, origin_to_name
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


PUBLISHED: dict[str, Any] = {
    **MODEL,
    "name": "me/digits",
    "licence": "mit",
    "origin": {"name": "a/b", "licence": "mit"},
}


@pytest.mark.parametrize(
    ("meta", "repository", "origin"),
    [
        (PUBLISHED, None, Origin("me/digits", "mit")),  # a folder of any name that was downloaded
        (PUBLISHED, "you/copy@1234", Origin("you/copy", "mit")),
        ({**PUBLISHED, "name": "digits"}, None, Origin("a/b", "mit")),  # saved here, never published
        ({**PUBLISHED, "name": "digits", "origin": None}, None, None),
        ({**PUBLISHED, "name": "digits", "licence": None}, "me/digits@1234", Origin("me/digits", None)),
        (None, "you/other@1234", Origin("you/other", None)),
    ],
)
def test_published_folders_are_origins_by_their_name_on_the_hub(
    meta: dict[str, Any] | None, repository: str | None, origin: Origin | None
) -> None:
    assert origin_of(Path("downloaded"), meta, repository) == origin


@pytest.mark.parametrize(
    ("name", "expected"),
    [("me/more", Origin("a/b", "mit")), ("you/more", Origin("me/digits", "mit")), ("more", Origin("me/digits", "mit"))],
)
def test_a_copy_by_the_same_owner_has_the_origin_of_the_first(name: str, expected: Origin) -> None:
    origin = origin_of(Path("digits"), PUBLISHED)
    assert origin_to_name(origin, PUBLISHED, name) == expected
    assert origin_to_name(origin, MODEL, name) == origin  # trained from it


def test_an_origin_has_its_name_on_the_hub() -> None:
    names = ["me/digits", "DiT-XL-2-skip", "DiT-XL-2-256x256", "mine.pt"]
    assert [hub_name(Origin(name, None)) for name in names] == ["me/digits", "GuanjieChen/Skip-DiT", None, None]


def test_a_misspelt_identifier_has_a_suggestion() -> None:
    with pytest.raises(UserError, match="--license apache2: .* did you mean apache-2.0"):
        licence_to_publish("apache2", None)
    assert licence_to_publish("other", None) == "other"
