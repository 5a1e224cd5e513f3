"""Public addresses of the code."""

import pytest

from runtime import ROOT
from sampling.provenance import project_version, public_url


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://github.com/a/b.git\n", "https://github.com/a/b.git"),
        ("https://user:secret@git.a.org:8443/a/b", "https://git.a.org:8443/a/b"),
        ("git@github.com:a/b.git", "https://github.com/a/b.git"),
        ("ssh://git@a.org:2222/a/b.git", "https://a.org/a/b.git"),
        ("/srv/git/b.git", None),
        ("../b", None),
        ("file:///srv/b", None),
        ("http://127.0.0.1:3000/a/b", None),
        ("http://localhost/a/b", None),
        ("http://git.internal/a/b", None),
        ("http://[::1]/a/b", None),
        ("git@server:a/b", None),
        ("https://a.org:no/b", None),
        ("", None),
    ],
)
def test_only_what_anybody_may_clone_is_an_address(remote: str, url: str | None) -> None:
    assert public_url(remote) == url


def test_the_version_is_that_of_the_source() -> None:
    assert f'version = "{project_version()}"' in (ROOT / "pyproject.toml").read_text()
