"""The output process's thread that makes previews: the newest of each request, and none that nobody waits for."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

import numpy as np

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.managers.output_messages import PreviewRendered, RenderPreview
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.observability.logging_setup import fields
from sglang.multimodal_gen.runtime.postprocess.formats import choose_format, quality_percent
from sglang.multimodal_gen.runtime.postprocess.previews import EncodedPreview, colours, encode_clip, encode_still

logger = logging.getLogger(__name__)


class PreviewRenderer:
    """Renders in order of arrival; what comes while an earlier one of the same request waits takes its place."""

    def __init__(self, run_dir: RunDir, reply: Callable[[PreviewRendered], None]) -> None:
        self._run_dir = run_dir
        self._reply = reply
        self._waiting: dict[str, RenderPreview] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, message: RenderPreview) -> None:
        """Take one, replacing an older one of the request."""
        self.drop(message.request_id)
        with self._changed:
            self._waiting[message.request_id] = message
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
            self._thread.start()

    def drop(self, request_id: str) -> None:
        """Nobody wants the one that waits."""
        with self._changed:
            message = self._waiting.pop(request_id, None)
        if message is not None:
            self._run_dir.discard(message.latents.latents)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                message = self._waiting.pop(next(iter(self._waiting)))
            rendered = self._rendered(message)
            if rendered is not None:
                self._reply(rendered)

    def _rendered(self, message: RenderPreview) -> PreviewRendered | None:
        """None when the latents are gone, as when the request ended, or cannot be shown."""
        try:
            encoded = render(message, self._run_dir.take(message.latents.latents))
        except FileNotFoundError:
            return None
        except (ServingError, OSError):
            logger.exception("a preview was not made", extra=fields(request_id=message.request_id))
            with contextlib.suppress(ServingError):
                self._run_dir.discard(message.latents.latents)
            return None
        return PreviewRendered(
            request_id=message.request_id,
            step=message.latents.step,
            media_type=encoded.media_type,
            image=encoded.image,
        )


def render(message: RenderPreview, latents: np.ndarray) -> EncodedPreview:
    """Latents [C, F, h, w] -> the preview: of a picture as the result will be, of a clip small and animated."""
    params, found = message.params, message.latents
    assert params.width and params.height and params.num_frames, "the parameters are complete"
    weights = np.frombuffer(found.basis, dtype=np.float32).reshape(2, latents.shape[0] + 1, -1)
    frames = colours(latents, weights, patch=found.patch)
    chosen = choose_format(params, num_frames=params.num_frames)
    if chosen.is_video:
        assert params.fps, "the parameters are complete"
        seconds = params.num_frames / params.fps
        return encode_clip(frames, width=params.width, height=params.height, seconds=seconds)
    percent = quality_percent(
        chosen, output_quality=params.output_quality, output_compression=params.output_compression
    )
    return encode_still(frames[0], width=params.width, height=params.height, chosen=chosen, percent=percent)
