"""The fields of each call: OpenAI's own, declared here, and those of SamplingParams, taken from their declarations.

Nothing of OpenAI's API is ignored in silence: what cannot be honoured is either declared with the values that make no
difference or listed as unsupported with the reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from sglang.multimodal_gen.configs.declare import Parameter, Surface, arg, coerce, from_text, hint, parameters
from sglang.multimodal_gen.configs.sample.sampling_params import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    SamplingParams,
)
from sglang.multimodal_gen.errors import (
    IncompatibleParameters,
    InvalidType,
    InvalidValue,
    MissingParameter,
    SizeTooLarge,
    UnknownParameter,
    UnsupportedParameter,
)
from sglang.multimodal_gen.errors_http import AdminRequired
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import Body
from sglang.multimodal_gen.runtime.entrypoints.openai.uploads import FileField

_SIZE = re.compile(r"([1-9][0-9]{0,9})x([1-9][0-9]{0,9})")
_NAME_LENGTH = 512


def _size_problem(value: str) -> str | None:
    return None if value == "auto" or _SIZE.fullmatch(value) else "WIDTHxHEIGHT in pixels, such as 512x512, or auto"


@dataclass(frozen=True, kw_only=True)
class CommonFields:
    """What OpenAI's image and video calls share."""

    model: str | None = arg(
        None, help="Name of the served model; unset: that model.", group="openai", max_length=_NAME_LENGTH
    )
    size: str | None = arg(
        None,
        help="WIDTHxHEIGHT in pixels; unset or `auto`: the model's default.",
        group="openai",
        code="invalid_size",
        check=_size_problem,
    )
    user: str | None = arg(None, help="Accepted and not used.", group="openai", max_length=_NAME_LENGTH)
    safety_identifier: str | None = arg(
        None, help="Returned with the result and not used.", group="openai", max_length=_NAME_LENGTH
    )


@dataclass(frozen=True, kw_only=True)
class StillFields(CommonFields):
    """What OpenAI's calls for images share."""

    response_format: str = arg(
        "b64_json", help="Image in the reply, or a URL to it.", group="openai", choices=("b64_json", "url")
    )
    background: str = arg("auto", help="Results are opaque.", group="openai", choices=("auto", "opaque"))
    quality: str = arg(
        "auto", help="Rendering effort is set with num_inference_steps.", group="openai", choices=("auto", "standard")
    )
    stream: bool = arg(False, help="Send one image as server-sent events.", group="openai")
    partial_images: int = arg(
        0,
        help="Pictures on the way in a stream, spread evenly over the steps; fewer come when steps are few or fast.",
        group="openai",
        minimum=0,
        maximum=3,
        code="invalid_value",
    )


@dataclass(frozen=True, kw_only=True)
class ImageFields(StillFields):
    """What only OpenAI's call for images from a text has."""

    moderation: str = arg("auto", help="No moderation is done.", group="openai", choices=("auto", "low"))


@dataclass(frozen=True, kw_only=True)
class EditFields(StillFields):
    """What only OpenAI's call for images from images has."""

    input_fidelity: str = arg(
        "high",
        help="Images are used as they are; `strength` says how far they change.",
        group="openai",
        choices=("high",),
    )


@dataclass(frozen=True, kw_only=True)
class VideoFields(CommonFields):
    """What only OpenAI's video call has."""

    seconds: str | int | float | None = arg(
        None,
        help="Time from the first frame to the last: num_frames = seconds x fps, rounded down to the model's temporal "
        "stride, plus 1. The reply reports the actual time. Unset: the model's default frames.",
        group="openai",
        code="invalid_seconds",
    )


@dataclass(frozen=True, kw_only=True)
class DerivedVideoFields(VideoFields):
    """What OpenAI's calls for videos from videos have."""

    video_id: str | None = arg(
        None,
        help="Id of a completed video of this server, in place of a file; `video[id]` says the same.",
        group="openai",
        max_length=_NAME_LENGTH,
    )


