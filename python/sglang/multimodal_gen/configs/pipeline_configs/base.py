"""`PipelineConfig`: what a family's pipeline needs to know beyond its checkpoint; data only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Tasks and sampling defaults of one published model or family."""

    tasks: tuple[str, ...] = ()
    defaults: SamplingParams = SamplingParams()
    max_pixels: int = 4096 * 4096
    max_frames: int = 1
