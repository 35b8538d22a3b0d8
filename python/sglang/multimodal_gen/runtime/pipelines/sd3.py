"""Stable Diffusion 3 and 3.5, text to image. Source: arXiv:2403.03206, https://github.com/Stability-AI/sd3.5"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_PICTURE, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.sd3 import SD3TransformerConfig
from sglang.multimodal_gen.configs.models.encoders import CLIPTextConfig, T5EncoderConfig
from sglang.multimodal_gen.configs.models.vaes.autoencoder_kl import AutoencoderKLConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.errors import InvalidValue, UnsupportedModel
from sglang.multimodal_gen.runtime.loader.component_loader import (
    ComponentLoader,
    NativeEncoder,
    NativeModule,
    SchedulerConfig,
    Tokenizer,
)
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.models.dits.sd3 import SD3Transformer2DModel
from sglang.multimodal_gen.runtime.models.encoders.clip_text import CLIPTextModelWithProjection
from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl import AutoencoderKL
from sglang.multimodal_gen.runtime.pipelines.sd3_workloads import SD3_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, Row
from sglang.multimodal_gen.runtime.pipelines_core.fitting import require_equal
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import SkipLayerGuidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.picture_pipeline_base import PicturePipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import encoder_memory
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Prompt, Req, TextCondition
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import hold_outside_mask
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.text_encoders import ProjectedCLIP, T5Sequence
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload

_MLP_RATIO = 4


class SD3Prompts:
    """Two CLIPs side by side, zeros up to the width of T5, and T5's states behind them. See PromptEncoder.

    Without T5 there are zeros in its place. No padding is masked. The vector is that of both CLIPs.
    """

    def __init__(
        self,
        clips: tuple[ProjectedCLIP, ProjectedCLIP],
        t5: T5Sequence | None,
        *,
        width: int,
        max_sequence_length: int,
        dtype: torch.dtype,
    ) -> None:
        self.clips = clips
        self.t5 = t5
        self.width = width
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        largest = clips[1].text_encoder if t5 is None else t5.text_encoder
        self.memory = encoder_memory(largest.config, dtype.itemsize)

    def clean(self, text: str) -> str:
        """See PromptEncoder: texts are taken as they are."""
        return text

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder; what counts as cut is what no encoder sees."""
        if self.t5 is None:
            tokens = self.clips[0].tokenizer(text, max_length=self.clips[0].max_length)
        else:
            tokens = self.t5.tokenizer(text, max_length=max_length)
        return Prompt(
            ids=tokens.ids,
            num_tokens=tokens.num_tokens,
            pooled_ids=tuple(clip.ids(text) for clip in self.clips),
            max_length=max_length,
        )

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; CLIP sees all prompts at once, T5 those of one maximal length."""
        skipped = [prompt.options[0] if prompt.options else 0 for prompt in prompts]
        states, vectors = zip(
            *(
                clip.states([prompt.pooled_ids[which] for prompt in prompts], skipped)
                for which, clip in enumerate(self.clips)
            ),
            strict=True,
        )
        of_clips = torch.cat(states, dim=-1).to(self.dtype)
        of_clips = pad(of_clips, (0, self.width - of_clips.shape[-1]))
        pooled = torch.cat(vectors, dim=-1).to(self.dtype)
        found: dict[int, TextCondition] = {}
        for length in {prompt.max_length for prompt in prompts}:
            rows = [row for row, prompt in enumerate(prompts) if prompt.max_length == length]
            for row, of_t5 in zip(rows, self._t5_states([prompts[row] for row in rows], length), strict=True):
                embeds = torch.cat((of_clips[row], of_t5))
                found[row] = TextCondition(embeds, len(embeds), pooled[row].clone())
        return [found[row] for row in range(len(prompts))]

    def _t5_states(self, prompts: Sequence[Prompt], length: int) -> Tensor:
        """[B, length, width]."""
        if self.t5 is None:
            return torch.zeros(len(prompts), length, self.width, dtype=self.dtype, device=self.clips[0].device)
        return self.t5.hidden_states([prompt.ids for prompt in prompts], length).to(self.dtype)

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.memory.row_bytes(self.max_sequence_length)


class SD3TextStage(TextEncodingStage):
    """Takes the prompt's CLIP states `clip_skip` layers earlier; those of the negative prompt stay as they are."""

    encoder: SD3Prompts

    def admit(self, req: Req) -> None:
        """See TextEncodingStage. Raises InvalidValue for more layers than CLIP has."""
        super().admit(req)
        skipped, most = req.params.clip_skip, min(clip.most_skipped for clip in self.encoder.clips)
        if not skipped:
            return
        if skipped > most:
            raise InvalidValue("clip_skip", skipped, f"an integer from 0 to {most} for this model")
        assert req.prompt is not None, "prepared just now"
        req.prompt = dataclasses.replace(req.prompt, options=(skipped,))


class SD3Denoiser(Denoiser):
    """The velocity of image latents."""

    transformer: SD3Transformer2DModel

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, _ = self.stacked_text(rows)
        latents = self.stacked_latents(rows).squeeze(2)
        skip_layers = [row.skipped_layers for row in rows]
        pooled = self.stacked_pooled(rows)
        velocity = self.transformer(
            latents, self.timesteps(rows), text, pooled, skip_layers, embedded=self.embedded(rows)
        )
        return list(velocity.unsqueeze(2))

    def embed_steps(self, row: Row, timesteps: Sequence[float]) -> Tensor:
        """See Denoiser."""
        assert row.text.pooled is not None, "CLIP's"
        return self.transformer.embed_steps(self.numbers(timesteps), row.text.pooled.expand(len(timesteps), -1))

    def num_text_tokens(self, req: Req) -> int:
        """Those of CLIP and T5; all that there are count."""
        assert req.prompt is not None, "prepared at admission"
        return len(req.prompt.pooled_ids[0]) + super().num_text_tokens(req)


