"""LTX-Video: text to video, and video that begins with a given picture or clip.

Source: arXiv:2501.00103, https://github.com/Lightricks/LTX-Video
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from sglang.multimodal_gen.configs.model_info import InputLimits, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.ltx import LTXVideoTransformerConfig
from sglang.multimodal_gen.configs.models.encoders import T5EncoderConfig
from sglang.multimodal_gen.configs.models.vaes.ltx import LTXVideoVAEConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.pipeline_configs.ltx import LTXPipelineConfig
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.runtime.layers.uploads import uploaded
from sglang.multimodal_gen.runtime.loader.component_loader import (
    ComponentLoader,
    NativeEncoder,
    NativeModule,
    SchedulerConfig,
    Tokenizer,
)
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.models.dits.ltx import LTXVideoTransformer3DModel
from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel
from sglang.multimodal_gen.runtime.models.schedulers.shifting import linear_then_quadratic, spaced_to_last
from sglang.multimodal_gen.runtime.models.vaes.ltx_vae import AutoencoderKLLTXVideo, LTXClip
from sglang.multimodal_gen.runtime.pipelines.ltx_conditioning import (
    DecodeNoiseStage,
    FirstFramesStage,
    GivenFramesStage,
    after_step,
    decode_timestep,
    with_decode_noise,
)
from sglang.multimodal_gen.runtime.pipelines.ltx_denoiser import LTXConditionDenoiser, LTXDenoiser
from sglang.multimodal_gen.runtime.pipelines.ltx_workloads import LTX_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.fitting import require_equal
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import ClassifierFreeGuidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory, TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import encoder_memory
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Prompt, Req, TextCondition
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import (
    LatentPreparationStage,
    request_generator,
)
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.text_encoders import T5Sequence
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload

_ACTIVATIONS = 7
"""Of the autoencoder's widest layers that are alive at its peak on the CPU, where a convolution is a sum of slices."""


class LTXPrompts:
    """T5's states of the text's tokens; the transformer attends to no padding. See PromptEncoder.

    Where T5 does not mask its padding either, a text's states depend on the length that it is padded to.
    """

    def __init__(self, t5: T5Sequence, *, max_sequence_length: int, dtype: torch.dtype) -> None:
        self.t5 = t5
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self.memory = encoder_memory(t5.text_encoder.config, dtype.itemsize)

    def clean(self, text: str) -> str:
        """See PromptEncoder: texts are taken as they are."""
        return text

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder."""
        tokens = self.t5.tokenizer(text, max_length=max_length)
        return Prompt(ids=tokens.ids, num_tokens=tokens.num_tokens, max_length=max_length)

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; prompts of one padded length share a forward."""
        lengths = [self.padded_length(prompt, prompts) for prompt in prompts]
        found: dict[int, TextCondition] = {}
        for length in set(lengths):
            rows = [row for row, padded in enumerate(lengths) if padded == length]
            states = self.t5.hidden_states([prompts[row].ids for row in rows], length).to(self.dtype)
            for row, embeds in zip(rows, states, strict=True):
                num_tokens = len(prompts[row].ids)
                found[row] = TextCondition(embeds[:num_tokens].clone(), num_tokens)
        return [found[row] for row in range(len(prompts))]

    def padded_length(self, prompt: Prompt, prompts: Sequence[Prompt]) -> int:
        """Tokens that T5 gets: masked padding changes nothing but its time."""
        return max(len(other.ids) for other in prompts) if self.t5.masks else prompt.max_length

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.memory.row_bytes(num_tokens if self.t5.masks else self.max_sequence_length)


