"""The administrator's routes: flush the cache, release and resume memory, load weights anew.

The gate has checked the key. Each answers when it is done. A client that goes away meanwhile stops nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.configs.declare import arg, build, check_names, parameters
from sglang.multimodal_gen.errors import InvalidValue, UnsupportedParameter, WeightsDoNotFit
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings, require_model
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import has_body, read_json
from sglang.multimodal_gen.runtime.managers.messages import Operation

_UNSUPPORTED = {"target_modules": "all components are loaded anew"}


@dataclass(frozen=True, kw_only=True)
class WeightsFields:
    """The body of /update_weights_from_disk."""

    model_path: str | None = arg(
        None,
        help="Directory of this machine with a checkpoint of the architecture that is served; unset: the one that the "
        "weights came from.",
        group="weights",
        max_length=4096,
    )
    flush_cache: bool = arg(
        True, help="Only true is accepted: embeddings of other weights are never kept.", group="weights"
    )


class ControlApi:
    """The routes."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self._engine = engine
        self._settings = settings

    async def flush_cache(self, request: Request) -> Response:
        """Forget the embeddings of earlier requests and what was learned of the memory that they take, and give unused
        memory back. Requests that run go on."""
        return await self._do_without_fields(request, "flush_cache")

    async def release_memory(self, request: Request) -> Response:
        """Free the device: requests that have begun end first, then the weights go. Those that wait go on waiting, new
        ones are refused until the memory is resumed."""
        return await self._do_without_fields(request, "release_memory_occupation")

    async def resume_memory(self, request: Request) -> Response:
        """Load the weights again that were released."""
        return await self._do_without_fields(request, "resume_memory_occupation")

    async def update_weights(self, request: Request) -> Response:
        """Load weights anew, from the same directory or another one of the same architecture. Requests that have begun
        end with the old ones, those that wait and those that come get the new ones. When they cannot be loaded, the old
        ones come back."""
        wish = await self._weights_wish(request)
        if wish.model_path is not None:
            model = require_model(self._engine, self._settings, None)
            await asyncio.to_thread(_check_directory, wish.model_path, model.pipeline_class, self._settings.backend)
        path = None if wish.model_path is None else str(Path(wish.model_path).resolve())
        return await self._do("update_weights_from_disk", model_path=path)

    async def _weights_wish(self, request: Request) -> WeightsFields:
        given = await self._given(request, {*parameters(WeightsFields), *_UNSUPPORTED})
        values = {name: value for name, value in given.items() if value is not None}
        for name, reason in _UNSUPPORTED.items():
            if name in values:
                raise UnsupportedParameter(name, reason)
        wish: WeightsFields = build(WeightsFields, values, what="field")
        if not wish.flush_cache:
            raise UnsupportedParameter("flush_cache", "embeddings of other weights are never kept")
        return wish

    async def _given(self, request: Request, known: Collection[str]) -> Mapping[str, Any]:
        """The fields of the body, which may be left out. Raises UnknownParameter for others than `known`."""
        if not has_body(request):
            return {}
        values = (await read_json(request, self._settings.body)).values
        check_names(values, known, what="field")
        return values

    async def _do_without_fields(self, request: Request, operation: Operation) -> Response:
        await self._given(request, ())
        return await self._do(operation)

    async def _do(self, operation: Operation, *, model_path: str | None = None) -> Response:
        message = await self._engine.control(operation, model_path=model_path)
        return JsonResponse({"success": True, "message": message})


def _check_directory(model_path: str, pipeline_class: str, backend: str) -> None:
    """Refuse at the door what no worker needs to be ended for.

    Raises:
        InvalidValue: no directory of this machine.
        ModelError: a directory without a model that can be served.
        WeightsDoNotFit: a model of another class.
    """
    if not Path(model_path).is_dir():
        raise InvalidValue("model_path", model_path, "a directory of the server's machine")
    entry = get_model_info(model_path, backend=backend).entry
    assert entry is not None, "a directory is known or refused"
    found = entry.pipeline.rpartition(":")[2]
    if found != pipeline_class:
        raise WeightsDoNotFit(served=pipeline_class, found=found)
