"""Qwen-Image text to image. Source: arXiv:2508.02324, https://github.com/QwenLM/Qwen-Image"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_PICTURE, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.qwen_image import QwenImageVAEConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.loader.component_loader import (
    ComponentLoader,
    NativeModule,
    SchedulerConfig,
    Tokenizer,
)
from sglang.multimodal_gen.runtime.loader.library_module import transformers_module
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.models.dits.qwen_image import ImageShapes, QwenImageTransformer2DModel
from sglang.multimodal_gen.runtime.models.schedulers.shifting import spaced_to_last
from sglang.multimodal_gen.runtime.models.vaes.qwen_image_vae import AutoencoderKLQwenImage
from sglang.multimodal_gen.runtime.pipelines.qwen_image_prompts import TEXT_TO_IMAGE, QwenPrompts
from sglang.multimodal_gen.runtime.pipelines.qwen_image_workloads import QWEN_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, Row, pack, unpack
from sglang.multimodal_gen.runtime.pipelines_core.fitting import require_equal
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import ClassifierFreeGuidance, guidance_scale, renormed
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory, TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import PromptEncoder
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import InitialImageStage, hold_outside_mask
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload

PICTURES = "pictures"
"""Name of the conditioning [S, C]: packed latents of the pictures that the image is made from."""
_MLP_RATIO = 4
# From this many image tokens on a forward of one row fills a GPU, and attention without a mask is worth more than a
# larger batch; below, rows of unequal text share a forward.
_MASKED_BELOW = 1024


class RenormedGuidance(ClassifierFreeGuidance):
    """Guided predictions keep the conditional one's length, token by token.

    The scale is `true_cfg_scale` where a request says so, or else `guidance_scale`.
    """

    def __init__(self) -> None:
        super().__init__(_scale)

    def uses_negative(self, params: SamplingParams) -> bool:
        return super().uses_negative(params) and params.negative_prompt is not None

    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        guided = super().guided(conditional, unconditional, scale)
        tokens = renormed(pack(guided.unsqueeze(0)), pack(conditional.unsqueeze(0)), dim=-1)
        return unpack(tokens, _grid(conditional.shape))[0]


def _scale(params: SamplingParams) -> float:
    return guidance_scale(params) if params.true_cfg_scale is None else params.true_cfg_scale


def _grid(latent_shape: Sequence[int]) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of latents (…, T, H, W)."""
    frames, height, width = latent_shape[-3:]
    return frames, height // 2, width // 2


