"""Evaluations cut by --shard and merged: the scores of one to the last bit, and every mistake in one line."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator import parts, stages
from evaluator.__main__ import main
from evaluator.inception.network import InceptionNetwork
from evaluator.video.weights import load_i3d
from runtime.errors import run
from scripts import merge
from tests.i3d_files import NARROW, moving_squares, write_i3d
from tests.inception_files import make_images, write_graph, write_npz
from tests.processes import run_ranks

VOLATILE = ("seconds", "config")


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch, pair):
    """A working directory with a reference of 14 images and 11 samples; files of features of 4 rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIT_EVAL_INCEPTION", raising=False)
    monkeypatch.setitem(parts.ROWS_PER_FILE, "image", 4)
    monkeypatch.setattr("evaluator.statistics.ROWS_PER_UPDATE", 5)  # blocks that end nowhere else
    monkeypatch.setattr("evaluator.features.ROWS_PER_UPDATE", 5)
    for name, path in zip(("ref.npz", "samples.npz"), pair, strict=True):
        shutil.copy(path, name)
    return tmp_path


def evaluate(graph, *argv, reference="ref.npz", samples="samples.npz", status=0):
    fixed = ["--weights", str(graph), "--cache-dir", "cache", "--device", "cpu", "--batch-size", "2"]
    assert run(main, "evaluator", [reference, samples, *fixed, *argv]) == status


def make_parts(graph, count, *argv, output="samples.scores", **files):
    for i in range(1, count + 1):
        evaluate(graph, *argv, "--shard", f"{i}/{count}", **files)
    return [f"{output}.{i}-of-{count}" for i in range(count, 0, -1)]  # in another order


def merged(folders, output="merged.json", status=0):
    assert run(merge.main, "merge.py", [*map(str, folders), "--output", output]) == status
    return None if status else result(output)


def result(name="samples.scores.json"):
    return {key: value for key, value in json.loads(Path(name).read_text()).items() if key not in VOLATILE}


def the_error(capsys, program="merge.py"):
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("warning", "samples:"))]
    assert len(lines) == 1 and lines[0].startswith(f"{program}: error: "), lines
    return lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# The scores of one evaluation


@pytest.mark.parametrize("shards", [1, 3, 6])
def test_merged_scores_are_those_of_one_evaluation(graph, shards, capsys, monkeypatch):
    def bits(a, b):  # of the statistics of sFID, whose eigenvalues take seconds
        return float(int(a.sha256()[:12] + b.sha256()[:1], 16))

    monkeypatch.setattr("evaluator.scores.frechet_distance", bits)
    metrics = ("--metrics", "is,fid,pr,kid,sfid" if shards == 3 else "is,fid,pr,kid")
    evaluate(graph, *metrics)
    printed = capsys.readouterr().out
    shutil.rmtree("cache")  # parts take nothing from it
    together = merged(make_parts(graph, shards, *metrics))
    assert together == result()
    assert capsys.readouterr().out.endswith(f"{printed}Merged {shards} parts of an evaluation to merged.json\n")


def test_folders_prefixes_and_stored_statistics(graph, files):
    with np.load("samples.npz") as file:
        images = file["arr_0"]
    Path("photos").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"photos/{i}.png")
    options = ("--metrics", "is,fid", "--num-samples", "9")
    for reference, samples in (("ref.npz", "photos"), ("photos", "samples.npz")):
        output = f"{Path(samples).stem}.scores"
        evaluate(graph, *options, reference=reference, samples=samples)
        folders = make_parts(graph, 2, *options, reference=reference, samples=samples, output=output)
        assert merged(folders, f"{output}.merged.json") == result(f"{output}.json")


def test_fewer_batches_of_the_reference_than_shards(graph):
    write_npz(Path("ref.npz"), make_images(4, seed=3))
    evaluate(graph, "--metrics", "fid,kid")
    assert merged(make_parts(graph, 5, "--metrics", "fid,kid")) == result()


def test_clips(files, monkeypatch):
    monkeypatch.setattr(stages, "load_i3d", partial(load_i3d, divisor=NARROW))
    weights = write_i3d(files / "i3d-kinetics-400.ckpt")
    write_npz(files / "ref.npz", moving_squares(5, 20, seed=1))
    write_npz(files / "samples.npz", moving_squares(3, 17, seed=2, speed=2))
    argv = ["ref.npz", "samples.npz", "--i3d-weights", str(weights), "--device", "cpu", "--clip-seed", "3"]
    argv += ["--num-reference", "4", "--cache-dir", "cache"]
    assert run(main, "evaluator", argv) == 0
    for shard in ("1/2", "2/2"):
        assert run(main, "evaluator", [*argv, "--shard", shard]) == 0
    assert merged(["samples.scores.1-of-2", "samples.scores.2-of-2"]) == result()


