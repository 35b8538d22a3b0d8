"""A do-nothing family: no checkpoint, no model, every unit returns at once. Measures the engine alone.

Registered with `register_configs` and nothing else. Words in the prompt cause faults in denoising unit 1:
`sleep-MS`, `fail`, `fail-shared` (only in company), `die`, `die-once-FILE` (while FILE does not exist), `hang`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from sglang.multimodal_gen.configs.model_info import TaskLimits
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.registry import register_configs
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

NULL_CONFIG = PipelineConfig(
    tasks=("T2V",),
    defaults=SamplingParams(width=16, height=16, num_frames=5, fps=8, num_inference_steps=4, guidance_scale=1.0),
    max_pixels=1 << 20,
    max_frames=1001,
)
FAULT_UNIT = 1


def register() -> None:
    """Make `null-model` known in this process and, through the engine's configuration, in its workers."""
    register_configs(
        name="null",
        pipeline=f"{__name__}:NullPipeline",
        config=f"{__name__}:NULL_CONFIG",
        pipeline_class_names=("NullPipeline",),
        hub_ids=("null-model",),
        needs_checkpoint=False,
    )


def one_phase(name: str, lane: str, units: int) -> Phase:
    return Phase(name=name, lane=lane, units=units, batch_key=name, cost=1.0, peak_bytes=1)


class NullEncoding(Stage):
    name, reads, writes = "encode", (), ("prompt_embeds",)

    def phase(self, req: Req) -> Phase:
        return one_phase("encode", "encode", 1)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        return []


class NullDenoising(Stage):
    name, reads, writes = "denoise", ("prompt_embeds",), ("latents",)

    def phase(self, req: Req) -> Phase:
        return one_phase("denoise", "denoise", req.params.num_inference_steps or 1)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        for req in requests:
            if req.done("denoise") == FAULT_UNIT:
                for word in req.params.prompt.split():
                    cause_fault(word, len(requests))
            elif "sleep-" in req.params.prompt:
                cause_fault(next(w for w in req.params.prompt.split() if w.startswith("sleep-")), 1)
            req.latents = torch.zeros(1, 1, 1, 1)
        return []


def cause_fault(word: str, batch_size: int) -> None:
    if word.startswith("sleep-"):
        time.sleep(int(word.removeprefix("sleep-")) / 1000)
    elif word == "fail" or (word == "fail-shared" and batch_size > 1):
        raise InvalidRequest("prompt: got a word that fails", param="prompt")
    elif word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word.startswith("die-once-"):
        marker = Path(word.removeprefix("die-once-"))
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif word == "hang":
        time.sleep(3600)


class NullDecoding(Stage):
    name, reads, writes = "decode", ("latents",), ()

    def phase(self, req: Req) -> Phase | None:
        return None if req.params.output_type == "latent" else one_phase("decode", "decode", num_chunks(req))

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        return [chunk_of(req) for req in requests]


def chunk_of(req: Req) -> OutputBatch:
    """The first half of a video's frames, then the rest; each frame's pixels are its number."""
    total, index = req.params.num_frames or 1, req.done("decode")
    last = index == num_chunks(req) - 1
    numbers = range(index * (total // 2), total if last else total // 2)
    height, width = req.params.height or 16, req.params.width or 16
    frames = torch.stack([torch.full((height, width, 3), number % 256, dtype=torch.uint8) for number in numbers])
    return OutputBatch(request_id=req.request_id, first_frame=numbers.start, last=last, frames=frames)


def num_chunks(req: Req) -> int:
    return 1 if req.params.num_frames == 1 else 2


class NullPipeline(ComposedPipelineBase):
    """Three stages that do nothing."""

    components: ClassVar[dict[str, ComponentLoader]] = {}

    def create_pipeline_stages(self) -> list[Stage]:
        return [NullEncoding(), NullDenoising(), NullDecoding()]

    def limits(self) -> TaskLimits:
        return TaskLimits(
            size_multiple=16, max_pixels=1 << 20, frame_stride=4, max_frames=1001, max_sequence_length=512
        )
