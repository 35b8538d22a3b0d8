"""FLUX.1 text to image. Source: https://github.com/black-forest-labs/flux"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_PICTURE, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.flux import FluxTransformerConfig
from sglang.multimodal_gen.configs.models.encoders import CLIPTextConfig, T5EncoderConfig
from sglang.multimodal_gen.configs.models.vaes.autoencoder_kl import AutoencoderKLConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.runtime.layers.rotary import grid_positions, rotary_table
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache
from sglang.multimodal_gen.runtime.loader.component_loader import (
    ComponentLoader,
    NativeEncoder,
    NativeModule,
    SchedulerConfig,
    Tokenizer,
)
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.models.dits.flux import FluxTransformer2DModel
from sglang.multimodal_gen.runtime.models.encoders.clip_text import CLIPTextModel
from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel
from sglang.multimodal_gen.runtime.models.schedulers.shifting import spaced_to_last
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl import AutoencoderKL
from sglang.multimodal_gen.runtime.pipelines.flux_workloads import FLUX_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, DistilledDenoiser, Row, pack, unpack
from sglang.multimodal_gen.runtime.pipelines_core.fitting import require_equal
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import DistilledGuidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.picture_pipeline_base import PicturePipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import encoder_memory
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Prompt, TextCondition
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import hold_outside_mask
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.text_encoders import PooledCLIP, T5Sequence
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload

PATCH_SIZE = 2
"""Latent cells along each side of a token."""


class FluxPrompts:
    """T5's states, padding included and never masked, and CLIP's vector. See PromptEncoder."""

    def __init__(self, t5: T5Sequence, clip: PooledCLIP, *, max_sequence_length: int, dtype: torch.dtype) -> None:
        self.t5 = t5
        self.clip = clip
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self.memory = encoder_memory(t5.text_encoder.config, dtype.itemsize)

    def clean(self, text: str) -> str:
        """See PromptEncoder: texts are taken as they are."""
        return text

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder."""
        tokens = self.t5.tokenizer(text, max_length=max_length)
        return Prompt(
            ids=tokens.ids, num_tokens=tokens.num_tokens, pooled_ids=(self.clip.ids(text),), max_length=max_length
        )

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; prompts of one maximal length share a forward."""
        pooled = self.clip.pooled([prompt.pooled_ids[0] for prompt in prompts]).to(self.dtype)
        found: dict[int, TextCondition] = {}
        for length in {prompt.max_length for prompt in prompts}:
            rows = [row for row, prompt in enumerate(prompts) if prompt.max_length == length]
            states = self.t5.hidden_states([prompts[row].ids for row in rows], length).to(self.dtype)
            for row, embeds in zip(rows, states, strict=True):
                found[row] = TextCondition(embeds.clone(), length, pooled[row].clone())
        return [found[row] for row in range(len(prompts))]

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.memory.row_bytes(self.max_sequence_length)


class FluxDenoiser(DistilledDenoiser):
    """The velocity of image latents, packed to tokens of 2x2 cells."""

    transformer: FluxTransformer2DModel

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, _ = self.stacked_text(rows)
        latents = self.stacked_latents(rows)
        grid = (1, latents.shape[3] // PATCH_SIZE, latents.shape[4] // PATCH_SIZE)
        tokens = self.transformer(
            self.input_tokens(pack(latents), rows),
            self.timesteps(rows),
            text,
            self.stacked_pooled(rows),
            self.rotary_table(text.shape[1], grid[1:], rows),
            self.guidance(rows),
            self.embedded(rows),
        )
        return list(unpack(tokens[:, : grid[1] * grid[2]], grid))

    def input_tokens(self, latents: Tensor, rows: Sequence[Row]) -> Tensor:
        """Packed latents [B, S, C] -> what the transformer reads: [B, S', C'], whose first S tokens are predicted."""
        return latents

    def rotary_table(self, num_text_tokens: int, grid: tuple[int, int], rows: Sequence[Row]) -> Tensor:
        """Of the text and of all input tokens; `grid` are those of the picture that is made."""
        return flux_rotary_table(num_text_tokens, (grid,), self.transformer.config.axes_dims_rope, self.device)


@table_cache(16)
def flux_rotary_table(
    num_text_tokens: int,
    grids: tuple[tuple[int, int], ...],
    axes_dim: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Table [1, L + S, 1, E/2, 2] of text, all at position 0, and of pictures one after the other: index, row, column.

    `grids` are the pictures' tokens along height and width.
    """
    # A table made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        positions = [torch.zeros(num_text_tokens, 3, dtype=torch.long)]
        for index, grid in enumerate(grids):
            cells = grid_positions(1, *grid)
            cells[:, 0] = index
            positions.append(cells)
        return rotary_table(torch.cat(positions), axes_dim).to(device)


