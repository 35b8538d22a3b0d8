"""`PipelineConfig`: what a family's pipeline needs to know beyond its checkpoint; data only, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Tasks, limits and sampling defaults of one published model or family."""

    tasks: tuple[str, ...] = ()
    defaults: SamplingParams = field(default_factory=SamplingParams)
    max_pixels: int = 4096 * 4096
    """Width times height of one frame."""
    max_frames: int = 1
    max_sequence_length: int = 512
    """Text tokens that the model was trained with; requests may ask for fewer."""
    fp32_components: tuple[str, ...] = ()
    """Components that compute in fp32 whatever precision the rest has."""
    schedulers: tuple[str, ...] = ()
    """Names of the samplers that requests may choose besides the checkpoint's own; empty: all that can do the model."""