@dataclass(frozen=True, kw_only=True)
class CallFields:
    """Every field of one call; `admin_only` are taken from an administrator alone, `unsupported` are OpenAI's fields
    that this server cannot honour, with the reason; `files` are those that take files, by name."""

    accepted: Mapping[str, Parameter]
    admin_only: Mapping[str, Parameter]
    unsupported: Mapping[str, str]
    files: Mapping[str, FileField] = dataclasses.field(default_factory=dict)

    def refuse(self, name: str) -> None:
        """Raises UnsupportedParameter, AdminRequired or UnknownParameter for a field that is not accepted."""
        if name in self.unsupported:
            raise UnsupportedParameter(name, self.unsupported[name])
        if name in self.admin_only:
            raise AdminRequired(name)
        raise UnknownParameter(name, what="field", hint=hint(name, {*self.accepted, *self.files}))

    def refuse_file(self, name: str) -> None:
        """Raises for an uploaded file of a field that takes none."""
        known = {**self.accepted, **self.admin_only}
        if name in known:
            raise InvalidType(name, "a file", known[name].accepted())
        self.refuse(name)

    def checked(self, body: Body, *, surface: Surface = "http") -> dict[str, Any]:
        """The given fields, each of its declared type and within its bounds. Null means: not given.

        Raises:
            ServingError: a field that is unknown, unsupported, for administrators, of the wrong type or out of bounds;
                no prompt.
        """
        accepted = {**self.accepted, **(self.admin_only if surface == "admin" else {})}
        absent = {*self.unsupported, *self.admin_only}
        for name in body.values:
            if name not in accepted and not (name in absent and body.values[name] is None):
                self.refuse(name)
        checked = {
            name: _checked_value(accepted[name], value, spelled=name in body.spelled)
            for name, value in body.values.items()
            if value is not None
        }
        values = {name: value for name, value in checked.items() if value is not None}  # a text may spell null
        if "prompt" not in values:
            raise MissingParameter("prompt: not given, accepted is a text", param="prompt")
        return values


def _checked_value(parameter: Parameter, value: Any, *, spelled: bool) -> Any:
    try:
        if spelled:
            value = _read(parameter, value)
        if parameter.name in ("width", "height"):
            _check_side(value, param=parameter.name)
        return coerce(parameter, value)
    except InvalidValue as error:
        raise _explained(parameter, error) from None


def _read(parameter: Parameter, value: Any) -> Any:
    """What the texts of a multipart body spell; an object (`name[key]`) is left to be refused by its type."""
    if isinstance(value, list):
        return tuple(from_text(parameter.item(), text) for text in value)
    return value if isinstance(value, dict) else from_text(parameter, value)


def _explained(parameter: Parameter, error: InvalidValue) -> InvalidValue:
    """The error; of OpenAI's choices, the help says why others are not there and what is used instead."""
    declaration = parameter.declaration
    if declaration.group != "openai" or declaration.choices is None:
        return error
    return InvalidValue(parameter.name, error.value, f"{error.accepted} ({declaration.help.rstrip('.')})")


def _check_side(value: Any, *, param: str) -> None:
    maximum = parameters(SamplingParams)["width"].declaration.maximum
    assert maximum is not None, "the width has a declared maximum"
    if type(value) in (int, float) and value > maximum:
        raise SizeTooLarge(
            f"{param}: larger than {int(maximum)} pixels a side, which is the most accepted", param=param
        )


def sides(size: str) -> tuple[int, int]:
    """(width, height) of a checked WIDTHxHEIGHT. Raises SizeTooLarge or InvalidValue for sides beyond any model's."""
    match = _SIZE.fullmatch(size)
    assert match is not None, "the declaration has checked the form"
    width, height = int(match[1]), int(match[2])
    least = parameters(SamplingParams)["width"].declaration.minimum or 0
    for side in (width, height):
        _check_side(side, param="size")
        if side < least:
            raise InvalidValue("size", size, f"sides of at least {int(least)} pixels", code="invalid_size")
    return width, height


def _declared(own: type, *, without: Collection[str], formats: tuple[str, ...]) -> dict[str, Parameter]:
    """OpenAI's fields and the exposed ones of SamplingParams, the file formats narrowed to what the call can give."""
    found = dict(parameters(own))
    for name, parameter in parameters(SamplingParams).items():
        if "http" in parameter.declaration.exposed and name not in without:
            found[name] = parameter
    declaration = dataclasses.replace(found["output_format"].declaration, choices=formats)
    found["output_format"] = dataclasses.replace(found["output_format"], declaration=declaration)
    return found


def _admin_only() -> Mapping[str, Parameter]:
    return MappingProxyType(
        {
            name: parameter
            for name, parameter in parameters(SamplingParams).items()
            if "admin" in parameter.declaration.exposed and "http" not in parameter.declaration.exposed
        }
    )


