"""The administrator's routes for adapters. The gate has checked the key. Each answers when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.runtime.entrypoints.lora_wishes import (
    LIST_REQUEST,
    listed,
    merge_request,
    remove_request,
    set_request,
    unmerge_request,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import has_body, read_json
from sglang.multimodal_gen.runtime.managers.messages import LoraRequest


class LoraApi:
    """The routes."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self._engine = engine
        self._settings = settings

    async def set(self, request: Request) -> Response:
        """Load adapters and set them for requests that come later and name none. Requests that run keep theirs, and no
        generation waits, unless the weights change: then those that came before end first."""
        return await self._do(request, set_request)

    async def merge(self, request: Request) -> Response:
        """Make the adapters that are set part of the weights of all requests, once those before have ended."""
        return await self._do(request, merge_request)

    async def unmerge(self, request: Request) -> Response:
        """Bring the checkpoint's weights back, bit for bit, once the requests before have ended."""
        return await self._do(request, unmerge_request)

    async def remove(self, request: Request) -> Response:
        """Forget adapters; requests that have them keep them until they end."""
        return await self._do(request, remove_request)

    async def list(self, request: Request) -> Response:
        """Which adapters are loaded, and which are set or merged; never behind a generation."""
        return JsonResponse(listed(await self._engine.loras(LIST_REQUEST)))

    async def _do(self, request: Request, read: Callable[[Mapping[str, Any]], LoraRequest]) -> Response:
        values = (await read_json(request, self._settings.body)).values if has_body(request) else {}
        reply = await self._engine.loras(read(values))
        return JsonResponse({"status": "ok", "message": reply.message})
