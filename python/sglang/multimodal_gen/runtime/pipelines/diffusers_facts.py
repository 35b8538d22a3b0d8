"""What a pipeline of diffusers says of itself: the arguments of its call, its sizes, its tasks.

Nothing here knows a pipeline by name: what a call takes is in its signature, and the rest in the attributes and configs
by which diffusers' pipelines compute their own defaults.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from sglang.multimodal_gen.configs.declare import hint, parameters
from sglang.multimodal_gen.configs.model_info import InputLimits, TaskLimits
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.pipeline_configs.fallback import FRAMES_PER_SECOND
from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, SamplingParams
from sglang.multimodal_gen.errors import InvalidValue, MissingParameter, UnsupportedModel, UnsupportedParameter
from sglang.multimodal_gen.runtime.pipelines_core.pictures import resized
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs

# SamplingParams and what calls name them; the others go by their own names.
_ALIASES = {"num_frames": ("num_frames", "frames", "video_length"), "fps": ("frame_rate", "fps")}
# What calls name the inputs; one with a plural name takes several pictures.
_IMAGE_ARGUMENTS = ("image", "images", "input_images", "control_image")
_SEVERAL = ("images", "input_images")
_MOST_IMAGES = 16
_MASK_ARGUMENTS = ("mask_image", "mask")
# Parameters that are about the result's file, or that are given in another way.
_OTHER_GROUPS = frozenset({"output", "observation", "fallback", "scheduling"})
_GIVEN_OTHERWISE = frozenset({"seed", "num_outputs_per_prompt"})
# Arguments that say how the call is driven or what it returns, which is ours to say.
_OURS = frozenset(
    {
        "generator",
        "num_images_per_prompt",
        "num_videos_per_prompt",
        "output_type",
        "return_dict",
        "use_resolution_binning",
    }
)
_SPATIAL_RATIOS = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)
_TEMPORAL_RATIOS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
# Where neither the call nor a config says a size.
_USUAL_SIDE = 1024
_USUAL_NUM_FRAMES = 121


@dataclass(frozen=True)
class CallSignature:
    """The arguments that a pipeline class's call takes by name."""

    class_name: str
    arguments: Mapping[str, inspect.Parameter]

    @classmethod
    def of(cls, pipeline_class: type) -> CallSignature:
        """Raises UnsupportedModel for a class that makes no images or videos of a size from a text."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        call = inspect.signature(pipeline_class.__call__)  # type: ignore[operator]
        arguments = {name: p for name, p in call.parameters.items() if name != "self" and p.kind in named}
        found = cls(pipeline_class.__name__, MappingProxyType(arguments))
        missing = [] if "prompt" in arguments else ["prompt"]
        if not found.takes_size and found.image_argument is None:
            missing += [name for name in ("height", "width") if name not in arguments]
        if missing:
            raise UnsupportedModel(
                f"diffusers' {pipeline_class.__name__} takes no {', '.join(missing)}; supported are pipelines that "
                "make images or videos of a given size, or of a given image, from a text",
                param="model_path",
            )
        return found

    def argument_for(self, field: str) -> str | None:
        """The argument that a SamplingParams field is; None where the call has none."""
        return next((name for name in _ALIASES.get(field, (field,)) if name in self.arguments), None)

    def default(self, field: str) -> Any:
        """The call's own default for a SamplingParams field; None without one."""
        name = self.argument_for(field)
        value = None if name is None else self.arguments[name].default
        return None if value is inspect.Parameter.empty else value

    @property
    def steps_told(self) -> str | None:
        """The argument through which the call says that a step has ended; None where there is none."""
        return next((name for name in ("callback_on_step_end", "callback") if name in self.arguments), None)

    @property
    def makes_videos(self) -> bool:
        """Whether the call is told a number of frames."""
        return self.argument_for("num_frames") is not None

    @property
    def takes_size(self) -> bool:
        """Whether the call is told a size; one that is not makes its image's."""
        return "height" in self.arguments and "width" in self.arguments

    @property
    def image_argument(self) -> str | None:
        """The argument that pictures are given as."""
        return next((name for name in _IMAGE_ARGUMENTS if name in self.arguments), None)

    @property
    def mask_argument(self) -> str | None:
        """The argument that a mask is given as."""
        return next((name for name in _MASK_ARGUMENTS if name in self.arguments), None)

    def input_limits(self) -> InputLimits:
        """Which inputs the call takes."""
        image, required = self.image_argument, self.required()
        return InputLimits(
            min_images=int(image in required),
            max_images=0 if image is None else _MOST_IMAGES if image in _SEVERAL else 1,
            takes_mask=self.mask_argument is not None,
            requires_mask=self.mask_argument in required,
            takes_last_image="last_image" in self.arguments,
            takes_video="video" in self.arguments,
            requires_video="video" in required,
            takes_strength="strength" in self.arguments,
        )

    def input_arguments(self, inputs: RequestInputs, params: SamplingParams) -> dict[str, Any]:
        """The inputs as the call takes them: PIL images and lists of them.

        A call that is told no size makes what it is given, so it is given the size that is wanted.
        """

        def as_image(array: np.ndarray) -> Image.Image:
            if self.takes_size or params.height is None or params.width is None:
                return Image.fromarray(array)
            return Image.fromarray(resized(array, params.height, params.width))

        given: dict[str, Any] = {}
        images, image = [as_image(array) for array in inputs.images], self.image_argument
        if images and image is not None:
            given[image] = images if image in _SEVERAL else images[0]
        if inputs.mask is not None and self.mask_argument is not None:
            given[self.mask_argument] = as_image(inputs.mask)
        if inputs.last_image is not None:
            given["last_image"] = as_image(inputs.last_image)
        if inputs.video is not None:
            given["video"] = [as_image(frame) for frame in inputs.video]
        return given

    def tasks(self) -> tuple[str, ...]:
        """What the pipeline makes of what."""
        needs_image = any(name in self.required() for name in ("image", "video", "image_embeds"))
        names = ("ImageToVideo", "Image2Video", "VideoToVideo", "Img2Img", "Inpaint", "Edit", "ControlNet")
        from_image = needs_image or any(name in self.class_name for name in names)
        return (("I" if from_image else "T") + "2" + ("V" if self.makes_videos else "I"),)

    def required(self) -> tuple[str, ...]:
        """Arguments without a default."""
        return tuple(name for name, p in self.arguments.items() if p.default is inspect.Parameter.empty)

    def call_arguments(
        self, params: SamplingParams, defaults: SamplingParams, inputs: RequestInputs = EMPTY
    ) -> dict[str, Any]:
        """What complete parameters and inputs say to the call. What nobody set is left to the call.

        `defaults` are the model's own, by which `params` were completed, then by GENERAL_DEFAULTS.

        Raises:
            UnsupportedParameter: a parameter that was set is none of the call's.
            InvalidValue: an argument in `diffusers_kwargs` is none of the call's.
            MissingParameter: the call needs more than that.
        """
        given: dict[str, Any] = {}
        for field, parameter in parameters(SamplingParams).items():
            if parameter.declaration.group in _OTHER_GROUPS or field in _GIVEN_OTHERWISE:
                continue
            if field in ("width", "height") and not self.takes_size:
                continue
            value, own, general = (getattr(source, field) for source in (params, defaults, GENERAL_DEFAULTS))
            name = self.argument_for(field)
            is_unset = value is None or (own is None and value == general)
            if name is not None and not is_unset:
                given[name] = value
            elif name is None and not is_unset and value != own and field != "fps":
                raise UnsupportedParameter(field, f"diffusers' {self.class_name} takes none")
        given |= self._extra(params.diffusers_kwargs or {}) | self.input_arguments(inputs, params)
        missing = [name for name in self.required() if name not in given]
        if missing:
            raise MissingParameter(
                f"{missing[0]}: diffusers' {self.class_name} needs {', '.join(missing)}", param=missing[0]
            )
        return given

    def _extra(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        own_fields = {name: field for field in parameters(SamplingParams) if (name := self.argument_for(field))}
        free = self.arguments.keys() - _OURS - own_fields.keys()
        accepted = sorted(name for name in free if "callback" not in name)
        for name in extra:
            if name in own_fields:
                raise InvalidValue("diffusers_kwargs", name, f"the parameter {own_fields[name]} for that")
            if name not in accepted:
                names = f"an argument of {self.class_name}: {', '.join(accepted)}"
                raise InvalidValue("diffusers_kwargs", name, names + hint(name, accepted))
        return {name: self._as_wanted(name, value) for name, value in extra.items()}

    def _as_wanted(self, name: str, value: Any) -> Any:
        """A list as a tuple where the call wants one, which JSON does not have."""
        kinds = str(self.arguments[name].annotation).lower()
        return tuple(value) if isinstance(value, list) and "tuple" in kinds and "list" not in kinds else value

    def num_steps(self, given: Mapping[str, Any]) -> int:
        """Steps that a call with these arguments is asked for; 1 where a call is not told how many."""
        for schedule in ("timesteps", "sigmas"):
            if isinstance(given.get(schedule), list):
                return max(1, len(given[schedule]))
        steps = given.get("num_inference_steps")
        return steps if isinstance(steps, int) else 1


def own_defaults(pipeline: Any, signature: CallSignature) -> SamplingParams:
    """What the pipeline does where nothing is said, as SamplingParams."""
    values: dict[str, Any] = {}
    for field, parameter in parameters(SamplingParams).items():
        default = signature.default(field)
        kind = next((kind for kind in parameter.types if kind in (int, float)), None)
        if kind is not None and type(default) in (int, float):
            values[field] = kind(default)
    width, height = _default_size(pipeline)
    values.setdefault("width", width)
    values.setdefault("height", height)
    values.setdefault("num_frames", _default_num_frames(pipeline) if signature.makes_videos else 1)
    values.setdefault("num_inference_steps", 1)
    if signature.class_name in FRAMES_PER_SECOND:
        values.setdefault("fps", FRAMES_PER_SECOND[signature.class_name])
    return SamplingParams(**values)


def limits_of(pipeline: Any, signature: CallSignature, defaults: SamplingParams, config: PipelineConfig) -> TaskLimits:
    """The sizes that the pipeline can do, as far as it says, and the inputs that its call takes.

    Its processor of images knows the multiple of pixels, its transformer the patch. Frames have a stride where the
    default number keeps to it: some autoencoders cut what is too much.
    """
    temporal = _first_number(pipeline, _TEMPORAL_RATIOS) or 1
    own_frames = defaults.num_frames or 1
    return TaskLimits(
        size_multiple=_size_multiple(pipeline),
        max_pixels=config.max_pixels,
        frame_stride=temporal if (own_frames - 1) % temporal == 0 else 1,
        max_frames=config.max_frames,
        max_sequence_length=defaults.max_sequence_length or config.max_sequence_length,
        inputs=signature.input_limits(),
        takes_length_from_video=signature.argument_for("num_frames") is None and "video" in signature.arguments,
    )


def _size_multiple(pipeline: Any) -> int:
    if getattr(pipeline, "vae", None) is None and getattr(pipeline, "vqvae", None) is None:
        return 1
    ratio = _first_number(pipeline, _SPATIAL_RATIOS) or 1
    multiple = ratio
    for processor in ("image_processor", "video_processor"):
        multiple = math.lcm(multiple, _config_number(getattr(pipeline, processor, None), "vae_scale_factor") or 1)
    patch = getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "patch_size", 1)
    sides = patch[-2:] if isinstance(patch, list | tuple) else (patch,)
    return math.lcm(multiple, *(ratio * side for side in sides if isinstance(side, int) and side > 0))


