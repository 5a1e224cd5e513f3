"""Loss curves of every family at debug size, as text: a refactor may not move them.

A change that must move them says so in CHANGELOG.md with the reason, and records them again:

    python -m tests.test_golden_losses
"""

import sys
from pathlib import Path

import pytest

import models
from tests.networks import debug_name
from tests.runs import data_for, losses, start

CURVES = Path(__file__).parent / "assets" / "losses"
# Another processor rounds differently, and twenty steps of Adam spread that a little; a changed computation shows.
TOLERANCE = 2e-4


def loss_curve(family: str, results: Path) -> list[float]:
    """Twenty losses on the digits: seed 0, float32, the official recipe's settings at a batch of 16."""
    argv = "--max-steps 20 --global-batch-size 16 --precision fp32 --lr 1e-3".split()
    assert start(results, *data_for(family), "--model", debug_name(family), *argv) == 0
    return [*losses(results).values()]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_losses_are_the_recorded_ones(family, tmp_path):
    recorded = [float(line) for line in (CURVES / f"{family}-debug.txt").read_text().splitlines()]
    assert len(recorded) == 20 and recorded[-1] < recorded[0]
    assert loss_curve(family, tmp_path) == pytest.approx(recorded, rel=TOLERANCE)


if __name__ == "__main__":
    import tempfile

    for name in sys.argv[1:] or models.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            curve = loss_curve(name, Path(folder))
        (CURVES / f"{name}-debug.txt").write_text("".join(f"{loss:.6f}\n" for loss in curve))