_NOT_FOR_IMAGES = ("num_frames", "fps", "x264_preset")
_NOT_MADE = {
    "style": "write the style into the prompt",
    "complexity": "it concerns SVG",
    "svg": "images are made of pixels",
    "frame_count": "animations are made with /v1/videos",
    "frame_duration_ms": "animations are made with /v1/videos",
}
MAX_EDITED_IMAGES = 16


def _image_call(own: type, *, unsupported: Mapping[str, str], files: Iterable[FileField] = ()) -> CallFields:
    accepted = _declared(own, without=_NOT_FOR_IMAGES, formats=IMAGE_FORMATS)
    accepted["n"] = dataclasses.replace(accepted["num_outputs_per_prompt"], name="n")
    return CallFields(
        accepted=MappingProxyType(accepted),
        admin_only=_admin_only(),
        unsupported=MappingProxyType(dict(unsupported)),
        files=MappingProxyType({field.name: field for field in files}),
    )


def _edit_call() -> CallFields:
    files = (
        FileField(
            name="image",
            kind="image",
            help=f"PNG, JPEG, WebP or BMP; up to {MAX_EDITED_IMAGES} as image[], or as many as the model takes.",
            max_files=MAX_EDITED_IMAGES,
            alias="images",
        ),
        FileField(
            name="mask",
            kind="mask",
            help="PNG of the first image's size that is transparent where that one is made anew.",
        ),
    )
    unsupported = _NOT_MADE | {"markup": "draw on the image itself"}
    return _image_call(EditFields, unsupported=unsupported, files=files)


_NEW_VIDEO_FILES = (
    FileField(name="input_reference", kind="image", help="Image that the video starts from or shows."),
    FileField(name="last_image", kind="image", help="Image that the video ends with."),
    FileField(name="video", kind="video", help="MP4, WebM or GIF that the video is made from."),
)
_NOT_MADE_FOR_VIDEOS = {
    "n": "a job makes one video",
    "num_outputs_per_prompt": "a job makes one video",
    "stream": "a video is followed with GET /v1/videos/{id}/events",
    "partial_images": "they come with GET /v1/videos/{id}/events",
}
_SOURCE_VIDEO = FileField(
    name="video", kind="video", help="MP4, WebM or GIF, or the id of a video of this server.", by_id=True
)


def _video_call(own: type[VideoFields], files: Iterable[FileField]) -> CallFields:
    return CallFields(
        accepted=MappingProxyType(_declared(own, without=("num_outputs_per_prompt",), formats=VIDEO_FORMATS)),
        admin_only=_admin_only(),
        unsupported=MappingProxyType(dict(_NOT_MADE_FOR_VIDEOS)),
        files=MappingProxyType({field.name: field for field in files}),
    )


def private_texts(body: Body) -> list[str]:
    """What the client wrote, as far as it is text; see `SamplingParams.private_texts`."""
    return [text for name in ("prompt", "negative_prompt") if isinstance(text := body.values.get(name), str)]


IMAGE_CALL = _image_call(ImageFields, unsupported=_NOT_MADE)
EDIT_CALL = _edit_call()
VIDEO_CALL = _video_call(VideoFields, _NEW_VIDEO_FILES)
REMIX_CALL = _video_call(VideoFields, ())
DERIVED_VIDEO_CALL = _video_call(DerivedVideoFields, (_SOURCE_VIDEO,))


Own = TypeVar("Own", bound=CommonFields)


def sampling_values(values: Mapping[str, Any], own: type[Own]) -> tuple[Own, dict[str, Any]]:
    """OpenAI's own fields as an object, and the rest as SamplingParams fields: `size` and `n` under our names.

    Raises:
        IncompatibleParameters: the same thing said twice, such as `size` and `width`.
    """
    known: type = own
    wish = own(**{name: value for name, value in values.items() if name in parameters(known)})
    sampling = {name: value for name, value in values.items() if name in parameters(SamplingParams)}
    if wish.size is not None and wish.size != "auto":
        _refuse_both("size", sampling, "width", "height")
        sampling["width"], sampling["height"] = sides(wish.size)
    if "n" in values:
        _refuse_both("n", sampling, "num_outputs_per_prompt")
        sampling["num_outputs_per_prompt"] = values["n"]
    return wish, sampling


def _refuse_both(name: str, sampling: Mapping[str, Any], *others: str) -> None:
    for other in others:
        if other in sampling:
            raise IncompatibleParameters(f"{name}: says the same as {other}, accepted is one of them", param=name)
