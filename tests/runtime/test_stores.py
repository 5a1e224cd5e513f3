import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import urllib.request
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from runtime import stores
from runtime.errors import UserError
from runtime.stores import Address, check_store, fetch, is_there, parse_path, staged, upload
from tests import hub_server
from tests.object_stores import contents, put

pytestmark = pytest.mark.usefixtures("quick_stores")


def test_an_address_is_a_path_that_keeps_its_slashes():
    address = parse_path("s3://bucket/a/b.npz")
    assert str(address) == f"{address}" == "s3://bucket/a/b.npz" and address.protocol == "s3"
    assert (address.name, address.stem, address.suffix) == ("b.npz", "b", ".npz")
    for other, expected in (
        (address.with_suffix(".json"), "s3://bucket/a/b.json"),
        (address.with_name("c"), "s3://bucket/a/c"),
        (address.parent / "c", "s3://bucket/a/c"),
        (copy.deepcopy(address), "s3://bucket/a/b.npz"),
        (pickle.loads(pickle.dumps(address)), "s3://bucket/a/b.npz"),
    ):
        assert str(other) == expected and isinstance(other, Address)
    assert parse_path("memory://x") == parse_path("memory://x") != Path("x")


@pytest.mark.parametrize("text", ["a/b", "/a", "s3:/a", "c:x", "a//b", "."])
def test_other_texts_are_local_paths(text):
    assert parse_path(text) == Path(text) and not isinstance(parse_path(text), Address)
    assert parse_path(Path(text)) == Path(text) and parse_path(Address("s3://a/b")) == Address("s3://a/b")


def test_addresses_of_local_files_are_paths():
    assert parse_path("file:///a/b") == Path("/a/b") and not isinstance(parse_path("file:///a/b"), Address)


def test_a_file_is_copied_and_followed(place, tmp_path):
    (tmp_path / "x").write_bytes(b"one")
    address = parse_path(put(tmp_path / "x", f"{place}/dir/file.bin"))
    copy = fetch(address, "--flag")
    assert copy.read_bytes() == b"one" and copy.name == "file.bin" and is_there(address, "--flag")
    (tmp_path / "x").write_bytes(b"other")
    put(tmp_path / "x", f"{place}/dir/file.bin")
    assert fetch(address, "--flag").read_bytes() == b"other"
    assert not is_there(parse_path(f"{place}/dir/none"), "--flag")


def test_a_folder_is_copied_with_odd_names(place, tmp_path):
    names = ["a/0 [1].png", "a/*.png", "b/c/é?.png", "1.json"]
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(name)
    copy = fetch(parse_path(put(tmp_path / "x", f"{place}/data")), "--flag")
    copied = {path.relative_to(copy).as_posix(): path.read_text() for path in copy.rglob("*") if path.is_file()}
    assert copied == {name: name for name in names}
    (copy / ".listing.json").touch()  # a program's record next to its data
    store, name = fsspec.core.url_to_fs(f"{place}/data")
    store.rm(f"{name}/b", recursive=True)
    kept = fetch(parse_path(f"{place}/data"), "--flag")
    left = sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*"))
    assert left == [".listing.json", "1.json", "a", "a/*.png", "a/0 [1].png"]


def test_what_has_not_changed_is_not_copied_again(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"one")
    address = parse_path(put(tmp_path / "x", "memory://unchanged/x"))
    fetch(address, "--flag")
    monkeypatch.setattr(MemoryFileSystem, "get_file", None)
    assert fetch(address, "--flag").read_bytes() == b"one"


def test_what_is_made_is_brought_and_compared(place, tmp_path):
    address = parse_path(f"{place}/out/x.npz")
    check_store(address, "--output")
    local = staged(address)
    local.parent.mkdir(parents=True, exist_ok=True)
    local.write_bytes(b"made" * 1000)
    upload(local, address, "--output")
    assert contents(str(address.parent)) == {"x.npz": b"made" * 1000}, "and no probe is left"
    assert local.exists() == (local == address)