class QwenImageDenoiser(Denoiser):
    """The velocity of image latents, packed to tokens of 2x2 cells, which those of pictures may follow."""

    transformer: QwenImageTransformer2DModel

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        *,
        num_dropped: int,
        pictures: Callable[[Req], ImageShapes],
        **options: Any,
    ) -> None:
        """`num_dropped`: how many of a prompt's tokens do not count. `pictures`: the shapes of a request's pictures."""
        super().__init__(transformer, **options)
        self.num_dropped = num_dropped
        self.pictures = pictures

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        if self.output_tokens(rows[0].req) < _MASKED_BELOW:
            return self._predict_together(rows)
        found: dict[int, Tensor] = {}
        for length in {row.text.length for row in rows}:
            group = [index for index, row in enumerate(rows) if row.text.length == length]
            part = [rows[index] for index in group]
            with self.caching(part), self.transformer.adapters.only(group):
                found |= zip(group, self._predict_together(part), strict=True)
        return [found[index] for index in range(len(rows))]

    def _predict_together(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        text, lengths = self.stacked_text(rows)
        latents = self.stacked_latents(rows)
        grid, pictures = _grid(latents.shape), self.pictures(rows[0].req)
        tokens = pack(latents)
        if pictures:
            given = torch.stack([row.req.conditioning[PICTURES] for row in rows])
            tokens = torch.cat((tokens, given.to(tokens.dtype)), dim=1)
        constant = (0.0,) if self.transformer.config.zero_cond_t else ()
        velocity = self.transformer(
            tokens, self.timesteps(rows), text, (grid, *pictures), lengths, embedded=self.embedded(rows, *constant)
        )
        return list(unpack(velocity[:, : prod(grid)], grid))

    def embed_steps(self, row: Row, timesteps: Sequence[float]) -> Tensor:
        """See Denoiser."""
        return self.transformer.embed_steps(self.numbers(timesteps))

    def batch_key(self, req: Req) -> str:
        """See Denoiser; texts of any length share a forward."""
        return "pictures" + ",".join("x".join(map(str, shape)) for shape in self.pictures(req))

    def num_text_tokens(self, req: Req) -> int:
        """See Denoiser; those of the longer text."""
        lengths = [len(prompt.ids) for prompt in (req.prompt, req.negative_prompt) if prompt is not None]
        return max(lengths) - self.num_dropped

    def num_tokens(self, req: Req) -> int:
        """See Denoiser."""
        return self.output_tokens(req) + sum(map(prod, self.pictures(req)))

    def row_bytes(self, req: Req) -> int:
        """See Denoiser; text passes through the same blocks."""
        return self.memory.row_bytes(self.num_tokens(req) + self.num_text_tokens(req))


class QwenImagePipeline(ComposedPipelineBase):
    """Text to image with Qwen-Image and its fine-tunes."""

    own_parameters: ClassVar[frozenset[str]] = frozenset({"true_cfg_scale"})
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        "tokenizer": Tokenizer(),
        "text_encoder": transformers_module("Qwen2_5_VLForConditionalGeneration", part="model.language_model"),
        "transformer": NativeModule(QwenImageTransformer2DModel, QwenImageTransformerConfig),
        "vae": NativeModule(AutoencoderKLQwenImage, QwenImageVAEConfig),
        "scheduler": SchedulerConfig(),
    }
    workloads: ClassVar[Mapping[str, Workload]] = QWEN_IMAGE_WORKLOADS
    num_dropped: ClassVar[int] = TEXT_TO_IMAGE.num_dropped
    tokenizer: PromptTokenizer
    text_encoder: Any
    transformer: QwenImageTransformer2DModel
    vae: AutoencoderKLQwenImage
    scheduler: dict[str, Any]

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry, denoiser = RenormedGuidance(), self.geometry(), self.denoiser()
        element_size = self.vae.post_quant_conv.weight.element_size()
        return [
            TextEncodingStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            *self.picture_stages(),
            LatentPreparationStage(geometry, self.device),
            TimestepPreparationStage(
                self.scheduler,
                schedulers=self.config.schedulers,
                default=self.defaults.scheduler,
                spacing=spaced_to_last,
                num_tokens=denoiser.output_tokens,
            ),
            DenoisingStage(denoiser, guidance=guidance, free_bytes=self.free_bytes, constraint=hold_outside_mask),
            DecodingStage(
                self.vae,
                geometry=geometry,
                memory=self.decoder_memory_of({"vae": self.vae.config}, element_size),
                free_bytes=self.free_bytes,
                dtype=self.vae.post_quant_conv.weight.dtype,
            ),
        ]

    def prompt_encoder(self) -> PromptEncoder:
        """The text encoder."""
        return QwenPrompts(
            self.tokenizer, self.text_encoder, max_sequence_length=self.config.max_sequence_length, dtype=self.dtype
        )

    def picture_stages(self) -> list[Stage]:
        """What encodes the picture that the image starts from, or those that it is made from."""
        weight = self.vae.quant_conv.weight
        memory = self.decoder_memory_of({"vae": self.vae.config}, weight.element_size())
        return [InitialImageStage(self.vae, memory=memory, device=self.device, dtype=weight.dtype, samples=True)]

    def picture_shapes(self, req: Req) -> ImageShapes:
        """Tokens of those pictures."""
        return ()

    def denoiser(self) -> QwenImageDenoiser:
        """The transformer."""
        config = self.transformer.config
        return QwenImageDenoiser(
            self.transformer,
            num_dropped=self.num_dropped,
            pictures=self.picture_shapes,
            geometry=self.geometry(),
            memory=TransformerMemory(
                hidden_size=config.hidden_size,
                ffn_dim=_MLP_RATIO * config.hidden_size,
                element_size=self.dtype.itemsize,
            ),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def check_components(self) -> None:
        transformer, channels = self.transformer.config, 4 * self.vae.config.z_dim
        text_config = getattr(self.text_encoder.config, "text_config", self.text_encoder.config)
        require_equal(
            (
                ("transformer.in_channels", transformer.in_channels, channels, "4 x vae.z_dim"),
                ("transformer.out_channels", transformer.num_output_channels, channels, "4 x vae.z_dim, in all cells,"),
                (
                    "transformer.joint_attention_dim",
                    transformer.joint_attention_dim,
                    text_config.hidden_size,
                    "text_encoder.hidden_size",
                ),
            )
        )

    def geometry(self) -> VideoGeometry:
        """How pixels map to latents and tokens."""
        return self.geometry_of({"transformer": self.transformer.config, "vae": self.vae.config}, self.config)

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        transformer, vae = configs["transformer"], configs["vae"]
        assert isinstance(transformer, QwenImageTransformerConfig), "as `components` says"
        assert isinstance(vae, QwenImageVAEConfig), "as `components` says"
        return VideoGeometry.of_pictures(
            channels=vae.z_dim,
            spatial_ratio=vae.spatial_ratio,
            patch_size=transformer.patch_size,
            max_pixels=config.max_pixels,
        )

    def limits(self) -> TaskLimits:
        return self.geometry().limits(
            max_sequence_length=self.config.max_sequence_length,
            inputs=STARTS_FROM_A_PICTURE,
        )

    @classmethod
    def decoder_memory_of(cls, configs: Mapping[str, ModelConfig], element_size: int) -> DecoderMemory:
        config = configs["vae"]
        assert isinstance(config, QwenImageVAEConfig), "as `components` says"
        # The last stage brings `dim_mult[1]` times the base width to full size before it narrows to the base width.
        channels = config.base_dim * max(config.dim_mult[:2])
        return DecoderMemory(channels=channels, carried_channels=0, patch_size=1, element_size=element_size)
