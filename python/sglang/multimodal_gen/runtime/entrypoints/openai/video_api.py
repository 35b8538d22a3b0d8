"""/v1/videos: videos from a text, images or a video, as jobs that clients poll."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.configs.declare import Surface, arg, from_text, parameters
from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, SamplingParams
from sglang.multimodal_gen.errors import DuplicateParameter, IncompatibleParameters, InvalidValue
from sglang.multimodal_gen.errors_http import NotOffered, VideoFailed, VideoNotFound, VideoNotReady
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.admin import caller_of, surface_of
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings, require_model
from sglang.multimodal_gen.runtime.entrypoints.openai.event_stream import EventStream, event_frame
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import (
    VIDEO_CALL,
    VideoFields,
    private_texts,
    sampling_values,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.frame import keep_private, link_engine_requests
from sglang.multimodal_gen.runtime.entrypoints.openai.idempotency import IdempotentReplies, identity_of
from sglang.multimodal_gen.runtime.entrypoints.openai.inputs import InputReader, video_sources
from sglang.multimodal_gen.runtime.entrypoints.openai.patience import heartbeat_s
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse, error_object, to_json
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import Body, read_json_or_multipart
from sglang.multimodal_gen.runtime.entrypoints.openai.results import Results
from sglang.multimodal_gen.runtime.entrypoints.openai.video_jobs import VideoJobs
from sglang.multimodal_gen.runtime.entrypoints.request_builder import check_ahead, check_output, expand
from sglang.multimodal_gen.runtime.managers.job_store import KeptReply, VideoJob
from sglang.multimodal_gen.runtime.managers.messages import Preview

_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_POLL_AFTER_MS = 500
# A length is told in milliseconds: what was told is taken back, with a little more for the rounding of floats.
_TOLERANCE_S = 0.000501


@dataclass(frozen=True, kw_only=True)
class ListQuery:
    """How a list of videos is paged."""

    after: str | None = arg(None, help="Id of the last video of the page before.", group="paging", max_length=512)
    limit: int = arg(20, help="Videos a page.", group="paging", minimum=0, maximum=100)
    order: Literal["asc", "desc"] = arg("desc", help="By time of creation.", group="paging", choices=("asc", "desc"))


@dataclass(frozen=True, kw_only=True)
class ContentQuery:
    """Which form of a video is fetched."""

    variant: str = arg(
        "video",
        help="The video, a WebP image of its middle frame, or a JPEG image of up to 25 frames in a grid.",
        group="content",
        choices=("video", "thumbnail", "spritesheet"),
        code="invalid_variant",
    )


@dataclass(frozen=True, kw_only=True)
class EventsQuery:
    """What of a video's life is streamed."""

    previews: bool = arg(True, help="Also small pictures of what is being made.", group="events")


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoWish:
    """A video that a client asked for, whichever call it used. `sampling` are SamplingParams fields; `name` is what the
    client called the model."""

    sampling: Mapping[str, Any]
    inputs: DecodedInputs
    model: ModelInfo
    name: str | None = None
    safety_identifier: str | None = None
    remixed_from: str | None = None


