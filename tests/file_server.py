"""A web server on this machine that can break off, refuse, or change its mind about a file."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

CONTENT = bytes(range(256)) * 40


S = TypeVar("S", bound=http.server.ThreadingHTTPServer)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` everywhere.

    Attributes:
        cut: the next answer ends after this many bytes.
        status: the next answer, if not 200 or 206.
        ranges: the Range header of each request; "" for none.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = CONTENT, '"1"'
        self.cut: list[int] = []
        self.status: list[int] = []
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range", "")
        server.ranges.append(asked)
        if server.status:
            self.send_error(server.status.pop(0))
            return
        start = 0
        if asked and self.headers.get("If-Range") in (None, server.tag):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        stop = start + server.cut.pop(0) if server.cut else len(server.content)
        self.wfile.write(server.content[start:stop])

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextmanager
def answering(server: S) -> Iterator[S]:
    """The server, which answers while the block runs."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def serving() -> AbstractContextManager[Server]:
    """A server that answers while the block runs."""
    return answering(Server())
