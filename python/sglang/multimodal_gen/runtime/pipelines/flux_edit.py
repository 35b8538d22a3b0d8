"""FLUX.1 Kontext (editing by instruction) and Fill (painting into a mask).

Source: arXiv:2506.15742, https://github.com/black-forest-labs/flux
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import AreaRule, InputLimits, TaskLimits
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl import AutoencoderKL
from sglang.multimodal_gen.runtime.pipelines.flux import PATCH_SIZE, FluxDenoiser, FluxPipeline, flux_rotary_table
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Row, pack
from sglang.multimodal_gen.runtime.pipelines_core.guidance import DistilledGuidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import clip_of, mask_of
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage

# (width, height): the sizes that Kontext was trained on, to one of which a picture is brought.
KONTEXT_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)
KONTEXT_AREA = 1024 * 1024
_REFERENCE = "reference_latents"
_MASKED = "masked_latents"


class ReferenceStage(Stage):
    """The latents of the picture that is edited, brought to the trained size of the nearest aspect ratio."""

    name: str = "reference_encode"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs")
    writes: ClassVar[tuple[str, ...]] = ("conditioning",)

    def __init__(self, pipeline: FluxKontextPipeline) -> None:
        self.pipeline = pipeline
        self.vae = pipeline.vae
        self.memory = pipeline.decoder_memory()

    def phase(self, req: Req) -> Phase | None:
        if not req.inputs.images:
            return None
        width, height = self.pipeline.reference_size(req)
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(width * height),
            peak_bytes=self.memory.encoding_bytes(
                self.vae.strips, 1, height, width, ratio=self.vae.config.spatial_ratio
            ),
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        encoded = [self._encoded(req) for req in requests]
        for req, latents in zip(requests, encoded, strict=True):
            req.conditioning[_REFERENCE] = latents
        return []

    def _encoded(self, req: Req) -> Tensor:
        """[C, 1, h, w]."""
        width, height = self.pipeline.reference_size(req)
        cache, key = self.pipeline.conditioning_cache, (self.name, req.inputs.digest(), width, height)
        if (found := cache.get(key)) is None:
            picture = clip_of(req.inputs.images[:1], height, width)
            picture = picture.to(self.pipeline.device, self.vae.dtype)
            found = self.vae.to_latents(picture)[0].float()
            cache.put(key, found)
        return found


class KontextDenoiser(FluxDenoiser):
    """The picture that is edited stands behind the one that is made, as further tokens."""

    def __init__(self, pipeline: FluxKontextPipeline) -> None:
        super().__init__(pipeline.transformer, geometry=pipeline.geometry(), **pipeline.denoiser_options())
        self.pipeline = pipeline

    def batch_key(self, req: Req) -> str:
        """See Denoiser: pictures of one size share a forward."""
        return f"{super().batch_key(req)}:{'x'.join(map(str, self.reference_grid(req)))}"

    def num_tokens(self, req: Req) -> int:
        """See Denoiser."""
        return super().num_tokens(req) + math.prod(self.reference_grid(req))

    def reference_grid(self, req: Req) -> tuple[int, ...]:
        """Tokens of the picture that is edited, along height and width; none without one."""
        if not req.inputs.images:
            return (0,)
        width, height = self.pipeline.reference_size(req)
        side = self.geometry.spatial_ratio * PATCH_SIZE
        return height // side, width // side

    def input_tokens(self, latents: Tensor, rows: Sequence[Row]) -> Tensor:
        """See FluxDenoiser."""
        if _REFERENCE not in rows[0].req.conditioning:
            return latents
        references = torch.stack([row.req.conditioning[_REFERENCE].to(self.dtype) for row in rows])
        return torch.cat((latents, pack(references)), dim=1)

    def rotary_table(self, num_text_tokens: int, grid: tuple[int, int], rows: Sequence[Row]) -> Tensor:
        """See FluxDenoiser."""
        reference = rows[0].req.conditioning.get(_REFERENCE)
        grids = [grid]
        if reference is not None:
            grids.append((reference.shape[2] // PATCH_SIZE, reference.shape[3] // PATCH_SIZE))
        return flux_rotary_table(num_text_tokens, tuple(grids), self.transformer.config.axes_dims_rope, self.device)


class FluxKontextPipeline(FluxPipeline):
    """Edits a picture as a text says; without one it makes a picture from the text."""

    own_parameters: ClassVar[frozenset[str]] = frozenset({"true_cfg_scale", "auto_resize"})

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry, denoiser = DistilledGuidance(), self.geometry(), KontextDenoiser(self)
        return [
            TextEncodingStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            ReferenceStage(self),
            LatentPreparationStage(geometry, self.device),
            self.timesteps(denoiser),
            DenoisingStage(denoiser, guidance=guidance, free_bytes=self.free_bytes),
            self.decoding(geometry),
        ]

    def reference_size(self, req: Req) -> tuple[int, int]:
        """(width, height) at which the request's picture is encoded."""
        height, width = req.inputs.images[0].shape[:2]
        if req.params.auto_resize is not False:
            _, width, height = min((abs(width / height - w / h), w, h) for w, h in KONTEXT_SIZES)
        multiple = self.geometry().size_multiple
        return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)

    def limits(self) -> TaskLimits:
        geometry = self.geometry()
        return geometry.limits(
            max_sequence_length=self.config.max_sequence_length,
            inputs=InputLimits(max_images=1),
            area_rule=AreaRule(area=KONTEXT_AREA, multiple=geometry.size_multiple),
        )


