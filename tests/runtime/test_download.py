"""Downloads from a local server that breaks off, refuses, or has another file by now; and from the hub.

The hub's client is replaced by a stand-in with its signature, because it reads its address when it is imported.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import download as download_module
from runtime.download import DownloadError, download, obtain, read_record
from runtime.errors import UserError
from runtime.releases import Preset, Release
from tests.file_server import CONTENT, Server, serving

PRESET = Preset("ddpm", "250", 1.5, 3)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_alone(server: Server, tmp_path: Path) -> None:
    download(f"{server.url}/a.pt", tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == CONTENT and names(tmp_path) == ["a.pt"]


def test_a_download_is_resumed_after_a_broken_connection(server: Server, tmp_path: Path) -> None:
    server.cut = [1000, 0, 3000]
    download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    assert server.ranges == ["", "bytes=1000-", "bytes=1000-", "bytes=4000-"]


def test_a_download_of_an_earlier_process_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cut = [700] + [0] * download_module.ATTEMPTS
    with pytest.raises(DownloadError, match=r"700 bytes are in .*a\.pt\.part, and the same command resumes"):
        download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)
    assert names(tmp_path) == ["a.pt.part", "a.pt.part.tag"]
    download(f"{server.url}/a.pt", tmp_path / "a.pt")
    assert server.ranges[-1] == "bytes=700-"
    assert (tmp_path / "a.pt").read_bytes() == CONTENT and names(tmp_path) == ["a.pt"]


def test_a_kill_between_the_last_byte_and_the_final_name_costs_nothing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.pt.part").write_bytes(CONTENT)
    (tmp_path / "a.pt.part.tag").write_text('"1"')
    download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT and server.ranges == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("part", [CONTENT[:500], CONTENT + b"too much"])
def test_a_file_that_changed_on_the_server_is_downloaded_from_its_start(
    part: bytes, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "a.pt.part").write_bytes(part)
    (tmp_path / "a.pt.part.tag").write_text('"0"')
    download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


def test_too_long_a_part_is_downloaded_from_its_start(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.pt.part").write_bytes(CONTENT + b"too much")
    (tmp_path / "a.pt.part.tag").write_text('"1"')
    download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


def test_a_server_in_trouble_is_asked_again_and_one_that_lacks_the_file_is_not(server: Server, tmp_path: Path) -> None:
    server.status = [503, 500]
    download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)
    server.status = [404]
    with pytest.raises(DownloadError, match="the server says 404"):
        download(f"{server.url}/b.pt", tmp_path / "b.pt", pause=0)
    assert len(server.ranges) == 4


def test_another_file_than_expected_is_refused_before_it_is_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"offers 10,240 bytes, not about 2.7 GB"):
        download(f"{server.url}/a.pt", tmp_path / "a.pt", gigabytes=2.7, pause=0)
    assert names(tmp_path) == []


def test_a_full_disk_is_noticed_before_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 99})())
    with pytest.raises(DownloadError, match="10,240 bytes are missing, and 99 are free"):
        download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)


def test_two_processes_do_not_write_one_file(server: Server, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "a.pt.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading it"):
            download(f"{server.url}/a.pt", tmp_path / "a.pt", pause=0)


# ----------------------------------------------------------------------------------------------------------------------
# Releases


def release(folder: str, **options: object) -> Release:
    return Release("a.pt", "DiT", "DiT-XL/2", 256, "weights", folder, None, None, PRESET)._replace(**options)


def test_a_release_is_downloaded_once_and_its_size_and_hash_are_recorded(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    path = obtain(release(server.url), tmp_path / "new", said.append)
    assert path.read_bytes() == CONTENT
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert read_record(path) == {"source": f"{server.url}/a.pt", "bytes": len(CONTENT), "sha256": digest}
    assert f"{server.url}/a.pt (size unknown)" in said[0] and digest in said[1]
    assert obtain(release("http://127.0.0.1:1"), tmp_path / "new", said.append) == path and len(said) == 2
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="has 10,239 bytes, and had 10,240 when it was downloaded"):
        obtain(release(server.url), tmp_path / "new", said.append)


def test_a_file_that_was_not_downloaded_here_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"x")
    assert obtain(release("http://127.0.0.1:1"), tmp_path) == tmp_path / "a.pt"
    assert read_record(tmp_path / "a.pt") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "deep"])
def test_a_damaged_record_is_one_line_and_a_document_of_others_is_none(
    server: Server, tmp_path: Path, damage: str
) -> None:
    path = obtain(release(server.url), tmp_path, str)
    record = path.with_name("a.pt.json")
    text = record.read_text()
    record.write_text({"flip": text.replace("10240", "10241"), "cut": text[:30], "deep": "[" * 100_000}[damage])
    with pytest.raises(UserError, match=r"^--ckpt: .*a.pt.json: (edited or damaged|not JSON).*; delete it and a.pt to"):
        obtain(release(server.url), tmp_path, str)
    record.write_text('{"_class_name": "of another program"}')
    assert obtain(release(server.url), tmp_path, str) == path and read_record(path) is None


def test_a_wrong_hash_is_refused_and_the_file_deleted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has SHA-256 .*, not 00ff; it was deleted"):
        obtain(release(server.url, sha256="00ff"), tmp_path, str)
    assert names(tmp_path) == []
    obtain(release(server.url, sha256=hashlib.sha256(CONTENT).hexdigest()), tmp_path, str)


class Hub:
    """Stands in for the hub's client.

    Attributes:
        files: in the repository "a/b"; None if the hub cannot be reached.
        arrived: what a broken attempt leaves of a file.
    """

    files: list[str] | None = None
    arrived = b""

    def list_repo_files(self, repo_id: str) -> list[str]:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        warnings.warn("`local_dir_use_symlinks` is deprecated", stacklevel=2)
        if repo_id != "a/b" or self.files is None:
            raise RuntimeError("no connection\nand so on")
        return self.files

    def hf_hub_download(self, repo_id: str, filename: str, *, local_dir: Path) -> str:
        cache = local_dir / ".cache" / "huggingface"
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "12ab.lock").touch()
        (cache / "12ab.incomplete").write_bytes(self.arrived)
        if filename not in self.list_repo_files(repo_id):
            raise FileNotFoundError(f"no {filename}")
        path = local_dir / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
        return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    return hub


@pytest.mark.parametrize(
    ("folder", "remote_name"), [("http://127.0.0.1:1", None), ("hub:a/b", None), ("hub:a/b", "*.ckpt")]
)
@pytest.mark.parametrize("forbidden", ["1", "0"])
def test_offline_says_address_and_place_in_one_line(
    folder: str, remote_name: str | None, forbidden: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "ATTEMPTS", 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", forbidden)
    chosen = release(folder, remote_name=remote_name)
    folder_of_downloads = tmp_path / "downloads"
    with pytest.raises(UserError) as error:
        obtain(chosen, folder_of_downloads, str)
    message = str(error.value)
    assert "\n" not in message and ("HF_HUB_OFFLINE forbids it" in message) == (forbidden == "1")
    assert message.endswith(f"fetch {chosen.address} by other means and put it at {folder_of_downloads / 'a.pt'}")
    assert names(tmp_path) == [], "nothing arrived, and nothing is left"


def test_a_part_of_the_hub_s_client_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.arrived = b"the first bytes"
    with pytest.raises(UserError, match="cannot download it"):
        obtain(release("hub:a/b"), tmp_path / "downloads", str)
    assert [path.read_bytes() for path in tmp_path.rglob("*.incomplete")] == [hub.arrived]


@pytest.mark.parametrize("remote_name", [None, "*.ckpt"])
def test_the_hub_s_client_is_silent(
    remote_name: str | None, hub: Hub, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(listener)
    try:
        with pytest.raises(UserError, match=r"cannot download it \(no connection\)"):
            obtain(release("hub:a/b", remote_name=remote_name), tmp_path, str)
        assert said == [] and not recwarn.list
        logger.warning("of another download")
        assert len(said) == 1, "silent during ours alone"
    finally:
        logger.removeHandler(listener)


def test_a_folder_that_cannot_be_written_to_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"fetch http.* by other means and put it at .*file/a\.pt"):
        obtain(release(server.url), tmp_path / "file", str)


@pytest.mark.parametrize("remote_name", ["last.ckpt", "*.ckpt"])
def test_the_hub_s_own_client_fetches_from_the_hub(remote_name: str, hub: Hub, tmp_path: Path) -> None:
    hub.files = ["README.md", "folder/last.ckpt"]
    path = obtain(release("hub:a/b/folder", remote_name=remote_name), tmp_path, str)
    assert path.read_bytes() == CONTENT and names(tmp_path) == ["a.pt", "a.pt.json"]


def test_a_pattern_of_several_files_is_an_error(hub: Hub, tmp_path: Path) -> None:
    hub.files = ["a.ckpt", "b.ckpt"]
    with pytest.raises(UserError, match=r"2 files match \*\.ckpt: a\.ckpt, b\.ckpt"):
        obtain(release("hub:a/b", remote_name="*.ckpt"), tmp_path, str)
