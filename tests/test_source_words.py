"""Family names are found where a program uses them, and only there."""

import pytest

from tests.source_words import families_named, identifiers, strings


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if isinstance(network, DiT): pass", {"DiT"}),
        ("from models.dit import CONFIGS", {"DiT"}),
        ("x = network.is_skip_dit", {"DiT", "Skip-DiT"}),
        ("x = SkipDiTBlock()", {"DiT", "Skip-DiT"}),
        ("def f(dit=None): pass", {"DiT"}),
        ('"""DiT draws uniformly."""\nconditional = editing = additive = 1', set()),
        ("def f():\n    'As DiT does.'\n    # for DiT\n    return 'DiT-XL/2'", set()),
    ],
)
def test_families_among_identifiers(source: str, found: set[str]) -> None:
    assert families_named(identifiers(source), ["DiT", "Skip-DiT"]) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if name == 'Skip-DiT-XL/2': pass", {"DiT", "Skip-DiT"}),
        ('"""DiT draws uniformly."""\nx = "condition"\nDiT = 1', set()),
        ("def f():\n    'As DiT does.'\n    # for DiT\n    return 'conditional'", set()),
    ],
)
def test_families_among_strings(source: str, found: set[str]) -> None:
    assert families_named(strings(source), ["DiT", "Skip-DiT"]) == found
