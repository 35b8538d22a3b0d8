"""Videos from videos: remixes, edits and extensions, as far as the model can make them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.configs.declare import parameters
from sglang.multimodal_gen.configs.model_info import InputNames, ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import IncompatibleParameters, MissingParameter, UnsupportedParameter
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import DecodedInputs, MediaSources
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import require_model
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import (
    DERIVED_VIDEO_CALL,
    REMIX_CALL,
    CallFields,
    DerivedVideoFields,
    VideoFields,
    private_texts,
    sampling_values,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.frame import keep_private
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import Body, read_json, read_json_or_multipart
from sglang.multimodal_gen.runtime.entrypoints.openai.uploads import of_field
from sglang.multimodal_gen.runtime.entrypoints.openai.video_api import VideoApi, VideoWish, with_length
from sglang.multimodal_gen.runtime.entrypoints.request_builder import check_ahead
from sglang.multimodal_gen.runtime.managers.job_store import VideoJob

_NAMES = InputNames(images="video", video="video")
# How much of the source a remix or an edit makes anew when nobody says.
_STRENGTH = 0.7
# Of the source's parameters, what its remix does not take over: how its files are called and what is drawn anew.
_NOT_TAKEN_OVER = frozenset({"prompt", "seed", "strength"})


class VideoDerivationApi:
    """The routes that make a video from a video."""

    def __init__(self, videos: VideoApi) -> None:
        self._videos = videos

    async def remix(self, request: Request, video_id: str) -> Response:
        """Make a completed video anew from another prompt: its parameters, and as much of its pictures as `strength`
        leaves."""
        body = await read_json(request, self._videos.settings.body)
        with contextlib.closing(body):
            keep_private(request, private_texts(body))
            source = self._videos.completed(request, video_id)
            wish, given = self._wish(request, body, REMIX_CALL, VideoFields)
            model = require_model(self._videos.engine, self._videos.settings, wish.model)
            sampling = _taken_over(source, wish) | given
            return await self._derive(request, body, wish, sampling, model, source=source, remixed_from=video_id)

    async def edit(self, request: Request) -> Response:
        """Change a video, uploaded or made here, as the prompt says; `strength` says how much."""
        return await self._from_source(request, extend=False)

    async def extend(self, request: Request) -> Response:
        """A video that goes on from the last frame of another, for models that start from an image."""
        return await self._from_source(request, extend=True)

    async def _from_source(self, request: Request, *, extend: bool) -> Response:
        call = DERIVED_VIDEO_CALL
        body = await read_json_or_multipart(
            request, self._videos.settings.body, files=call.files, refuse_file=call.refuse_file
        )
        with contextlib.closing(body):
            keep_private(request, private_texts(body))
            wish, given = self._wish(request, body, call, DerivedVideoFields)
            model = require_model(self._videos.engine, self._videos.settings, wish.model)
            source = self._source(request, wish, body)
            sampling = given if source is None or extend else _taken_over(source, wish) | given
            return await self._derive(request, body, wish, sampling, model, source=source, extend=extend)

    def _wish(
        self, request: Request, body: Body, call: CallFields, own: type[VideoFields]
    ) -> tuple[Any, dict[str, Any]]:
        return sampling_values(call.checked(body, surface=self._videos.surface(request)), own)

    def _source(self, request: Request, wish: DerivedVideoFields, body: Body) -> VideoJob | None:
        """The job whose result is meant; None for an upload. Raises for neither and both."""
        uploaded = bool(of_field(body.files, "video"))
        if wish.video_id is None and not uploaded:
            raise MissingParameter("video: not given, accepted is a file or video[id]", param="video")
        if wish.video_id is not None and uploaded:
            raise IncompatibleParameters("video: got a file and an id, accepted is one of them", param="video")
        return None if wish.video_id is None else self._videos.completed(request, wish.video_id)

    async def _derive(
        self,
        request: Request,
        body: Body,
        wish: Any,
        sampling: Mapping[str, Any],
        model: ModelInfo,
        *,
        source: VideoJob | None,
        extend: bool = False,
        remixed_from: str | None = None,
    ) -> Response:
        limits = model.limits.inputs
        if extend and ("I2V" not in model.tasks or limits.requires_last_image):
            raise UnsupportedParameter("video", "the model does not go on from an image, so that it extends no video")
        if not extend and not limits.takes_video:
            raise UnsupportedParameter("video", f"the model works from {limits.in_words()}")
        values = with_length(sampling, wish.seconds, model)
        if not extend and limits.takes_strength:
            values.setdefault("strength", _STRENGTH)
        check_ahead(values, model=model, images=extend, video=not extend)
        async with self._opened(source, body) as file:
            found = await self._videos.inputs.read(
                MediaSources(video=file, names=_NAMES), _reading_videos(model), values
            )
        inputs = _last_frame(found) if extend else found
        derived = VideoWish(
            sampling=values,
            inputs=inputs,
            model=model,
            name=wish.model,
            safety_identifier=wish.safety_identifier,
            remixed_from=remixed_from,
        )
        return await self._videos.start_job(request, body, derived)

    def _opened(self, source: VideoJob | None, body: Body) -> AbstractAsyncContextManager[Any]:
        if source is None:
            return contextlib.nullcontext(of_field(body.files, "video")[0])
        return self._videos.opened(source)


def _reading_videos(model: ModelInfo) -> ModelInfo:
    """The model as one that takes a video, whether it does or gets one frame of it."""
    inputs = msgspec.structs.replace(model.limits.inputs, takes_video=True, min_images=0)
    return msgspec.structs.replace(model, limits=msgspec.structs.replace(model.limits, inputs=inputs))


def _last_frame(inputs: DecodedInputs) -> DecodedInputs:
    assert inputs.video is not None, "read from one"
    return dataclasses.replace(inputs, images=(inputs.video.frames[-1],), video=None)


def _taken_over(source: VideoJob, wish: VideoFields) -> dict[str, Any]:
    """What a client could have said to get the source; its length only if the wish names no other."""
    found = {}
    for name, parameter in parameters(SamplingParams).items():
        value = getattr(source.params, name)
        if "http" in parameter.declaration.exposed and name not in _NOT_TAKEN_OVER and value != parameter.default:
            found[name] = value
    if wish.seconds is not None:
        found.pop("num_frames", None)
    return found
