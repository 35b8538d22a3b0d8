"""The HTTP server: application, routes, and running it on a listening socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from sglang.multimodal_gen.configs.declare import check_names
from sglang.multimodal_gen.errors import (
    NotReady,
    ServingError,
    StorageError,
    StorageUnavailable,
    UnknownParameter,
    shown,
)
from sglang.multimodal_gen.errors_http import (
    AdminRequired,
    ImageNotFound,
    MethodNotAllowed,
    ModelNotFound,
    RouteNotFound,
    VideoNotFound,
)
from sglang.multimodal_gen.runtime.entrypoints.lora_wishes import (
    MergeLoraFields,
    RemoveLoraFields,
    SetLoraFields,
    UnmergeLoraFields,
)
from sglang.multimodal_gen.runtime.entrypoints.metrics_api import MetricsApi
from sglang.multimodal_gen.runtime.entrypoints.openai import reply_schemas as schemas
from sglang.multimodal_gen.runtime.entrypoints.openai.connection import Connection
from sglang.multimodal_gen.runtime.entrypoints.openai.control_api import ControlApi, WeightsFields
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import (
    DERIVED_VIDEO_CALL,
    EDIT_CALL,
    IMAGE_CALL,
    REMIX_CALL,
    VIDEO_CALL,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.frame import RequestFrame
from sglang.multimodal_gen.runtime.entrypoints.openai.gate import ADMIN_PATHS, OPEN_PATHS, Gate, is_page
from sglang.multimodal_gen.runtime.entrypoints.openai.image_api import ImageApi
from sglang.multimodal_gen.runtime.entrypoints.openai.lifecycle import Lifecycle
from sglang.multimodal_gen.runtime.entrypoints.openai.lora_api import LoraApi
from sglang.multimodal_gen.runtime.entrypoints.openai.model_api import ModelApi
from sglang.multimodal_gen.runtime.entrypoints.openai.openapi import (
    ALWAYS,
    CALLING,
    CONTROLLING,
    EVENT_STREAM,
    READING,
    binary,
    plain_body,
    query,
    replies,
    request_body,
    tidied,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse, error_response
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import drop_body
from sglang.multimodal_gen.runtime.entrypoints.openai.state_api import StateApi
from sglang.multimodal_gen.runtime.entrypoints.openai.video_api import ContentQuery, EventsQuery, ListQuery, VideoApi
from sglang.multimodal_gen.runtime.entrypoints.openai.video_derivation import VideoDerivationApi
from sglang.multimodal_gen.runtime.entrypoints.studio_routes import StudioRoutes
from sglang.multimodal_gen.runtime.observability.metrics import HttpMetrics
from sglang.multimodal_gen.runtime.postprocess.formats import MEDIA_TYPES

logger = logging.getLogger(__name__)

# For those that are told that the time is over to have that answer, and for their connections to end.
_LAST_ANSWERS_S = 2.0
_JSON = "application/json"
_PROMETHEUS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
_MULTIPART = "multipart/form-data"
_IMAGES = ("image/png", "image/jpeg", "image/webp")
_VIDEO_VARIANTS = tuple(media for media in MEDIA_TYPES.values() if media != "image/png")


def create_app(engine: Engine, settings: HttpSettings) -> FastAPI:
    """The application. Its routes belong to the loop that `engine` runs in."""
    videos = VideoApi(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        _remove_orphans(settings.state.files)
        await videos.start()
        yield
        await videos.jobs.close()

    # No /docs: its page loads scripts from elsewhere.
    app = _Application(
        title="SGLang Diffusion",
        description="Images and videos from text, images and videos, in the form of OpenAI's API.",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=JsonResponse,
        responses=replies(*ALWAYS),
        lifespan=lifespan,
        dependencies=[Depends(_refuse_unknown_query)],
    )
    app.key_paths = None if settings.api_keys else ADMIN_PATHS
    app.state.draining = asyncio.Event()
    lifecycle = app.state.lifecycle = Lifecycle()
    lifecycle.on_drain.append(videos.jobs.drain)
    metrics = HttpMetrics()
    app.add_middleware(Gate, settings=settings, lifecycle=lifecycle)
    app.add_middleware(RequestFrame, metrics=metrics, lifecycle=lifecycle)
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_routing_error)
    _add_state_routes(app, StateApi(engine, settings, lifecycle))
    _add_control_routes(app, ControlApi(engine, settings))
    _add_lora_routes(app, LoraApi(engine, settings))
    app.get("/metrics", response_model=None, responses=_PROMETHEUS)(MetricsApi(engine, metrics).scrape)
    _add_model_routes(app, ModelApi(engine, settings))
    _add_image_routes(app, ImageApi(engine, settings))
    _add_video_routes(app, videos)
    StudioRoutes(enabled=settings.studio).add_to(app)
    return app


def _remove_orphans(files_dir: Path) -> None:
    """Images of an HTTP process before this one, which nobody can ask for any more."""
    for path in files_dir.glob("images/img_*"):
        path.unlink(missing_ok=True)


class _Application(FastAPI):
    """`key_paths` are those that need a key, None for all but the open ones."""

    key_paths: Collection[str] | None = None

    def openapi(self) -> dict[str, Any]:
        """The page that describes the routes."""
        if self.openapi_schema is None:
            self.openapi_schema = tidied(super().openapi(), open_paths=OPEN_PATHS, key_paths=self.key_paths)
        return self.openapi_schema


def _add_state_routes(app: FastAPI, state: StateApi) -> None:
    def unavailable(*errors: type[ServingError], schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
        content = {_JSON: {"schema": schemas.UNHEALTHY}}
        return replies(*errors, schema=schema) | {503: {"description": "Not ready, and why.", "content": content}}

    app.get("/liveness", response_model=None, responses=replies(schema=schemas.LIVENESS))(state.liveness)
    app.get("/health", response_model=None, responses=unavailable(schema=schemas.HEALTHY))(state.health)
    app.get("/health_generate", response_model=None, responses=unavailable(schema=schemas.GENERATES))(
        state.health_generate
    )
    app.get("/server_info", response_model=None, responses=replies(schema=schemas.SERVER_INFO))(state.server_info)
    app.get("/model_info", response_model=None, responses=replies(schema=schemas.MODEL_INFO))(state.model_info)
    app.get("/v1/model_info", response_model=None, responses=replies(schema=schemas.MODEL_PATH))(state.model_path)


def _add_control_routes(app: FastAPI, control: ControlApi) -> None:
    responses = replies(*CONTROLLING, schema=schemas.DONE)
    app.post("/flush_cache", response_model=None, responses=responses)(control.flush_cache)
    app.post("/release_memory_occupation", response_model=None, responses=responses)(control.release_memory)
    app.post("/resume_memory_occupation", response_model=None, responses=responses)(control.resume_memory)
    app.post(
        "/update_weights_from_disk",
        response_model=None,
        responses=responses,
        openapi_extra=plain_body(WeightsFields),
    )(control.update_weights)


def _add_lora_routes(app: FastAPI, loras: LoraApi) -> None:
    responses = replies(*CONTROLLING, schema=schemas.LORAS_DONE)
    for name, fields, call in (
        ("set_lora", SetLoraFields, loras.set),
        ("merge_lora_weights", MergeLoraFields, loras.merge),
        ("unmerge_lora_weights", UnmergeLoraFields, loras.unmerge),
        ("remove_lora", RemoveLoraFields, loras.remove),
    ):
        app.post(f"/v1/{name}", response_model=None, responses=responses, openapi_extra=plain_body(fields))(call)
    app.get("/v1/list_loras", response_model=None, responses=replies(AdminRequired, NotReady, schema=schemas.LORAS))(
        loras.list
    )


def _add_model_routes(app: FastAPI, models: ModelApi) -> None:
    for path in ("/v1/models", "/models"):
        app.get(path, response_model=None, responses=replies(schema=schemas.MODELS))(models.list)
    app.get(
        "/v1/models/{model_id:path}",  # hub ids hold a slash
        response_model=None,
        responses=replies(ModelNotFound, schema=schemas.MODEL),
    )(models.retrieve)


def _add_image_routes(app: FastAPI, images: ImageApi) -> None:
    """Variations have a route to say what to use instead."""
    responses = replies(*CALLING, schema=schemas.IMAGES)
    responses[200]["content"] |= EVENT_STREAM[200]["content"]
    app.post(
        "/v1/images/generations",
        response_model=None,
        openapi_extra=request_body(IMAGE_CALL, [_JSON]),
        responses=responses,
    )(images.generate)
    app.post(
        "/v1/images/edits",
        response_model=None,
        openapi_extra=request_body(EDIT_CALL, [_MULTIPART, _JSON]),
        responses=responses,
    )(images.edit)
    app.post("/v1/images/variations", response_model=None, include_in_schema=False)(images.vary)
    app.get(
        "/v1/images/{image_id}/content",
        response_model=None,
        name="image_content",
        responses=binary(_IMAGES, ImageNotFound),
    )(images.content)


def _add_video_routes(app: FastAPI, videos: VideoApi) -> None:
    app.post(
        "/v1/videos",
        response_model=None,
        openapi_extra=request_body(VIDEO_CALL, [_MULTIPART, _JSON]),
        responses=replies(*CALLING, schema=schemas.VIDEO),
    )(videos.create)
    app.get(
        "/v1/videos",
        response_model=None,
        openapi_extra=query(ListQuery),
        responses=replies(*READING, schema=schemas.VIDEOS),
    )(videos.list)
    app.get("/v1/videos/{video_id}", response_model=None, responses=replies(VideoNotFound, schema=schemas.VIDEO))(
        videos.retrieve
    )
    for method, path in (("POST", "/v1/videos/characters"), ("GET", "/v1/videos/characters/{character_id}")):
        app.api_route(path, methods=[method], response_model=None, include_in_schema=False)(videos.characters)
    derived = VideoDerivationApi(videos)
    for name, call in (("edits", derived.edit), ("extensions", derived.extend)):
        app.post(
            f"/v1/videos/{name}",
            response_model=None,
            openapi_extra=request_body(DERIVED_VIDEO_CALL, [_MULTIPART, _JSON]),
            responses=replies(*CALLING, VideoNotFound, schema=schemas.VIDEO),
        )(call)
    app.post(
        "/v1/videos/{video_id}/remix",
        response_model=None,
        openapi_extra=request_body(REMIX_CALL, [_JSON]),
        responses=replies(*CALLING, VideoNotFound, schema=schemas.VIDEO),
    )(derived.remix)
    app.delete(
        "/v1/videos/{video_id}",
        response_model=None,
        responses=replies(VideoNotFound, StorageError, StorageUnavailable, schema=schemas.VIDEO_DELETED),
    )(videos.delete)
    app.get(
        "/v1/videos/{video_id}/events",
        response_model=None,
        openapi_extra=query(EventsQuery),
        responses=replies(VideoNotFound) | EVENT_STREAM,
    )(videos.events)
    app.get(
        "/v1/videos/{video_id}/content",
        response_model=None,
        openapi_extra=query(ContentQuery),
        responses=binary(_VIDEO_VARIANTS, *READING, VideoNotFound, StorageUnavailable),
    )(videos.content)


async def _refuse_unknown_query(request: Request) -> None:
    """Raises UnknownParameter for what the route's page does not name. Probes and the page for browsers have none, and
    caches and load balancers like to add some."""
    if not request.query_params or request.url.path in OPEN_PATHS or is_page(request.url.path):
        return
    described = (getattr(request.scope["route"], "openapi_extra", None) or {}).get("parameters", ())
    known = [each["name"] for each in described if each["in"] == "query"]
    try:
        check_names(request.query_params, known, what="query parameter")
    except UnknownParameter:
        await drop_body(request)
        raise


def _methods_of(request: Request) -> str:
    """All that the path has, in whichever of its routes."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in getattr(route, "methods", None) or ()}))


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def _on_routing_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods. An id that is no single path segment is an unknown id."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == MethodNotAllowed.http_status:
        allowed = _methods_of(request)
        message = f"method: got {shown(request.method)}, accepted for {shown(path)} is {allowed}"
        return error_response(MethodNotAllowed(message), {"allow": allowed})
    if path.startswith("/v1/videos/") and (request.method in ("GET", "DELETE") or path.endswith("/remix")):
        video_id = path.removeprefix("/v1/videos/")
        for route in ("/content", "/events", "/remix"):
            video_id = video_id.removesuffix(route)
        return error_response(VideoNotFound(video_id))
    return error_response(RouteNotFound(f"path: {shown(path)} does not exist; GET /openapi.json lists what does"))