def test_a_killed_part_continues_on_two_processes(graph, files, monkeypatch, capfd):
    evaluate(graph, "--metrics", "is,fid,pr")
    folders = make_parts(graph, 2, "--metrics", "is,fid,pr")
    first = Path(folders[-1])
    whole = {path.name: path.read_bytes() for path in first.iterdir()}
    shutil.rmtree(first)
    real, calls = InceptionNetwork.features, []

    def failing(self, images):
        if len(calls) == 2:  # the first file is written
            raise MemoryError
        calls.append(1)
        return real(self, images)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(InceptionNetwork, "features", failing)
        evaluate(graph, "--metrics", "is,fid,pr", "--shard", "1/2")
    assert 1 < len(list(first.iterdir())) < len(whole)
    merged(folders, status=2)
    assert "1-of-2: not finished, network-reference-000000004" in capfd.readouterr().err
    argv = ["ref.npz", "samples.npz", "--weights", str(graph), "--cache-dir", "cache", "--device", "cpu"]
    argv += "--batch-size 2 --metrics is,fid,pr --shard 1/2".split()
    small = "from evaluator import parts; parts.ROWS_PER_FILE['image'] = 4"
    done = run_ranks("evaluator/evaluator.py", *argv, folder=files, fault=small)
    assert done.returncode == 0, done.stderr
    assert "reference: features of images 0 to 3 are there" in done.stdout
    assert {path.name: path.read_bytes() for path in first.iterdir()} == whole
    assert merged(folders) == result()


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--shard", "4/3"), "--shard 4/3: the first number must be from 1 to the second one"),
        (("--shard", "x"), "--shard x: must be i/n"),
        (("--shard", "1/8"), "--shard 1/8: the job has 7 batches of 2 (--batch-size); give at most 7 shards"),
        (("--shard", "1/2", "--json", "memory://a/b.json"), "give a local --json"),
    ],
)
def test_a_shard_that_cannot_be_is_one_line(graph, argv, words, capsys):
    evaluate(graph, *argv, status=2)
    assert words in the_error(capsys, "evaluator")
    assert not list(Path.cwd().glob("*-of-*"))


def test_a_shard_of_two_files_of_statistics_is_one_line(graph, capsys):
    for name in ("ref.npz", "samples.npz"):
        np.savez(name, mu=np.zeros(3), sigma=np.eye(3))
    evaluate(graph, "--metrics", "fid", "--shard", "1/2", status=2)
    assert "no features are needed" in the_error(capsys, "evaluator")


def test_parts_that_do_not_belong_together_are_one_line(graph, files, capsys):
    second, first = make_parts(graph, 2, "--metrics", "is")
    other = write_graph(files / "other.pb", seed=1)
    evaluate(other, "--metrics", "is", "--shard", "2/2", "--json", "b.json")
    evaluate(graph, "--metrics", "fid", "--shard", "2/2", "--json", "c.json")
    evaluate(graph, "--metrics", "is", "--shard", "2/3")
    Path("empty").mkdir()
    capsys.readouterr()
    for given, words in (
        ([first, "b.2-of-2"], "b.2-of-2: of another job: the image network's weights (sha256) is '"),
        ([first, "c.2-of-2"], "c.2-of-2: of another job: --metrics is 'fid', in"),
        ([first, "samples.scores.2-of-3"], "is shard 2/3, but"),
        ([first], "shards 2/2 of this job are missing"),
        ([first, second, first], "is shard 1/2, as"),
        ([first, "empty"], "empty: no part of an evaluation (no evaluation.json)"),
        ([first, "samples.npz"], "samples.npz: is no folder of latents or features"),
    ):
        merged(given, status=2)
        assert words in the_error(capsys), words
        assert not Path("merged.json").exists()
    evaluate(graph, "--metrics", "fid", "--shard", "2/2", status=2)
    assert "2-of-2: is a part of another evaluation: --metrics is is, here fid; delete it" in the_error(
        capsys, "evaluator"
    )
    Path("d.1-of-2").mkdir()
    Path("d.1-of-2/mine").touch()
    evaluate(graph, "--metrics", "is", "--shard", "1/2", "--json", "d.json", status=2)
    assert "d.1-of-2: exists, and is no part of an evaluation" in the_error(capsys, "evaluator")


def test_damaged_parts_and_changed_files_are_one_line(graph, files, capsys):
    folders = make_parts(graph, 2, "--metrics", "is,kid")
    path = Path(folders[0]) / "network-samples-000000006.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    capsys.readouterr()
    merged(folders, status=2)
    assert f"{path}: damaged (pool does not match its checksum); delete it, and run the command" in the_error(capsys)
    shutil.copy(Path(folders[1]) / "network-samples-000000000.safetensors", path)
    merged(folders, status=2)
    assert f"{path}: damaged (it is of another job)" in the_error(capsys)
    evaluate(graph, "--metrics", "is,kid", "--shard", "2/2")  # which makes a damaged file again
    assert path.read_bytes() == content
    description = Path(folders[0]) / "evaluation.json"
    description.write_text(
        description.read_text().replace('"--batch-size of images": 2', '"--batch-size of images": 4')
    )
    capsys.readouterr()
    merged(folders, status=2)
    assert "evaluation.json: edited or damaged" in the_error(capsys)
    shutil.rmtree(folders[0])
    evaluate(graph, "--metrics", "is,kid", "--shard", "2/2")
    write_npz(files / "samples.npz", make_images(11, seed=8))
    capsys.readouterr()
    merged(folders, status=2)
    assert "the file of samples (sha256) was" in the_error(capsys)
    Path("merged.json").write_text("mine")
    merged(folders, status=2)
    assert "merged.json: exists already" in the_error(capsys) and Path("merged.json").read_text() == "mine"
