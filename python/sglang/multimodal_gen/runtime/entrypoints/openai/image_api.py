"""/v1/images: images from a text, or from images and a text, answered when they are there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.configs.declare import Surface
from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import IncompatibleParameters, InvalidValue, MissingParameter
from sglang.multimodal_gen.errors_http import ImageNotFound, NotOffered
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.admin import surface_of
from sglang.multimodal_gen.runtime.entrypoints.openai.content import content_response
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, HttpSettings, require_model
from sglang.multimodal_gen.runtime.entrypoints.openai.event_stream import EventStream
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import (
    EDIT_CALL,
    IMAGE_CALL,
    CallFields,
    EditFields,
    ImageFields,
    StillFields,
    private_texts,
    sampling_values,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.frame import (
    http_request_id,
    keep_private,
    link_engine_requests,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.generation import (
    EncodedResult,
    generate_all,
    unless_disconnected,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.idempotency import IdempotentReplies
from sglang.multimodal_gen.runtime.entrypoints.openai.image_events import ImageEvents
from sglang.multimodal_gen.runtime.entrypoints.openai.image_store import ImageStore
from sglang.multimodal_gen.runtime.entrypoints.openai.inputs import InputReader, edit_sources
from sglang.multimodal_gen.runtime.entrypoints.openai.patience import client_deadline_s, heartbeat_s
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse, to_json
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import Body, read_json, read_json_or_multipart
from sglang.multimodal_gen.runtime.entrypoints.openai.results import Results
from sglang.multimodal_gen.runtime.entrypoints.openai.uploads import of_field
from sglang.multimodal_gen.runtime.entrypoints.request_builder import check_ahead, expand


class ImageApi:
    """The image routes."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._inputs = InputReader()
        self._replies = IdempotentReplies(lifetime_s=settings.idempotency_lifetime_s)
        self._results = Results(settings.object_store)
        self._store = ImageStore(
            settings.state.files / "images",
            capacity=settings.max_images,
            max_bytes=settings.jobs.max_output_bytes,
            lifetime_s=settings.image_lifetime_s,
        )

    async def generate(self, request: Request) -> Response:
        """Generate images from a text."""
        body = await read_json(request, self._settings.body)
        return await self._answer(request, body, IMAGE_CALL, ImageFields)

    async def edit(self, request: Request) -> Response:
        """Generate images from images and a text; a mask says where the first image is made anew."""
        call = EDIT_CALL
        body = await read_json_or_multipart(
            request, self._settings.body, files=call.files, refuse_file=call.refuse_file
        )
        with contextlib.closing(body):
            return await self._answer(request, body, call, EditFields)

    async def vary(self, request: Request) -> Response:
        """OpenAI's call for variations."""
        raise NotOffered("path: variations are not offered; use POST /v1/images/edits with a prompt and a strength")

    async def _answer(self, request: Request, body: Body, call: CallFields, own: type[StillFields]) -> Response:
        keep_private(request, private_texts(body))
        surface = surface_of(request, self._settings)
        wish, sampling = sampling_values(call.checked(body, surface=surface), own)
        _check_combinations(wish, sampling)
        if call is EDIT_CALL and not of_field(body.files, "image"):
            raise MissingParameter("image: not given, accepted is at least one image", param="image")
        if not wish.stream and "deadline_s" not in sampling:
            sampling["deadline_s"] = client_deadline_s(request.headers)
        model = require_model(self._engine, self._settings, wish.model)
        model.check_previews(wish.partial_images, param="partial_images")
        sources = edit_sources(body)
        if sources:
            check_ahead({**sampling, "num_frames": 1}, model=model, images=bool(sources.images))
        inputs = await self._inputs.read(sources, model, sampling)
        requests = _image_requests(sampling, model, surface, inputs, num_previews=wish.partial_images)
        if wish.response_format == "url" and self._results.are_uploaded:
            requests = [_uploaded(params, self._settings.state.files / "images") for params in requests]
        by_id = {f"{http_request_id(request)}-{secrets.token_hex(4)}": params for params in requests}
        if wish.stream:
            events = ImageEvents("image_edit" if call is EDIT_CALL else "image_generation", requests[0])
            return self._stream(request, body, wish=wish, events=events, by_id=by_id, inputs=inputs)

        async def run() -> bytes:
            link_engine_requests(request, by_id)
            try:
                results = await generate_all(self._engine, by_id, inputs)
            except BaseException:  # one failed or the client went: of the others, those that were uploaded go
                self._results.discard([path for params in requests if (path := _saved_path(params))])
                raise
            return to_json(await self._images_response(request, wish, requests, results))

        return JsonResponse(await unless_disconnected(request, self._replies.once(request, body, run)))

    def _stream(
        self,
        request: Request,
        body: Body,
        *,
        wish: StillFields,
        events: ImageEvents,
        by_id: Mapping[str, SamplingParams],
        inputs: DecodedInputs,
    ) -> Response:
        """The one image of `by_id` as events. Whoever sends the same call again gets the last of them."""
        [params] = by_id.values()

        async def run() -> bytes:
            link_engine_requests(request, by_id)
            [result] = await generate_all(self._engine, by_id, inputs, on_event=events.heard)
            image = await self._image(request, wish, params, result)
            facts = {name: value for name, value in image.items() if name not in ("url", "revised_prompt")}
            return events.completed(facts | {"safety_identifier": wish.safety_identifier} | _measured([result]))

        frames = events.frames(lambda: self._replies.once(request, body, run))
        return EventStream(request, frames, heartbeat_s=heartbeat_s(request.headers, self._settings.heartbeat_s))

    async def content(self, request: Request, image_id: str) -> Response:
        """The bytes of an image that was answered with a URL."""
        image = self._store.get(image_id)
        try:
            return content_response(request, image.path, file_format=image.file_format)
        except FileNotFoundError:
            raise ImageNotFound(image_id) from None

    async def _images_response(
        self, request: Request, wish: StillFields, requests: list[SamplingParams], results: list[EncodedResult]
    ) -> dict[str, Any]:
        first = results[0].finished
        return {
            "created": int(time.time()),
            "data": [
                await self._image(request, wish, params, result)
                for params, result in zip(requests, results, strict=True)
            ],
            "background": "opaque",
            "output_format": requests[0].output_format,
            "quality": None,
            "size": f"{first.width}x{first.height}",
            "safety_identifier": wish.safety_identifier,
            "usage": None,
        } | _measured(results)

    async def _image(
        self, request: Request, wish: StillFields, params: SamplingParams, result: EncodedResult
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "b64_json": None,
            "url": None,
            "revised_prompt": None,
            "seed": result.finished.seed,
            "generation_time": round(result.finished.generation_time, 3),
            "computed_steps": result.finished.computed_steps,
            "notes": list(result.finished.notes),
        }
        if result.finished.profile_path is not None:
            found["profile"] = Path(result.finished.profile_path).name
        if result.data is None:
            found["url"] = result.finished.stored["output"].url
        elif wish.response_format == "b64_json":
            found["b64_json"] = (await asyncio.to_thread(base64.b64encode, result.data)).decode("ascii")
        else:
            assert params.output_format is not None, "set for every image request"
            image_id = await self._store.put(result.data, file_format=params.output_format)
            found["url"] = str(request.url_for("image_content", image_id=image_id))
        return found