class VideoApi:
    """The video routes."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.inputs = InputReader()
        self._replies = IdempotentReplies(lifetime_s=settings.idempotency_lifetime_s)
        self._results = Results(settings.object_store)
        self.jobs = VideoJobs(engine, settings.state, settings.jobs, self._results)

    async def start(self) -> None:
        """Go on with the jobs of the server before this one."""
        for reply in await self.jobs.start():
            self._replies.remember(reply)

    async def create(self, request: Request) -> Response:
        """Start a video from a text and what the model takes besides; poll it until its status is `completed` or
        `failed`."""
        call = VIDEO_CALL
        body = await read_json_or_multipart(request, self.settings.body, files=call.files, refuse_file=call.refuse_file)
        with contextlib.closing(body):
            return await self._create(request, body)

    async def _create(self, request: Request, body: Body) -> Response:
        keep_private(request, private_texts(body))
        wish, sampling = sampling_values(VIDEO_CALL.checked(body, surface=self.surface(request)), VideoFields)
        model = require_model(self.engine, self.settings, wish.model)
        sampling = with_length(sampling, wish.seconds, model)
        sources = video_sources(body)
        if sources:
            check_ahead(sampling, model=model, images=bool(sources.images), video=sources.video is not None)
        wanted = VideoWish(
            sampling=sampling,
            inputs=await self.inputs.read(sources, model, sampling),
            model=model,
            name=wish.model,
            safety_identifier=wish.safety_identifier,
        )
        return await self.start_job(request, body, wanted)

    def surface(self, request: Request) -> Surface:
        """Whose fields the request may use."""
        return surface_of(request, self.settings)

    async def start_job(self, request: Request, body: Body, wish: VideoWish) -> Response:
        """Start the job, once for each idempotency key, and tell of it."""
        params = _video_request(wish.sampling, wish.model, self.surface(request), wish.inputs)

        def reply_for(job: VideoJob) -> KeptReply | None:
            identity = identity_of(request, body)
            if identity is None:
                return None
            return KeptReply(key=identity[0], fingerprint=identity[1], reply=to_json(video_object(job)))

        async def start() -> bytes:
            job = await self.jobs.create(
                params,
                model=wish.name or self.settings.model_names[0],
                safety_identifier=wish.safety_identifier,
                inputs=wish.inputs,
                remixed_from=wish.remixed_from,
                owner=caller_of(request),
                reply_for=reply_for,
            )
            link_engine_requests(request, [job.id])
            return to_json(video_object(job))

        def holds(reply: bytes) -> bool:
            return self.jobs.holds(json.loads(reply)["id"])

        reply = await self._replies.once(request, body, start, holds=holds)
        return JsonResponse(reply, headers=_poll_headers(done=False))

    def completed(self, request: Request, video_id: str) -> VideoJob:
        """The job, whose result is there. Raises VideoNotFound, VideoFailed, VideoNotReady."""
        job = self.jobs.get(video_id, caller_of(request))
        if job.status == "failed":
            raise VideoFailed(f"video {video_id} has no content: its generation failed", param="video_id")
        if job.status != "completed":
            raise VideoNotReady(video_id, status=job.status, progress=job.progress)
        return job

    @contextlib.asynccontextmanager
    async def opened(self, job: VideoJob) -> AsyncIterator[BinaryIO]:
        """A completed job's video. Raises VideoNotFound when it is gone, StorageUnavailable."""
        try:
            async with self._results.opened(self.jobs.path(job)) as stream:
                yield stream
        except FileNotFoundError:
            raise VideoNotFound(job.id) from None

    async def retrieve(self, request: Request, video_id: str) -> Response:
        """A video's status and progress."""
        return _video_response(self.jobs.get(video_id, caller_of(request)))

    async def events(self, request: Request, video_id: str) -> Response:
        """A video's status and progress as server-sent events, from now to its end, and pictures on the way."""
        wanted = _query(request, EventsQuery).previews
        model = self.engine.state.model
        job = self.jobs.get(video_id, caller_of(request))
        frames = self._event_frames(job.id, previews=wanted and model is not None and model.gives_previews)
        return EventStream(request, frames, heartbeat_s=heartbeat_s(request.headers, self.settings.heartbeat_s))

    async def _event_frames(self, job_id: str, *, previews: bool) -> AsyncGenerator[bytes, None]:
        numbers = itertools.count()
        async with self.jobs.feeds.follow(job_id, previews=previews) as follower:
            async for change in follower:
                content = _preview_event(change) if isinstance(change, Preview) else _job_event(change)
                yield event_frame({**content, "sequence_number": next(numbers)})

    async def list(self, request: Request) -> Response:
        """Videos by time of creation, page by page."""
        query = _query(request, ListQuery)
        jobs, has_more = self.jobs.page(
            after=query.after, limit=query.limit, order=query.order, viewer=caller_of(request)
        )
        return JsonResponse(
            {
                "object": "list",
                "data": [video_object(job) for job in jobs],
                "first_id": jobs[0].id if jobs else None,
                "last_id": jobs[-1].id if jobs else None,
                "has_more": has_more,
            }
        )

    async def content(self, request: Request, video_id: str) -> Response:
        """The bytes of a completed video, or of one of the images made of it."""
        variant = _query(request, ContentQuery).variant
        job = self.completed(request, video_id)
        try:
            path, file_format = self._variant(job, variant)
            return await self._results.respond(request, path, file_format=file_format)
        except FileNotFoundError:
            raise VideoNotFound(video_id) from None

    def _variant(self, job: VideoJob, variant: str) -> tuple[Path, str]:
        """The file of a `ContentQuery.variant` and its format."""
        if variant == "thumbnail":
            return self.jobs.thumbnail(job), "webp"
        if variant == "spritesheet":
            return self.jobs.contact_sheet(job), "jpeg"
        return self.jobs.path(job), str(job.params.output_format)

    async def characters(self, request: Request) -> Response:
        """OpenAI's calls for characters."""
        raise NotOffered("path: characters are not offered; describe who is to be seen in the prompt")

    async def delete(self, request: Request, video_id: str) -> Response:
        """Delete a video and its bytes; one that runs is cancelled."""
        await self.jobs.delete(video_id, caller_of(request))
        return JsonResponse({"id": video_id, "object": "video.deleted", "deleted": True})