class StableDiffusion3Pipeline(PicturePipelineBase):
    """Text to image with Stable Diffusion 3 medium, 3.5 medium, 3.5 large and their fine-tunes."""

    own_parameters: ClassVar[frozenset[str]] = frozenset(
        {
            *("clip_skip", "mu", "skip_guidance_layers"),
            *("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
        }
    )
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        "tokenizer": Tokenizer(),
        "tokenizer_2": Tokenizer(),
        "tokenizer_3": Tokenizer(),
        "text_encoder": NativeEncoder(CLIPTextModelWithProjection, CLIPTextConfig),
        "text_encoder_2": NativeEncoder(CLIPTextModelWithProjection, CLIPTextConfig),
        "text_encoder_3": NativeEncoder(T5EncoderModel, T5EncoderConfig),
        "transformer": NativeModule(SD3Transformer2DModel, SD3TransformerConfig),
        "vae": NativeModule(AutoencoderKL, AutoencoderKLConfig),
        "scheduler": SchedulerConfig(),
    }
    optional_components: ClassVar[frozenset[str]] = frozenset({"text_encoder_3", "tokenizer_3"})
    workloads: ClassVar[Mapping[str, Workload]] = SD3_WORKLOADS
    tokenizer: PromptTokenizer
    tokenizer_2: PromptTokenizer
    tokenizer_3: PromptTokenizer | None
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel | None
    transformer: SD3Transformer2DModel
    scheduler: dict[str, Any]

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry = SkipLayerGuidance(self.transformer.config.num_layers), self.geometry()
        denoiser = self.denoiser(geometry)
        return [
            SD3TextStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            self.initial_image(),
            LatentPreparationStage(geometry, self.device),
            TimestepPreparationStage(
                self.scheduler,
                schedulers=self.config.schedulers,
                default=self.defaults.scheduler,
                num_tokens=denoiser.output_tokens,
            ),
            DenoisingStage(denoiser, guidance=guidance, free_bytes=self.free_bytes, constraint=hold_outside_mask),
            self.decoding(geometry),
        ]

    def prompt_encoder(self) -> SD3Prompts:
        """The two or three text encoders."""
        t5 = None
        if self.text_encoder_3 is not None:
            assert self.tokenizer_3 is not None, "checked with the components"
            t5 = T5Sequence(self.tokenizer_3, self.text_encoder_3, masks=False)
        return SD3Prompts(
            (
                ProjectedCLIP(self.tokenizer, self.text_encoder),
                ProjectedCLIP(self.tokenizer_2, self.text_encoder_2),
            ),
            t5,
            width=self.transformer.config.joint_attention_dim,
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def denoiser(self, geometry: VideoGeometry) -> SD3Denoiser:
        """The transformer."""
        hidden_size = self.transformer.config.hidden_size
        return SD3Denoiser(
            self.transformer,
            geometry=geometry,
            memory=TransformerMemory(
                hidden_size=hidden_size, ffn_dim=_MLP_RATIO * hidden_size, element_size=self.dtype.itemsize
            ),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def check_components(self) -> None:
        transformer, latents = self.transformer.config, self.vae.config.latent_channels
        clips = (self.text_encoder.config, self.text_encoder_2.config)
        pooled = sum(config.projection_dim for config in clips)
        require_equal(
            (
                ("transformer.in_channels", transformer.in_channels, latents, "vae.latent_channels"),
                ("transformer.out_channels", transformer.num_output_channels, latents, "vae.latent_channels"),
                ("transformer.pooled_projection_dim", transformer.pooled_projection_dim, pooled, "that of both CLIPs"),
            )
        )
        if (self.text_encoder_3 is None) != (self.tokenizer_3 is None):
            raise UnsupportedModel("text_encoder_3 and tokenizer_3: one is missing; both or neither must be there")
        self._check_text_widths(sum(config.hidden_size for config in clips))

    def _check_text_widths(self, clips: int) -> None:
        width = self.transformer.config.joint_attention_dim
        t5 = width if self.text_encoder_3 is None else self.text_encoder_3.config.d_model
        if t5 != width or clips > width:
            raise UnsupportedModel(
                f"transformer.joint_attention_dim is {width}, but text_encoder_3.d_model is {t5} and both CLIPs are "
                f"{clips} wide; the first two must be equal and no less than the third"
            )

    def geometry(self) -> VideoGeometry:
        """How pixels map to latents and tokens."""
        found = self.geometry_of({"transformer": self.transformer.config, "vae": self.vae.config}, self.config)
        positions = self.transformer.config.pos_embed_max_size
        return dataclasses.replace(found, max_side=positions * self.transformer.config.patch_size * found.spatial_ratio)

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        transformer = configs["transformer"]
        assert isinstance(transformer, SD3TransformerConfig), "as `components` says"
        return VideoGeometry.of_pictures(
            channels=transformer.in_channels,
            spatial_ratio=cls.vae_config(configs).spatial_ratio,
            patch_size=transformer.patch_size,
            max_pixels=config.max_pixels,
        )

    def limits(self) -> TaskLimits:
        return self.geometry().limits(max_sequence_length=self.config.max_sequence_length, inputs=STARTS_FROM_A_PICTURE)
