"""/v1/models: the one model that this server serves."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.configs.declare import parameters
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors_http import ModelNotFound
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse


class ModelApi:
    """The model routes. They answer while the model still loads, then with more."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self._engine = engine
        self._names = settings.model_names
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        """The served model."""
        return JsonResponse({"object": "list", "data": [self._card(self._names[0])]})

    async def retrieve(self, request: Request, model_id: str) -> Response:
        """The served model, by any of its names."""
        if model_id not in self._names:
            raise ModelNotFound(model_id, served=self._names[0])
        return JsonResponse(self._card(model_id))

    def _card(self, name: str) -> dict[str, Any]:
        card: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "sglang",
            "root": self._names[0],
            "parent": None,
        }
        model = self._engine.state.model
        if model is not None:
            card |= {
                "pipeline_class": model.pipeline_class,
                "tasks": list(model.tasks),
                "precision": model.precision,
                "family": model.family,
                "licence": model.licence,
                "num_parameters": model.num_parameters,
                "weight_bytes": model.weight_bytes,
                "quantization": None if model.quantization is None else msgspec.to_builtins(model.quantization),
                "limits": msgspec.to_builtins(model.limits),
                "defaults": _public_defaults(model.defaults),
            }
        return card


def _public_defaults(defaults: SamplingParams) -> dict[str, Any]:
    """The model's own defaults, as far as clients may set the fields."""
    declared = parameters(SamplingParams)
    return {
        name: value
        for name, value in dataclasses.asdict(defaults).items()
        if "http" in declared[name].declaration.exposed and value != declared[name].default
    }