def with_length(sampling: Mapping[str, Any], seconds: str | int | float | None, model: ModelInfo) -> dict[str, Any]:
    """`sampling` with as many frames as `seconds` are, where they are given. Raises as `frames_for`."""
    if seconds is None:
        return dict(sampling)
    return {**sampling, "num_frames": frames_for(seconds, sampling, model)}


def frames_for(seconds: str | int | float, sampling: Mapping[str, Any], model: ModelInfo) -> int:
    """Frames of a video whose last frame shows `seconds` after its first: 5 s at 16 fps are 81 frames.

    Between two counts that the model can do it is the lower one; the reply tells the actual time, to the millisecond,
    and that gives the same count again.

    Raises:
        IncompatibleParameters: `num_frames` is given too.
        InvalidValue: not a positive number, or longer than the model can do.
    """
    if "num_frames" in sampling:
        raise IncompatibleParameters("seconds: says the same as num_frames, accepted is one of them", param="seconds")
    fps = sampling.get("fps") or model.defaults.fps or GENERAL_DEFAULTS.fps
    assert fps is not None, "the general defaults have a frame rate"
    stride, most = model.limits.frame_stride, model.limits.max_frames
    longest = (most - 1) // stride * stride / fps
    number = seconds if not isinstance(seconds, str) else float(seconds) if _SECONDS.fullmatch(seconds) else 0
    if not 0 < number <= longest + _TOLERANCE_S:
        raise InvalidValue(
            "seconds", seconds, f"a number above 0, up to {_plain(longest)} at {fps} fps", code="invalid_seconds"
        )
    return math.floor((number + _TOLERANCE_S) * fps / stride) * stride + 1


def _video_request(
    sampling: Mapping[str, Any], model: ModelInfo, surface: Surface, inputs: DecodedInputs
) -> SamplingParams:
    values = {"output_format": "mp4", **sampling}
    requests = expand(values, model=model, surface=surface, inputs=inputs)
    if len(requests) != 1:
        raise InvalidValue("seed", sampling.get("seed"), "one integer: a job makes one video", code="invalid_seed")
    saved = dataclasses.replace(requests[0], save_output=True)
    check_output(saved)
    return saved


def _query(request: Request, owner: type) -> Any:
    """The URL's query as an instance of `owner`. Raises for repeated and bad parameters."""
    known = parameters(owner)
    values: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name in values:
            raise DuplicateParameter(name)
        values[name] = from_text(known[name], text)
    return owner(**values)


def _video_response(job: VideoJob) -> Response:
    return JsonResponse(video_object(job), headers=_poll_headers(done=job.is_final))


def _job_event(job: Any) -> dict[str, Any]:
    return {"type": f"video.{job.status}", "video": video_object(job)}


def _preview_event(preview: Preview) -> dict[str, Any]:
    return {
        "type": "video.preview",
        "video_id": preview.request_id,
        "step": preview.step,
        "total_steps": preview.total_steps,
        "media_type": preview.media_type,
        "b64_json": base64.b64encode(preview.image).decode("ascii"),
    }


def _poll_headers(*, done: bool) -> dict[str, str]:
    """How soon OpenAI's client asks again."""
    return {} if done else {"openai-poll-after-ms": str(_POLL_AFTER_MS)}


def video_object(job: VideoJob) -> dict[str, Any]:
    """The job in OpenAI's form, with our own facts beside: frames, fps, seed, seconds, memory, notes."""
    params = job.params
    assert params.num_frames is not None and params.fps is not None, "the request is complete"
    found = {
        "id": job.id,
        "object": "video",
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "seconds": _plain((params.num_frames - 1) / params.fps),
        "size": f"{params.width}x{params.height}",
        "prompt": params.prompt,
        "remixed_from_video_id": job.remixed_from,
        "error": None if job.error is None else error_object(job.error),
        "num_frames": params.num_frames,
        "fps": params.fps,
        "seed": params.seed,
        "parameters": params.recorded(),
        "started_at": job.started_at,
        "queue_position": job.queue_position,
        "eta_seconds": _rounded(job.eta_s, 1),
        "generation_time": _rounded(job.generation_time, 3),
        "inference_time_s": _rounded(job.generation_time, 3),
        "queue_time_s": _rounded(job.queue_seconds, 3),
        "attempts": job.attempts,
        "peak_memory_mb": _rounded(job.peak_memory_mb, 1),
        "computed_steps": job.computed_steps,
        "notes": list(job.notes),
        "safety_identifier": job.safety_identifier,
    }
    return found if job.profile is None else found | {"profile": job.profile}


def _rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)


def _plain(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")
