"""The events of an image that is streamed: pictures on the way, then the result."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.entrypoints.openai.event_stream import event_frame
from sglang.multimodal_gen.runtime.managers.messages import Preview

# No model here counts in tokens; OpenAI's client wants the fields.
_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


class ImageEvents:
    """One image on its way to one client. `kind` is the first part of its events' types, `params` are complete."""

    def __init__(self, kind: str, params: SamplingParams) -> None:
        self._kind = kind
        self._params = params
        self._newest: Preview | None = None
        self._changed = asyncio.Event()

    def show(self, preview: Preview) -> None:
        """A picture on the way; one that was not sent yet is forgotten."""
        self._newest = preview
        self._changed.set()

    async def frames(self, reply: Callable[[], Coroutine[Any, Any, bytes]]) -> AsyncGenerator[bytes, None]:
        """Pictures while `reply` runs, then what it returns, the last frame. Closing this early cancels it.

        Raises: what `reply` raises.
        """
        running = asyncio.create_task(reply())
        running.add_done_callback(lambda _: self._changed.set())
        index = 0
        try:
            while not running.done() or self._newest is not None:
                await self._changed.wait()
                self._changed.clear()
                preview, self._newest = self._newest, None
                if preview is not None:
                    yield self._partial(preview, index)
                    index += 1
            yield running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _partial(self, preview: Preview, index: int) -> bytes:
        image = base64.b64encode(preview.image).decode("ascii")
        return event_frame(self._fields("partial_image") | {"b64_json": image, "partial_image_index": index})

    def completed(self, facts: dict[str, Any]) -> bytes:
        """The last frame; `facts` are those of the image, as in a reply that is not streamed."""
        return event_frame(self._fields("completed") | facts | {"usage": _NO_USAGE})

    def _fields(self, name: str) -> dict[str, Any]:
        return {
            "type": f"{self._kind}.{name}",
            "created_at": int(time.time()),
            "size": f"{self._params.width}x{self._params.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": self._params.output_format,
        }
