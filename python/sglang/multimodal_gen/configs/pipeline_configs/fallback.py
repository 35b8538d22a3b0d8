"""What is known of the models that diffusers runs beyond what their pipelines say themselves."""

from __future__ import annotations

from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig

# A pipeline that makes images refuses frames itself, with a sentence that says so.
FALLBACK = PipelineConfig(max_frames=100_000)

FRAMES_PER_SECOND = {
    "AllegroPipeline": 15,
    "AnimateDiffPipeline": 8,
    "CogVideoXPipeline": 8,
    "CogVideoXImageToVideoPipeline": 8,
    "LattePipeline": 8,
    "MochiPipeline": 30,
    "SanaVideoPipeline": 16,
    "WanPipeline": 16,
    "WanImageToVideoPipeline": 16,
}
"""Of the published videos, by pipeline class, where the call itself has no frame rate."""
