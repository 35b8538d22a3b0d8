"""The family that does nothing: no checkpoint, no model, every unit returns at once. What is left is the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from sglang.multimodal_gen.configs.model_info import TaskLimits
from sglang.multimodal_gen.configs.request_plan import Lane, Phase
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage


def one_phase(lane: Lane, units: int) -> Phase:
    """A phase called as its lane; all requests share its batches."""
    return Phase(name=lane, lane=lane, units=units, batch_key=lane, cost=1.0, peak_bytes=1)


class NullEncoding(Stage):
    """One unit that encodes nothing."""

    name: str = "encode"
    writes: ClassVar[tuple[str, ...]] = ("text",)

    def phase(self, req: Req) -> Phase:
        return one_phase("encode", 1)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        return []


class NullDenoising(Stage):
    """As many units as the request has steps; the one latent number says how many are done."""

    name: str = "denoise"
    reads: ClassVar[tuple[str, ...]] = ("text",)
    writes: ClassVar[tuple[str, ...]] = ("latents",)

    def phase(self, req: Req) -> Phase:
        return one_phase("denoise", req.params.num_inference_steps or 1)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        for req in requests:
            req.latents = torch.ones(1, 1, 1, 1) if req.latents is None else req.latents + 1
        return []


class NullDecoding(Stage):
    """A video in two chunks, an image in one; each frame's pixels are its number."""

    name: str = "decode"
    reads: ClassVar[tuple[str, ...]] = ("latents",)

    def phase(self, req: Req) -> Phase | None:
        return None if req.params.output_type == "latent" else one_phase("decode", _num_chunks(req))

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        return [self._chunk(req) for req in requests]

    def _chunk(self, req: Req) -> OutputBatch:
        """The first half of the frames, then the rest."""
        total, index = req.params.num_frames or 1, req.done("decode")
        last = index == _num_chunks(req) - 1
        numbers = range(index * (total // 2), total if last else total // 2)
        frames = self.frames(req, numbers, last)
        return OutputBatch(request_id=req.request_id, first_frame=numbers.start, last=last, frames=frames)

    def frames(self, req: Req, numbers: range, last: bool) -> torch.Tensor:
        """Those with these numbers: [T, H, W, 3] uint8."""
        height, width = req.params.height or 16, req.params.width or 16
        return torch.stack([torch.full((height, width, 3), number % 256, dtype=torch.uint8) for number in numbers])


def _num_chunks(req: Req) -> int:
    return 1 if req.params.num_frames == 1 else 2


class NullPipeline(ComposedPipelineBase):
    """Three stages that do nothing."""

    gives_previews: ClassVar[bool] = False
    components: ClassVar[Mapping[str, ComponentLoader]] = {}

    def create_pipeline_stages(self) -> list[Stage]:
        return [NullEncoding(), NullDenoising(), NullDecoding()]

    def limits(self) -> TaskLimits:
        return TaskLimits(
            size_multiple=16, max_pixels=1 << 20, frame_stride=4, max_frames=1001, max_sequence_length=512
        )
