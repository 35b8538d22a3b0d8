"""Wan text to video, 2.1 and the two experts of 2.2.

Source: arXiv:2503.20314, https://github.com/Wan-Video/Wan2.1, https://github.com/Wan-Video/Wan2.2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_CLIP, SizeFromImage, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.models.encoders import UMT5EncoderConfig
from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.runtime.loader.component_loader import (
    ComponentLoader,
    NativeEncoder,
    NativeModule,
    SchedulerConfig,
    Tokenizer,
)
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.encoders.umt5 import UMT5EncoderModel
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan
from sglang.multimodal_gen.runtime.pipelines.wan_experts import Boundary, LowNoiseGuidance
from sglang.multimodal_gen.runtime.pipelines.wan_workloads import WAN_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, Row
from sglang.multimodal_gen.runtime.pipelines_core.fitting import require_equal
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import ClassifierFreeGuidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory, TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.prompt_cleaning import repair_and_collapse
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import ZeroPaddedPrompts
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import Constraint, DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import InitialImageStage, hold_outside_mask
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload

_STRENGTH = 0.8
"""How far a clip that a request starts from is changed, unless it says."""


class WanDenoiser(Denoiser):
    """The velocity of video latents, steered by text."""

    transformer: WanTransformer3DModel
    num_image_tokens: int = 0
    """Of pictures that the transformer is told apart from the text."""

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, lengths = self.stacked_text(rows)
        return self.transformer(
            self.stacked_latents(rows),
            self.timesteps(rows),
            text,
            text_lengths=lengths,
            embedded=self.embedded(rows),
        )

    def embed_text(self, row: Row) -> Tensor:
        """See Denoiser: the keys and values of all blocks, of text and image."""
        text, lengths = self.stacked_text([row])
        return self.transformer.embed_text(text, self.image_embeds([row]), lengths)[0]

    def image_embeds(self, rows: Sequence[Row]) -> Tensor | None:
        """What an image encoder sees in the rows' pictures, for models that are told it."""
        return None

    def held_bytes(self, req: Req) -> int:
        """See Denoiser."""
        of_image = self.embedded_text_bytes(self.num_image_tokens) if req.embeds_ahead else 0
        return super().held_bytes(req) + of_image


