"""Runs on object stores: what is brought there, and what another machine, which has an empty cache, makes of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from runtime.stores import parse_path
from tests import runs
from tests.object_stores import contents
from tests.processes import run_ranks
from training.mirror import RunMirror
from training.trainer import Trainer

ARGV = "--model DiT-debug/2 --num-classes 10 --global-batch-size 4 --image-size 8 --ckpt-every 2".split()
RUN = "000-DiT-debug-2"

# Rank 1 writes to the disk of another machine
APART = """
import os
import runtime.saver as saver
from pathlib import Path
save = saver.save_part
def apart(folder, *content):
    folder = Path("other") / folder.name if os.environ["RANK"] == "1" else folder
    folder.parent.mkdir(exist_ok=True)
    save(folder, *content)
saver.save_part = apart
"""


@pytest.fixture
def machine(quick_stores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that changes to the machine of a name: its cache."""
    return lambda name: monkeypatch.setenv("DIT_STORE_CACHE", str(tmp_path / name))


def train(results: str, steps: int, *argv: object) -> int:
    return runs.start(
        Path(results) if "://" not in results else parse_path(results), *runs.DIGITS, *ARGV, "--max-steps", steps, *argv
    )


def working(results: str) -> Path:
    """Where this machine has the runs."""
    address = parse_path(results)
    return RunMirror(address).results if "://" in results else address


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("expected")
    assert train(str(results), 6) == 0
    return results


@pytest.mark.parametrize("kind", ["one-file", "sharded"])
def test_a_run_is_resumed_by_a_machine_that_has_nothing_of_it(
    kind: str, place: str, expected: Path, machine: Any, tmp_path: Path
) -> None:
    results, argv = f"{place}/runs", ["--resume", "auto", "--checkpoint-format", kind]
    machine("first")
    assert train(results, 4, *argv) == 0
    machine("second")
    assert train(results, 6, *argv, "--keep-last", 2) == 0
    found = {name: content for name, content in contents(results).items() if "/checkpoints/" in name}
    if "://" in place:
        records = {name: json.loads(content)["files"] for name, content in found.items() if name.endswith(".json")}
        assert sorted(records) == [f"{RUN}/checkpoints/{step:07d}.json" for step in (4, 6)]
        files = {f"{RUN}/checkpoints/{name}": each for record in records.values() for name, each in record.items()}
        assert files.keys() == found.keys() - records.keys()
        for name, each in files.items():
            digest = hashlib.sha256(found[name]).hexdigest()
            assert each == {"size": len(found[name]), "sha256": digest}
            assert (working(results) / name).read_bytes() == found[name]
    suffix = ".safetensors" if kind == "one-file" else ".sharded"
    own = next((working(results) / RUN / "checkpoints").glob(f"0000006{suffix}*"))
    runs.assert_same(runs.state(own), runs.state(runs.checkpoint(expected, 6)))
    there = contents(results)
    assert {line["step"]: line["loss"] for line in map(json.loads, there[f"{RUN}/metrics.jsonl"].splitlines())} == (
        runs.losses(expected)
    )
    assert b"Resumed" in there[f"{RUN}/log.txt"] and there[f"{RUN}/log.txt"].endswith(b"Done!\n")


