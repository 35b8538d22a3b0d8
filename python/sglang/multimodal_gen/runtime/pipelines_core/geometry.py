"""How pixels and frames map to latents and tokens, and which sizes a checkpoint can do at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from sglang.multimodal_gen.configs.model_info import AreaRule, InputLimits, SizeFromImage, TaskLimits
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import MissingParameter

NO_INPUTS = InputLimits()


@dataclass(frozen=True, kw_only=True)
class VideoGeometry:
    """Strides of the autoencoder and patches of the transformer, as (frames, height, width)."""

    channels: int
    spatial_ratio: int
    temporal_ratio: int
    patch_size: tuple[int, int, int]
    max_pixels: int
    max_frames: int
    max_side: int | None = None
    """Pixels along height and width; None: only their product is limited."""

    @classmethod
    def of_pictures(cls, *, channels: int, spatial_ratio: int, patch_size: int, max_pixels: int) -> Self:
        """For models that make one picture at a time."""
        return cls(
            channels=channels,
            spatial_ratio=spatial_ratio,
            temporal_ratio=1,
            patch_size=(1, patch_size, patch_size),
            max_pixels=max_pixels,
            max_frames=1,
        )

    @property
    def size_multiple(self) -> int:
        """Height and width are multiples of this."""
        return self.spatial_ratio * math.lcm(self.patch_size[1], self.patch_size[2])

    def check(self, params: SamplingParams) -> None:
        """Raises MissingParameter, SizeNotDivisible, SizeTooLarge or FramesNotSupported."""
        self._size(params)
        self.limits(max_sequence_length=0).check(params)

    def limits(
        self,
        *,
        max_sequence_length: int,
        inputs: InputLimits = NO_INPUTS,
        size_from_image: SizeFromImage | None = None,
        area_rule: AreaRule | None = None,
        takes_length_from_video: bool = False,
    ) -> TaskLimits:
        """What can be done, for every process to check: sizes from here, the rest from the family."""
        return TaskLimits(
            size_multiple=self.size_multiple,
            max_pixels=self.max_pixels,
            max_side=self.max_side,
            frame_stride=self.temporal_ratio,
            max_frames=self.max_frames,
            max_sequence_length=max_sequence_length,
            inputs=inputs,
            size_from_image=size_from_image,
            area_rule=area_rule,
            takes_length_from_video=takes_length_from_video,
        )

    def latent_shape(self, params: SamplingParams) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents."""
        width, height, num_frames = self._size(params)
        latent_frames = (num_frames - 1) // self.temporal_ratio + 1
        return self.channels, latent_frames, height // self.spatial_ratio, width // self.spatial_ratio

    def num_tokens(self, latent_shape: tuple[int, int, int, int]) -> int:
        """Tokens that the transformer makes of latents (C, T, H, W)."""
        return math.prod(latent_shape[1:]) // math.prod(self.patch_size)

    def first_frame(self, latent_frame: int) -> int:
        """The first video frame of a latent frame: the first latent frame holds one, each other `temporal_ratio`."""
        return 0 if latent_frame == 0 else 1 + (latent_frame - 1) * self.temporal_ratio

    @staticmethod
    def _size(params: SamplingParams) -> tuple[int, int, int]:
        for name in ("width", "height", "num_frames"):
            if getattr(params, name) is None:
                raise MissingParameter(f"{name}: missing, and the model has no default for it", param=name)
        assert params.width is not None and params.height is not None and params.num_frames is not None
        return params.width, params.height, params.num_frames