def test_a_folder_is_brought_without_hidden_files_and_its_index_last(tmp_path, monkeypatch):
    for name in ("index", "z", ".lock", "a/b"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(name)
    order, put_file = [], MemoryFileSystem.put_file

    def noted(store, local, name, **options):
        order.append(name)
        put_file(store, local, name, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", noted)
    upload(tmp_path / "x", parse_path("memory://brought"), "--output", last="index")
    assert contents("memory://brought") == {name: name.encode() for name in ("index", "z", "a/b")}
    assert order[-1] == "/brought/index" and len(order) == 3 and not (tmp_path / "x").exists()


class Failing:
    """A method of the memory that fails so many times first."""

    def __init__(self, monkeypatch, name, times, error=ConnectionError):
        self.calls, method = 0, getattr(MemoryFileSystem, name)

        def call(store, *args, **options):
            self.calls += 1
            if self.calls <= times:
                raise error("reset by peer\nwith a second line")
            return method(store, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, name, call)


@pytest.mark.parametrize("name", ["info", "get_file"])
@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, type("EndpointConnectionError", (Exception,), {})])
def test_three_failures_of_the_connection_are_repeated(name, error, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"one")
    address = parse_path(put(tmp_path / "x", "memory://failing/x"))
    failing = Failing(monkeypatch, name, 3, error)
    assert fetch(address, "--flag").read_bytes() == b"one" and failing.calls >= 4


def test_more_failures_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"one")
    address = parse_path(put(tmp_path / "x", "memory://failing/x"))
    failing = Failing(monkeypatch, "get_file", 10)
    with pytest.raises(UserError, match=r"^--flag memory://failing/x: cannot read it \(reset by peer with a sec"):
        fetch(address, "--flag")
    assert failing.calls == stores.ATTEMPTS
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["put_file", "pipe_file"])
def test_writing_is_repeated_too(name, tmp_path, monkeypatch):
    Failing(monkeypatch, name, 3)
    address = parse_path("memory://repeated/x")
    (tmp_path / "x").write_bytes(b"one")
    check_store(address, "--output")
    upload(tmp_path / "x", address, "--output")
    assert contents("memory://repeated") == {"x": b"one"}


def test_what_is_not_what_was_written_is_kept_here(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"one")
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda store, local, name, **_: store.pipe_file(name, b"onf"))
    with pytest.raises(UserError, match=f"what was read back is not what was written.; it is at {tmp_path}"):
        upload(tmp_path / "x", parse_path("memory://changed/x"), "--output")
    assert (tmp_path / "x").read_bytes() == b"one"


def test_a_copy_that_is_cut_short_is_found(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"three")
    address = parse_path(put(tmp_path / "x", "memory://short/x"))
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda store, name, local, **_: Path(local).write_bytes(b"thr"))
    with pytest.raises(UserError, match="has 3 bytes here, and 5 in the store"):
        fetch(address, "--flag")


def test_names_that_lead_out_of_the_cache_are_refused(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "find", lambda store, *_, **__: {"/d/../../x": {"size": 1, "type": "file"}})
    fsspec.filesystem("memory").pipe("/d/x", b"1")
    with pytest.raises(UserError, match="is no name of a file that can be copied"):
        fetch(parse_path("memory://d"), "--flag")


def test_mistakes_are_one_line():
    for text, message in (
        ("memory://nothing/here", r"cannot read it \(no such file, folder or bucket\)"),
        ("foo://x", r"cannot read it \(Protocol not known: foo\)"),
    ):
        with pytest.raises(UserError, match=rf"^--ckpt {text}: {message}$"):
            fetch(parse_path(text), "--ckpt")


def test_a_missing_package_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"^--ckpt s3://b/x: cannot read it \(Install s3fs to access S3; pip"):
        fetch(parse_path("s3://b/x"), "--ckpt")


