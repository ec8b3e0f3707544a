"""The server: connections, records of what came in, and the door to faults."""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hub_server.calls import READ_TOKEN, WRITE_TOKEN, Account, Answer, Call, refused
from tests.hub_server.faults import Fault, Faults
from tests.hub_server.repository import MOVED, Refusal, Repository
from tests.hub_server.routes import ROUTES


@dataclass
class Request:
    """One request, as a test may ask for it. Its status is None where the connection was dropped."""

    time: float
    method: str
    path: str
    authorized: bool
    status: int | None = None


class Hub:
    """The server, what it keeps, and what a test may do to it; it serves while its context is open.

    Attributes:
        home: Where clients that are given `environment` keep their files.
        tokens: Who may call: one token of "me" that may write, one that may not, and what a test puts here.
        repositories: The repositories by their names, "me/adapter".
        requests: What was asked for, in the order in which it came.
        bodies: The path and the body of each request that had one, or as much of it as was read.
        errors: Tracebacks of what this server could not answer: there should be none.
        part_size: LFS objects of more bytes are asked for in parts of so many; None, all in one.
    """

    def __init__(self, home: Path, port: int = 0) -> None:
        self.home = Path(home)
        self.tokens = {WRITE_TOKEN: Account("me"), READ_TOKEN: Account("me", role="read")}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.bodies: list[tuple[str, bytes]] = []
        self.errors: list[str] = []
        self.part_size: int | None = None
        self.faults = Faults()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = Server(self, port)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What points a process at this server, whatever its own environment says."""
        folders = {"HF_HUB_CACHE": "hub", "HF_ASSETS_CACHE": "assets", "HF_XET_CACHE": "xet", "HF_TOKEN_PATH": "token"}
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(self.home),
            **{name: str(self.home / folder) for name, folder in folders.items()},
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def repository(self, name: str) -> Repository:
        return self.repositories[name]

    def fail(self, method: str, path: str, status: int = 503, times: int = 1, message: str = "Out of order") -> None:
        """Answer with an error; method and path are regular expressions, as for all faults."""
        self.faults.add(Fault(method, path, times, answer=refused(Refusal(status, message))))

    def conflict(self, status: int = 409, times: int = 1, path: str = "/commit/") -> None:
        """Refuse commits: another is in progress (409), or was made since (412)."""
        messages = {409: "Another commit is in progress. Please try again.", 412: MOVED}
        self.fail("POST", path, status, times, messages[status])

    def drop(self, method: str, path: str, times: int = 1, at: str = "request") -> None:
        """Close the connection within the "request", before the "answer", or within the answer's "body"."""
        self.faults.add(Fault(method, path, times, cut=at))

    def delay(self, method: str, path: str, seconds: float, times: int = 1) -> None:
        self.faults.add(Fault(method, path, times, seconds=seconds))

    def where(self, text: bytes | str) -> list[str]:
        """Return where a text came up in the bodies that were received, and in files that came in them as base64."""
        wanted = text.encode() if isinstance(text, str) else text
        return [place for place, content in self.received() if wanted in content]

    def received(self) -> Iterator[tuple[str, bytes]]:
        for path, body in list(self.bodies):
            yield path, body
            if re.search("/(commit|preupload)/", path):
                yield from ((f"{path}: {name}", content) for name, content in encoded_files(body))

    def answer(self, call: Call) -> Answer:
        """Find the route and take it, while nothing else is changed."""
        try:
            with self.lock:
                for methods, pattern, function in ROUTES:
                    found = re.fullmatch(pattern, call.path)
                    if found and call.method in methods:
                        return function(call, *map(urllib.parse.unquote, found.groups("")))
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            return refused(refusal)
        except Exception:
            self.errors.append(traceback.format_exc())
            return refused(Refusal(500, "Internal Error"))


def encoded_files(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the files inside the body of a commit, or the samples of files inside that of a preupload."""
    for line in body.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # the connection was dropped here
            return
        for each in (value.get("value", {}), *value.get("files", [])):
            if encoded := each.get("content") or each.get("sample"):
                yield each["path"], base64.b64decode(encoded)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, port: int) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent about clients that left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """HTTP as such: bodies in and out, records, and the faults that befall a connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def handle_request(self) -> None:
        hub = self.server.hub
        request = Request(time.monotonic(), self.command, self.path, "Authorization" in self.headers)
        hub.requests.append(request)
        fault = hub.faults.take(self.command, self.path)
        body = self.read_body(half=fault.cut == "request")
        if body:
            hub.bodies.append((self.path, body))
        if fault.cut == "request":
            return self.cut()
        hub.closing.wait(fault.seconds)
        answer = fault.answer or hub.answer(Call(hub, self.command, self.path, self.headers, body))
        if fault.cut == "answer":
            return self.cut()
        request.status = None if fault.cut else answer.status
        return self.send(answer, half=fault.cut == "body")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(self.read_chunks(half))
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length // 2 if half else length)

    def read_chunks(self, half: bool) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size // 2 if half else size)
            if half:
                return
            self.rfile.readline()
        self.rfile.readline()

    def send(self, answer: Answer, half: bool) -> None:
        raw = isinstance(answer.content, bytes)
        body = answer.content if raw else json.dumps(answer.content).encode()
        kind = "application/octet-stream" if raw else "application/json; charset=utf-8"
        given = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Request-Id": f"Root=1-{uuid.uuid4()}"}
        self.send_response(answer.status)
        for name, value in (given | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.cut()

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `Hub.requests` has it all."""