class FluxPipeline(PicturePipelineBase):
    """Text to image with FLUX.1 dev, schnell and their fine-tunes."""

    own_parameters: ClassVar[frozenset[str]] = frozenset({"true_cfg_scale"})
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        "tokenizer": Tokenizer(),
        "tokenizer_2": Tokenizer(),
        "text_encoder": NativeEncoder(CLIPTextModel, CLIPTextConfig),
        "text_encoder_2": NativeEncoder(T5EncoderModel, T5EncoderConfig),
        "transformer": NativeModule(FluxTransformer2DModel, FluxTransformerConfig),
        "vae": NativeModule(AutoencoderKL, AutoencoderKLConfig),
        "scheduler": SchedulerConfig(),
    }
    workloads: ClassVar[Mapping[str, Workload]] = FLUX_WORKLOADS
    tokenizer: PromptTokenizer
    tokenizer_2: PromptTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel
    scheduler: dict[str, Any]

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry = DistilledGuidance(), self.geometry()
        denoiser = FluxDenoiser(self.transformer, geometry=geometry, **self.denoiser_options())
        return [
            TextEncodingStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            self.initial_image(),
            LatentPreparationStage(geometry, self.device),
            self.timesteps(denoiser),
            DenoisingStage(denoiser, guidance=guidance, free_bytes=self.free_bytes, constraint=hold_outside_mask),
            self.decoding(geometry),
        ]

    def prompt_encoder(self) -> FluxPrompts:
        """Both text encoders."""
        return FluxPrompts(
            T5Sequence(self.tokenizer_2, self.text_encoder_2, masks=False),
            PooledCLIP(self.tokenizer, self.text_encoder),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def denoiser_options(self) -> dict[str, Any]:
        """What each denoiser over this transformer is made with."""
        memory = TransformerMemory(
            hidden_size=self.transformer.config.hidden_size,
            ffn_dim=5 * self.transformer.config.hidden_size,  # attention and MLP side by side in a single block
            element_size=self.dtype.itemsize,
        )
        return {"memory": memory, "max_sequence_length": self.config.max_sequence_length, "dtype": self.dtype}

    def timesteps(self, denoiser: Denoiser) -> TimestepPreparationStage:
        """The shift depends on the size, not on pictures beside the one that is made."""
        return TimestepPreparationStage(
            self.scheduler,
            schedulers=self.config.schedulers,
            default=self.defaults.scheduler,
            spacing=spaced_to_last,
            num_tokens=denoiser.output_tokens,
        )

    def check_components(self) -> None:
        transformer, vae = self.transformer.config, self.vae.config
        t5, clip = self.text_encoder_2.config, self.text_encoder.config
        channels = vae.latent_channels * PATCH_SIZE**2
        require_equal(
            (
                ("transformer.in_channels", transformer.in_channels, self.input_channels(), "the pipeline's input"),
                ("transformer.out_channels", transformer.num_output_channels, channels, "4 x vae.latent_channels"),
                (
                    "transformer.joint_attention_dim",
                    transformer.joint_attention_dim,
                    t5.d_model,
                    "text_encoder_2.d_model",
                ),
                (
                    "transformer.pooled_projection_dim",
                    transformer.pooled_projection_dim,
                    clip.hidden_size,
                    "text_encoder.hidden_size",
                ),
            )
        )

    def input_channels(self) -> int:
        """Channels of an input token: the noisy latents alone."""
        return PATCH_SIZE**2 * self.vae.config.latent_channels

    def geometry(self) -> VideoGeometry:
        """How pixels map to latents and tokens."""
        return self.geometry_of({"transformer": self.transformer.config, "vae": self.vae.config}, self.config)

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        transformer = configs["transformer"]
        assert isinstance(transformer, FluxTransformerConfig), "as `components` says"
        return VideoGeometry.of_pictures(
            channels=transformer.num_output_channels // PATCH_SIZE**2,
            spatial_ratio=cls.vae_config(configs).spatial_ratio,
            patch_size=PATCH_SIZE,
            max_pixels=config.max_pixels,
        )

    def limits(self) -> TaskLimits:
        return self.geometry().limits(max_sequence_length=self.config.max_sequence_length, inputs=STARTS_FROM_A_PICTURE)
