"""HunyuanVideo text to video. Source: arXiv:2412.03603, https://github.com/Tencent/HunyuanVideo"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_CLIP, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.hunyuan_video import TOKEN_REPLACE, HunyuanVideoTransformerConfig
from sglang.multimodal_gen.configs.models.encoders import CLIPTextConfig
from sglang.multimodal_gen.configs.models.vaes.hunyuan_video import HunyuanVideoVAEConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.runtime.layers.step_embedding import StepTable
from sglang.multimodal_gen.runtime.loader.component_loader import (
    ComponentLoader,
    NativeEncoder,
    NativeModule,
    SchedulerConfig,
    Tokenizer,
)
from sglang.multimodal_gen.runtime.loader.library_module import transformers_module
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from sglang.multimodal_gen.runtime.models.encoders.clip_text import CLIPTextModel
from sglang.multimodal_gen.runtime.models.schedulers.shifting import spaced_to_end
from sglang.multimodal_gen.runtime.models.vaes.hunyuan_video_vae import AutoencoderKLHunyuanVideo
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video_prompts import HunyuanVideoPrompts
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video_workloads import HUNYUAN_VIDEO_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import DistilledDenoiser, Row
from sglang.multimodal_gen.runtime.pipelines_core.fitting import require_equal
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import DistilledGuidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory, TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import PieceDecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import InitialImageStage, hold_outside_mask
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.text_encoders import PooledCLIP
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload

# Between two pieces of a clip the last four frames of the earlier one wait to be blended.
_WAITING_CHANNELS = 4 * 3


class HunyuanVideoDenoiser(DistilledDenoiser):
    """The velocity of video latents. Texts of any lengths share a forward, since the model masks their padding."""

    transformer: HunyuanVideoTransformer3DModel

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, lengths = self.stacked_text(rows)
        return self.transformer(
            self.model_input(rows),
            self.timesteps(rows),
            text,
            lengths,
            self.stacked_pooled(rows),
            self.guidance(rows),
            self.embedded(rows),
        )

    @property
    def step_table(self) -> StepTable | None:
        """See Denoiser: a transformer that is given the first frame has two embeddings of a step."""
        is_given_frame = self.transformer.config.image_condition_type == TOKEN_REPLACE
        return None if is_given_frame else self.transformer.step_table

    def model_input(self, rows: Sequence[Row]) -> Tensor:
        """What the transformer sees of the latents and beside them: [B, C_in, T, H, W]."""
        return self.stacked_latents(rows)

    def batch_key(self, req: Req) -> str:
        """See Denoiser."""
        return "text"


class HunyuanVideoPipeline(ComposedPipelineBase):
    """Text to video with HunyuanVideo and its fine-tunes; one frame gives an image."""

    own_parameters: ClassVar[frozenset[str]] = frozenset({"true_cfg_scale"})
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        "tokenizer": Tokenizer(),
        "tokenizer_2": Tokenizer(),
        "text_encoder": transformers_module("LlamaModel"),
        "text_encoder_2": NativeEncoder(CLIPTextModel, CLIPTextConfig),
        "transformer": NativeModule(HunyuanVideoTransformer3DModel, HunyuanVideoTransformerConfig),
        "vae": NativeModule(AutoencoderKLHunyuanVideo, HunyuanVideoVAEConfig),
        "scheduler": SchedulerConfig(),
    }
    workloads: ClassVar[Mapping[str, Workload]] = HUNYUAN_VIDEO_WORKLOADS
    condition_types: ClassVar[Mapping[str | None, Any]] = {None: HunyuanVideoDenoiser}
    """The transformer's `image_condition_type`s that the pipeline serves, and what denoises with each."""
    tokenizer: PromptTokenizer
    tokenizer_2: PromptTokenizer
    text_encoder: Any
    text_encoder_2: CLIPTextModel
    transformer: HunyuanVideoTransformer3DModel
    vae: AutoencoderKLHunyuanVideo
    scheduler: dict[str, Any]

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry = DistilledGuidance(), self.geometry()
        return [
            TextEncodingStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            *self.starting_stages(),
            LatentPreparationStage(geometry, self.device),
            self.timesteps(),
            DenoisingStage(
                self.denoiser(geometry), guidance=guidance, free_bytes=self.free_bytes, constraint=hold_outside_mask
            ),
            self.decoding(geometry),
        ]

    def starting_stages(self) -> list[Stage]:
        """What a clip, or a picture for a single frame, starts from instead of noise alone."""
        dtype = self.vae.post_quant_conv.weight.dtype
        memory = self.decoder_memory_of({"vae": self.vae.config}, dtype.itemsize)
        return [InitialImageStage(self.vae, memory=memory, device=self.device, dtype=dtype, samples=False)]

    def prompt_encoder(self) -> HunyuanVideoPrompts:
        """Both text encoders."""
        return HunyuanVideoPrompts(
            self.tokenizer,
            self.text_encoder,
            PooledCLIP(self.tokenizer_2, self.text_encoder_2),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def timesteps(self) -> TimestepPreparationStage:
        """The schedule."""
        return TimestepPreparationStage(
            self.scheduler,
            schedulers=self.config.schedulers,
            default=self.defaults.scheduler,
            spacing=spaced_to_end,
        )

    def denoiser(self, geometry: VideoGeometry) -> HunyuanVideoDenoiser:
        """The transformer."""
        config = self.transformer.config
        denoiser: HunyuanVideoDenoiser = self.condition_types[config.image_condition_type](
            self.transformer,
            geometry=geometry,
            memory=TransformerMemory(
                hidden_size=config.hidden_size,
                ffn_dim=config.hidden_size + config.ffn_dim,  # attention and MLP side by side in a single block
                element_size=self.dtype.itemsize,
            ),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )
        return denoiser

    def decoding(self, geometry: VideoGeometry, *, skipped_frames: int = 0) -> PieceDecodingStage:
        """The autoencoder's half."""
        dtype = self.vae.post_quant_conv.weight.dtype
        return PieceDecodingStage(
            self.vae,
            geometry=geometry,
            memory=self.decoder_memory_of({"vae": self.vae.config}, dtype.itemsize),
            free_bytes=self.free_bytes,
            dtype=dtype,
            skipped_frames=skipped_frames,
        )

    def check_components(self) -> None:
        transformer, vae = self.transformer.config, self.vae.config
        if transformer.image_condition_type not in self.condition_types:
            accepted = ", ".join("null" if kind is None else kind for kind in self.condition_types)
            raise UnsupportedModel(
                f"transformer/config.json says image_condition_type: {transformer.image_condition_type}; "
                f"{type(self).__name__} takes {accepted}"
            )
        encoder = getattr(self.text_encoder.config, "text_config", self.text_encoder.config)
        pooled = self.text_encoder_2.config.hidden_size
        channels = self.model_channels(transformer, vae.latent_channels)
        require_equal(
            (
                ("transformer.in_channels", transformer.in_channels, channels, "vae.latent_channels"),
                (
                    "transformer.out_channels",
                    transformer.num_output_channels,
                    vae.latent_channels,
                    "vae.latent_channels",
                ),
                (
                    "transformer.text_embed_dim",
                    transformer.text_embed_dim,
                    encoder.hidden_size,
                    "text_encoder.hidden_size",
                ),
                ("transformer.pooled_projection_dim", transformer.pooled_projection_dim, pooled, "text_encoder_2"),
            )
        )

    @classmethod
    def model_channels(cls, transformer: HunyuanVideoTransformerConfig, latent_channels: int) -> int:
        """What the transformer sees at each latent cell."""
        return latent_channels

    def geometry(self) -> VideoGeometry:
        """How pixels map to latents and tokens."""
        return self.geometry_of({"transformer": self.transformer.config, "vae": self.vae.config}, self.config)

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        transformer, vae = configs["transformer"], configs["vae"]
        assert isinstance(transformer, HunyuanVideoTransformerConfig), "as `components` says"
        assert isinstance(vae, HunyuanVideoVAEConfig), "as `components` says"
        return cls.geometry_class(transformer)(
            channels=vae.latent_channels,
            spatial_ratio=vae.spatial_compression_ratio,
            temporal_ratio=vae.temporal_compression_ratio,
            patch_size=transformer.patch,
            max_pixels=config.max_pixels,
            max_frames=config.max_frames,
        )

    @classmethod
    def geometry_class(cls, transformer: HunyuanVideoTransformerConfig) -> type[VideoGeometry]:
        """How frames map to latents."""
        return VideoGeometry

    def limits(self) -> TaskLimits:
        return self.geometry().limits(
            max_sequence_length=self.config.max_sequence_length,
            inputs=STARTS_FROM_A_CLIP,
            takes_length_from_video=True,
        )

    @classmethod
    def decoder_memory_of(cls, configs: Mapping[str, ModelConfig], element_size: int) -> DecoderMemory:
        config = configs["vae"]
        assert isinstance(config, HunyuanVideoVAEConfig), "as `components` says"
        # The last stage gets the second width at full size and narrows it to the first.
        return DecoderMemory(
            channels=max(config.block_out_channels[:2]),
            carried_channels=_WAITING_CHANNELS,
            patch_size=1,
            element_size=element_size,
        )
