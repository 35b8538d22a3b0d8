"""The events of an image that is streamed: pictures on the way, then the result. Comments tell how far it is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.entrypoints.openai.event_stream import comment_frame, event_frame
from sglang.multimodal_gen.runtime.managers.messages import Preview, Progress, Queued, RequestEvent, Started

# Between two comments, and before the first: what is refused or done by then is answered without one.
_NEWS_PAUSE_S = 0.5

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
        self._news: dict[str, Any] | None = None
        self._eta_s: float | None = None
        self._changed = asyncio.Event()

    def heard(self, event: RequestEvent) -> None:
        """What the engine says; a picture or news that were not sent yet are forgotten."""
        if isinstance(event, Preview):
            self._newest = event
        elif isinstance(event, Started):
            steps = sum(phase.units for phase in event.phases if phase.lane == "denoise")
            self._news = _news("in_progress", self._eta_s, progress=0, step=0, total_steps=steps)
        elif isinstance(event, Queued):
            self._eta_s = event.eta_s
            self._news = _news("queued", event.eta_s, queue_position=event.position)
        elif isinstance(event, Progress):
            self._eta_s, progress = event.eta_s, int(100 * event.fraction)
            steps, total = event.step, event.total_steps
            self._news = _news("in_progress", event.eta_s, progress=progress, step=steps, total_steps=total)
        else:
            return
        self._changed.set()

    async def frames(self, reply: Callable[[], Coroutine[Any, Any, bytes]]) -> AsyncGenerator[bytes, None]:
        """Pictures and news while `reply` runs, then what it returns, the last frame. Closing this early cancels it.

        Raises: what `reply` raises.
        """
        running = asyncio.create_task(reply())
        running.add_done_callback(lambda _: self._changed.set())
        index, news_at = 0, time.monotonic() + _NEWS_PAUSE_S
        try:
            while not running.done() or self._newest is not None:
                await self._change(None if self._news is None else max(0.0, news_at - time.monotonic()))
                preview, self._newest = self._newest, None
                if preview is not None:
                    yield self._partial(preview, index)
                    index += 1
                elif self._news is not None and not running.done() and time.monotonic() >= news_at:
                    news, self._news = self._news, None
                    yield comment_frame(news)
                    news_at = time.monotonic() + _NEWS_PAUSE_S
            yield running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _change(self, timeout_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()

    def _partial(self, preview: Preview, index: int) -> bytes:
        image = base64.b64encode(preview.image).decode("ascii")
        facts = {"b64_json": image, "partial_image_index": index}
        steps = {"step": preview.step, "total_steps": preview.total_steps, "eta_seconds": _rounded(self._eta_s)}
        return event_frame(self._fields("partial_image") | facts | steps)

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


def _news(status: str, eta_s: float | None, **facts: int) -> dict[str, Any]:
    """In the words of a video's object."""
    return {"status": status, **facts, "eta_seconds": _rounded(eta_s)}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
