"""Between the scheduler and the output process, over a ZMQ PAIR: ToOutput and FromOutput."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.managers.messages import MappedArray, Message
from sglang.multimodal_gen.runtime.managers.worker_messages import PreviewLatents
from sglang.multimodal_gen.runtime.postprocess.object_store import StoredFile

# --- scheduler -> output process ---


class OpenOutput(Message, frozen=True, kw_only=True, tag="open_output"):
    """A request's frames will follow; `num_frames` is their total. `directory` None: nothing is saved."""

    request_id: str
    params: SamplingParams
    num_frames: int
    directory: str | None


class OutputFrames(Message, frozen=True, kw_only=True, tag="output_frames"):
    """The next frames of an opened output."""

    request_id: str
    first_frame: int
    last: bool
    frames: MappedArray


class DropOutput(Message, frozen=True, kw_only=True, tag="drop_output"):
    """The request was cancelled or failed: discard what there is of it."""

    request_id: str


class RemoveOutput(Message, frozen=True, kw_only=True, tag="remove_output"):
    """The request was cancelled or failed before its output was complete: remove the files and objects again."""

    request_id: str
    paths: tuple[str, ...]
    keys: tuple[str, ...]


class RenderPreview(Message, frozen=True, kw_only=True, tag="render_preview"):
    """Make a preview of a request's latents; answered by a PreviewRendered unless a newer one comes before its turn."""

    latents: PreviewLatents
    params: SamplingParams

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self.latents.request_id


ToOutput = OpenOutput | OutputFrames | DropOutput | RemoveOutput | RenderPreview


# --- output process -> scheduler ---


class OutputHello(Message, frozen=True, kw_only=True, tag="output_hello"):
    """A fresh output process is listening; outputs that an earlier one held are lost."""

    protocol_version: int


class OutputDone(Message, frozen=True, kw_only=True, tag="output_done"):
    """An output is complete: saved under its final name, uploaded, or returned. `encode_seconds` are without
    `upload_seconds`."""

    request_id: str
    output_file_path: str | None
    thumbnail_path: str | None = None
    contact_sheet_path: str | None = None
    frames: MappedArray | None
    encoded: MappedArray | None
    encode_seconds: float
    stored: dict[str, StoredFile] = msgspec.field(default_factory=dict)
    upload_seconds: float = 0.0


class OutputFailed(Message, frozen=True, kw_only=True, tag="output_failed"):
    """An output could not be encoded or saved; nothing of it is left on disk."""

    request_id: str
    error: ErrorInfo


class PreviewRendered(Message, frozen=True, kw_only=True, tag="preview_rendered"):
    """The preview of a request after `step` steps."""

    request_id: str
    step: int
    media_type: str
    image: bytes


FromOutput = OutputHello | OutputDone | OutputFailed | PreviewRendered
