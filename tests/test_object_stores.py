"""Training data, checkpoints, samples, latents and scores at addresses: the bytes are those of local files."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import sample_ddp
from data.latents import LatentShards
from evaluator import __main__ as evaluator
from runtime.errors import run
from runtime.stores import fetch, parse_path
from scripts import extract_latents
from tests import runs
from tests.digits_checkpoints import save_digits_checkpoint
from tests.image_sources import convert, write_images
from tests.inception_files import make_images, write_graph, write_npz
from tests.networks import small_autoencoder
from tests.object_stores import contents, put
from tests.processes import run_ranks

TRAIN = "--vae none --image-size 8 --model DiT-debug/2 --num-classes 3 --global-batch-size 4 --device cpu".split()
TRAIN += "--log-every 1 --num-workers 0 --max-steps 2".split()
SAMPLE = "--num-fid-samples 6 --per-proc-batch-size 4 --num-sampling-steps 3 --device cpu".split()


def test_training_data_and_first_weights_are_read(place: str, tmp_path: Path) -> None:
    folder, start = write_images(tmp_path / "images"), tmp_path / "start.safetensors"
    assert runs.start(tmp_path / "first", *TRAIN, "--data-path", folder) == 0
    start.write_bytes(runs.last_checkpoint(tmp_path / "first").read_bytes())
    argv = [*TRAIN, "--eval-every", "2", "--eval-samples", "0"]
    local = ["--data-path", folder, "--init-from", start, "--eval-data-path", folder]
    assert runs.start(tmp_path / "a", *argv, *local) == 0
    data, weights = put(folder, f"{place}/images"), put(start, f"{place}/w/start.safetensors")
    there = ["--data-path", data, "--init-from", weights, "--eval-data-path", data]
    assert runs.start(tmp_path / "b", *argv, *there) == 0
    one, two = (runs.state(runs.checkpoint(tmp_path / name, 2)) for name in "ab")
    runs.assert_same(one, two)
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b")
    recorded = json.loads((runs.run_folder(tmp_path / "b") / "config.json").read_text())
    assert recorded["data"]["data_path"] == data and recorded["run"]["init_from"] == weights


def test_shards_are_read_by_a_pattern(place: str, tmp_path: Path) -> None:
    source = convert(write_images(tmp_path / "images"), "webdataset", tmp_path / "shards")
    there = f"{put(source['path'], f'{place}/shards')}/{{0..1}}.tar"
    for name, path in (("a", source["path"]), ("b", there)):
        assert runs.start(tmp_path / name, *TRAIN, "--dataset", "webdataset", "--data-path", path) == 0
    runs.assert_same(*(runs.state(runs.checkpoint(tmp_path / name, 2)) for name in "ab"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_digits_checkpoint(tmp_path / "weights/digits.safetensors", "DiT-debug/2", num_classes=10)


def sample(*argv: object) -> int:
    return run(sample_ddp.main, "sample_ddp.py", [*SAMPLE, *map(str, argv)])


def test_samples_are_the_same_bytes(place: str, checkpoint: Path, tmp_path: Path) -> None:
    assert sample("--ckpt", checkpoint, "--output", tmp_path / "local/x.npz", "--save-png") == 0
    there = put(checkpoint, f"{place}/weights/digits.safetensors")
    assert sample("--ckpt", there, "--output", f"{place}/out/x.npz", "--save-png") == 0
    ours, expected = contents(f"{place}/out"), contents(str(tmp_path / "local"))
    records = [json.loads(files.pop("x.json")) for files in (ours, expected)]
    assert ours == expected and sorted(ours) == ["x.npz", *(f"x/{i:06d}.png" for i in range(6))]
    assert records[0]["checkpoint"] == records[1]["checkpoint"]
    assert records[0]["config"]["job"]["output"] == f"{place}/out/x.npz"
    assert sample("--ckpt", there, "--sample-dir", f"{place}/named") == 0
    assert sorted(Path(name).suffix for name in contents(f"{place}/named")) == [".json", ".npz"]


def test_what_was_trained_at_an_address_is_sampled_from_there(place: str, tmp_path: Path) -> None:
    argv = [*runs.DIGITS, *"--model DiT-digits/2 --depth 2 --global-batch-size 4 --max-steps 1".split()]
    for results, kind in ((f"{place}/a", "one-file"), (f"{place}/b", "sharded")):
        assert run(runs.train.main, "train.py", [*argv, "--results-dir", results, "--checkpoint-format", kind]) == 0
        names = {name for name in contents(results) if name.endswith(".safetensors")}
        (name,) = {str(Path(name).parent) if kind == "sharded" else name for name in names}
        copy = tmp_path / kind / Path(name).name
        for each, content in contents(f"{results}/{name}").items():
            (copy / each).parent.mkdir(parents=True, exist_ok=True)
            (copy / each).write_bytes(content)
        assert sample("--ckpt", f"{results}/{name}", "--output", f"{place}/{kind}.npz") == 0
        assert sample("--ckpt", copy, "--output", tmp_path / f"{kind}-local.npz") == 0
        assert contents(f"{place}/{kind}.npz")[""] == (tmp_path / f"{kind}-local.npz").read_bytes()
    assert contents(f"{place}/one-file.npz") == contents(f"{place}/sharded.npz"), "the weights are the same"


@pytest.mark.slow
def test_two_ranks_share_one_copy_and_one_upload(s3: str, checkpoint: Path, tmp_path: Path) -> None:
    assert sample("--ckpt", checkpoint, "--output", tmp_path / "x.npz") == 0
    there = put(checkpoint, f"{s3}/weights/digits.safetensors")
    done = run_ranks("sample_ddp.py", *SAMPLE, "--ckpt", there, "--output", f"{s3}/out/x.npz", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(f"{s3}/out")["x.npz"] == (tmp_path / "x.npz").read_bytes()


def test_samples_are_not_replaced_unless_that_is_asked_for(
    place: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--ckpt", checkpoint, "--output", f"{place}/x.npz"]
    assert sample(*argv) == 0 and sample(*argv) == 2
    assert f"--output: {place}/x.npz exists already; --overwrite replaces it" in capsys.readouterr().err
    before = contents(place)
    assert sample(*argv, "--overwrite", "--global-seed", 1) == 0 and contents(place)["x.npz"] != before["x.npz"]


def test_a_killed_job_is_resumed_from_its_local_files(checkpoint: Path, quick_stores: None, capsys: object) -> None:
    argv = ["--ckpt", checkpoint, "--output", "memory://resumed/x.npz"]
    write, calls = sample_ddp.Job._store, []

    def interrupted(job: object, chunk: int, *rest: object) -> None:
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(job, chunk, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_ddp.Job, "_store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(*argv)
    assert contents("memory://resumed") == {} and sample(*argv) == 0
    assert sample("--ckpt", checkpoint, "--output", "memory://whole/x.npz") == 0
    assert contents("memory://resumed")["x.npz"] == contents("memory://whole")["x.npz"]


def test_latents_are_the_same_bytes_and_can_be_trained_on(place: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    small_autoencoder(tmp_path / "vae")
    flags = f"--vae {tmp_path / 'vae'} --image-size 16 --batch-size 2 --shard-size 4 --num-workers 0 --device cpu"
    images = put(folder, f"{place}/images")
    for data, output in ((str(folder), str(tmp_path / "local")), (images, f"{place}/latents")):
        argv = ["--data-path", data, "--output", output, *flags.split()]
        assert run(extract_latents.main, "extract_latents.py", argv) == 0
    ours, expected = contents(f"{place}/latents"), contents(str(tmp_path / "local"))
    assert ours == expected and len(ours) == 9
    LatentShards(fetch(parse_path(f"{place}/latents"), "--data-path")).verify()
    train = "--dataset latents --model DiT-debug/2 --num-classes 3 --global-batch-size 4 --device cpu --num-workers 0"
    argv = [*train.split(), "--vae", str(tmp_path / "vae"), "--max-steps", "2", "--log-every", "1"]
    for name, path in (("a", str(tmp_path / "local")), ("b", f"{place}/latents")):
        assert runs.start(tmp_path / name, *argv, "--data-path", path) == 0
    runs.assert_same(*(runs.state(runs.checkpoint(tmp_path / name, 2)) for name in "ab"))


def test_latents_are_not_replaced_unless_that_is_asked_for(
    quick_stores: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_autoencoder(tmp_path / "vae")
    fsspec.filesystem("memory").pipe("/taken/index.json", b"{}")
    argv = ["--data-path", str(write_images(tmp_path / "images")), "--vae", str(tmp_path / "vae"), "--image-size", "16"]
    argv += ["--device", "cpu", "--output", "memory://taken"]
    assert run(extract_latents.main, "extract_latents.py", argv) == 2
    assert "--output memory://taken: index.json is there already; --overwrite" in capsys.readouterr().err


def test_scores_are_the_same(place: str, tmp_path: Path) -> None:
    graph, pixels = write_graph(tmp_path / "narrow.pb"), tmp_path / "pixels"
    pixels.mkdir()
    write_npz(pixels / "reference.npz", make_images(14, seed=1))
    write_npz(pixels / "samples.npz", make_images(11, seed=2))
    (pixels / "samples.json").write_text('{"config": {"cfg_scale": 1.5}}')
    flags = ["--weights", str(graph), "--cache-dir", str(tmp_path / "features"), "--device", "cpu", "--metrics", "fid"]
    documents = []
    for folder in (str(pixels), put(pixels, f"{place}/there")):
        argv = [f"{folder}/reference.npz", f"{folder}/samples.npz", *flags]
        assert run(evaluator.main, "evaluator", argv) == 0
        documents.append(json.loads(contents(folder)["samples.scores.json"]))
    one, two = documents
    assert one["scores"] == two["scores"] and one["protocol"] == two["protocol"] != None  # noqa: E711
    assert all(one[title]["sha256"] == two[title]["sha256"] for title in ("reference", "samples"))
    assert two["config"]["ref_batch"] == f"{place}/there/reference.npz"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--ckpt memory://nothing/x.safetensors",
            "--ckpt memory://nothing/x.safetensors: cannot read it (no such file",
        ),
        ("--ckpt memory://nothing/x.pt --guide-ckpt s4://x/y", "cannot read it"),
        ("--ckpt x --pretrained-dir s3://x/y", "--pretrained-dir s3://x/y: is on an object store, and must be a local"),
    ],
)
def test_mistakes_of_sampling_are_one_line(
    argv: str, message: str, quick_stores: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if "guide" in argv:
        argv += " --guidance autoguidance"
    assert sample(*argv.split(), "--output", "memory://out/x.npz") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data-path memory://nothing/images", "--data-path memory://nothing/images: cannot read it (no such file"),
        (
            "--data-path x --align-ckpt memory://cache",
            "--align-ckpt memory://cache: is on an object store, and must",
        ),
        ("--data-path x --init-from memory://b/x.pt", "--init-from memory://b/x.pt: cannot read it (no such file"),
    ],
)
def test_mistakes_of_training_are_one_line(
    argv: str, message: str, quick_stores: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = argv.split()
    if "--results-dir" not in words:
        words += ["--results-dir", str(tmp_path)]
    assert run(runs.train.main, "train.py", [*TRAIN, *words]) == 2
    assert message in runs.the_error(capsys)


def test_a_read_only_place_is_found_before_the_work(
    checkpoint: Path, quick_stores: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refused)
    monkeypatch.setattr(sample_ddp.Job, "sample", refused)
    assert sample("--ckpt", checkpoint, "--output", "memory://readonly/x.npz") == 2
    error = capsys.readouterr().err
    assert (
        error.endswith("--output memory://readonly/x.npz: cannot write it (no permission: Access Denied)\n")
        and np.count_nonzero([line.startswith("sample_ddp.py: error") for line in error.splitlines()]) == 1
    )