def _default_size(pipeline: Any) -> tuple[int, int]:
    """(width, height) as diffusers' pipelines compute them where none is given."""
    ratio = _first_number(pipeline, _SPATIAL_RATIOS) or 1
    backbone = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    width, height = _first_number(pipeline, ("default_width",)), _first_number(pipeline, ("default_height",))
    if width and height:
        return width, height
    width, height = _config_number(backbone, "sample_width"), _config_number(backbone, "sample_height")
    if width and height:
        return width * ratio, height * ratio
    sample = getattr(pipeline, "default_sample_size", None) or getattr(
        getattr(backbone, "config", None), "sample_size", None
    )
    if isinstance(sample, list | tuple) and len(sample) == 2:
        return sample[1] * ratio, sample[0] * ratio
    return (sample * ratio, sample * ratio) if isinstance(sample, int) else (_USUAL_SIDE, _USUAL_SIDE)


def _default_num_frames(pipeline: Any) -> int:
    backbone = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    own = _config_number(backbone, "num_frames")
    sample = _config_number(backbone, "sample_frames")
    if own is not None or sample is None:
        return own or _USUAL_NUM_FRAMES
    # Counted in frames of the video, or of the latents where 4 of these make 1 of those and no frame stands alone.
    temporal = _first_number(pipeline, _TEMPORAL_RATIOS) or 1
    return sample if (sample - 1) % temporal == 0 else sample * temporal


def _first_number(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _config_number(component: Any, name: str) -> int | None:
    value = getattr(getattr(component, "config", None), name, None)
    return value if type(value) is int and value > 0 else None