class _Server(uvicorn.Server):
    """Signals are the process's business: uvicorn would raise them again when it has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers alone."""
        yield


async def serve(app: FastAPI, sock: socket.socket, *, stop: asyncio.Event, settings: HttpSettings) -> None:
    """Serve on a bound socket until `stop` is set. Then nothing new is taken, and requests that run get the grace time;
    those that are not done by then are answered that the server stops.

    Writes `Listening on http://HOST:PORT` to the log.
    """
    server = _Server(_configuration(app, settings))
    host, port = sock.getsockname()[:2]
    running = asyncio.create_task(server.serve(sockets=[sock]))
    logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    lifecycle: Lifecycle = app.state.lifecycle
    await lifecycle.drain(settings.shutdown_grace_s)
    app.state.draining.set()
    await lifecycle.settle(_LAST_ANSWERS_S)
    server.should_exit = True
    await running


def _configuration(app: FastAPI, settings: HttpSettings) -> uvicorn.Config:
    protocol = type(
        "Connection",
        (Connection,),
        {
            "header_timeout_s": settings.header_timeout_s,
            "max_per_address": settings.max_connections_per_ip,
            "num_by_address": Counter(),
        },
    )
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.header_timeout_s)),
        timeout_graceful_shutdown=round(_LAST_ANSWERS_S),
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
