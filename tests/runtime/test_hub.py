"""Names that may be repositories, and errors in one line; tests/scripts/test_publish.py has the rest."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import models
from runtime.errors import UserError
from runtime.hub import hub_errors, is_repository


@pytest.mark.parametrize("name", ["me/digits", "facebook/DiT-XL-2-256", "a.b-c/d_e", "me/digits@v1.0", "a/b@refs/pr/1"])
def test_a_repository_is_an_owner_and_a_name(name: str) -> None:
    assert is_repository(Path(name), models.list_models())


MISSPELT = ["digits", "a/b/c", "/a/b", "me/digits.pt", "DiT-XL/3", "Skip-DiT-X/2", "here/missing", "me/-x", "../x"]


@pytest.mark.parametrize("name", [*MISSPELT, "a@b/c", "a/b@"])
def test_misspelt_files_and_models_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert not is_repository(Path(name), models.list_models())


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses the token"),
        (403, "refuses it"),
        (404, "no such repository"),
        (500, "first line$"),
        (None, "first line$"),
    ],
)
def test_an_error_is_one_line(status: int | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "any")
    error = OSError("first line\nsecond")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"^--repo me/a: .*{words}") as caught, hub_errors("--repo me/a"):
        raise error
    assert "\n" not in str(caught.value)
