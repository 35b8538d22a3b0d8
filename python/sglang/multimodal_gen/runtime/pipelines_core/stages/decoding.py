"""Latents to pixels, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

# Decoding shares the device with the denoising of other requests.
_MEMORY_SHARE = 0.5


class StreamingDecoder(Protocol):
    """An autoencoder that decodes a clip in pieces, in order, with a state that each clip has its own of."""

    def denormalise(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] of the transformer -> of the decoder."""
        ...

    def decode_next(self, latents: Tensor, state: Any) -> Tensor:
        """The clip's next latent frames [B, C, t, H, W] -> their video [B, 3, T, H, W] in [-1, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """How a clip is cut: `chunk_frames` latent frames a unit, and tiles when even one frame is too large."""

    chunk_frames: int
    num_chunks: int
    tiling: Tiling | None
    peak_bytes: int


class DecodingStage(Stage):
    """Frames [T, H, W, 3] uint8 of each chunk; the whole clip is one chunk where memory allows."""

    name: ClassVar[str] = "decode"
    reads: ClassVar[tuple[str, ...]] = ("latents",)
    writes: ClassVar[tuple[str, ...]] = ("decode_plan", "decoder_state")

    def __init__(
        self,
        vae: StreamingDecoder,
        *,
        new_state: Callable[..., Any],
        geometry: VideoGeometry,
        memory: DecoderMemory,
        free_bytes: Callable[[], int],
        dtype: torch.dtype,
    ) -> None:
        """`new_state(tiling, carry=...)` starts a clip; without `carry` its first chunk is all there is."""
        self.vae = vae
        self.new_state = new_state
        self.geometry = geometry
        self.memory = memory
        self.free_bytes = free_bytes
        self.dtype = dtype

    def admit(self, req: Req) -> None:
        if req.params.output_type == "latent":
            return
        req.decode_plan = self._plan(req)
        if req.decode_plan.tiling is not None:
            req.notes.append("decoded in tiles to save memory; seams may show")

    def phase(self, req: Req) -> Phase | None:
        plan: DecodePlan | None = req.decode_plan
        if plan is None:
            return None
        assert req.latent_shape is not None, "planned by the stages before"
        _, _, height, width = req.latent_shape
        return Phase(
            name=self.name,
            lane="decode",
            units=plan.num_chunks,
            batch_key=f"{self.name}:{'x'.join(map(str, req.latent_shape))}:{plan.chunk_frames}:{self.dtype}",
            cost=float(plan.chunk_frames * height * width),
            peak_bytes=plan.peak_bytes,
        )

    def _plan(self, req: Req) -> DecodePlan:
        """The longest chunk that fits, without tiles if at all possible."""
        assert req.latent_shape is not None and req.params.height and req.params.width, "checked by the stages before"
        latent_frames = req.latent_shape[1]
        budget = _MEMORY_SHARE * self.free_bytes()
        size = (req.params.height, req.params.width)
        tiling = Tiling()
        tile_size = (min(size[0], tiling.tile_height), min(size[1], tiling.tile_width))
        for tiles, sides in ((None, size), (tiling, tile_size)):
            if tiles is None or tile_size != size:
                for chunk_frames in range(latent_frames, 0, -1):
                    peak = self._peak_bytes(chunk_frames, sides)
                    if peak <= budget:
                        return _plan_of(latent_frames, chunk_frames, tiles, peak)
        # Admission refuses this, with these numbers, unless the memory gets free until then.
        return _plan_of(latent_frames, 1, None if tile_size == size else tiling, self._peak_bytes(1, tile_size))

    def _peak_bytes(self, chunk_frames: int, size: tuple[int, int]) -> int:
        return self.memory.chunk_bytes(chunk_frames * self.geometry.temporal_ratio, *size)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        decoded = []
        for req in requests:
            # While a chunk is decoded the state is half-way; on an exception it stays away and is made anew.
            state, req.decoder_state = req.decoder_state, None
            decoded.append(self._decode_chunk(req, state))
        for req, (_, state) in zip(requests, decoded, strict=True):
            req.decoder_state = state
        return [output for output, _ in decoded]

    def _decode_chunk(self, req: Req, state: Any) -> tuple[OutputBatch, Any]:
        plan: DecodePlan = req.decode_plan
        index = req.done(self.name)
        if state is None:
            state = self.new_state(plan.tiling, carry=plan.num_chunks > 1)
            for earlier in range(index):
                self._video(req, earlier, state)
        video = self._video(req, index, state)
        first_frame = self.geometry.first_frame(index * plan.chunk_frames)
        last = index == plan.num_chunks - 1
        output = OutputBatch(request_id=req.request_id, first_frame=first_frame, last=last, frames=to_uint8(video[0]))
        return output, None if last else state

    def _video(self, req: Req, index: int, state: Any) -> Tensor:
        assert req.latents is not None, "denoising comes before decoding"
        chunk = slice(index * req.decode_plan.chunk_frames, (index + 1) * req.decode_plan.chunk_frames)
        latents = req.latents[None, :, chunk].to(self.dtype)
        return self.vae.decode_next(self.vae.denormalise(latents), state)


def _plan_of(latent_frames: int, chunk_frames: int, tiling: Tiling | None, peak_bytes: int) -> DecodePlan:
    # Chunks of about equal length: the last one should not be a stub.
    num_chunks = -(-latent_frames // chunk_frames)
    even = -(-latent_frames // num_chunks)
    return DecodePlan(chunk_frames=even, num_chunks=num_chunks, tiling=tiling, peak_bytes=peak_bytes)


def to_uint8(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> frames [T, H, W, 3] uint8 on the CPU, rounded as diffusers' postprocessing does."""
    pixels = (video.float() * 0.5 + 0.5).clamp(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu()
