"""/health_generate: whether the engine really generates."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors_http import ProbeTimedOut
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import NO_INPUTS, Clip, DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine
from sglang.multimodal_gen.runtime.entrypoints.request_builder import expand
from sglang.multimodal_gen.runtime.managers.messages import Finished
from sglang.multimodal_gen.runtime.managers.warm_up import input_shapes

_PROMPT = "a health check"
# Far below this, models meet shapes that no request of a user has, such as an attention over one token.
_LEAST_SIDE = 64


class Probe:
    """One generation at a time, whoever asks: those who come while it runs get its outcome."""

    def __init__(self, engine: Engine, *, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._running: asyncio.Task[Finished] | None = None

    async def outcome(self, model: ModelInfo) -> Finished:
        """What came of a generation of the smallest size in one step.

        Raises:
            ServingError: it failed, or was not done in time.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._generate(model))
            self._running.add_done_callback(_look_at)
        return await asyncio.shield(self._running)

    async def _generate(self, model: ModelInfo) -> Finished:
        params, inputs = _smallest(model)
        request_id = f"health_{secrets.token_hex(16)}"
        try:
            async with asyncio.timeout(self._timeout_s), self._engine.stored(inputs) as media:
                handle = await self._engine.submit(params, request_id=request_id, inputs=media)
                return await handle.result()
        except TimeoutError:
            await self._engine.cancel(request_id)
            raise ProbeTimedOut(
                f"no image of the smallest size was done within {self._timeout_s:g} s; the queue may be long"
            ) from None


def _look_at(task: asyncio.Task[Finished]) -> None:
    """Whoever asked may have gone; asyncio logs errors that nobody has looked at."""
    if not task.cancelled():
        task.exception()


def _smallest(model: ModelInfo) -> tuple[SamplingParams, DecodedInputs]:
    """A request that is cheap and takes every stage, with black inputs where the model wants some."""
    limits = model.limits
    side = -(-_LEAST_SIDE // limits.size_multiple) * limits.size_multiple
    if side * side > limits.max_pixels:
        side = limits.size_multiple
    size = SamplingParams(width=side, height=side, num_frames=1)
    inputs = _black_inputs(model, size)
    values = {"prompt": _PROMPT, "width": side, "height": side, "num_frames": 1, "num_inference_steps": 1, "seed": 0}
    if limits.area_rule is not None:
        values["max_area"] = side * side
    (params,) = expand(values, model=model, surface="python", inputs=inputs)
    plain = dataclasses.replace(
        params,
        output_type="pixels",
        save_output=False,
        return_frames=False,
        return_latents=False,
        return_encoded=False,
    )
    return plain, inputs


def _black_inputs(model: ModelInfo, size: SamplingParams) -> DecodedInputs:
    shapes = input_shapes(model.limits.inputs, size)
    if not (shapes.images or shapes.last_image or shapes.video):
        return NO_INPUTS
    import numpy as np  # late: a model that needs inputs is rare, and the server starts without this

    def black(shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, np.uint8)

    return DecodedInputs(
        images=tuple(black(shape) for shape in shapes.images),
        last_image=None if shapes.last_image is None else black(shapes.last_image),
        video=None if shapes.video is None else Clip(frames=black(shapes.video)),
    )
