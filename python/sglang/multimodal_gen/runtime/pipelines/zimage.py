"""Z-Image and Z-Image-Turbo, text to image. Source: https://github.com/Tongyi-MAI/Z-Image"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_PICTURE, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.zimage import ZImageTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.autoencoder_kl import AutoencoderKLConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.loader.chat_tokenizer import ChatPromptTokenizer, ChatTokenizer
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader, NativeModule, SchedulerConfig
from sglang.multimodal_gen.runtime.loader.library_module import transformers_module
from sglang.multimodal_gen.runtime.models.dits.zimage import TOKEN_MULTIPLE, ZImageTransformer2DModel, padded_length
from sglang.multimodal_gen.runtime.models.schedulers.shifting import spaced_to_last
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl import AutoencoderKL
from sglang.multimodal_gen.runtime.pipelines.zimage_workloads import Z_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, Row
from sglang.multimodal_gen.runtime.pipelines_core.fitting import require_equal
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import (
    ClassifierFreeGuidance,
    guidance_scale,
    length_capped,
)
from sglang.multimodal_gen.runtime.pipelines_core.library_encoders import LanguageModelStates
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.picture_pipeline_base import PicturePipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Prompt, Req, TextCondition
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import hold_outside_mask
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload

_THOUSAND = 1000.0
_TEXT_LAYER = -2
"""The language model's last layer predicts words; the one before says more of the whole text."""


