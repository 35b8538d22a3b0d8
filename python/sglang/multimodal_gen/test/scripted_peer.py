"""A server of somebody else: OpenAI's fields and nothing more, no /metrics, no list of models.

Words in the prompt say what happens: `delay-MS` before the reply, `together-N` no reply before N requests are under way
at once, `status-N` with an error, `garbage` and `nothing` in place of a result, `cut` in the middle of the body, `hang`
until the server stops, `lost` in place of the file that a URL names, `stream-error` and `stream-ends` in place of a
stream's end, `fail-job` for a video.
"""

from __future__ import annotations

import base64
import contextlib
import email.parser
import email.policy
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

IMAGE_FIELDS = {"prompt", "model", "n", "size", "quality", "response_format", "user", "stream", "partial_images"}
VIDEO_FIELDS = {"prompt", "model", "seconds", "size"}
IMAGE = base64.b64encode(bytes(range(256)) * 300).decode()
CLIP = b"clip" * 1000
MODEL = "peer-1"
FILE_S = 0.05
"""How long a file takes."""


@dataclass
class Seen:
    """One request as the server saw it; moments are of `time.perf_counter`, which all threads share."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    received: float
    answered: float = 0.0


@dataclass
class Job:
    """A video whose statuses come one after the other, each at the next question."""

    prompt: str
    statuses: list[str] = field(default_factory=lambda: ["queued", "in_progress", "completed"])

    def described(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = {"id": job_id, "object": "video", "status": self.statuses[0], "size": "32x16"}
        if found["status"] == "failed":
            found["error"] = {"code": "moderation_blocked", "message": "not this one"}
        return found


class Peer(ThreadingHTTPServer):
    """The server and what it saw. `events` are played on the events route of videos where there are some.

    URLs of images begin with `files_url`; without it they are relative.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.seen: list[Seen] = []
        self.jobs: dict[str, Job] = {}
        self.events: Sequence[dict[str, Any]] = ()
        self.key = ""
        self.files_url = ""
        self.refuses_all = False
        self.stopping = threading.Event()
        self.num_open = self.most_open = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is nothing to talk about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def of(self, method: str, path: str) -> list[Seen]:
        """The requests to a path that begins so, in order of arrival."""
        return [one for one in self.seen if one.method == method and one.path.startswith(path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Peer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        received = time.perf_counter()
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        with self.server.lock:
            self.server.num_open += 1
            self.server.most_open = max(self.server.most_open, self.server.num_open)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(method, self.path, headers, self._fields(data), received)
        self.server.seen.append(seen)
        try:
            self._answer(seen)
        finally:
            seen.answered = time.perf_counter()

    def send_response(self, code: int, message: str | None = None) -> None:
        """From here on the client may think that it is over."""
        with self.server.lock:
            self.server.num_open -= 1
        super().send_response(code, message)

    def _fields(self, data: bytes) -> dict[str, Any]:
        kind = self.headers.get("content-type", "")
        if kind.startswith("multipart/"):
            parser = email.parser.BytesParser(policy=email.policy.HTTP)
            parts = parser.parsebytes(f"content-type: {kind}\r\n\r\n".encode() + data).iter_parts()
            return {
                str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True).decode()
                for part in parts
            }
        return json.loads(data) if data else {}

    def _answer(self, seen: Seen) -> None:
        if self.server.key and seen.headers.get("authorization") != f"Bearer {self.server.key}":
            self._error(401, "invalid_api_key", "Incorrect API key provided.")
        elif seen.method == "POST" and seen.path == "/v1/images/generations":
            self._images(seen.body)
        elif seen.method == "POST" and seen.path == "/v1/videos":
            self._create_video(seen.body)
        elif seen.path.startswith("/files/"):
            time.sleep(FILE_S)
            self._reply(404 if "lost" in seen.path else 200, CLIP)
        elif seen.path.startswith("/v1/videos/"):
            self._video(seen, *seen.path.split("/")[3:])
        else:
            self._reply(404, b'{"detail": "Not Found"}')

    def _images(self, body: dict[str, Any]) -> None:
        if self._is_refused(body, IMAGE_FIELDS):
            return
        words = body["prompt"].split()
        self._wait(words)
        if "cut" in words:
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"created": 1')
            self.close_connection = True
        elif "garbage" in words:
            self._reply(200, b"<html>")
        elif "nothing" in words:
            self._reply(200, b'{"created": 1, "data": []}')
        elif body.get("stream"):
            self._stream_images(body, words)
        elif body.get("response_format") == "url":
            path = f"{self.server.files_url}/files/{'lost' if 'lost' in words else 'found'}"
            images = [{"url": f"{path}-{index}"} for index in range(body.get("n", 1))]
            self._reply(200, json.dumps({"created": 1, "data": images}).encode())
        else:
            images = [{"b64_json": IMAGE}] * body.get("n", 1)
            self._reply(200, json.dumps({"created": 1, "data": images}).encode())

    def _stream_images(self, body: dict[str, Any], words: list[str]) -> None:
        events: list[dict[str, Any]] = [
            {"type": "image_generation.partial_image", "b64_json": IMAGE, "partial_image_index": index}
            for index in range(body["partial_images"])
        ]
        end: dict[str, Any] = {"type": "image_generation.completed", "b64_json": IMAGE, "size": "32x32"}
        if "stream-error" in words:
            end = {"error": {"code": "server_overloaded", "message": "too much"}}
        self._stream([*events, *([] if "stream-ends" in words else [end])], words)

    def _create_video(self, body: dict[str, Any]) -> None:
        if self._is_refused(body, VIDEO_FIELDS):
            return
        self._wait(body["prompt"].split())
        with self.server.lock:
            job_id = f"video/{len(self.server.jobs)}"  # an id that must be quoted in a path
            self.server.jobs[job_id] = Job(body["prompt"])
        if "fail-job" in body["prompt"]:
            self.server.jobs[job_id].statuses = ["queued", "failed"]
        self._reply(200, json.dumps(self.server.jobs[job_id].described(job_id)).encode(), ("openai-poll-after-ms", "5"))

    def _video(self, seen: Seen, quoted: str, part: str = "") -> None:
        job_id = quoted.replace("%2F", "/")
        job = self.server.jobs[job_id]
        if seen.method == "DELETE":
            self._reply(405, b"")
        elif part == "content":
            self._reply(200, CLIP)
        elif part == "events" and self.server.events:
            base = job.described(job_id)
            self._stream([e | {"video": base | e["video"]} if "video" in e else e for e in self.server.events], [])
        elif part:
            self._reply(404, b'{"detail": "Not Found"}')
        else:
            if len(job.statuses) > 1:
                job.statuses.pop(0)
            self._reply(200, json.dumps(job.described(job_id)).encode())

    def _is_refused(self, body: dict[str, Any], fields: set[str]) -> bool:
        unknown = body.keys() - fields
        status = next((int(w.removeprefix("status-")) for w in body["prompt"].split() if w.startswith("status-")), 0)
        if unknown:
            self._error(400, "unknown_parameter", f"Unknown parameter: {min(unknown)!r}.")
        elif body.get("model", MODEL) != MODEL:
            self._error(404, "model_not_found", f"The model {body['model']!r} does not exist.")
        elif self.server.refuses_all:
            self._error(429, "rate_limit_exceeded", "Slow down.")
        elif status:
            self._error(status, "as_told", "This is what the prompt wants.")
        else:
            return False
        return True

    def _wait(self, words: list[str]) -> None:
        for word in words:
            if word.startswith("delay-"):
                time.sleep(int(word.removeprefix("delay-")) / 1000)
            elif word.startswith("together-"):
                deadline = time.monotonic() + 30
                while self.server.most_open < int(word.removeprefix("together-")) and time.monotonic() < deadline:
                    time.sleep(0.005)
            elif word == "hang":
                self.server.stopping.wait(60)

    def _stream(self, events: list[dict[str, Any]], words: list[str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in events:
            self._chunk(f": keep-alive\n\nevent: {event.get('type', 'error')}\ndata: {json.dumps(event)}\n\n".encode())
            self._wait(words)
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _error(self, status: int, code: str, message: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self._reply(status, json.dumps({"error": error}).encode())

    def _reply(self, status: int, data: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def running_peer() -> Iterator[Peer]:
    """A peer on a port of its own."""
    peer = Peer()
    thread = threading.Thread(target=peer.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield peer
    finally:
        peer.stopping.set()
        peer.shutdown()
        thread.join()
        peer.server_close()
