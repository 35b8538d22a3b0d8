"""Latents to pixels, chunk by chunk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory, longest_chunk
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

_SMALLEST_TILE = 128
_TILED = "decoded in tiles to save memory; seams may show"


class StreamingDecoder(Protocol):
    """An autoencoder that decodes a clip in pieces, in order, with a state that each clip has its own of.

    One that `decodes_whole_clips` is given no pieces.
    """

    decodes_whole_clips: ClassVar[bool]
    strips: StripSharding
    """How the picture is dealt to ranks."""

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> Any:
        """For a new clip; without `carry` its first chunk is all there is."""
        ...

    def denormalise(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] of the transformer -> of the decoder."""
        ...

    def decode_next(self, latents: Tensor, state: Any) -> Tensor:
        """The clip's next latent frames [B, C, t, H, W] -> their video [B, 3, T, H, W] in [-1, 1], of which each rank
        gets its strip."""
        ...


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """How a clip is cut: unit i takes latent frames `bounds[i]` to `bounds[i + 1]`, in tiles if one frame is too large.

    `chunk_frames` is the length of the longest chunk that is still to come.
    """

    bounds: tuple[int, ...]
    chunk_frames: int
    tiling: Tiling | None

    @property
    def num_chunks(self) -> int:
        """Units of the whole clip."""
        return len(self.bounds) - 1

    def chunk(self, index: int) -> slice:
        """The latent frames of one unit."""
        return slice(self.bounds[index], self.bounds[index + 1])

    def recut(self, done: int, chunk_frames: int, tiling: Tiling | None) -> DecodePlan:
        """The same clip with the chunks after the first `done` cut into ones of at most `chunk_frames`."""
        kept, end = self.bounds[: done + 1], self.bounds[-1]
        left = end - kept[-1]
        # Chunks of about equal length: the last one should not be a stub.
        even = -(-left // -(-left // chunk_frames))
        return DecodePlan(bounds=(*kept, *range(kept[-1] + even, end, even), end), chunk_frames=even, tiling=tiling)


class DecodingStage(Stage):
    """Frames [T, H, W, 3] uint8 of each chunk, of which a short or small clip is one.

    Where the autoencoder deals its pictures each rank decodes a strip, and the leader has the frames.
    """

    name: str = "decode"
    reads: ClassVar[tuple[str, ...]] = ("latents",)
    writes: ClassVar[tuple[str, ...]] = ("decode_plan", "decoder_state")

    def __init__(
        self,
        vae: StreamingDecoder,
        *,
        geometry: VideoGeometry,
        memory: DecoderMemory,
        free_bytes: Callable[[], int],
        dtype: torch.dtype,
        prepare: Callable[[Req, Tensor], Tensor] | None = None,
        prepare_state: Callable[[Req, Any], Any] | None = None,
    ) -> None:
        """`prepare`: what a family that decodes whole clips does to the latents [1, C, T, H, W] of the decoder.

        `prepare_state`: what it makes of the autoencoder's state for a new clip, such as one that knows a request's
        parameters.
        """
        self.vae = vae
        self.strips = vae.strips
        self.only_leader = self.strips.axis.size == 1
        self.prepare = prepare
        self.prepare_state = prepare_state
        self.geometry = geometry
        self.memory = memory
        self.free_bytes = free_bytes
        self.dtype = dtype

    def admit(self, req: Req) -> None:
        if req.params.output_type == "latent":
            return
        req.decode_plan = self._plan(req)
        if req.decode_plan.tiling is not None:
            req.notes.append(_TILED)

    def phase(self, req: Req) -> Phase | None:
        plan: DecodePlan | None = req.decode_plan
        if plan is None:
            return None
        assert req.latent_shape is not None, "planned by the stages before"
        _, _, height, width = req.latent_shape
        tiles = "" if plan.tiling is None else f":tiles{plan.tiling.tile_height}x{plan.tiling.tile_width}"
        return Phase(
            name=self.name,
            lane="decode",
            units=plan.num_chunks,
            batch_key=f"{self.name}:{'x'.join(map(str, req.latent_shape))}:{plan.chunk_frames}{tiles}:{self.dtype}",
            cost=float(plan.chunk_frames * height * width),
            peak_bytes=self._peak_bytes(req, plan.chunk_frames, plan.tiling),
            held_bytes=0 if plan.num_chunks == 1 else self.memory.carried_bytes(*self._strip(*_size(req))),
        )

    def _plan(self, req: Req) -> DecodePlan:
        """The longest chunks that fit and pay, without tiles if at all possible."""
        assert req.latent_shape is not None, "planned by the stages before"
        latent_frames = req.latent_shape[1]
        whole = DecodePlan(bounds=(0, latent_frames), chunk_frames=latent_frames, tiling=None)
        lengths = range(latent_frames if self.vae.decodes_whole_clips else 1, latent_frames + 1)
        tilings = (None, Tiling()) if _is_cut(Tiling(), req) else (None,)
        for tiling in tilings:
            peak_bytes = partial(self._peak_bytes, req, tiling=tiling)
            chunk_frames = longest_chunk(lengths, peak_bytes, self.free_bytes())
            if chunk_frames is not None:
                return whole.recut(0, chunk_frames, tiling)
        # Admission refuses this, with these numbers, unless the memory gets free until then.
        return whole.recut(0, lengths[0], tilings[-1])

    def shrink(self, req: Req) -> bool:
        plan: DecodePlan = req.decode_plan
        done = req.done(self.name)
        if plan.chunk_frames > 1 and not self.vae.decodes_whole_clips:
            req.decode_plan = plan.recut(done, plan.chunk_frames // 2, plan.tiling)
            return True
        tiling = self._finer_tiling(req)
        if tiling is None:
            return False
        req.decode_plan = plan.recut(done, plan.chunk_frames, tiling)
        return True

    def _finer_tiling(self, req: Req) -> Tiling | None:
        """Tiles for less memory, which the request's notes then name; None when there are no smaller ones."""
        plan: DecodePlan = req.decode_plan
        tiling = Tiling() if plan.tiling is None else plan.tiling.halved()
        if min(tiling.tile_height, tiling.tile_width) < _SMALLEST_TILE or not _is_cut(tiling, req):
            return None
        if _TILED not in req.notes:
            req.notes.append(_TILED)
        return tiling

    def _peak_bytes(self, req: Req, chunk_frames: int, tiling: Tiling | None) -> int:
        height, width = _size(req)
        if tiling is not None:
            height, width = min(height, tiling.tile_height), min(width, tiling.tile_width)
        num_frames = chunk_frames * self.geometry.temporal_ratio
        # All ranks plan as the leader must, which has the frames of all, the strips that came and what becomes of them.
        collected = 0 if self.only_leader else 2 * 3 * num_frames * math.prod(_size(req))
        return self.memory.chunk_bytes(num_frames, *self._strip(height, width)) + collected

    def _strip(self, height: int, width: int) -> tuple[int, int]:
        """What a rank holds of a picture of so many pixels, at most."""
        return self.strips.largest(height, width, ratio=self.geometry.spatial_ratio)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        decoded = []
        for req in requests:
            # While a chunk is decoded the state is half-way; on an exception it stays away and is made anew.
            state, req.decoder_state = req.decoder_state, None
            decoded.append(self._decode_chunk(req, state))
        for req, (_, state) in zip(requests, decoded, strict=True):
            req.decoder_state = state
        return [output for output, _ in decoded if output is not None]

    def _decode_chunk(self, req: Req, state: Any) -> tuple[OutputBatch | None, Any]:
        plan: DecodePlan = req.decode_plan
        index = req.done(self.name)
        if state is None:
            state = self.vae.new_state(plan.tiling, carry=plan.num_chunks > 1)
            state = state if self.prepare_state is None else self.prepare_state(req, state)
            for earlier in range(index):
                self._video(req, earlier, state)
        assert req.latents is not None, "denoising comes before decoding"
        pixels = self.strips.collect(to_uint8(self._video(req, index, state)[0]), *req.latents.shape[-2:])
        last = index == plan.num_chunks - 1
        output = None
        if pixels is not None:
            output = OutputBatch(
                request_id=req.request_id,
                first_frame=self._first_frame(plan, index),
                last=last,
                frames=on_host(pixels.permute(1, 2, 3, 0).contiguous()),
            )
        return output, None if last else state

    def _first_frame(self, plan: DecodePlan, index: int) -> int:
        """Where in the clip a unit's frames begin."""
        return self.geometry.first_frame(plan.bounds[index])

    def _video(self, req: Req, index: int, state: Any) -> Tensor:
        return self.vae.decode_next(self._latents(req, req.decode_plan.chunk(index)), state)

    def _latents(self, req: Req, frames: slice) -> Tensor:
        """Some latent frames [1, C, t, H, W] as the decoder takes them."""
        assert req.latents is not None, "denoising comes before decoding"
        # In fp32, so that only the result is rounded.
        latents = self.vae.denormalise(req.latents[None, :, frames].float())
        if self.prepare is not None:
            latents = self.prepare(req, latents)
        return latents.to(self.dtype)


class PieceDecoder(Protocol):
    """An autoencoder that must be given a clip in certain pieces, which overlap: how it is cut changes the result."""

    strips: StripSharding

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> Any:
        """As StreamingDecoder's."""
        ...

    def denormalise(self, latents: Tensor) -> Tensor:
        """As StreamingDecoder's."""
        ...

    def decoder_pieces(self, num_frames: int) -> list[slice]:
        """The latent frames that each piece of a clip sees; its own begin one after the first, but in the first."""
        ...

    def decode_piece(self, latents: Tensor, index: int, state: Any) -> Tensor:
        """Piece `index` of the whole clip's latents [B, C, T, H, W] -> its own video frames, each rank its strip."""
        ...


class PieceDecodingStage(DecodingStage):
    """As DecodingStage, but a unit is a piece of the autoencoder's own cut."""

    vae: PieceDecoder  # type: ignore[assignment]

    def __init__(
        self,
        vae: PieceDecoder,
        *,
        geometry: VideoGeometry,
        memory: DecoderMemory,
        free_bytes: Callable[[], int],
        dtype: torch.dtype,
        skipped_frames: int = 0,
    ) -> None:
        """`skipped_frames` at the start of what is decoded are no part of the result."""
        super().__init__(
            cast(StreamingDecoder, vae), geometry=geometry, memory=memory, free_bytes=free_bytes, dtype=dtype
        )
        self.skipped_frames = skipped_frames

    def _plan(self, req: Req) -> DecodePlan:
        """In tiles where a piece would not fit otherwise."""
        assert req.latent_shape is not None, "planned by the stages before"
        latent_frames = req.latent_shape[1]
        pieces = self.vae.decoder_pieces(latent_frames)
        bounds = (0, *(piece.start + 1 for piece in pieces[1:]), latent_frames)
        longest = min(latent_frames, max(piece.stop - piece.start for piece in pieces))
        fits = longest_chunk((longest,), partial(self._peak_bytes, req, tiling=None), self.free_bytes())
        tiling = None if fits is not None or not _is_cut(Tiling(), req) else Tiling()
        return DecodePlan(bounds=bounds, chunk_frames=longest, tiling=tiling)

    def shrink(self, req: Req) -> bool:
        tiling = self._finer_tiling(req)
        if tiling is None:
            return False
        req.decode_plan = dataclasses.replace(req.decode_plan, tiling=tiling)
        return True

    def _first_frame(self, plan: DecodePlan, index: int) -> int:
        return max(0, super()._first_frame(plan, index) - self.skipped_frames)

    def _video(self, req: Req, index: int, state: Any) -> Tensor:
        video = self.vae.decode_piece(self._latents(req, slice(None)), index, state)
        return video[:, :, self.skipped_frames :] if index == 0 else video


def _size(req: Req) -> tuple[int, int]:
    assert req.params.height and req.params.width, "checked by the stages before"
    return req.params.height, req.params.width


def _is_cut(tiling: Tiling, req: Req) -> bool:
    """Whether the frame is larger than one tile."""
    height, width = _size(req)
    return height > tiling.tile_height or width > tiling.tile_width


def to_uint8(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> the same uint8, rounded as diffusers' postprocessing does."""
    return (video.float() * 0.5 + 0.5).clamp(0, 1).mul_(255).round_().to(torch.uint8)


def on_host(frames: Tensor) -> Tensor:
    """A tensor in memory of the CPU: of a GPU's through pages that stay where they are, which is several times as fast
    and leaves them to the frames that follow."""
    if not frames.is_cuda:
        return frames
    host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True).copy_(frames, non_blocking=True)
    torch.cuda.current_stream(frames.device).synchronize()
    return host