class MaskedImageStage(Stage):
    """The picture without what the mask covers, as latents, and the mask: what Fill sees beside the noise.

    It draws after the noise, as the reference does.
    """

    name: str = "mask_encode"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs", "generator", "latents")
    writes: ClassVar[tuple[str, ...]] = ("conditioning", "generator")

    def __init__(self, vae: AutoencoderKL, memory: DecoderMemory, device: torch.device) -> None:
        self.vae = vae
        self.memory = memory
        self.device = device

    def phase(self, req: Req) -> Phase:
        width, height = req.params.width, req.params.height
        assert width and height, "checked by the stages before"
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(width * height),
            peak_bytes=self.memory.encoding_bytes(
                self.vae.strips, 1, height, width, ratio=self.vae.config.spatial_ratio
            ),
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        encoded = [self._encoded(req) for req in requests]
        for req, (tokens, generator) in zip(requests, encoded, strict=True):
            req.conditioning[_MASKED], req.generator = tokens, generator
        return []

    def _encoded(self, req: Req) -> tuple[Tensor, torch.Generator]:
        """Tokens [S, C] of masked latents and mask, side by side."""
        params, inputs, ratio = req.params, req.inputs, self.vae.config.spatial_ratio
        assert params.height and params.width and inputs.mask is not None and req.generator is not None
        generator = req.generator.clone_state()
        mask = mask_of(inputs.mask, params.height, params.width)
        picture = clip_of(inputs.images[:1], params.height, params.width) * (1 - mask).unsqueeze(2)
        picture = picture.to(self.device, self.vae.dtype)
        latents = self.vae.to_latents(picture, generator=generator).float()
        # The pixels of a latent cell become its channels.
        cells = mask[0].unflatten(2, (-1, ratio)).unflatten(1, (-1, ratio)).permute(0, 2, 4, 1, 3).flatten(1, 2)
        tokens = torch.cat((pack(latents)[0], pack(cells.unsqueeze(2))[0].to(latents)), dim=-1)
        return tokens, generator


class FillDenoiser(FluxDenoiser):
    """Masked picture and mask are further channels of each token."""

    def input_tokens(self, latents: Tensor, rows: Sequence[Row]) -> Tensor:
        """See FluxDenoiser."""
        seen = torch.stack([row.req.conditioning[_MASKED].to(self.dtype) for row in rows])
        return torch.cat((latents, seen), dim=-1)


class FluxFillPipeline(FluxPipeline):
    """Paints into the part of a picture that a mask covers."""

    own_parameters: ClassVar[frozenset[str]] = frozenset()

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry = DistilledGuidance(), self.geometry()
        denoiser = FillDenoiser(self.transformer, geometry=geometry, **self.denoiser_options())
        return [
            TextEncodingStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            self.initial_image(default_strength=1.0),
            LatentPreparationStage(geometry, self.device),
            MaskedImageStage(self.vae, self.decoder_memory(), self.device),
            self.timesteps(denoiser),
            DenoisingStage(denoiser, guidance=guidance, free_bytes=self.free_bytes),
            self.decoding(geometry),
        ]

    def input_channels(self) -> int:
        """Noisy latents, masked latents, and a number for each pixel of the mask."""
        pixels = self.vae.config.spatial_ratio**2
        return PATCH_SIZE**2 * (2 * self.vae.config.latent_channels + pixels)

    def limits(self) -> TaskLimits:
        return self.geometry().limits(
            max_sequence_length=self.config.max_sequence_length,
            inputs=InputLimits(min_images=1, max_images=1, takes_mask=True, requires_mask=True, takes_strength=True),
        )
