"""Where the weight file is looked for, and that a download is whole or absent."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from evaluator.inception import weights
from evaluator.inception.weights import FILE_NAME, default_cache, download, find_weights, inspect_weights
from runtime.errors import UserError

CONTENT = bytes(range(256)) * 9000


class Server(BaseHTTPRequestHandler):
    """Serves /whole; /cut breaks off; /silent does not say how much comes; everything else is missing."""

    def do_GET(self):
        if self.path not in ("/whole", "/cut", "/silent"):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/silent":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty working directory, no variable, and no way to the real server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(weights.ENVIRONMENT, raising=False)
    monkeypatch.setattr(weights, "URL", "http://127.0.0.1:9/no-server")


def place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


def test_places_in_order(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cached = place(cache / FILE_NAME)
    assert find_weights(None, cache, offline=False) == cached
    here = place(tmp_path / FILE_NAME)
    assert find_weights(None, cache, offline=False).resolve() == here
    named = place(tmp_path / "elsewhere" / "a.pb")
    monkeypatch.setenv(weights.ENVIRONMENT, str(named))
    assert find_weights(None, cache, offline=False) == named
    given = place(tmp_path / "given.pb")
    assert find_weights(given, cache, offline=True) == given


@pytest.mark.parametrize("flag", [True, False])
def test_a_named_file_must_exist(tmp_path, monkeypatch, flag):
    place(tmp_path / FILE_NAME)
    if not flag:
        monkeypatch.setenv(weights.ENVIRONMENT, "no.pb")
    with pytest.raises(UserError, match=r"(--weights|DIT_EVAL_INCEPTION) no.pb: there is no such file; get it from"):
        find_weights(Path("no.pb") if flag else None, tmp_path, offline=False)


@pytest.mark.parametrize("offline", [True, False])
def test_without_file_and_network_one_message_says_where_to_get_it(tmp_path, offline):
    with pytest.raises(UserError) as caught:
        find_weights(None, tmp_path / "cache", offline=offline)
    for part in (FILE_NAME, str(tmp_path / "cache"), weights.URL, "--weights PATH", weights.ENVIRONMENT):
        assert part in str(caught.value)
    assert ("--offline" if offline else "downloading it failed") in str(caught.value)
    assert not (tmp_path / "cache" / FILE_NAME).exists()


def test_a_missing_file_is_downloaded_once(tmp_path, monkeypatch, address):
    monkeypatch.setattr(weights, "URL", f"{address}/whole")
    monkeypatch.setattr(weights, "SIZE", len(CONTENT))
    path = find_weights(None, tmp_path / "cache", offline=False)
    assert path == tmp_path / "cache" / FILE_NAME and path.read_bytes() == CONTENT
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert Path(f"{path}.sha256").read_text() == f"{digest}  {FILE_NAME}\n"
    monkeypatch.setattr(weights, "URL", f"{address}/gone")
    assert find_weights(None, tmp_path / "cache", offline=False) == path
    assert inspect_weights(path).sha256 == digest


@pytest.mark.parametrize(
    ("page", "size", "message"),
    [
        ("whole", 17, "2,304,000 bytes arrived, expected 17"),
        ("cut", len(CONTENT), "1,152,000 bytes arrived, expected 2,304,000|IncompleteRead"),
        ("cut", None, "1,152,000 bytes arrived, expected 2,304,000|IncompleteRead"),
        ("missing", None, "404"),
    ],
)
def test_nothing_is_left_of_a_failed_download(tmp_path, address, page, size, message):
    with pytest.raises((OSError, ValueError), match=message):
        download(f"{address}/{page}", tmp_path / "folder" / "a.pb", size=size)
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_server_need_not_announce_the_size(tmp_path, address):
    assert download(f"{address}/silent", tmp_path / "a.pb", size=None).read_bytes() == CONTENT


def test_a_file_that_is_not_the_published_one_has_a_warning(tmp_path, monkeypatch):
    path = place(tmp_path / "a.pb")
    found = inspect_weights(path)
    assert found.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert found.warning == "a.pb has 7 bytes; the file of published scores has 95,673,916"
    monkeypatch.setattr(weights, "SIZE", 7)
    assert "does not have the md5 that is reported" in inspect_weights(path).warning
    monkeypatch.setattr(weights, "MD5", hashlib.md5(b"weights").hexdigest())
    assert inspect_weights(path).warning is None


def test_a_file_that_changed_after_its_download_is_refused(tmp_path):
    path = place(tmp_path / "a.pb")
    Path(f"{path}.sha256").write_text("0123\n")
    with pytest.raises(UserError, match=r"a.pb: has changed since its download .*a.pb.sha256\); delete both"):
        inspect_weights(path)


def test_the_cache_is_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "dit-family"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "dit-family"
