"""The HTTP server: application, routes, and running it on a listening socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.errors import MethodNotAllowed, RouteNotFound, ServingError, VideoNotFound, shown
from sglang.multimodal_gen.runtime.entrypoints.metrics_api import MetricsApi
from sglang.multimodal_gen.runtime.entrypoints.openai.connection import Connection
from sglang.multimodal_gen.runtime.entrypoints.openai.content import MEDIA_TYPES
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings, load_failure
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import EDIT_CALL, IMAGE_CALL, VIDEO_CALL
from sglang.multimodal_gen.runtime.entrypoints.openai.frame import RequestFrame
from sglang.multimodal_gen.runtime.entrypoints.openai.image_api import ImageApi
from sglang.multimodal_gen.runtime.entrypoints.openai.model_api import ModelApi
from sglang.multimodal_gen.runtime.entrypoints.openai.openapi import (
    ERROR_RESPONSES,
    EVENT_STREAM,
    binary,
    query,
    request_body,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import (
    RETRY_AFTER_S,
    JsonResponse,
    error_object,
    error_response,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.video_api import ContentQuery, EventsQuery, ListQuery, VideoApi
from sglang.multimodal_gen.runtime.observability.metrics import HttpMetrics

logger = logging.getLogger(__name__)

_DRAIN_SHARE = 0.6
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
        _remove_orphans(settings.files_dir)
        yield
        await videos.jobs.close()

    # No /docs: its page loads scripts from elsewhere. No CORS: any web page could use a server on localhost.
    app = FastAPI(
        title="SGLang Diffusion",
        description="Images and videos from text, images and videos, in the form of OpenAI's API.",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=JsonResponse,
        responses=ERROR_RESPONSES,
        lifespan=lifespan,
    )
    app.state.draining = asyncio.Event()
    metrics = HttpMetrics()
    app.add_middleware(RequestFrame, metrics=metrics)
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_routing_error)
    _add_state_routes(app, engine)
    app.get("/metrics", response_model=None, responses=_PROMETHEUS)(MetricsApi(engine, metrics).scrape)
    _add_model_routes(app, ModelApi(engine, settings))
    _add_image_routes(app, ImageApi(engine, settings))
    _add_video_routes(app, videos)
    return app


def _remove_orphans(files_dir: Path) -> None:
    """Results of an HTTP process before this one, which nobody can ask for any more: jobs live in memory."""
    for path in (*files_dir.glob("images/img_*"), *files_dir.glob("videos/*video_*")):
        path.unlink(missing_ok=True)


def _add_state_routes(app: FastAPI, engine: Engine) -> None:
    @app.get("/liveness", response_model=None)
    async def liveness() -> Response:
        """The HTTP server answers."""
        return JsonResponse({"status": "ok"})

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """The engine can take requests; until then 503 and its state."""
        state = engine.state
        if state.state == "ready":
            return JsonResponse({"status": "ok", "state": "ready"})
        body: dict[str, Any] = {"status": "unavailable", "state": state.state}
        headers = {"retry-after": str(RETRY_AFTER_S)}
        if state.state == "failed":
            body["error"] = error_object(load_failure(state))
            headers = {"x-should-retry": "false"}
        return JsonResponse(body, status_code=503, headers=headers)


def _add_model_routes(app: FastAPI, models: ModelApi) -> None:
    app.get("/v1/models", response_model=None)(models.list)
    app.get("/v1/models/{model_id:path}", response_model=None)(models.retrieve)  # hub ids hold a slash


def _add_image_routes(app: FastAPI, images: ImageApi) -> None:
    app.post("/v1/images/generations", response_model=None, openapi_extra=request_body(IMAGE_CALL, [_JSON]))(
        images.generate
    )
    app.post("/v1/images/edits", response_model=None, openapi_extra=request_body(EDIT_CALL, [_MULTIPART, _JSON]))(
        images.edit
    )
    app.post("/v1/images/variations", response_model=None, include_in_schema=False)(images.vary)
    app.get("/v1/images/{image_id}/content", response_model=None, name="image_content", responses=binary(_IMAGES))(
        images.content
    )


def _add_video_routes(app: FastAPI, videos: VideoApi) -> None:
    app.post("/v1/videos", response_model=None, openapi_extra=request_body(VIDEO_CALL, [_MULTIPART, _JSON]))(
        videos.create
    )
    app.get("/v1/videos", response_model=None, openapi_extra=query(ListQuery))(videos.list)
    app.get("/v1/videos/{video_id}", response_model=None)(videos.retrieve)
    app.get(
        "/v1/videos/{video_id}/events", response_model=None, openapi_extra=query(EventsQuery), responses=EVENT_STREAM
    )(videos.events)
    app.delete("/v1/videos/{video_id}", response_model=None)(videos.delete)
    app.get(
        "/v1/videos/{video_id}/content",
        response_model=None,
        openapi_extra=query(ContentQuery),
        responses=binary(_VIDEO_VARIANTS),
    )(videos.content)


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def _on_routing_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods. An id that is no single path segment is an unknown id."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == MethodNotAllowed.http_status:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"method: got {shown(request.method)}, accepted for {shown(path)} is {allowed}"
        return error_response(MethodNotAllowed(message), {"allow": allowed})
    if path.startswith("/v1/videos/") and request.method in ("GET", "DELETE"):
        return error_response(
            VideoNotFound(path.removeprefix("/v1/videos/").removesuffix("/content").removesuffix("/events"))
        )
    return error_response(RouteNotFound(f"path: {shown(path)} does not exist; GET /openapi.json lists what does"))


class _Server(uvicorn.Server):
    """Signals are the process's business: uvicorn would raise them again when it has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers alone."""
        yield


async def serve(app: FastAPI, sock: socket.socket, *, stop: asyncio.Event, settings: HttpSettings) -> None:
    """Serve on a bound socket until `stop` is set; then no new connections, and running requests get most of the grace
    time before they are answered that the server stops.

    Writes `Listening on http://HOST:PORT` to the log.
    """
    protocol = type("Connection", (Connection,), {"header_timeout_s": settings.header_timeout_s})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.header_timeout_s)),
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
    )
    server = _Server(config)
    host, port = sock.getsockname()[:2]
    running = asyncio.create_task(server.serve(sockets=[sock]))
    logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.should_exit = True
    await asyncio.wait({running}, timeout=settings.shutdown_grace_s * _DRAIN_SHARE)
    app.state.draining.set()
    await running