def _measured(results: list[EncodedResult]) -> dict[str, Any]:
    """What the slowest took, and the most memory."""
    return {
        "queue_time_s": round(max(result.finished.queue_seconds for result in results), 3),
        "inference_time_s": round(max(result.finished.generation_time for result in results), 3),
        "peak_memory_mb": round(max(result.finished.peak_memory_bytes for result in results) / 2**20, 1),
    }


def _check_combinations(wish: StillFields, sampling: Mapping[str, Any]) -> None:
    if wish.partial_images and not wish.stream:
        raise IncompatibleParameters(
            "partial_images: come before the result, accepted is partial_images with stream", param="partial_images"
        )
    if wish.stream:
        _check_stream(wish, sampling)
    if sampling.get("output_compression") is not None and sampling.get("output_format", "png") == "png":
        raise IncompatibleParameters(
            "output_compression: PNG is lossless, accepted is output_compression with output_format jpeg or webp",
            param="output_compression",
        )
    most = IMAGE_CALL.accepted["n"].declaration.maximum
    seed = sampling.get("seed")
    if isinstance(seed, tuple) and most is not None and len(seed) > most:
        raise InvalidValue("seed", f"{len(seed)} seeds", f"at most {int(most)}", code="invalid_seed")


def _check_stream(wish: StillFields, sampling: Mapping[str, Any]) -> None:
    """An event says neither of which image it is nor where it lies."""
    seed = sampling.get("seed")
    count = max(sampling.get("num_outputs_per_prompt", 1), len(seed) if isinstance(seed, tuple) else 1)
    if count > 1:
        raise IncompatibleParameters(f"n: got {count} images, accepted is one with stream", param="n")
    if wish.response_format == "url":
        raise IncompatibleParameters(
            "response_format: events hold the image itself, accepted is b64_json with stream", param="response_format"
        )


def _image_requests(
    sampling: Mapping[str, Any], model: ModelInfo, surface: Surface, inputs: DecodedInputs, *, num_previews: int
) -> list[SamplingParams]:
    """One complete request per image, which comes back encoded instead of being saved."""
    return [
        dataclasses.replace(
            params,
            output_format=params.output_format if "output_format" in sampling else "png",
            return_encoded=True,
            save_output=False,
            num_previews=num_previews,
        )
        for params in expand({**sampling, "num_frames": 1}, model=model, surface=surface, inputs=inputs)
    ]


def _uploaded(params: SamplingParams, directory: Path) -> SamplingParams:
    """The same request with its result in the object store instead of in the reply; the name is 128 random bits."""
    return dataclasses.replace(
        params,
        return_encoded=False,
        save_output=True,
        output_path=str(directory),
        output_file_name=f"img_{secrets.token_hex(16)}.{params.output_format}",
    )


def _saved_path(params: SamplingParams) -> Path | None:
    if params.output_path is None or params.output_file_name is None:
        return None
    return Path(params.output_path, params.output_file_name)
