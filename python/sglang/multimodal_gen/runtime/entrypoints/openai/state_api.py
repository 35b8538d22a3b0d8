"""How the server is: /liveness, /health, /health_generate, /server_info and /model_info."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.entrypoints.openai.admin import caller_of
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings, load_failure, require_model
from sglang.multimodal_gen.runtime.entrypoints.openai.lifecycle import Lifecycle
from sglang.multimodal_gen.runtime.entrypoints.openai.probe import Probe
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import (
    RETRY_AFTER_S,
    JsonResponse,
    error_headers,
    error_object,
    without_paths,
)
from sglang.multimodal_gen.runtime.managers.messages import EngineState, Status

_SCHEDULER_ANSWERS_S = 2.0
_REASONS = {
    "starting": "the engine is starting",
    "loading": "the model is being loaded",
    "recovering": "a worker was lost and is being replaced",
    "reloading": "the weights are being loaded",
    "asleep": "the administrator has released its memory",
    "stopping": "the server is shutting down",
    "draining": "the server is shutting down; requests that run are finished",
    "failed": "the engine has failed; the server's log says why",
}
# Names under which packages are known to pip; only those that are installed are told.
_PACKAGES = ("sglang-diffusion", "torch", "diffusers", "transformers", "fastapi", "starlette", "uvicorn", "pyzmq", "av")


class StateApi:
    """The routes about the server itself. None of them waits for a generation but the one that makes one."""

    def __init__(self, engine: Engine, settings: HttpSettings, lifecycle: Lifecycle) -> None:
        self._engine = engine
        self._settings = settings
        self._lifecycle = lifecycle
        self._probe = Probe(engine, timeout_s=settings.health_timeout_s)
        self._started = time.time()
        self._clock = time.monotonic()

    async def liveness(self, request: Request) -> Response:
        """The HTTP server answers."""
        return JsonResponse({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """The server takes requests and computes them; otherwise 503 with the reason."""
        state = self._engine.state
        name = "draining" if self._lifecycle.draining else state.state
        if name == "ready":
            return JsonResponse({"status": "ok", "state": "ready"})
        body: dict[str, Any] = {"status": "unavailable", "state": name, "reason": _reason(name, state)}
        headers = {"retry-after": str(RETRY_AFTER_S)}
        if name == "failed":
            body["error"] = error_object(load_failure(state))
            headers = {"x-should-retry": "false"}
        return JsonResponse(body, status_code=503, headers=headers)

    async def health_generate(self, request: Request) -> Response:
        """One small generation works, as far as the queue lets it; otherwise 503 with the error. Who asks while one
        runs gets its outcome."""
        try:
            finished = await self._probe.outcome(require_model(self._engine, self._settings, None))
        except ServingError as error:
            info = error.info()
            body = {"status": "unavailable", "state": self._engine.state.state, "error": error_object(info)}
            return JsonResponse(body, status_code=503, headers=error_headers(info))
        return JsonResponse({"status": "ok", "state": "ready", "inference_time_s": round(finished.generation_time, 3)})

    async def server_info(self, request: Request) -> Response:
        """The model, the limits, the queue and the memory; for administrators the options and the versions too."""
        info: dict[str, Any] = {
            "model_path": self._model_path(request),
            "served_model_name": self._settings.model_names[0],
            "tp_size": self._option("tp_size", 1),
            "dp_size": self._option("dp_size", 1),
            "state": "draining" if self._lifecycle.draining else self._engine.state.state,
            "started_at": int(self._started),
            "uptime_s": round(time.monotonic() - self._clock, 1),
            "model": self._model(),
            "limits": self._limits(),
            "queue": None,
            "memory": None,
            "workers": None,
        } | _running(await self._status())
        if caller_of(request).role == "admin":
            info |= {"options": self._settings.options, "versions": _versions(), "version": _version()}
        return JsonResponse(info)

    async def model_info(self, request: Request) -> Response:
        """What kind of model this is, for gateways in front of servers of several kinds."""
        model = self._engine.state.model
        tasks = [] if model is None else list(model.tasks)
        outputs = sorted({"video" if task.lower().endswith(("video", "2v")) else "image" for task in tasks})
        inputs = None if model is None else model.limits.inputs
        return JsonResponse(
            {
                "model_path": self._model_path(request),
                "is_generation": True,
                "model_type": "diffusion",
                "architectures": None if model is None else [model.pipeline_class],
                "has_image_understanding": inputs is not None and inputs.max_images > 0,
                "has_audio_understanding": False,
                "task_type": tasks[0] if tasks else None,
                "supported_task_types": tasks,
                "output_types": outputs,
                "is_image_gen": "image" in outputs,
            }
        )

    async def model_path(self, request: Request) -> Response:
        """The model's name alone."""
        return JsonResponse({"model_path": self._model_path(request)})

    def _model_path(self, request: Request) -> str:
        """Administrators may know where it lies; others get the name that it is served under."""
        path = self._option("model_path", None) if caller_of(request).role == "admin" else None
        return path or self._settings.model_names[0]

    def _option(self, name: str, otherwise: Any) -> Any:
        return self._settings.options.get(name, {}).get("value", otherwise)

    def _model(self) -> dict[str, Any] | None:
        model = self._engine.state.model
        if model is None:
            return None
        return {
            "names": list(self._settings.model_names),
            "pipeline_class": model.pipeline_class,
            "family": model.family,
            "tasks": list(model.tasks),
            "precision": model.precision,
            "device": model.device,
            "num_parameters": model.num_parameters,
            "weight_bytes": model.weight_bytes,
            "quantization": None if model.quantization is None else msgspec.to_builtins(model.quantization),
            "load_seconds": round(model.load_seconds, 3),
            "limits": msgspec.to_builtins(model.limits),
        }

    def _limits(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "max_queued_requests": settings.max_queued_requests,
            "max_body_bytes": settings.body.max_bytes,
            "max_upload_bytes": settings.body.max_upload_bytes,
            "max_json_upload_bytes": settings.body.max_json_upload_bytes,
            "max_header_bytes": settings.max_header_bytes,
            "header_timeout_s": settings.header_timeout_s,
            "body_timeout_s": settings.body.timeout_s,
            "max_connections_per_ip": settings.max_connections_per_ip,
            "max_images": settings.max_images,
            "max_videos": settings.jobs.capacity,
            "shutdown_grace_s": settings.shutdown_grace_s,
        }

    async def _status(self) -> Status | None:
        try:
            async with asyncio.timeout(_SCHEDULER_ANSWERS_S):
                return await self._engine.status()
        except (TimeoutError, ServingError):
            return None


def _reason(name: str, state: EngineState) -> str:
    """Why the server is not ready. What the scheduler says of the progress is added where it says any."""
    reason = _REASONS.get(name, "the engine is not ready")
    detail = without_paths(state.detail)
    return f"{reason} ({detail})" if detail and name in ("loading", "starting", "reloading") else reason


def _running(status: Status | None) -> dict[str, Any]:
    """What the scheduler says; nothing while there is none."""
    if status is None:
        return {}
    return {
        "queue": {"queued": status.num_queued, "running": status.num_running},
        "memory": {
            "budget_bytes": status.budget_bytes,
            "reserved_bytes": status.reserved_bytes,
            "allocated_bytes": status.allocated_bytes,
        },
        "workers": {
            "count": status.num_workers,
            "restarts": status.num_worker_restarts,
            "ticks": status.ticks,
            "mean_batch_size": round(status.mean_batch_size, 3),
        },
    }


def _version() -> str | None:
    return _versions().get(_PACKAGES[0])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
