"""Files that the evaluator's tests share."""

from pathlib import Path

import pytest

from tests.inception_files import make_images, write_graph, write_npz


@pytest.fixture(scope="session")
def graph(tmp_path_factory) -> Path:
    """A narrow synthetic weight file."""
    return write_graph(tmp_path_factory.mktemp("weights") / "narrow.pb")


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A reference of 14 images and 11 samples."""
    folder = tmp_path_factory.mktemp("images")
    reference = write_npz(folder / "reference.npz", make_images(14, seed=1))
    return reference, write_npz(folder / "samples.npz", make_images(11, seed=2))
