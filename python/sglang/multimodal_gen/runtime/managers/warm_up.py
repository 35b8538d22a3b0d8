"""Warm-up: requests of our own that run before those of clients, so that nobody's time holds what only happens once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

from sglang.multimodal_gen.configs.model_info import InputLimits, ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, SamplingParams
from sglang.multimodal_gen.runtime.managers.messages import MappedArray, MediaInputs
from sglang.multimodal_gen.runtime.server_args import WarmupArgs, split_size

Mode = Literal["off", "request", "server"]
Shape = tuple[int | None, int | None, int | None]
ID_PREFIX = "warmup_"
_PROMPT = "a warm-up"


def shape_of(params: SamplingParams) -> Shape:
    """What a warm-up warms: a size of the result."""
    return params.width, params.height, params.num_frames


@dataclass(frozen=True, kw_only=True)
class InputShapes:
    """Shapes of the inputs that a warm-up has; their pixels are black."""

    images: tuple[tuple[int, ...], ...] = ()
    mask: tuple[int, ...] | None = None
    last_image: tuple[int, ...] | None = None
    video: tuple[int, ...] | None = None
    video_fps: float | None = None

    @classmethod
    def of(cls, inputs: MediaInputs | None) -> InputShapes:
        """Those of a request."""
        if inputs is None:
            return cls()
        return cls(
            images=tuple(image.shape for image in inputs.images),
            mask=None if inputs.mask is None else inputs.mask.shape,
            last_image=None if inputs.last_image is None else inputs.last_image.shape,
            video=None if inputs.video is None else inputs.video.shape,
            video_fps=inputs.video_fps,
        )

    def fill(self, blank: Callable[[tuple[int, ...]], MappedArray]) -> MediaInputs | None:
        """Black inputs, made with `blank`; None when there are none."""
        if self == InputShapes():
            return None
        return MediaInputs(
            images=tuple(blank(shape) for shape in self.images),
            mask=None if self.mask is None else blank(self.mask),
            last_image=None if self.last_image is None else blank(self.last_image),
            video=None if self.video is None else blank(self.video),
            video_fps=self.video_fps,
        )


def input_shapes(limits: InputLimits, params: SamplingParams) -> InputShapes:
    """What a model needs at least for a result of this size."""
    assert params.height is not None and params.width is not None, "the parameters are complete"
    image = (params.height, params.width, 3)
    video = (params.num_frames or 1, *image) if limits.requires_video else None
    last_image = image if limits.requires_last_image else None
    return InputShapes(images=(image,) * limits.min_images, last_image=last_image, video=video)


@dataclass
class WarmUp:
    """Which sizes are warm on one replica, and which warm-up requests are under way. `given_up`: one failed, so there
    are no more. `id_prefix` tells its requests from other replicas'; `is_needed` says that something, such as a
    compiler, wants one."""

    args: WarmupArgs
    id_prefix: str = ""
    is_needed: bool = False
    mode: Mode = "off"
    warm: set[Shape] = field(default_factory=set)
    under_way: dict[str, Shape] = field(default_factory=dict)
    given_up: bool = False
    _number: int = 0

    def choose_mode(self, *, serves_http: bool, device: str) -> Mode:
        """The mode asked for; else a server on a GPU warms up before it takes requests, and nothing else does unless
        it is needed."""
        by_default: Mode = "server" if self.is_needed or (serves_http and device.startswith("cuda")) else "off"
        self.mode = "off" if self.given_up else cast(Mode, self.args.warmup_mode or by_default)
        return self.mode

    def for_server(self, model: ModelInfo) -> list[SamplingParams]:
        """What to run before the first request: the sizes asked for, or the model's own.

        Raises: InvalidRequest for a size that the model cannot do.
        """
        # As a request that says nothing: defaults of a step cache that is off are no part of it.
        own = SamplingParams().filled_from(model.defaults, GENERAL_DEFAULTS)
        asked = self.args.warmup_resolutions
        sizes = [(own.width, own.height)] if asked is None else [split_size(size) for size in asked]
        num_frames = self.args.warmup_num_frames or own.num_frames
        wishes = [
            dataclasses.replace(own, prompt=_PROMPT, width=width, height=height, num_frames=num_frames)
            for width, height in sizes
        ]
        for params in wishes:
            model.limits.check(params)
        return [self._shortened(params) for params in wishes]

    def for_request(self, params: SamplingParams) -> SamplingParams | None:
        """What to run before this request; None when its size is warm or being warmed."""
        shape = shape_of(params)
        if self.mode != "request" or shape in self.warm or shape in self.under_way.values():
            return None
        return self._shortened(params)

    def blocks(self, params: SamplingParams) -> bool:
        """Whether a client's request must wait for a warm-up that is under way."""
        return bool(self.under_way) if self.mode == "server" else shape_of(params) in self.under_way.values()

    def start(self, params: SamplingParams) -> str:
        """A warm-up is under way; its request id."""
        self._number += 1
        request_id = f"{ID_PREFIX}{self.id_prefix}{self._number}"
        self.under_way[request_id] = shape_of(params)
        return request_id

    def ended(self, request_id: str, *, failed: bool) -> None:
        """A warm-up is over."""
        shape = self.under_way.pop(request_id)
        if failed:
            self.given_up, self.mode = True, "off"
        else:
            self.warm.add(shape)

    def forget(self) -> None:
        """A fresh worker has nothing warm."""
        self.warm.clear()

    def _shortened(self, params: SamplingParams) -> SamplingParams:
        steps = min(self.args.warmup_steps, params.num_inference_steps or self.args.warmup_steps)
        seed = params.seed if isinstance(params.seed, int) else 0
        return dataclasses.replace(
            params.without_scheduling(),
            seed=seed,
            num_inference_steps=steps,
            output_type="pixels",
            save_output=False,
            return_frames=False,
            return_latents=False,
            return_encoded=False,
            num_previews=0,
        )
