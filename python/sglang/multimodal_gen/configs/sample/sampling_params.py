"""`SamplingParams`: what a client wishes for one generation. Frozen, flat, checked; unset fields are None.

Unset fields are filled from the model's defaults, then from `GENERAL_DEFAULTS` (`filled_from`).
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen.configs.attention import ATTENTION_BACKENDS
from sglang.multimodal_gen.configs.declare import ADMIN, FROM_MODEL, LOCAL_ONLY, PYTHON_ONLY, arg, build, parameters
from sglang.multimodal_gen.configs.sample.cache_params import CacheParams, filled_caches, without_unused
from sglang.multimodal_gen.configs.sample.guidance_params import GuidanceParams
from sglang.multimodal_gen.configs.sample.input_params import InputParams
from sglang.multimodal_gen.configs.sample.lora_params import LoraParams
from sglang.multimodal_gen.configs.sample.scheduling_params import SchedulingParams
from sglang.multimodal_gen.configs.schedulers import SCHEDULER_NAMES
from sglang.multimodal_gen.errors import EmptyPrompt

MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 32_000
OUTPUT_QUALITIES = ("default", "maximum", "high", "medium", "low")
IMAGE_FORMATS = ("png", "jpeg", "webp")
VIDEO_FORMATS = ("mp4", "gif", "webm")
X264_PRESETS = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
    "placebo",
)
PROFILED_TIMESTEPS = 5


def _plain_file_name(name: str) -> str | None:
    """What would be accepted instead of `name`, or None when it is a name without a directory."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        return "a file name without a directory; the directory is --output-path"
    return None


@dataclass(frozen=True, kw_only=True)
class ConditioningParams:
    """What the result should show."""

    prompt: str = arg("", help="What to generate.", group="prompt", max_length=MAX_PROMPT_CHARACTERS, recorded=True)
    negative_prompt: str | None = arg(
        None,
        help="What to steer away from; used only with a guidance scale above 1.",
        group="prompt",
        unset=FROM_MODEL,
        max_length=MAX_PROMPT_CHARACTERS,
        recorded=True,
    )
    max_sequence_length: int | None = arg(
        None,
        help="Text tokens that the model sees; a longer prompt is cut and the result says so.",
        group="prompt",
        unset=FROM_MODEL,
        minimum=1,
        maximum=4096,
        recorded=True,
    )
    clip_skip: int | None = arg(
        None,
        help="Last layers of CLIP that the prompt's tokens do not pass, beyond those that the model leaves out anyway; "
        "the negative prompt passes them.",
        group="prompt",
        unset="none",
        minimum=0,
        maximum=100,
        recorded=True,
    )


@dataclass(frozen=True, kw_only=True)
class ShapeParams:
    """How large the result is."""

    width: int | None = arg(
        None,
        help="Width in pixels.",
        group="size",
        unset=FROM_MODEL,
        minimum=16,
        maximum=16384,
        code="invalid_size",
        recorded=True,
    )
    height: int | None = arg(
        None,
        help="Height in pixels.",
        group="size",
        unset=FROM_MODEL,
        minimum=16,
        maximum=16384,
        code="invalid_size",
        recorded=True,
    )
    num_frames: int | None = arg(
        None,
        help="Frames of the video; 1 gives an image.",
        group="size",
        unset=FROM_MODEL,
        minimum=1,
        maximum=100_000,
        code="invalid_num_frames",
        recorded=True,
    )
    fps: int | None = arg(
        None,
        help="Frames a second of the saved video.",
        group="size",
        unset=FROM_MODEL,
        minimum=1,
        maximum=240,
        code="invalid_fps",
        recorded=True,
    )