@pytest.mark.slow
def test_parts_of_two_ranks_are_brought_and_resumed_by_one(s3: str, machine: Any, tmp_path: Path) -> None:
    results = f"{s3}/runs"
    argv = [*runs.DIGITS, *ARGV, "--results-dir", results, "--checkpoint-format", "sharded", "--resume", "auto"]
    machine("first")
    done = run_ranks("train.py", *argv, "--parallel", "fsdp", "--max-steps", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {Path(name).name for name in contents(f"{results}/{RUN}/checkpoints")}
    assert names == {"0000002.json", "00000-of-00002.safetensors", "00001-of-00002.safetensors"}
    for kind in ("fsdp", "ddp"):
        machine(f"second-{kind}")
        done = run_ranks("train.py", *argv, "--parallel", kind, "--max-steps", "4", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "at step" in contents(results)[f"{RUN}/log.txt"].decode()
    machine("third")
    assert train(results, 4, "--resume", "auto") == 0, "whole, and nothing left to do"


def test_a_checkpoint_of_an_address_is_resumed_and_later_ones_set_aside(expected: Path, machine: Any) -> None:
    results = "memory://aside/runs"
    machine("first")
    assert train(results, 6) == 0
    machine("second")
    assert train(results, 6, "--resume", f"{results}/{RUN}/checkpoints/0000002.safetensors", "--ckpt-every", 6) == 0
    names = sorted(Path(name).name for name in contents(f"{results}/{RUN}/checkpoints"))
    steps = ("0000002", "0000006")
    kept = [f"{step}{end}" for step in steps for end in (".json", ".safetensors")]
    assert names == sorted([*kept, "0000004.safetensors.aside", "0000006.safetensors.aside"])
    path = working(results) / RUN / "checkpoints/0000006.safetensors"
    runs.assert_same(runs.state(path), runs.state(runs.checkpoint(expected, 6)))


def test_numbers_of_runs_go_on_and_an_unstarted_run_is_used(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = "memory://numbers/runs"
    machine("first")
    assert train(results, 1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda *_: None)  # killed before its first checkpoint
        assert train(results, 2, "--model", "DDT-debug/2") == 0
    machine("second")
    assert train(results, 2, "--model", "DDT-debug/2", "--resume", "auto") == 0
    assert {name.partition("/")[0] for name in contents(results)} == {RUN, "001-DDT-debug-2"}
    assert "001-DDT-debug-2/checkpoints/0000002.json" in contents(results)


def test_other_models_are_not_copied(machine: Any) -> None:
    results = "memory://models/runs"
    machine("first")
    assert train(results, 1) == 0
    assert train(results, 1, "--model", "DDT-debug/2") == 0
    machine("second")
    assert train(results, 2, "--resume", "auto") == 0
    assert len([*working(results).glob("*/checkpoints/*")]) == 2 and not [*working(results).glob("001*/checkpoints")]


def test_what_a_failing_store_did_not_get_is_brought_by_the_next_job(
    expected: Path, machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, calls = "memory://failing/runs", []
    put_file = MemoryFileSystem.put_file

    def fails(store: Any, local: str, name: str, **options: Any) -> None:
        calls.append(name)
        if len(calls) > 1:
            raise ConnectionError("reset by peer")
        put_file(store, local, name, **options)

    machine("first")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", fails)
        assert train(results, 6) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: --results-dir memory://failing/runs/") and "(reset by peer)" in error
    assert len(calls) == 5, "one, and four attempts"
    assert f"{RUN}/checkpoints/0000004.json" not in contents(results)
    assert train(results, 4, "--resume", "auto") == 0  # brings what the other could not
    assert f"{RUN}/checkpoints/0000004.json" in contents(results)
    machine("second")
    assert train(results, 6, "--resume", "auto") == 0
    runs.assert_same(runs.state(runs.checkpoint(working(results), 6)), runs.state(runs.checkpoint(expected, 6)))


def test_three_failures_of_the_connection_are_repeated(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name in ("put_file", "pipe_file", "find", "cat_file"):
            failed, method = [], getattr(MemoryFileSystem, name)

            def call(store: Any, *args: Any, method: Any = method, failed: Any = failed, **options: Any) -> Any:
                if len(failed) < 3:
                    failed.append(1)
                    raise ConnectionError("reset by peer")
                return method(store, *args, **options)

            patch.setattr(MemoryFileSystem, name, call)
        assert train("memory://again/runs", 2) == 0
    assert f"{RUN}/checkpoints/0000002.json" in contents("memory://again/runs")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["put_object", "get_object", "head_object", "list_objects_v2", "delete_object", ""])
def test_failures_of_s3_are_repeated_or_one_line(
    kind: str, s3: str, machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three failures of a kind of request; without a kind all requests about the second checkpoint fail."""
    import botocore.exceptions
    import s3fs

    failed, method = [], s3fs.S3FileSystem._call_s3

    async def failing(store: Any, name: str, *args: Any, **options: Any) -> Any:
        if (name == kind and len(failed) < 3) if kind else "checkpoints/0000004" in options.get("Key", ""):
            failed.append(name)
            raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://there")
        return await method(store, name, *args, **options)

    machine("first")
    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", failing)
        assert train(f"{s3}/runs", 4, "--keep-last", 1) == (0 if kind else 2)
    kept = f"{RUN}/checkpoints/0000004.json" if kind else f"{RUN}/checkpoints/0000002.json"
    assert len(failed) == 3 if kind else len(failed) > 3
    assert [name for name in contents(f"{s3}/runs") if name.endswith(("2.json", "4.json"))] == [kept]
    if not kind:
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"train.py: error: --results-dir {s3}/runs/{RUN}/checkpoints/0000004.")
        assert "Could not connect" in error
        assert train(f"{s3}/runs", 4, "--resume", "auto") == 0
        assert f"{RUN}/checkpoints/0000004.json" in contents(f"{s3}/runs")


@pytest.mark.slow
def test_parts_on_machines_that_share_no_folder_are_one_line(s3: str, machine: Any, tmp_path: Path) -> None:
    argv = [*runs.DIGITS, *ARGV, "--results-dir", f"{s3}/runs", "--checkpoint-format", "sharded", "--max-steps", "4"]
    done = run_ranks("train.py", *argv, "--parallel", "fsdp", folder=tmp_path, fault=APART)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "parts that other machines wrote are not here" in error and "set DIT_STORE_CACHE" in error
    assert not [name for name in contents(f"{s3}/runs") if "/checkpoints/" in name]


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    expected: Path, machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    results = "memory://damaged/runs"
    machine("first")
    assert train(results, 4) == 0
    store, name = MemoryFileSystem(), f"/damaged/runs/{RUN}/checkpoints/0000004.safetensors"
    content = bytearray(store.cat_file(name))
    content[-1] ^= 1
    store.pipe_file(name, bytes(content))
    machine("second")
    assert train(results, 6, "--resume", "auto") == 0
    assert "damaged: its SHA-256 is not the one that was recorded" in capsys.readouterr().err
    assert "at step 2" in contents(results)[f"{RUN}/log.txt"].decode()
    runs.assert_same(runs.state(runs.checkpoint(working(results), 6)), runs.state(runs.checkpoint(expected, 6)))


def test_a_job_whose_run_another_has_taken_ends_and_writes_nothing(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, step = "memory://taken/runs", Trainer.train_step

    def taken(trainer: Trainer, number: int, pieces: Any) -> Any:
        if number == 2:
            MemoryFileSystem().pipe_file(f"/taken/runs/{RUN}/owner.json", b'{"token": "x", "pid": 7, "host": "there"}')
        return step(trainer, number, pieces)

    monkeypatch.setattr(Trainer, "train_step", taken)
    assert train(results, 4) == 2
    assert capsys.readouterr().err.count("in use by another job since then (process 7 on there") == 1
    found = contents(results)
    assert f"{RUN}/checkpoints/0000004.json" not in found and b"Done" not in found[f"{RUN}/log.txt"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--results-dir foo://x", "--results-dir foo://x/"),
        ("--results-dir memory://a --resume b.safetensors", "is not in --results-dir memory://a; give a checkpoint"),
        (
            "--results-dir a --resume memory://b/c/checkpoints/1.safetensors",
            "is not a checkpoint of a run in --results",
        ),
        (
            "--results-dir memory://a --resume memory://a/000-b/checkpoints/0000001.safetensors",
            "--resume memory://a/000-b/checkpoints/0000001.safetensors: no such whole checkpoint",
        ),
    ],
)
def test_mistakes_are_one_line(argv: str, message: str, machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = argv.split()
    assert runs.run(runs.train.main, "train.py", [*runs.DIGITS, *ARGV, *words]) == 2
    assert message in runs.the_error(capsys)


def test_a_read_only_store_is_one_line_before_the_work(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refused)
    assert train("memory://readonly/runs", 1) == 2
    assert "cannot write it (no permission: Access Denied)" in runs.the_error(capsys)
