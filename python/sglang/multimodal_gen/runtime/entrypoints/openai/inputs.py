"""From uploaded files to decoded inputs, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from sglang.multimodal_gen.configs.model_info import InputNames, ModelInfo
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import NO_INPUTS, DecodedInputs, MediaSources
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import Body
from sglang.multimodal_gen.runtime.entrypoints.openai.uploads import of_field

_EDIT_NAMES = InputNames(images="image", mask="mask", last_image="last_image", video="video")
_VIDEO_NAMES = InputNames(images="input_reference", mask="mask", last_image="last_image", video="video")
# Each holds up to a gigabyte while it decodes.
_DECODED_AT_ONCE = 2


def edit_sources(body: Body) -> MediaSources:
    """The files of an image call."""
    return MediaSources(
        images=tuple(of_field(body.files, "image")),
        mask=next(iter(of_field(body.files, "mask")), None),
        names=_EDIT_NAMES,
        mask_is_transparency=True,
    )


def video_sources(body: Body) -> MediaSources:
    """The files of a video call."""
    return MediaSources(
        images=tuple(of_field(body.files, "input_reference")),
        last_image=next(iter(of_field(body.files, "last_image")), None),
        video=next(iter(of_field(body.files, "video")), None),
        names=_VIDEO_NAMES,
    )


class InputReader:
    """Decodes what requests bring along, a few requests at a time."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_DECODED_AT_ONCE)

    async def read(self, sources: MediaSources, model: ModelInfo, sampling: Mapping[str, Any]) -> DecodedInputs:
        """What the model takes of it, decoded. Raises InvalidRequest, before decoding if it can be seen before."""
        sources.check(model.limits.inputs, strength=sampling.get("strength") is not None)
        if not sources:
            return NO_INPUTS
        # Late: the decoders take long to load, and most requests have no inputs.
        from sglang.multimodal_gen.runtime.entrypoints.media_reading import read_sources

        async with self._slots:
            return await asyncio.to_thread(read_sources, sources)
