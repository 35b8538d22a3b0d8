"""What an autoencoder makes of pictures and clips: the same work for one rank and for several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.models.vaes.ltx_vae import LTXClip
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage, PieceDecodingStage


@dataclass(frozen=True, kw_only=True)
class Coding:
    """One clip to encode, and one to decode, `chunk_frames` latent frames at a time or in tiles of so many pixels."""

    height: int
    width: int
    num_frames: int = 1
    chunk_frames: int | None = None
    tile: int | None = None

    @property
    def tiling(self) -> Tiling | None:
        """Overlapping by a quarter."""
        if self.tile is None:
            return None
        stride = self.tile * 3 // 4
        return Tiling(tile_height=self.tile, tile_width=self.tile, stride_height=stride, stride_width=stride)


def coded(pipeline: Any, codings: Sequence[Coding]) -> dict[str, np.ndarray]:
    """Latents and video of each; on other ranks than the leader no video."""
    [stage] = [stage for stage in pipeline.stages if isinstance(stage, DecodingStage)]
    found = {}
    for number, coding in enumerate(codings):
        generator = torch.Generator().manual_seed(number)
        video = torch.rand(1, 3, coding.num_frames, coding.height, coding.width, generator=generator) * 2 - 1
        latents = stage.vae.to_latents(video.to(pipeline.device, stage.dtype))
        found[f"latents{number}"] = latents.float().cpu().numpy()
        drawn = torch.randn(latents.shape, generator=generator).to(pipeline.device, stage.dtype)
        parts = [stage.strips.collect(part, *drawn.shape[-2:]) for part in _decoded(stage, drawn, coding)]
        kept = [part.float().cpu() for part in parts if part is not None]
        if kept:
            found[f"video{number}"] = torch.cat(kept, dim=2).numpy()
    return found


def _decoded(stage: DecodingStage, latents: Tensor, coding: Coding) -> Iterator[Tensor]:
    """This rank's strips of the video, piece after piece."""
    latents, vae = stage.vae.denormalise(latents), stage.vae
    if isinstance(stage, PieceDecodingStage):
        pieces = range(len(stage.vae.decoder_pieces(latents.shape[2])))
        state = stage.vae.new_state(coding.tiling, carry=len(pieces) > 1)
        yield from (stage.vae.decode_piece(latents, index, state) for index in pieces)
        return
    chunks = latents.split(coding.chunk_frames or latents.shape[2], dim=2)
    state = vae.new_state(coding.tiling, carry=len(chunks) > 1)
    if isinstance(state, LTXClip):
        state = dataclasses.replace(state, timesteps=torch.tensor([0.3], device=latents.device), seed=5)
    yield from (vae.decode_next(chunk, state) for chunk in chunks)
