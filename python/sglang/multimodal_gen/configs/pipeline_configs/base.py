"""`PipelineConfig`: what a family's pipeline needs to know beyond its checkpoint; data only, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.teacache import TeaCacheFit


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
    transformer: type[TransformerConfig] | None = None
    """What reads `transformer/config.json`, for choosing a layout before anything loads; None: nothing is known."""
    temporal_ratio: int = 1
    """Frames of a latent frame behind the first."""
    spatial_ratio: int = 8
    """Pixels along each side of a latent cell."""
    reference_images: int = 0
    """Input images that are tokens beside those of the result, as many for each."""
    guided_by: tuple[str, ...] = ("guidance_scale",)
    """Which parameter switches guidance with a second row on, the first that is set: where it is more than
    `guided_above`."""
    guided_above: float = 1.0
    guided_by_negative_prompts_alone: bool = False
    """Whether only a negative prompt makes the second row."""
    teacache: TeaCacheFit | None = None
    """What is published for TeaCache; None: requests bring it themselves."""

    def num_rows(self, params: SamplingParams) -> int:
        """Forwards of a step of one request."""
        scales = (getattr(params, name) for name in self.guided_by)
        scale = next((value for value in scales if value is not None), 1.0)
        if scale <= self.guided_above:
            return 1
        return 1 if self.guided_by_negative_prompts_alone and params.negative_prompt is None else 2
