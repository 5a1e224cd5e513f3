"""Files of every job have the permissions of the user's umask, and so do the folders."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import sample_ddp
from evaluator import __main__ as evaluator
from runtime import files
from runtime.errors import run
from scripts import export, extract_latents, publish
from tests import runs
from tests.image_sources import write_images
from tests.inception_files import make_images, write_graph, write_npz
from tests.networks import small_autoencoder

TRAIN = "--dataset digits --model DiT-debug/2 --num-classes 10 --global-batch-size 12 --device cpu --max-steps 2"
TRAIN += " --log-every 1"
SAMPLE = "--num-fid-samples 6 --per-proc-batch-size 4 --num-sampling-steps 3 --save-png --device cpu"
EXTRACT = "--image-size 16 --batch-size 2 --shard-size 4 --num-workers 0 --device cpu"


@pytest.fixture(params=[0o027, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    before = os.umask(request.param)
    monkeypatch.setattr(files, "UMASK", request.param)  # which is read once, at the start of a process
    yield request.param
    os.umask(before)


def test_what_jobs_write_has_the_umasks_permissions(umask: int, tmp_path: Path) -> None:
    """The usual fault is 0600, from temporary files that were made to be private."""
    made = tmp_path / "made"
    made.mkdir()
    assert runs.start(made / "runs", *TRAIN.split()) == 0
    checkpoint = runs.last_checkpoint(made / "runs")
    argv = [*SAMPLE.split(), "--ckpt", str(checkpoint), "--output", str(made / "x.npz")]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    assert run(export.main, "export.py", ["--ckpt", str(checkpoint), "--output", str(made / "exported.pt")]) == 0
    small_autoencoder(tmp_path / "vae")
    images = ["--data-path", str(write_images(tmp_path / "images")), "--vae", str(tmp_path / "vae")]
    argv = [*images, "--output", str(made / "latents"), *EXTRACT.split()]
    assert run(extract_latents.main, "extract_latents.py", argv) == 0
    publishing = ["--ckpt", str(checkpoint), "--output", str(made / "published")]
    assert run(publish.main, "publish.py", publishing) == 0
    for name, layout in (("diffusers", "pipeline"), ("parts.sharded", "sharded")):
        argv = ["--ckpt", str(checkpoint), "--format", layout, "--output", str(made / name)]
        assert run(export.main, "export.py", argv) == 0
    graph, pixels = write_graph(tmp_path / "narrow.pb"), [tmp_path / "reference.npz", tmp_path / "samples.npz"]
    for number, path in enumerate(pixels):
        write_npz(path, make_images(14 - number, seed=number))
    argv = [*map(str, pixels), "--weights", str(graph), "--cache-dir", str(made / "features"), "--device", "cpu"]
    assert run(evaluator.main, "evaluator", [*argv, "--metrics", "fid", "--json", str(made / "scores.json")]) == 0
    modes = {path.relative_to(made): stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*")}
    wrong = {
        str(path): oct(mode)
        for path, mode in modes.items()
        if mode != (0o777 if (made / path).is_dir() else 0o666) & ~umask
    }
    assert not wrong
    suffixes = {path.suffix for path in modes}
    assert suffixes >= {".safetensors", ".json", ".jsonl", ".txt", ".npz", ".png", ".npy", ".pt"}, suffixes