class WanPipeline(ComposedPipelineBase):
    """Text to video; one frame gives an image. With `transformer_2` (Wan2.2 A14B) two experts share the steps."""

    components: ClassVar[Mapping[str, ComponentLoader]] = {
        "tokenizer": Tokenizer(),
        "text_encoder": NativeEncoder(UMT5EncoderModel, UMT5EncoderConfig),
        "transformer": NativeModule(WanTransformer3DModel, WanTransformerConfig),
        "transformer_2": NativeModule(WanTransformer3DModel, WanTransformerConfig),
        "vae": NativeModule(AutoencoderKLWan, WanVAEConfig),
        "scheduler": SchedulerConfig(),
    }
    optional_components: ClassVar[frozenset[str]] = frozenset({"transformer_2"})
    index_values: ClassVar[tuple[str, ...]] = ("boundary_ratio",)
    own_parameters: ClassVar[frozenset[str]] = frozenset({"guidance_scale_2", "boundary_ratio"})
    workloads: ClassVar[Mapping[str, Workload]] = WAN_WORKLOADS
    denoiser_class: ClassVar[type[WanDenoiser]] = WanDenoiser
    tokenizer: TextTokenizer
    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel
    transformer_2: WanTransformer3DModel | None
    vae: AutoencoderKLWan
    scheduler: dict[str, Any]
    boundary_ratio: float | None

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry = ClassifierFreeGuidance(), self.geometry()
        return [
            TextEncodingStage(self._prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            *self.starting_stages(),
            LatentPreparationStage(geometry, self.device),
            *self.picture_stages(),
            TimestepPreparationStage(
                self.scheduler,
                schedulers=self.config.schedulers,
                default=self.defaults.scheduler,
                rounds_strength_down=True,
            ),
            *self._denoising(guidance, geometry),
            DecodingStage(
                self.vae,
                geometry=geometry,
                memory=self._decoder_memory(),
                free_bytes=self.free_bytes,
                dtype=self.vae.post_quant_conv.weight.dtype,
            ),
        ]

    def starting_stages(self) -> list[Stage]:
        """What a clip, or a picture for a single frame, starts from instead of noise alone."""
        dtype = self.vae.post_quant_conv.weight.dtype
        return [
            InitialImageStage(
                self.vae,
                memory=self._decoder_memory(),
                device=self.device,
                dtype=dtype,
                samples=False,
                default_strength=_STRENGTH,
            )
        ]

    def picture_stages(self) -> list[Stage]:
        """What is made of pictures that the transformer sees beside the noise."""
        return []

    def _decoder_memory(self) -> DecoderMemory:
        return self.decoder_memory_of({"vae": self.vae.config}, self.vae.post_quant_conv.weight.element_size())

    def _denoising(self, guidance: ClassifierFreeGuidance, geometry: VideoGeometry) -> list[Stage]:
        """A stage for each expert, so that requests share forwards wherever they are with the same one."""
        constraint, free_bytes = self.constraint(), self.free_bytes
        first = self.denoiser(self.transformer, geometry)
        if self.transformer_2 is None:
            return [DenoisingStage(first, guidance=guidance, free_bytes=free_bytes, constraint=constraint)]
        assert self.boundary_ratio is not None, "checked when loaded"
        boundary = Boundary(
            ratio=self.boundary_ratio, num_train_timesteps=self.scheduler.get("num_train_timesteps", 1000)
        )
        return [
            DenoisingStage(
                first,
                guidance=guidance,
                free_bytes=free_bytes,
                steps=boundary.high_noise_steps,
                constraint=constraint,
            ),
            DenoisingStage(
                self.denoiser(self.transformer_2, geometry),
                name="denoise_2",
                guidance=LowNoiseGuidance(),
                free_bytes=free_bytes,
                steps=boundary.low_noise_steps,
                constraint=constraint,
            ),
        ]

    def read_parameters(self) -> frozenset[str]:
        return frozenset() if self.transformer_2 is None else frozenset({"guidance_scale_2", "boundary_ratio"})

    def constraint(self) -> Constraint | None:
        """What holds after each step."""
        return hold_outside_mask

    def _prompt_encoder(self) -> ZeroPaddedPrompts:
        config = self.text_encoder.config
        memory = TransformerMemory(
            hidden_size=config.d_model,
            ffn_dim=config.d_ff,
            element_size=self.dtype.itemsize,
            score_heads=config.num_heads,
        )
        return ZeroPaddedPrompts(
            self.tokenizer,
            self.text_encoder,
            clean=repair_and_collapse,
            max_sequence_length=self.config.max_sequence_length,
            memory=memory,
            dtype=self.dtype,
        )

    def denoiser(self, transformer: WanTransformer3DModel, geometry: VideoGeometry) -> WanDenoiser:
        """Of one expert."""
        config = transformer.config
        return self.denoiser_class(
            transformer,
            geometry=geometry,
            memory=TransformerMemory(
                hidden_size=config.hidden_size, ffn_dim=config.ffn_dim, element_size=self.dtype.itemsize
            ),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def check_components(self) -> None:
        if (self.transformer_2 is None) != (self.boundary_ratio is None):
            raise UnsupportedModel(
                f"model_index.json says boundary_ratio: {self.boundary_ratio}; accepted is a ratio with transformer_2, "
                "null without it"
            )
        if self.transformer_2 is not None and self.transformer_2.config != self.transformer.config:
            raise UnsupportedModel("transformer_2/config.json differs from transformer/config.json; both must be equal")
        transformer, vae, text_encoder = self.transformer.config, self.vae.config, self.text_encoder.config
        require_equal(
            (
                ("transformer.in_channels", transformer.in_channels, *self.input_channels()),
                ("transformer.out_channels", transformer.num_output_channels, vae.z_dim, "vae.z_dim"),
                ("transformer.text_dim", transformer.text_dim, text_encoder.d_model, "text_encoder.d_model"),
            )
        )
        self.check_pictures()

    def input_channels(self) -> tuple[int, str]:
        """How many channels the transformer is given, and what says so."""
        return self.vae.config.z_dim, "vae.z_dim"

    def check_pictures(self) -> None:
        """Refuse a transformer that wants other pictures than this pipeline has for it."""
        if self.transformer.config.image_dim is not None:
            raise UnsupportedModel(
                f"transformer.image_dim is {self.transformer.config.image_dim}, but text-to-video checkpoints want None"
            )

    def geometry(self) -> VideoGeometry:
        """How pixels map to latents and tokens."""
        return self.geometry_of({"transformer": self.transformer.config, "vae": self.vae.config}, self.config)

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        transformer, vae = configs["transformer"], configs["vae"]
        assert isinstance(transformer, WanTransformerConfig) and isinstance(vae, WanVAEConfig), "as `components` says"
        longest = (transformer.rope_max_seq_len * transformer.patch_size[0] - 1) * vae.temporal_ratio + 1
        return VideoGeometry(
            channels=vae.z_dim,
            spatial_ratio=vae.spatial_ratio,
            temporal_ratio=vae.temporal_ratio,
            patch_size=transformer.patch_size,
            max_pixels=config.max_pixels,
            max_frames=min(config.max_frames, longest),
        )

    def limits(self) -> TaskLimits:
        return self.geometry().limits(
            max_sequence_length=self.config.max_sequence_length,
            inputs=STARTS_FROM_A_CLIP,
            takes_length_from_video=True,
        )

    def size_from_picture(self) -> SizeFromImage | None:
        """The default size's area in a picture's own shape."""
        width, height = self.defaults.width, self.defaults.height
        if width is None or height is None:
            return None
        return SizeFromImage(area=width * height, multiple=self.geometry().size_multiple, source="first")

    @classmethod
    def decoder_memory_of(cls, configs: Mapping[str, ModelConfig], element_size: int) -> DecoderMemory:
        config = configs["vae"]
        assert isinstance(config, WanVAEConfig), "as `components` says"
        # The last stage brings `dim_mult[1]` times the base width to full size before it narrows to the base width.
        base = config.decoder_base_dim or config.base_dim
        # Each block of a stage has two causal convolutions that remember two frames, and the last one of all too. Every
        # stage further down has a quarter of the cells and at most twice the channels.
        convolutions = 2 * (config.num_res_blocks + 1) + 1
        return DecoderMemory(
            channels=base * max(config.dim_mult[:2]),
            carried_channels=2 * 2 * convolutions * base,
            patch_size=config.patch_size or 1,
            element_size=element_size,
            # The shortcuts of 2.2 are copies.
            activations=4 if config.is_residual else 3,
        )