@dataclass(frozen=True, kw_only=True)
class DenoisingParams:
    """How the noise becomes a result."""

    num_inference_steps: int | None = arg(
        None,
        help="Denoising steps.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=1,
        maximum=1000,
        code="invalid_steps",
        recorded=True,
    )
    guidance_scale: float | None = arg(
        None,
        help="Classifier-free guidance; 1 or less switches it off and halves the work.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1000.0,
        recorded=True,
    )
    guidance_rescale: float | None = arg(
        None,
        help="How far to pull the guided prediction's standard deviation back to the conditional one's "
        "(arXiv:2305.08891).",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    flow_shift: float | None = arg(
        None,
        help="Timestep shift of the sampler; a larger one spends more steps at high noise.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.01,
        maximum=100.0,
        recorded=True,
    )
    scheduler: str | None = arg(
        None,
        help="Sampler.",
        group="denoising",
        unset="the server's, else the checkpoint's own",
        choices=SCHEDULER_NAMES,
        recorded=True,
    )
    seed: int | tuple[int, ...] | None = arg(
        None,
        help="Seed of the noise. Output i of a prompt uses seed + i; a list gives one seed per output.",
        group="denoising",
        unset="drawn at random and reported",
        minimum=0,
        maximum=MAX_SEED,
        code="invalid_seed",
        recorded=True,
    )
    num_outputs_per_prompt: int = arg(
        1, help="Results per prompt.", group="denoising", minimum=1, maximum=10, code="invalid_n"
    )


@dataclass(frozen=True, kw_only=True)
class OutputParams:
    """What comes back, and where it is saved."""

    output_type: str = arg(
        "pixels",
        help="`pixels` decodes the result, `latent` stops before the VAE.",
        group="output",
        choices=("pixels", "latent"),
        exposed=LOCAL_ONLY,
    )
    save_output: bool | None = arg(
        None,
        help="Write the result to a file.",
        group="output",
        unset="yes for `sglang generate`, else no",
        exposed=LOCAL_ONLY,
    )
    return_frames: bool = arg(
        False, help="Return the frames as a uint8 array [T, H, W, 3].", group="output", exposed=PYTHON_ONLY
    )
    return_latents: bool = arg(
        False, help="Return the final latents as a float32 array [C, T, H, W].", group="output", exposed=PYTHON_ONLY
    )
    return_encoded: bool = arg(
        False, help="Return the encoded file's bytes instead of writing it.", group="output", exposed=()
    )
    output_path: str | None = arg(
        None,
        help="Directory for results.",
        group="output",
        unset="the server's output path",
        exposed=LOCAL_ONLY,
        metavar="DIR",
    )
    output_file_name: str | None = arg(
        None,
        help="File name; its ending picks the format.",
        group="output",
        unset="made from the prompt and the seed",
        exposed=LOCAL_ONLY,
        max_length=150,
        metavar="NAME",
        check=_plain_file_name,
    )
    output_format: str | None = arg(
        None,
        help="File format.",
        group="output",
        unset="png for images, mp4 for videos",
        choices=(*IMAGE_FORMATS, *VIDEO_FORMATS),
    )
    output_quality: str = arg("default", help="Encoding quality.", group="output", choices=OUTPUT_QUALITIES)
    output_compression: int | None = arg(
        None,
        help="Encoding quality as a number, higher is better; wins over the output quality.",
        group="output",
        unset="as the output quality says",
        minimum=0,
        maximum=100,
        code="invalid_value",
    )
    x264_preset: str | None = arg(
        None,
        help="Time spent on compressing an mp4: a slower preset makes a smaller file of the same quality.",
        group="output",
        unset="fast",
        choices=X264_PRESETS,
    )
    metadata: bool = arg(
        True,
        help="Write the parameters that made the result into its file: prompt, seed, size, steps, model and so on.",
        group="output",
    )
    thumbnail: bool = arg(
        False,
        help="Save a small WebP image of the middle frame beside the result.",
        group="output",
        exposed=LOCAL_ONLY,
    )
    contact_sheet: bool = arg(
        False,
        help="Save a JPEG image of up to 25 frames in a grid beside the result.",
        group="output",
        exposed=LOCAL_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class PreviewParams:
    """What is shown before the result is there."""

    num_previews: int = arg(
        0,
        help="Pictures on the way, spread evenly over the denoising steps, as events of `DiffGenerator.stream`.",
        group="output",
        minimum=0,
        maximum=100,
        exposed=PYTHON_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class AttentionParams:
    """Which attention kernels one request runs with. `sglang generate` makes the engine's options of these flags."""

    attention_backend: str | None = arg(
        None,
        help="Attention kernel of the transformer for this request.",
        group="execution",
        unset="the engine's",
        choices=ATTENTION_BACKENDS,
        exposed=LOCAL_ONLY,
        recorded=True,
    )
    self_attention_backend: str | None = arg(
        None,
        help="Kernel of the transformer's self-attention alone.",
        group="execution",
        unset="as the request's attention backend",
        choices=ATTENTION_BACKENDS,
        exposed=LOCAL_ONLY,
        recorded=True,
    )
    cross_attention_backend: str | None = arg(
        None,
        help="Kernel of the transformer's attention to the text alone.",
        group="execution",
        unset="as the request's attention backend",
        choices=ATTENTION_BACKENDS,
        exposed=LOCAL_ONLY,
        recorded=True,
    )


@dataclass(frozen=True, kw_only=True)
class LibraryParams:
    """What goes past us to the library that runs a model without a pipeline of ours."""

    diffusers_kwargs: Mapping[str, Any] | None = arg(
        None,
        help="Further arguments of the diffusers pipeline that runs the model, by name; see the page on the fallback.",
        group="fallback",
        unset="the pipeline's own defaults",
        exposed=LOCAL_ONLY,
        recorded=True,
    )


@dataclass(frozen=True, kw_only=True)
class ObservationParams:
    """What is measured besides."""

    perf_dump_path: str | None = arg(
        None,
        help="JSON file for the times and the memory of the generation; several outputs number it.",
        group="observation",
        unset="no file",
        exposed=LOCAL_ONLY,
        metavar="FILE",
    )
    profile: bool = arg(
        False,
        help="Record a torch profile of the first output's denoising as a Chrome trace in the profile directory.",
        group="observation",
        exposed=ADMIN,
    )
    num_profiled_timesteps: int | None = arg(
        None,
        help="Denoising steps to profile, after one that warms up.",
        group="observation",
        unset=str(PROFILED_TIMESTEPS),
        exposed=ADMIN,
        minimum=1,
        maximum=1000,
    )
    profile_all_stages: bool = arg(
        False,
        help="Profile the whole request instead, from the text encoder to the last decoded frame.",
        group="observation",
        exposed=ADMIN,
    )


@dataclass(frozen=True, kw_only=True)
class SamplingParams(
    SchedulingParams,
    ObservationParams,
    LibraryParams,
    LoraParams,
    AttentionParams,
    PreviewParams,
    OutputParams,
    CacheParams,
    GuidanceParams,
    DenoisingParams,
    ShapeParams,
    InputParams,
    ConditioningParams,
):
    """Everything a client may say about one generation; see the parents for the fields.

    The parents stand in reverse, since a dataclass takes the fields of its last parent first.
    """

    @classmethod
    def from_values(cls, values: Mapping[str, Any], *, what: str = "parameter") -> SamplingParams:
        """Checked construction from plain values. Raises UnknownParameter, InvalidType, InvalidValue."""
        return build(cls, values, what=what)

    def filled_from(self, *defaults: SamplingParams) -> SamplingParams:
        """Each unset (None) field taken from the first of `defaults` that sets it."""
        missing = filled_caches(self, defaults)
        for name, value in vars(self).items():
            if value is None and name not in parameters(CacheParams):
                found = next((v for d in defaults if (v := getattr(d, name)) is not None), None)
                if found is not None:
                    missing[name] = found
        return dataclasses.replace(self, **missing) if missing else self

    def recorded(self) -> dict[str, Any]:
        """What made the result, by declaration: equal for equal requests, unset and unused fields left out."""
        found = {name: getattr(self, name) for name, p in parameters(SamplingParams).items() if p.declaration.recorded}
        if max(self.guidance_scale or 0.0, self.true_cfg_scale or 0.0) <= 1:
            del found["negative_prompt"]
        if self.num_frames == 1:
            del found["fps"]
        if self.skip_guidance_layers is None:
            for name in _OF_SKIPPED_LAYERS:
                del found[name]
        return without_unused({name: value for name, value in found.items() if value is not None})

    def without_scheduling(self) -> SamplingParams:
        """What is asked for, whenever it is wanted: equal for requests that must give equal bytes."""
        return dataclasses.replace(self, **{name: p.default for name, p in parameters(SchedulingParams).items()})

    @property
    def num_outputs(self) -> int:
        """Results of one prompt: as many as asked for, or as there are seeds."""
        return len(self.seed) if isinstance(self.seed, tuple) else self.num_outputs_per_prompt

    @property
    def cost(self) -> int:
        """What admission counts: pixels x frames x steps x outputs of complete parameters."""
        sizes = (self.width, self.height, self.num_frames, self.num_inference_steps, self.num_outputs)
        return math.prod(size or 1 for size in sizes)

    def require_prompt(self) -> None:
        """Raises EmptyPrompt when there is nothing to generate from: no character that can be seen."""
        if all(unicodedata.category(character) in _UNSEEN for character in self.prompt):
            raise EmptyPrompt()

    def private_texts(self) -> tuple[str, ...]:
        """What the user wrote, which no log may repeat unasked."""
        return tuple(text for text in (self.prompt, self.negative_prompt, *_texts_in(self.diffusers_kwargs)) if text)


# Control and format characters, such as the zero-width space, and all white space.
_UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
_OF_SKIPPED_LAYERS = ("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop")


def _texts_in(value: Any) -> Iterator[str]:
    """Every text of a JSON value but the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


PARAMETERS_OF_SOME = frozenset(
    {
        *("true_cfg_scale", "guidance_scale_2", "cfg_normalization", "cfg_truncation", "boundary_ratio"),
        *("decode_timestep", "decode_noise_scale", "image_cond_noise_scale", "max_area", "auto_resize"),
        *("frame_index", "denoise_strength", "image_embed_interleave", "clip_skip", "mu"),
        *("skip_guidance_layers", *_OF_SKIPPED_LAYERS),
    }
)
"""What only some models have; the others refuse it rather than ignore it."""

# Last in the order of precedence: flag > env > YAML > model default > these.
GENERAL_DEFAULTS = SamplingParams(
    num_frames=1, fps=24, num_inference_steps=50, guidance_scale=1.0, guidance_rescale=0.0, save_output=False
)
