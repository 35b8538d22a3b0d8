"""From what a client said to complete requests: defaults merged, seeds drawn, limits checked at the door."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sglang.multimodal_gen.configs.declare import Surface, check_names, parameters
from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.cache_params import check_caches
from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, MAX_SEED, SamplingParams
from sglang.multimodal_gen.errors import (
    IncompatibleParameters,
    InvalidType,
    InvalidValue,
    MissingParameter,
    SizeTooLarge,
)
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import NO_INPUTS, DecodedInputs
from sglang.multimodal_gen.runtime.postprocess.formats import choose_format

_MAX_SIDE = int(parameters(SamplingParams)["width"].declaration.maximum or 0)


def expand(
    values: Mapping[str, Any], *, model: ModelInfo, surface: Surface, inputs: DecodedInputs = NO_INPUTS
) -> list[SamplingParams]:
    """One complete SamplingParams per output of one or several prompts, in order; see `expand_prompts`."""
    by_prompt = expand_prompts(values, model=model, surface=surface, inputs=inputs)
    return [params for outputs in by_prompt for params in outputs]


def expand_prompts(
    values: Mapping[str, Any], *, model: ModelInfo, surface: Surface, inputs: DecodedInputs = NO_INPUTS
) -> list[list[SamplingParams]]:
    """For each prompt, one complete SamplingParams per output; all have the same `inputs`.

    `values` holds SamplingParams fields without inputs; `prompt` may be one text or a list of them.

    Raises:
        InvalidRequest: any subclass that names the field, the value and what is accepted.
    """
    check_names(values, _exposed(surface), what="parameter")
    expanded = []
    for prompt in _prompts(values):
        wish = SamplingParams.from_values({**values, "prompt": prompt})
        wish.require_prompt()
        _check_profiling(wish)
        inputs.check(model.limits.inputs, strength=wish.strength is not None)
        wish = _as_long_as_the_video(_sized(wish, model, inputs), model, inputs)
        complete = model.limits.sized(wish.filled_from(model.defaults, GENERAL_DEFAULTS))
        _check_interval(complete)
        check_caches(complete)
        model.limits.check(complete)
        model.check_previews(complete.num_previews, param="num_previews")
        check_output(complete)
        expanded.append(_outputs(complete))
    return _observed(expanded)


def check_ahead(values: Mapping[str, Any], *, model: ModelInfo, images: bool = False, video: bool = False) -> None:
    """Refuse what no input can make acceptable, before anybody decodes one: an empty prompt, and more or other pixels,
    frames or work than are accepted, as far as they do not follow from the `images` or the `video` that there are."""
    wish = SamplingParams.from_values(values)
    wish.require_prompt()
    limits = model.limits
    if images and limits.size_from_image is not None and (wish.width is None or wish.height is None):
        return
    if video and limits.takes_length_from_video and wish.num_frames is None:
        wish = dataclasses.replace(wish, num_frames=1)  # the fewest that there may be
    limits.check(limits.sized(wish.filled_from(model.defaults, GENERAL_DEFAULTS)))


@functools.cache
def _exposed(surface: Surface) -> tuple[str, ...]:
    return tuple(name for name, p in parameters(SamplingParams).items() if surface in p.declaration.exposed)


def _sized(wish: SamplingParams, model: ModelInfo, inputs: DecodedInputs) -> SamplingParams:
    """With the size that follows from an input image, where the model has a rule for that and none is asked for."""
    size = inputs.size_for(model.limits.size_from_image, max_area=wish.max_area)
    if size is None:
        return wish
    if wish.width is None and wish.height is None:
        if max(size) > _MAX_SIDE:
            raise SizeTooLarge(
                f"size: the image's aspect ratio gives {size[0]}x{size[1]}, accepted are at most {_MAX_SIDE} pixels a "
                "side; give width and height",
                param="size",
            )
        return dataclasses.replace(wish, width=size[0], height=size[1])
    for name, other in (("width", "height"), ("height", "width")):
        if getattr(wish, name) is None:
            raise IncompatibleParameters(
                f"{name}: not given, accepted is {name} with {other}, or neither: the size then follows from the image",
                param=name,
            )
    return wish


def _as_long_as_the_video(wish: SamplingParams, model: ModelInfo, inputs: DecodedInputs) -> SamplingParams:
    """With as many frames as the input video has, or as many fewer as the model can do, where none are asked for."""
    if inputs.video is None or wish.num_frames is not None or not model.limits.takes_length_from_video:
        return wish
    limits = model.limits
    num_frames = min(len(inputs.video.frames), limits.max_frames)
    return dataclasses.replace(wish, num_frames=(num_frames - 1) // limits.frame_stride * limits.frame_stride + 1)


def _check_interval(params: SamplingParams) -> None:
    start, end = params.cfg_interval_start, params.cfg_interval_end
    if start is not None and end is not None and start > end:
        raise InvalidValue("cfg_interval_start", start, f"at most cfg_interval_end, which is {end}")


def _check_profiling(wish: SamplingParams) -> None:
    given = {
        "num_profiled_timesteps": wish.num_profiled_timesteps is not None,
        "profile_all_stages": wish.profile_all_stages,
    }
    for name in [name for name, is_given in given.items() if is_given]:
        if not wish.profile:
            raise IncompatibleParameters(f"{name}: says what to profile, accepted is it with profile", param=name)
    if all(given.values()):
        raise IncompatibleParameters(
            "num_profiled_timesteps: profile_all_stages profiles every step, accepted is one of them",
            param="num_profiled_timesteps",
        )


def _observed(expanded: list[list[SamplingParams]]) -> list[list[SamplingParams]]:
    """The first output of all has the profile, each has a performance dump of its own."""
    count = sum(len(outputs) for outputs in expanded)
    if count == 1:
        return expanded
    numbers = itertools.count()
    return [
        [
            dataclasses.replace(
                params,
                profile=params.profile and number == 0,
                perf_dump_path=_numbered(params.perf_dump_path, number, count),
            )
            for params, number in zip(outputs, numbers, strict=False)
        ]
        for outputs in expanded
    ]


def _prompts(values: Mapping[str, Any]) -> Sequence[Any]:
    prompt = values.get("prompt")
    if prompt is None:
        raise MissingParameter("prompt: nothing given, accepted is a text", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple) or not prompt:
        raise InvalidType("prompt", prompt, "a text or a list of texts")
    if len(prompt) > 1 and values.get("output_file_name") is not None:
        raise InvalidValue(
            "output_file_name", values["output_file_name"], "no fixed name when there are several prompts"
        )
    return prompt


def _outputs(params: SamplingParams) -> list[SamplingParams]:
    """One per output, each with a single seed of its own."""
    count = params.num_outputs_per_prompt
    if isinstance(params.seed, tuple):
        if len(params.seed) != count and count != 1:
            raise InvalidValue(
                "seed", list(params.seed), f"one seed, or as many as outputs per prompt ({count})", code="invalid_seed"
            )
        seeds = list(params.seed)
    else:
        first = secrets.randbelow(2**32) if params.seed is None else params.seed
        seeds = [first + index for index in range(count)]
    if seeds[-1] > MAX_SEED:
        raise InvalidValue("seed", seeds[0], f"at most {MAX_SEED - count + 1} for {count} outputs", code="invalid_seed")
    return [
        dataclasses.replace(
            params,
            seed=seed,
            num_outputs_per_prompt=1,
            output_file_name=_numbered(params.output_file_name, index, len(seeds)),
        )
        for index, seed in enumerate(seeds)
    ]


def _numbered(name: str | None, index: int, count: int) -> str | None:
    """`clip.mp4` -> `clip_0.mp4`, `clip_1.mp4` where there are several."""
    if name is None or count == 1:
        return name
    stem, dot, ending = name.rpartition(".")
    return f"{stem}_{index}.{ending}" if dot else f"{name}_{index}"


def check_output(params: SamplingParams) -> None:
    """Raises what is wrong with the file that is to be made, or with images beside a file that is not."""
    if params.save_output or params.return_encoded:
        choose_format(params, num_frames=params.num_frames or 1)
    for name in ("thumbnail", "contact_sheet"):
        if getattr(params, name) and not params.save_output:
            raise IncompatibleParameters(
                f"{name}: is saved beside the result, accepted is {name} with save_output", param=name
            )