class LTXPipeline(ComposedPipelineBase):
    """Text to video; with a picture, which becomes the first frame, image to video."""

    reference_fits_latents: ClassVar[bool] = False
    own_parameters: ClassVar[frozenset[str]] = frozenset({"decode_timestep", "decode_noise_scale"})
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        "tokenizer": Tokenizer(),
        "text_encoder": NativeEncoder(T5EncoderModel, T5EncoderConfig),
        "transformer": NativeModule(LTXVideoTransformer3DModel, LTXVideoTransformerConfig),
        "vae": NativeModule(AutoencoderKLLTXVideo, LTXVideoVAEConfig),
        "scheduler": SchedulerConfig(),
    }
    workloads: ClassVar[Mapping[str, Workload]] = LTX_WORKLOADS
    config: LTXPipelineConfig
    tokenizer: PromptTokenizer
    text_encoder: T5EncoderModel
    transformer: LTXVideoTransformer3DModel
    vae: AutoencoderKLLTXVideo
    scheduler: dict[str, Any]
    inputs: ClassVar[InputLimits] = InputLimits(max_images=1)
    denoiser_class: ClassVar[type[LTXDenoiser]] = LTXDenoiser
    masks_text: ClassVar[bool] = False
    """Whether T5 attends to the text alone."""

    def create_pipeline_stages(self) -> list[Stage]:
        denoiser = self.denoiser()
        return [
            *self.latent_stages(),
            FirstFramesStage(),
            self.timesteps(denoiser),
            DenoisingStage(
                denoiser,
                guidance=ClassifierFreeGuidance(),
                free_bytes=self.free_bytes,
                constraint=after_step,
            ),
            *self.decoding_stages(),
        ]

    def latent_stages(self) -> list[Stage]:
        """From text and picture to the starting latents; the picture's sample is drawn before the noise."""
        noise = LatentPreparationStage(self.geometry(), self.device)
        return [self.text_encoding(), self.given_frames(), noise]

    def text_encoding(self) -> TextEncodingStage:
        """T5."""
        prompts = LTXPrompts(
            T5Sequence(self.tokenizer, self.text_encoder, masks=self.masks_text),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )
        return TextEncodingStage(prompts, guidance=ClassifierFreeGuidance(), cache=self.conditioning_cache)

    def given_frames(self) -> GivenFramesStage:
        """The autoencoder's first half."""
        return GivenFramesStage(self.vae, geometry=self.geometry(), memory=self.decoder_memory())

    def timesteps(self, denoiser: LTXDenoiser) -> TimestepPreparationStage:
        """The schedule."""
        return TimestepPreparationStage(self.scheduler, spacing=spaced_to_last, num_tokens=denoiser.num_tokens)

    def denoiser(self) -> LTXDenoiser:
        """The transformer."""
        width = self.transformer.config.hidden_size
        return self.denoiser_class(
            self.transformer,
            geometry=self.geometry(),
            memory=TransformerMemory(hidden_size=width, ffn_dim=4 * width, element_size=self.dtype.itemsize),
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def decoding_stages(self) -> list[Stage]:
        """The autoencoder's second half."""
        decoding = DecodingStage(
            self.vae,
            geometry=self.geometry(),
            memory=self.decoder_memory(),
            free_bytes=self.free_bytes,
            dtype=self.vae.dtype,
            prepare=with_decode_noise if self.is_timed else None,
            prepare_state=self.clip_state,
        )
        return [DecodeNoiseStage(self.dtype), decoding] if self.is_timed else [decoding]

    @property
    def is_timed(self) -> bool:
        """Whether the decoder is told how noisy the latents are."""
        return self.vae.config.timestep_conditioning

    def clip_state(self, req: Req, clip: LTXClip) -> LTXClip:
        """What the decoder is told beside the latents."""
        timesteps = uploaded([decode_timestep(req)], self.device) if self.is_timed else None
        return dataclasses.replace(clip, timesteps=timesteps, seed=request_generator(req).initial_seed())

    def check_components(self) -> None:
        transformer, vae, t5 = self.transformer.config, self.vae.config, self.text_encoder.config
        require_equal(
            (
                ("transformer.in_channels", transformer.in_channels, vae.latent_channels, "vae.latent_channels"),
                (
                    "transformer.out_channels",
                    transformer.num_output_channels,
                    vae.latent_channels,
                    "vae.latent_channels",
                ),
                ("transformer.caption_channels", transformer.caption_channels, t5.d_model, "text_encoder.d_model"),
            )
        )

    def geometry(self) -> VideoGeometry:
        """How pixels map to latents and tokens."""
        return self.geometry_of({"transformer": self.transformer.config, "vae": self.vae.config}, self.config)

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        transformer, vae = configs["transformer"], configs["vae"]
        assert isinstance(transformer, LTXVideoTransformerConfig), "as `components` says"
        assert isinstance(vae, LTXVideoVAEConfig), "as `components` says"
        return VideoGeometry(
            channels=transformer.num_output_channels,
            spatial_ratio=vae.spatial_ratio,
            temporal_ratio=vae.temporal_ratio,
            patch_size=(1, 1, 1),
            max_pixels=config.max_pixels,
            max_frames=config.max_frames,
        )

    def limits(self) -> TaskLimits:
        return self.geometry().limits(max_sequence_length=self.config.max_sequence_length, inputs=self.inputs)

    @classmethod
    def decoder_memory_of(cls, configs: Mapping[str, ModelConfig], element_size: int) -> DecoderMemory:
        """What decoding takes, and encoding no more; the decoder's last block narrows to what it has at full size.

        Measured peaks of the published shapes in fp32 on the CPU were 83 to 97 % of it.
        """
        config = configs["vae"]
        assert isinstance(config, LTXVideoVAEConfig), "as `components` says"
        _, width = config.decoder_widths[-1]
        return DecoderMemory(
            channels=max(width, config.block_out_channels[0]),
            carried_channels=0,
            patch_size=config.patch_size,
            element_size=element_size,
            activations=_ACTIVATIONS,
        )

    def decoder_memory(self) -> DecoderMemory:
        """The same of this checkpoint."""
        return self.decoder_memory_of({"vae": self.vae.config}, self.vae.dtype.itemsize)


class LTXImageToVideoPipeline(LTXPipeline):
    """The same where a checkpoint's index names the pipeline that wants a picture."""

    inputs: ClassVar[InputLimits] = InputLimits(min_images=1, max_images=1)


class LTXConditionPipeline(LTXPipeline):
    """Releases from 0.9.5 on: the clip may also go on from a video or come to one, and end with a picture.

    What is given gets some noise, and with a `strength` below 1 it is changed.
    """

    own_parameters: ClassVar[frozenset[str]] = LTXPipeline.own_parameters | {
        *("image_cond_noise_scale", "frame_index", "denoise_strength"),
    }

    inputs: ClassVar[InputLimits] = InputLimits(
        max_images=1, takes_last_image=True, takes_video=True, takes_strength=True
    )
    denoiser_class: ClassVar[type[LTXDenoiser]] = LTXConditionDenoiser
    masks_text: ClassVar[bool] = True

    def latent_stages(self) -> list[Stage]:
        """Here the noise is drawn before the sample of the given frames."""
        noise = LatentPreparationStage(self.geometry(), self.device)
        return [self.text_encoding(), noise, self.given_frames()]

    def timesteps(self, denoiser: LTXDenoiser) -> TimestepPreparationStage:
        """The schedule, which no size moves."""
        return TimestepPreparationStage(self.scheduler, spacing=self.spacing, rounds_strength_down=True)

    def spacing(self, num_steps: int) -> np.ndarray:
        """The levels that a distilled model was trained for, if it is given as many steps."""
        own = self.config.sigmas
        return np.array(own) if num_steps == len(own) else linear_then_quadratic(num_steps)

    def check_components(self) -> None:
        super().check_components()
        for option, accepted in (("shift", 1.0), ("use_dynamic_shifting", False), ("shift_terminal", None)):
            got = self.scheduler.get(option, accepted)
            if got != accepted:
                raise UnsupportedModel(
                    f"scheduler.{option} is {got}, accepted is {accepted}: {type(self).__name__} gives noise levels "
                    "that are not to be moved"
                )
