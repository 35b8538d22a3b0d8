"""What only a loaded checkpoint knows, as the workers tell it to every other process."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams


class TaskLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What sizes the loaded model can do; checked at the door so that no bad request reaches a worker."""

    size_multiple: int
    max_pixels: int
    frame_stride: int
    max_frames: int
    max_sequence_length: int


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
