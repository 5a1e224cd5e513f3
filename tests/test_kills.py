"""Jobs that are killed at any moment, several times: the same command ends with the same files, and no others."""

from __future__ import annotations

import itertools
import json
import random
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from models import create_model
from tests.checkpoints import write_network
from tests.inception_files import make_images, write_graph, write_npz
from tests.networks import randomise, small_autoencoder
from tests.processes import fork_script

pytestmark = pytest.mark.slow

SEED = 14
KILLS = 20  # of each job by SIGKILL, in turn before an operation on its files and at a moment in time
CUTS = 6  # of each job in the middle of a file
CHAIN = 2  # kills before the job may finish
VOLATILE = {"run", "seconds", "steps_per_sec"}

# Put before a script: it counts what is done to files of the working directory, and dies before operation {event}, or
# where a file grows beyond {size} bytes.
DYING = """
    import os, resource, signal, sys
    from pathlib import Path

    count, event, size, here = 0, {event}, {size}, os.getcwd() + os.sep
    CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link"}

    def changes_a_file(name, arguments):
        if name == "open":
            _, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        else:
            writes = name in CHANGES
        path = arguments[0]
        return writes and isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(here)

    def hook(name, arguments):
        global count
        if (name == "open" or name in CHANGES) and changes_a_file(name, arguments):
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            if (event, size) == (None, None):
                os.write(2, f"operation: {name} {arguments[0]}\\n".encode())

    sys.addaudithook(hook)
    if size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


class Job(NamedTuple):
    """A command, run in a folder of its own.

    Attributes:
        script: Script, from the repository root.
        argv: Arguments; outputs are relative paths.
        seconds: Time that an undisturbed run took.
        operations: Number of operations on files in it.
        files: What it leaves.
    """

    script: str
    argv: tuple[str, ...]
    seconds: float = 0.0
    operations: int = 0
    files: dict[str, object] = {}


def attempt(
    job: Job, folder: Path, *, event: int | None = None, size: int | None = None, delay: float | None = None
) -> int:
    """Run a job, which may be killed; returns its exit status."""
    folder.mkdir(exist_ok=True)
    fault = textwrap.dedent(DYING).replace("{event}", str(event)).replace("{size}", str(size))
    process = fork_script(job.script, *job.argv, folder=folder, output=folder.with_suffix(".log"), fault=fault)
    process.join(delay)
    if delay is not None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def errors(folder: Path) -> str:
    """What the last attempt printed as errors."""
    return folder.with_suffix(".log.err").read_text()


def lasting(value: object) -> object:
    """A JSON document without times."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in VOLATILE}
    return value


