"""An HTTP proxy in front of a server, which can be unavailable for a while or drop a connection."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Headers of one connection only.
_HOP = ("connection", "transfer-encoding", "host", "content-length", "expect")


class FlakyProxy(ThreadingHTTPServer):
    """A proxy that forwards requests to 127.0.0.1:port.

    Attributes:
        fault: called with the method and path of each request; returns None to forward it, "unavailable" to
            answer 503, or "drop" to close the connection in the middle of the answer, after the request took
            effect.
        faults: the number of requests that were not answered properly.
    """

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = port
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.faults = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:  # killed clients are expected
        pass


class Once:
    """A fault for the requests from the first one that matches until `seconds` later."""

    def __init__(self, kind: str, matches: Callable[[str, str], bool], seconds: float = 0.0):
        self.kind, self._matches, self._seconds = kind, matches, seconds
        self._until: float | None = None
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> str | None:
        with self._lock:
            if self._until is None and self._matches(method, path):
                self._until = time.monotonic() + self._seconds
                return self.kind
            return self.kind if self._until is not None and time.monotonic() < self._until else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyProxy

    def log_message(self, format: str, *args) -> None:
        pass

    def _forward(self) -> None:
        body = self._body()
        fault = self.server.fault(self.command, self.path)
        if fault:
            self.server.faults += 1
        if fault == "unavailable":
            self._answer(503, {}, b"")
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.backend)) as connection:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        if fault == "drop":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(answer.status, dict(answer.getheaders()), content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _forward

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
