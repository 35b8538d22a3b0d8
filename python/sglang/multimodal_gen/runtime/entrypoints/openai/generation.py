"""Running requests that a client waits for: whoever goes away takes the work along."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EngineStopped, InternalError, ServingError
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import NO_INPUTS, DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine
from sglang.multimodal_gen.runtime.managers.messages import Finished, MediaInputs, RequestEvent

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedResult:
    """A finished request and the bytes of its encoded file; None when they were uploaded instead."""

    finished: Finished
    data: bytes | None


OnEvent = Callable[[RequestEvent], None]


async def generate_all(
    engine: Engine,
    requests: Mapping[str, SamplingParams],
    inputs: DecodedInputs = NO_INPUTS,
    *,
    on_event: OnEvent = lambda event: None,
) -> list[EncodedResult]:
    """One result per request (id -> parameters), in order, all from the same inputs. When one fails or the caller is
    cancelled, all are.

    Raises:
        ServingError: the first failure.
    """
    async with engine.stored(inputs) as media:
        tasks = [
            asyncio.create_task(_generate(engine, params, id_, media, on_event)) for id_, params in requests.items()
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _generate(
    engine: Engine, params: SamplingParams, request_id: str, media: MediaInputs | None, on_event: OnEvent
) -> EncodedResult:
    handle = await engine.submit(params, request_id=request_id, inputs=media)
    try:
        finished = await handle.result(on_event)
    except asyncio.CancelledError:
        await engine.cancel(request_id)
        # It may have finished before the cancel arrived; then its file is ours to remove.
        with contextlib.suppress(ServingError):
            _take(engine, await handle.result())
        raise
    return EncodedResult(finished=finished, data=_take(engine, finished))


def _take(engine: Engine, finished: Finished) -> bytes | None:
    if finished.stored:
        return None
    if finished.encoded is None:
        raise InternalError("the engine finished without the encoded result")
    return engine.take(finished.encoded).tobytes()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client or the server goes. The body must have been read.

    Raises:
        ClientDisconnect: the client went away.
        EngineStopped: the server is shutting down and the time for running requests is over.
    """
    running = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    draining = asyncio.create_task(request.app.state.draining.wait())
    tasks = (running, gone, draining)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientDisconnect if gone.done() else EngineStopped("the server is shutting down")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
