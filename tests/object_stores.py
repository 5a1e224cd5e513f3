"""Places that the same test bodies use: a local folder, fsspec's memory, and a local stand-in of S3."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import stores

PLACES = ("local", "memory", pytest.param("s3", marks=pytest.mark.slow))
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def quick_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep copies in a temporary folder, ask no server for credentials, and repeat requests at once."""
    monkeypatch.setenv("DIT_STORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in (*CREDENTIALS, "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stores, "WAIT_SECONDS", 0.0)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a local server that answers as S3 does."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, quick_stores: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a new bucket of it."""
    import s3fs

    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=PLACES)
def place(request: Any, quick_stores: None, tmp_path: Path) -> str:
    """Address of an empty folder."""
    if request.param == "local":
        return str(tmp_path / "place")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(request.getfixturevalue("s3"))


def put(local: Path, address: str) -> str:
    """Copy a file or folder to an address; returns the address."""
    import fsspec

    store, name = fsspec.core.url_to_fs(address)
    for path in [p for p in local.rglob("*") if p.is_file()] if local.is_dir() else [local]:
        target = f"{name}/{path.relative_to(local).as_posix()}" if local.is_dir() else name
        store.makedirs(target.rpartition("/")[0], exist_ok=True)
        store.pipe_file(target, path.read_bytes())
    return address


def contents(address: str) -> dict[str, bytes]:
    """Bytes of all files at and below an address, by their names relative to it."""
    import fsspec

    store, name = fsspec.core.url_to_fs(address)
    store.invalidate_cache()
    return {path.removeprefix(name).lstrip("/"): store.cat_file(path) for path in store.find(name)}