class ZImagePrompts:
    """The states of the prompt as a user's message, as many as it has tokens. See PromptEncoder."""

    def __init__(
        self, tokenizer: ChatPromptTokenizer, encoder: LanguageModelStates, *, max_sequence_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.max_sequence_length = max_sequence_length

    def clean(self, text: str) -> str:
        """See PromptEncoder: texts are taken as they are."""
        return text

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder."""
        tokens = self.tokenizer(text, max_length=max_length)
        return Prompt(ids=tokens.ids, num_tokens=tokens.num_tokens)

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; all texts in one forward."""
        states = self.encoder.hidden_states([prompt.ids for prompt in prompts])
        return [TextCondition(embeds, len(embeds)) for embeds in states]

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.encoder.memory.row_bytes(num_tokens)


class ZImageGuidance(ClassifierFreeGuidance):
    """Steps on from the conditional prediction, so that a scale of 0 is off, up to a moment and up to a length.

    `cfg_truncation` is the time, from 0 at noise to 1, behind which steps are no longer guided.
    """

    def uses_negative(self, params: SamplingParams) -> bool:
        return self.scale(params) > 0

    def is_on(self, req: Req) -> bool:
        last = req.params.cfg_truncation
        assert req.sampler_state is not None, "prepared at admission"
        # Rounded as the network's own time is, since a step may lie on the border.
        time = np.float32(_THOUSAND - req.sampler_state.timestep) / np.float32(_THOUSAND)
        return last is None or bool(time <= last)

    def combine(self, predictions: Sequence[Tensor], req: Req) -> Tensor:
        guided = super().combine(predictions, req)
        longest = req.params.cfg_normalization or 0.0
        if len(predictions) == 1 or longest == 0:
            return guided
        return length_capped(guided, predictions[0].float(), longest)

    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The two predictions [C, T, H, W] as one."""
        return conditional + scale * (conditional - unconditional)


class ZImageDenoiser(Denoiser):
    """The velocity of image latents; the network's own points from noise to data and its time runs that way."""

    transformer: ZImageTransformer2DModel

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, lengths = self.stacked_text(rows)
        time = _from_noise(self.timesteps(rows))
        return list(-self.transformer(self.stacked_latents(rows), time, text, lengths, self.embedded(rows)))

    def embed_text(self, row: Row) -> Tensor:
        """See Denoiser: captions as blocks of their own have refined them."""
        return self.transformer.embed_text(*self.stacked_text([row]))[0]

    def embed_steps(self, row: Row, timesteps: Sequence[float]) -> Tensor:
        """See Denoiser."""
        return self.transformer.embed_steps(_from_noise(self.numbers(timesteps)))

    def batch_key(self, req: Req) -> str:
        """Captions of any length share a forward."""
        return "captions"

    def num_text_tokens(self, req: Req) -> int:
        """Those of the longer prompt, padded."""
        prompts = [prompt for prompt in (req.prompt, req.negative_prompt) if prompt is not None]
        return padded_length(max(len(prompt.ids) for prompt in prompts))

    def row_bytes(self, req: Req) -> int:
        """Image and caption are one sequence."""
        return self.memory.row_bytes(padded_length(self.num_tokens(req)) + self.num_text_tokens(req))

    def cached_bytes(self, req: Req) -> int:
        """See Denoiser; padding of the image counts as image."""
        return padded_length(self.num_tokens(req)) * self.memory.hidden_size * self.memory.element_size


def _from_noise(timesteps: Tensor) -> Tensor:
    """Timesteps from 1000 (noise) to 0 -> from 0 (noise) to 1."""
    return (_THOUSAND - timesteps) / _THOUSAND


class ZImagePipeline(PicturePipelineBase):
    """Text to image with Z-Image, Z-Image-Turbo and their fine-tunes."""

    own_parameters: ClassVar[frozenset[str]] = frozenset({"cfg_normalization", "cfg_truncation"})
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        "tokenizer": ChatTokenizer(options=(("enable_thinking", True),)),
        "text_encoder": transformers_module("Qwen3Model", "Qwen3ForCausalLM", part="base_model"),
        "transformer": NativeModule(ZImageTransformer2DModel, ZImageTransformerConfig),
        "vae": NativeModule(AutoencoderKL, AutoencoderKLConfig),
        "scheduler": SchedulerConfig(),
    }
    workloads: ClassVar[Mapping[str, Workload]] = Z_IMAGE_WORKLOADS
    tokenizer: ChatPromptTokenizer
    text_encoder: Any
    transformer: ZImageTransformer2DModel
    scheduler: dict[str, Any]

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry = ZImageGuidance(guidance_scale), self.geometry()
        denoiser = self.denoiser(geometry)
        return [
            TextEncodingStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            self.initial_image(),
            LatentPreparationStage(geometry, self.device),
            TimestepPreparationStage(
                self.scheduler,
                schedulers=self.config.schedulers,
                default=self.defaults.scheduler,
                spacing=spaced_to_last,
                num_tokens=denoiser.output_tokens,
            ),
            DenoisingStage(denoiser, guidance=guidance, free_bytes=self.free_bytes, constraint=hold_outside_mask),
            self.decoding(geometry),
        ]

    def prompt_encoder(self) -> ZImagePrompts:
        """The language model."""
        encoder = LanguageModelStates(self.text_encoder, layer=_TEXT_LAYER, dtype=self.dtype)
        return ZImagePrompts(self.tokenizer, encoder, max_sequence_length=self.max_sequence_length)

    def denoiser(self, geometry: VideoGeometry) -> ZImageDenoiser:
        """The transformer."""
        config = self.transformer.config
        return ZImageDenoiser(
            self.transformer,
            geometry=geometry,
            memory=TransformerMemory(hidden_size=config.dim, ffn_dim=config.ffn_dim, element_size=self.dtype.itemsize),
            max_sequence_length=self.max_sequence_length,
            dtype=self.dtype,
        )

    def check_components(self) -> None:
        transformer, vae, text = self.transformer.config, self.vae.config, self.text_encoder.config
        require_equal(
            (
                ("transformer.in_channels", transformer.in_channels, vae.latent_channels, "vae.latent_channels"),
                ("transformer.cap_feat_dim", transformer.cap_feat_dim, text.hidden_size, "text_encoder.hidden_size"),
            )
        )

    @property
    def max_sequence_length(self) -> int:
        """Caption tokens that were trained with and have positions, with one left for the image behind them."""
        positions = (self.transformer.config.axes_lens[0] - 2) // TOKEN_MULTIPLE * TOKEN_MULTIPLE
        return min(self.config.max_sequence_length, positions)

    def geometry(self) -> VideoGeometry:
        """How pixels map to latents and tokens."""
        found = self.geometry_of({"transformer": self.transformer.config, "vae": self.vae.config}, self.config)
        positions = min(self.transformer.config.axes_lens[1:])
        return dataclasses.replace(found, max_side=positions * self.transformer.config.patch_size * found.spatial_ratio)

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        transformer = configs["transformer"]
        assert isinstance(transformer, ZImageTransformerConfig), "as `components` says"
        return VideoGeometry.of_pictures(
            channels=transformer.in_channels,
            spatial_ratio=cls.vae_config(configs).spatial_ratio,
            patch_size=transformer.patch_size,
            max_pixels=config.max_pixels,
        )

    def limits(self) -> TaskLimits:
        return self.geometry().limits(max_sequence_length=self.max_sequence_length, inputs=STARTS_FROM_A_PICTURE)
