"""The output process: encodes and saves frames while later ones are still being decoded. No torch.

Run as `python -m sglang.multimodal_gen.runtime.managers.output_process FD` by the supervisor. Each output has a thread
while it lasts, fed in order; a worker never waits for a file.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import zmq

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.errors import InternalError, ServingError
from sglang.multimodal_gen.runtime.managers.child_process import exit_with_parent, inherited_connection
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import PROTOCOL_VERSION, Codec, MappedArray, Message, encode
from sglang.multimodal_gen.runtime.managers.output_messages import (
    DropOutput,
    OpenOutput,
    OutputDone,
    OutputFailed,
    OutputFrames,
    OutputHello,
    RemoveOutput,
    RenderPreview,
    ToOutput,
)
from sglang.multimodal_gen.runtime.managers.preview_renderer import PreviewRenderer
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging, fields, log_refusal
from sglang.multimodal_gen.runtime.observability.private_texts import PRIVATE_TEXTS
from sglang.multimodal_gen.runtime.postprocess.metadata import file_metadata
from sglang.multimodal_gen.runtime.postprocess.saving import OutputWriter, SavedFiles
from sglang.multimodal_gen.runtime.postprocess.storage import Storage, open_storage
from sglang.multimodal_gen.runtime.server_args import model_names

# Started with -m, this module's own name is __main__, which is outside the package's logger.
logger = logging.getLogger("sglang.multimodal_gen.runtime.managers.output_process")

_WAKE = "inproc://replies"
_NOTHING_SAVED = SavedFiles(output=None, thumbnail=None, contact_sheet=None, stored={}, upload_seconds=0.0)
_NO_OPENING = 0
_MAX_THREADS = 4096  # more than there are requests at once; only as many start as are busy together


class OutputJob:
    """One output on its way to `storage`, to the client, or both. `model` is the name that the file gives as its
    maker."""

    def __init__(self, opened: OpenOutput, run_dir: RunDir, *, model: str, storage: Storage) -> None:
        self.opened = opened
        self.run_dir = run_dir
        self.seconds = 0.0
        self.returned: MappedArray | None = None
        self._returned_view: np.ndarray | None = None
        params = opened.params
        directory = opened.directory
        if params.return_encoded:
            directory = str(run_dir.fast or run_dir.base)  # the file never gets a name there
        metadata = file_metadata(params.recorded(), model=model) if params.metadata else None
        self.writer = (
            None
            if directory is None
            else OutputWriter(params, directory, num_frames=opened.num_frames, metadata=metadata, storage=storage)
        )

    def add(self, message: OutputFrames) -> OutputDone | None:
        """Take the next frames; the reply when they were the last."""
        frames = self.run_dir.take(message.frames)
        begin = time.perf_counter()
        if self.writer is not None:
            self.writer.write(frames)
        if self.opened.params.return_frames:
            if self._returned_view is None:
                shape = (self.opened.num_frames, *frames.shape[1:])
                self.returned, self._returned_view = self.run_dir.allocate(shape, "|u1")
            self._returned_view[message.first_frame : message.first_frame + len(frames)] = frames
        self.seconds += time.perf_counter() - begin
        return self._finish() if message.last else None

    def _finish(self) -> OutputDone:
        begin = time.perf_counter()
        saved, encoded = _NOTHING_SAVED, None
        if self.writer is not None:
            if self.opened.params.return_encoded:
                encoded = self.run_dir.send(np.frombuffer(self.writer.close_unnamed(), dtype=np.uint8))
            else:
                saved = self.writer.close()
        upload_seconds = saved.upload_seconds
        self._returned_view = None
        return OutputDone(
            request_id=self.opened.request_id,
            output_file_path=_text(saved.output),
            thumbnail_path=_text(saved.thumbnail),
            contact_sheet_path=_text(saved.contact_sheet),
            frames=self.returned,
            encoded=encoded,
            encode_seconds=self.seconds + time.perf_counter() - begin - upload_seconds,
            stored=dict(saved.stored),
            upload_seconds=upload_seconds,
        )

    def abandon(self) -> None:
        """Nothing of this output stays."""
        if self.writer is not None:
            self.writer.abort()
        if self.returned is not None:
            self.run_dir.discard(self.returned)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@dataclass(frozen=True)
class _Inbox:
    """What a thread is sent. A request that was put aside or lost its worker is opened more than once."""

    opening: int
    messages: queue.SimpleQueue[ToOutput] = field(default_factory=queue.SimpleQueue)


class OutputProcess:
    """Deals messages to one thread per output and brings their replies back."""

    def __init__(self, run_dir: RunDir, *, model: str, storage: Storage) -> None:
        self.run_dir = run_dir
        self.model = model
        self.storage = storage
        self.context = zmq.Context()
        self.scheduler = self.context.socket(zmq.PAIR)
        self.scheduler.set_hwm(0)
        self.scheduler.connect(run_dir.output_address)
        self.replies = self.context.socket(zmq.PULL)
        self.replies.bind(_WAKE)
        self.inboxes: dict[str, _Inbox] = {}
        self.num_openings = 0
        self.threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="output")
        self._own = threading.local()
        self.previews = PreviewRenderer(run_dir, lambda done: self._reply(done.request_id, _NO_OPENING, done))
        self._codec = Codec(ToOutput)

    def run(self) -> None:
        """For ever; the parent's pipe ends the process."""
        self.scheduler.send(encode(OutputHello(protocol_version=PROTOCOL_VERSION)))
        poller = zmq.Poller()
        poller.register(self.scheduler, zmq.POLLIN)
        poller.register(self.replies, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self.replies in ready:
                request_id, opening, payload = self.replies.recv_multipart()
                if payload:
                    self.scheduler.send(payload)
                self._close(request_id.decode(), int(opening))
            if self.scheduler in ready:
                self._dispatch(self.scheduler.recv())

    def _dispatch(self, payload: bytes) -> None:
        try:
            message = cast(ToOutput, self._codec.decode(payload))
        except msgspec.DecodeError:
            logger.exception("a message does not decode")
            return
        if isinstance(message, RenderPreview):
            self.previews.submit(message)
            return
        if isinstance(message, DropOutput):
            self.previews.drop(message.request_id)
        if isinstance(message, OpenOutput):
            self.num_openings += 1
            inbox = self.inboxes[message.request_id] = _Inbox(self.num_openings)
            self.threads.submit(self._serve, message, inbox)
        elif isinstance(message, RemoveOutput):
            self.threads.submit(self._remove, message)
        elif message.request_id in self.inboxes:
            self.inboxes[message.request_id].messages.put(message)
        elif isinstance(message, OutputFrames):
            self.run_dir.discard(message.frames)

    def _remove(self, message: RemoveOutput) -> None:
        for path in message.paths:
            with contextlib.suppress(OSError):
                Path(path).unlink(missing_ok=True)
        if message.keys:
            self.storage.remove(message.keys)

    def _close(self, request_id: str, opening: int) -> None:
        """A thread has ended. Its request may have come again meanwhile: that one's inbox stays."""
        if request_id in self.inboxes and self.inboxes[request_id].opening == opening:
            del self.inboxes[request_id]

    def _serve(self, opened: OpenOutput, inbox: _Inbox) -> None:
        """One output, from opening to its one reply."""
        text_key = f"{opened.request_id}:{inbox.opening}"
        PRIVATE_TEXTS.keep(text_key, opened.params.private_texts())
        reply: Message | None = None
        job: OutputJob | None = None
        try:
            job = OutputJob(opened, self.run_dir, model=self.model, storage=self.storage)
            while reply is None:
                message = inbox.messages.get()
                if isinstance(message, DropOutput):
                    break
                reply = job.add(cast(OutputFrames, message))
        except ServingError as error:
            log_refusal(logger, error, fields(request_id=opened.request_id))
            reply = OutputFailed(request_id=opened.request_id, error=error.info())
        except Exception:
            logger.exception("saving failed", extra=fields(request_id=opened.request_id))
            failure = InternalError("the result could not be saved; the server's log has the details")
            reply = OutputFailed(request_id=opened.request_id, error=failure.info())
        if job is not None and not isinstance(reply, OutputDone):
            job.abandon()
        PRIVATE_TEXTS.forget(text_key)
        self._reply(opened.request_id, inbox.opening, reply)

    def _reply(self, request_id: str, opening: int, reply: Message | None) -> None:
        if not hasattr(self._own, "replies"):
            self._own.replies = self.context.socket(zmq.PUSH)
            self._own.replies.connect(_WAKE)
        self._own.replies.send_multipart(
            [request_id.encode(), b"%d" % opening, b"" if reply is None else encode(reply)]
        )


def main() -> None:
    """Entry point of the process."""
    parent = inherited_connection()
    config = EngineConfig.from_bytes(parent.recv_bytes())
    configure_logging(config.args.logging)
    exit_with_parent(parent, lambda _: None, cleanup=lambda: None)
    # Behind an HTTP server a file on its disk is nobody's: what was uploaded goes.
    storage = open_storage(envs.current(), keep_local=not config.serves_http)
    OutputProcess(RunDir.at(config.run_dir), model=model_names(config.args.model)[0], storage=storage).run()


if __name__ == "__main__":
    main()