def contents(folder: Path) -> dict[str, object]:
    """All files of a folder by their paths; of JSON what does not depend on time, of logs only that they exist."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in (".lock", "log.txt"):
            found[name] = None
        elif path.suffix in (".json", ".jsonl"):
            found[name] = [lasting(json.loads(line)) for line in json_documents(path)]
        else:
            found[name] = path.read_bytes()
    return found


def json_documents(path: Path) -> list[str]:
    """The documents of a file: one, or one a line."""
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def undisturbed(job: Job, folder: Path) -> Job:
    """The job with what runs without kills take and leave."""
    for name in ("first", "second"):  # in the first, processes may still import
        start = time.perf_counter()
        assert attempt(job, folder / name) == 0, errors(folder / name)
        seconds = time.perf_counter() - start
    operations = errors(folder / name).count("\noperation: ")
    files = contents(folder / name)
    assert files == contents(folder / "first")
    return job._replace(seconds=seconds, operations=operations, files=files)


def disturb(job: Job, tmp_path: Path, kills: int, killed_by: int, moments: Iterator[dict[str, float]]) -> None:
    """Kill a job so many times; after every second kill it may finish, in another folder goes on the next."""
    done = chain = 0
    folder = tmp_path / "0"
    for moment in itertools.islice(moments, 5 * kills):
        status = attempt(job, folder, **moment)
        assert status in (0, killed_by), (moment, status, errors(folder))
        done, chain = done + (status != 0), chain + 1
        if status == 0 or chain == CHAIN or done == kills:
            finish(job, folder, moment, status == 0)
            folder, chain = tmp_path / str(done), 0
        if done == kills:
            return
    raise AssertionError(f"{done} kills")


def finish(job: Job, folder: Path, moment: dict[str, float], is_finished: bool) -> None:
    """Run the job to its end, and compare what it leaves."""
    if not is_finished and attempt(job, folder) != 0:
        assert "exists already" in errors(folder), (moment, errors(folder))  # it was killed after all work
    found = contents(folder)
    assert found.keys() == job.files.keys(), (moment, sorted(found.keys() ^ job.files.keys()))
    assert [name for name in found if found[name] != job.files[name]] == [], moment


def moments(job: Job, choose: random.Random) -> Iterator[dict[str, float]]:
    """Moments in turn: before an operation on files, and after a time."""
    while True:
        yield {"event": choose.randrange(job.operations)}
        yield {"delay": choose.uniform(0, job.seconds)}


def cuts(job: Job, choose: random.Random) -> Iterator[dict[str, float]]:
    """Sizes at which no file can grow."""
    largest = max(len(data) for data in job.files.values() if isinstance(data, bytes))
    while True:
        yield {"size": choose.randrange(1, largest)}


# ----------------------------------------------------------------------------------------------------------------------
# Jobs


def training(inputs: Path) -> Job:
    argv = "--dataset digits --model DiT-debug/2 --num-classes 10 --global-batch-size 12 --device cpu --num-workers 0"
    argv += " --max-steps 12 --ckpt-every 2 --keep-last 2 --log-every 1 --resume auto"
    return Job("train.py", tuple(argv.split()))


def sampling(inputs: Path) -> Job:
    network = randomise(create_model("DiT-digits/2", depth=1, hidden_size=32))
    ckpt = write_network(inputs / "0000007.safetensors", "DiT-digits/2", network)
    argv = (
        f"--ckpt {ckpt} --output a.npz --num-fid-samples 40 --num-sampling-steps 6 --per-proc-batch-size 4 --save-png"
    )
    return Job("sample_ddp.py", (*argv.split(), "--device", "cpu"))


def extraction(inputs: Path) -> Job:
    small_autoencoder(inputs / "vae")
    for i, image in enumerate(make_images(24, (16, 16))):
        path = inputs / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    argv = f"--data-path {inputs}/images --vae {inputs}/vae --output latents --image-size 16 --batch-size 2"
    return Job("scripts/extract_latents.py", (*argv.split(), *"--shard-size 4 --num-workers 0 --device cpu".split()))


def evaluation(inputs: Path) -> Job:
    graph = write_graph(inputs / "narrow.pb")
    reference, samples = (
        write_npz(inputs / f"{name}.npz", make_images(count, seed=count)) for name, count in (("ref", 14), ("own", 11))
    )
    argv = f"{reference} {samples} --weights {graph} --cache-dir cache --json scores.json --metrics is,fid,pr"
    return Job("evaluator/evaluator.py", (*argv.split(), "--device", "cpu"))


def merge(inputs: Path) -> Job:
    job = sampling(inputs)
    for shard in ("1/2", "2/2"):
        assert attempt(job._replace(argv=(*job.argv, "--shard", shard)), inputs) == 0, errors(inputs)
    return Job("scripts/merge.py", (*map(str, sorted(inputs.glob("a.*-of-2.npz"))), "--output", "b.npz"))


JOBS: tuple[Callable[[Path], Job], ...] = (training, sampling, extraction, evaluation, merge)


@pytest.fixture(scope="module", params=JOBS, ids=lambda make: make.__name__)
def job(request, tmp_path_factory) -> Job:
    inputs = tmp_path_factory.mktemp("inputs")
    return undisturbed(request.param(inputs), tmp_path_factory.mktemp("undisturbed"))


def test_a_job_that_was_killed_ends_with_the_same_files(job, tmp_path):
    disturb(job, tmp_path, KILLS, -signal.SIGKILL, moments(job, random.Random(SEED)))


def test_a_job_that_ended_in_the_middle_of_a_file_writes_the_same_files(job, tmp_path):
    disturb(job, tmp_path, CUTS, -signal.SIGXFSZ, cuts(job, random.Random(SEED)))