@pytest.mark.parametrize(("text", "package"), [("gs://b/x", "gcsfs"), ("gcs://b/x", "gcsfs")])
def test_a_package_that_is_no_extra_is_named(text, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    for call, verb in ((fetch, "read"), (check_store, "write")):
        with pytest.raises(UserError, match=rf"^--flag {text}: cannot {verb} it \(.*; pip install {package}\)$"):
            call(parse_path(text), "--flag")


def test_files_and_folders_of_the_hub_are_read_from_a_stand_in(tmp_path):
    with hub_server.serving() as hub:
        hub.repositories["me/thing"] = repository = hub_server.Repository()
        repository.files |= {"shards/0.tar": b"0" * 6000, "shards/1.tar": b"1", "x": b"other"}
        program = "import sys; from runtime.stores import *; print(fetch(parse_path(sys.argv[1]), '--data-path'))"
        environment = hub.environment(tmp_path / "home") | {"DIT_STORE_CACHE": str(tmp_path / "hub")}
        for address, expected in (
            ("hf://me/thing/shards", {"0.tar": b"0" * 6000, "1.tar": b"1"}),
            ("hf://me/thing/x", b"other"),
            ("hf://me/none/x", None),
        ):
            argv = [sys.executable, "-c", program, address]
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
            if expected is None:
                assert f"--data-path {address}: cannot read it (no such file" in done.stderr
                continue
            assert done.returncode == 0, done.stderr
            copy = Path(done.stdout.strip())
            found = copy.read_bytes() if copy.is_file() else {file.name: file.read_bytes() for file in copy.iterdir()}
            assert found == expected


@pytest.mark.slow
def test_missing_credentials_are_named(s3, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    s3fs.S3FileSystem.clear_instance_cache()
    for call, verb in ((fetch, "read"), (check_store, "write")):
        with pytest.raises(UserError, match=rf"^--flag {s3}/x: cannot {verb} it \(.*redentials.*; give them in"):
            call(parse_path(f"{s3}/x"), "--flag")


def test_a_place_that_is_read_only_is_named(monkeypatch):
    def refused(store, *_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refused)
    with pytest.raises(UserError, match=r"^--output memory://x/y: cannot write it \(no permission: Access Denied\)$"):
        check_store(parse_path("memory://x/y"), "--output")


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_named(s3):
    with pytest.raises(UserError, match=r"cannot write it \(no such file, folder or bucket\)"):
        check_store(parse_path("s3://no-such-bucket-here/x"), "--output")


@pytest.fixture
def read_only(s3, s3_server, monkeypatch):
    """Address of a bucket with the file x, for a user who may read and not write."""
    import boto3
    import s3fs

    fsspec.filesystem("s3").pipe_file(f"{s3}/x", b"one")
    users = boto3.client("iam")
    name = users.create_user(UserName=f"reader-{s3[-8:]}")["User"]["UserName"]
    allowed = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*", "s3:HeadObject"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    users.put_user_policy(UserName=name, PolicyName="read", PolicyDocument=policy)
    key = users.create_access_key(UserName=name)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    s3fs.S3FileSystem.clear_instance_cache()
    for calls in ("0", "inf"):  # calls that the server answers before it asks who calls
        kind = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset-auth", calls.encode(), kind))
        if calls == "0":
            yield s3


@pytest.mark.slow
def test_a_bucket_that_is_read_only_is_named_and_read(read_only):
    assert fetch(parse_path(f"{read_only}/x"), "--ckpt").read_bytes() == b"one"
    with pytest.raises(UserError, match=rf"^--output {read_only}/y: cannot write it \(no permission: ") as error:
        check_store(parse_path(f"{read_only}/y"), "--output")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("times", [3, 100])
def test_failures_of_the_stand_in_are_repeated_or_one_line(times, s3, tmp_path, monkeypatch):
    import botocore.exceptions
    import s3fs

    (tmp_path / "x").write_bytes(b"one")
    address = parse_path(put(tmp_path / "x", f"{s3}/x"))
    calls, method = [], s3fs.S3FileSystem._call_s3

    async def failing(store, *args, **options):
        calls.append(args[0])
        if len(calls) <= times:
            raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://there")
        return await method(store, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", failing)
    if times == 3:
        assert fetch(address, "--flag").read_bytes() == b"one" and len(calls) > 3
        return
    with pytest.raises(UserError, match=rf"^--flag {s3}/x: cannot read it \(Could not connect to the endpoint.*\)$"):
        fetch(address, "--flag")
