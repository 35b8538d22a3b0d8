"""Wan2.2 TI2V-5B: text to video, and with a picture image to video. Source: https://github.com/Wan-Video/Wan2.2"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import InputLimits, TaskLimits
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.runtime.pipelines.wan import WanDenoiser, WanPipeline
from sglang.multimodal_gen.runtime.pipelines.wan_pictures import CONDITION, PictureConditionStage
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Row
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import Constraint


class WanFirstFrameDenoiser(WanDenoiser):
    """The velocity of video latents whose first frame may be a given picture, free of noise and so at timestep 0."""

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, lengths = self.stacked_text(rows)
        latents = torch.stack([with_first_frame(row.req, row.latents).to(self.dtype) for row in rows])
        timesteps = self.timesteps(rows)
        given = [CONDITION in row.req.conditioning for row in rows]
        if any(given):
            timesteps = timesteps.unsqueeze(1).repeat(1, latents.shape[2])  # [B, T]
            timesteps[:, 0] *= self.numbers([0.0 if picture else 1.0 for picture in given])
        return self.transformer(latents, timesteps, text, text_lengths=lengths, embedded=self.embedded(rows))


def with_first_frame(req: Req, latents: Tensor) -> Tensor:
    """[Z, T, H, W] with the picture's latents as the first frame, where the request has one."""
    picture = req.conditioning.get(CONDITION)
    return latents if picture is None else torch.cat((picture.to(latents.dtype), latents[:, 1:]), dim=1)


class WanTextImageToVideoPipeline(WanPipeline):
    """Text to video, or image to video when the request has a picture; both kinds share forwards."""

    own_parameters: ClassVar[frozenset[str]] = WanPipeline.own_parameters | {"max_area"}
    denoiser_class: ClassVar[type[WanDenoiser]] = WanFirstFrameDenoiser

    def starting_stages(self) -> list[Stage]:
        return []

    def picture_stages(self) -> list[Stage]:
        # Kept in fp32, as the latents that it is put into.
        condition = PictureConditionStage(
            self.vae, first_frame_only=True, cache=self.conditioning_cache, dtype=torch.float32
        )
        return [condition]

    def limits(self) -> TaskLimits:
        inputs, size = InputLimits(max_images=1), self.size_from_picture()
        return msgspec.structs.replace(super().limits(), inputs=inputs, size_from_image=size)

    def constraint(self) -> Constraint:
        return with_first_frame

    def check_pictures(self) -> None:
        super().check_pictures()
        if self.transformer.config.patch_size[0] != 1:
            raise UnsupportedModel(
                f"transformer.patch_size is {list(self.transformer.config.patch_size)}, but a first frame of its own "
                "wants patches of one frame"
            )
        if self.transformer_2 is not None:
            raise UnsupportedModel("model_index.json says both expand_timesteps and transformer_2; accepted is one")
