"""A local S3 server in a process of its own, and a proxy in front of it that fails or waits when a test says so."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import boto3

BUCKET = "results"
ACCESS_KEY = "AKIAUSEDBYTHETESTS00"
SECRET_KEY = "the-secret-of-the-tests"
_START_SECONDS = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket. It knows no keys, so it takes any, until `require_keys`."""

    url: str
    client: Any

    def contents(self) -> list[str]:
        """What is in the bucket."""
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def num_unfinished_uploads(self) -> int:
        """Uploads in parts that were begun and neither finished nor given up."""
        return len(self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))

    def clear(self) -> None:
        """Empty the bucket."""
        for key in self.contents():
            self.client.delete_object(Bucket=BUCKET, Key=key)


def store_variables(url: str, **changed: str) -> dict[str, str]:
    """The environment of a process that uploads to the server at `url`."""
    return {
        "SGLANG_CLOUD_STORAGE_TYPE": "s3",
        "SGLANG_S3_BUCKET_NAME": BUCKET,
        "SGLANG_S3_ENDPOINT_URL": url,
        "SGLANG_S3_ACCESS_KEY_ID": ACCESS_KEY,
        "SGLANG_S3_SECRET_ACCESS_KEY": SECRET_KEY,
        **{f"SGLANG_S3_{name.upper()}": value for name, value in changed.items()},
    }


def client_of(url: str) -> Any:
    """boto3's client, as an independent witness of what is in the bucket."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """The server with an empty bucket; it is gone when the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(url, process)
        client = client_of(url)
        client.create_bucket(Bucket=BUCKET)
        yield S3Server(url, client)
        client.close()
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/moto-api/").close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.05)


@dataclass
class Faults:
    """What the proxy does to requests of the method `method` (and of no other). `attempts` counts them.

    The next `failures` are answered with 503. While `gate` is not set, the others wait before they go on to the server.
    """

    method: str = "PUT"
    failures: int = 0
    attempts: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()


@dataclass(frozen=True)
class Proxy:
    """Where it listens, and what it does."""

    url: str
    faults: Faults

    def reset(self) -> None:
        """Pass everything on again."""
        self.faults.method, self.faults.failures, self.faults.attempts = "PUT", 0, 0
        self.faults.gate.set()
        self.faults.waiting.clear()


@contextlib.contextmanager
def proxy_to(server: S3Server) -> Iterator[Proxy]:
    """A proxy in front of `server`."""
    faults = Faults()
    target = server.url.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.command == faults.method:
                faults.attempts += 1
                if faults.failures > 0:
                    faults.failures -= 1
                    self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                    return
                if not faults.gate.is_set():
                    faults.waiting.set()
                    faults.gate.wait()
            with contextlib.closing(http.client.HTTPConnection(target, timeout=30)) as onward:
                onward.request(self.command, self.path, body=body, headers=dict(self.headers))
                reply = onward.getresponse()
                self._answer(reply.status, dict(reply.getheaders()), reply.read())

        def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            length = str(len(body))
            if self.command == "HEAD":
                length = next((value for name, value in headers.items() if name.lower() == "content-length"), "0")
            self.send_header("content-length", length)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_any)
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Proxy(f"http://127.0.0.1:{listener.server_port}", faults)
    finally:
        faults.gate.set()
        listener.shutdown()
        thread.join()
        listener.server_close()
