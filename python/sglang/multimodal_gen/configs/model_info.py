"""What only a loaded checkpoint knows, as the workers tell it to every other process."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import FramesNotSupported, SizeNotDivisible, SizeTooLarge


class TaskLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What sizes the loaded model can do; checked at the door so that no bad request reaches a worker."""

    size_multiple: int
    max_pixels: int
    frame_stride: int
    max_frames: int
    max_sequence_length: int

    def check(self, params: SamplingParams) -> None:
        """Raises SizeTooLarge, SizeNotDivisible or FramesNotSupported for complete parameters out of these limits."""
        width, height, num_frames = params.width, params.height, params.num_frames
        assert width is not None and height is not None and num_frames is not None, "defaults are merged in"
        if width * height > self.max_pixels:
            raise SizeTooLarge(
                f"size: got {width}x{height}, which is {width * height} pixels, accepted are at most "
                f"{self.max_pixels} pixels",
                param="size",
            )
        if width % self.size_multiple or height % self.size_multiple:
            raise SizeNotDivisible(width=width, height=height, multiple=self.size_multiple)
        if num_frames > self.max_frames or (num_frames - 1) % self.frame_stride:
            raise FramesNotSupported(num_frames, stride=self.frame_stride, maximum=self.max_frames)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What only the checkpoint knows, told by a worker once it has loaded. `defaults` fill unset SamplingParams."""

    name: str
    pipeline_class: str
    tasks: tuple[str, ...]
    precision: str
    device: str
    num_parameters: int
    weight_bytes: int
    load_seconds: float
    limits: TaskLimits
    defaults: SamplingParams
