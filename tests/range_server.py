"""Servers on loopback: one for ranges of a folder's files with planned faults, delays and bandwidth; moto's for S3."""

import hashlib
import re
import socket
import struct
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FAULTS = ("503", "403", "404", "truncate", "reset", "stall", "loris")


class RangeServer:
    """Serves `folder` at `url` while its with block runs.

    Attributes:
        fault: Called with the number of the GET (from 0) and the file's name; returns one of FAULTS or "".
        down: While True, every connection is reset.
        latency: Seconds before each response.
        bandwidth: Bytes per second of each connection; 0 for no limit.
        knows_if_match: False: answers a request for another version of the object.
        redirect: Where every request is sent on to; "" for nowhere.
        headers: Of the newest request, by name in lower case.
        counts: Number of requests by method, and of faults by name.
        bytes_sent: Bytes of bodies.
        most_at_once: Largest number of GETs that were answered at the same time.
    """

    def __init__(self, folder: Path, fault: Callable[[int, str], str] | None = None) -> None:
        self.folder, self.fault = folder, fault or (lambda number, name: "")
        self.down, self.latency, self.bandwidth, self.knows_if_match = False, 0.0, 0.0, True
        self.redirect = ""
        self.headers: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.bytes_sent = self.most_at_once = self.at_once = 0
        self.ended = threading.Event()
        self.lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "RangeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: RangeServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_GET(self) -> None:
        state = self.server_state
        with state.lock:
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            self._respond(with_body=True)
        finally:
            with state.lock:
                state.at_once -= 1

    def _respond(self, with_body: bool) -> None:
        state = self.server_state
        name = self.path.split("?")[0].lstrip("/")
        with state.lock:
            number = state.counts[self.command]
            state.counts[self.command] += 1
            fault = state.fault(number, name) if with_body else ""
            state.counts[fault] += bool(fault)
        if state.latency:
            time.sleep(state.latency)
        if state.down or fault == "reset":
            self._reset()
            return
        state.headers = {key.lower(): value for key, value in self.headers.items()}
        if state.redirect:
            self.send_response(302)
            self.send_header("Location", state.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = state.folder / name
        if fault.isdigit() or not path.is_file():
            self._finish(int(fault or "404"), b"<Error>planned</Error>")
            return
        size, modified = path.stat().st_size, path.stat().st_mtime_ns
        etag = f'"{hashlib.sha1(f"{size} {modified}".encode()).hexdigest()}"'
        if state.knows_if_match and self.headers.get("If-Match", etag) != etag:
            self._finish(412, b"")
            return
        start, end = 0, size
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(size, int(found[2] or size) + 1)
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(end - start)
        self.send_response(206 if found else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if with_body:
            self._send(body, fault)

    def _send(self, body: bytes, fault: str) -> None:
        state, half = self.server_state, len(body) // 2
        try:
            if fault == "truncate":
                self.wfile.write(body[:half])
                self.close_connection = True
            elif fault == "stall":
                self.wfile.write(body[:half])
                state.ended.wait(60)
                self.close_connection = True
            elif fault == "loris":
                for at in range(len(body)):
                    self.wfile.write(body[at : at + 1])
                    if state.ended.wait(0.2):
                        return
            elif state.bandwidth:
                began = time.monotonic()
                for at in range(0, len(body), 1 << 16):
                    piece = memoryview(body)[at : at + (1 << 16)]
                    self.wfile.write(piece)
                    time.sleep(max(0.0, began + (at + len(piece)) / state.bandwidth - time.monotonic()))
            else:
                self.wfile.write(body)
        except OSError:  # the client has closed the connection
            self.close_connection = True
        with state.lock:
            state.bytes_sent += len(body)

    def _finish(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@contextmanager
def s3_bucket(secret: str) -> Iterator[dict[str, str]]:
    """Starts moto's server with an empty bucket named "bucket"; yields the environment that leads there."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextmanager
def gcs_bucket(token: str) -> Iterator[dict[str, str]]:
    """The same for Google's XML interface, which is S3's but for the token and the names of some headers."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication

    serve = DomainDispatcherApplication.__call__

    def translate(self: Any, environ: dict[str, Any], respond: Any) -> Any:
        if environ.get("HTTP_AUTHORIZATION") != f"Bearer {token}":
            respond("401 Unauthorized", [("Content-Length", "0")])
            return [b""]
        environ = {key.replace("HTTP_X_GOOG_", "HTTP_X_AMZ_"): value for key, value in environ.items()}
        environ["HTTP_AUTHORIZATION"] = "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/s3/aws4_request"

        def answer(status: str, headers: list[tuple[str, str]], *others: Any) -> Any:
            renamed = [(name.lower().replace("x-amz-", "x-goog-"), value) for name, value in headers]
            return respond(status, [*renamed, ("x-goog-generation", "1")], *others)

        return serve(self, environ, answer)

    with s3_bucket(token) as environment, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DomainDispatcherApplication, "__call__", translate)
        yield {"GOOGLE_BASE_URL": environment["AWS_ENDPOINT_URL"], "GOOGLE_BEARER_TOKEN": token}
