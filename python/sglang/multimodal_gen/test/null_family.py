"""A do-nothing family: no checkpoint, no model, every unit returns at once. Measures the engine alone.

Registered with `register_configs` and nothing else. Words in the prompt cause faults in denoising unit 1:
`sleep-MS`, `fail`, `fail-shared` (only in company), `crash` (an error that is not ours and quotes the prompt), `die`,
`die-once-FILE` (while FILE does not exist), `hang`, `oom`, `oom-shared` (only in company), `oom-large` (until the
request is planned with less). `die-at-K-FILE` dies at unit K once. `holds-N` makes the request hold N of the 1,000 GiB
that the family says there are. With `noise-until-FILE` the frames are noise, which takes room in a file, and the last
ones come when FILE exists.
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
from sglang.multimodal_gen.runtime.managers.warm_up import ID_PREFIX
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
    """Make `null-model` known in this process and, through the engine's configuration, in its workers.

    `fragile-model` is the same family, but every warm-up kills its worker.
    """
    for name, pipeline in (("null", "NullPipeline"), ("fragile", "FragilePipeline")):
        register_configs(
            name=name,
            pipeline=f"{__name__}:{pipeline}",
            config=f"{__name__}:NULL_CONFIG",
            pipeline_class_names=(pipeline,),
            hub_ids=(f"{name}-model",),
            needs_checkpoint=False,
        )


def one_phase(name: str, lane: str, units: int, held_bytes: int = 0) -> Phase:
    return Phase(name=name, lane=lane, units=units, batch_key=name, cost=1.0, peak_bytes=1, held_bytes=held_bytes)


def words(req: Req, prefix: str) -> list[str]:
    return [word.removeprefix(prefix) for word in req.params.prompt.split() if word.startswith(prefix)]


class NullEncoding(Stage):
    name, reads, writes = "encode", (), ("prompt_embeds",)

    def phase(self, req: Req) -> Phase:
        return one_phase("encode", "encode", 1)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        return []


class NullDenoising(Stage):
    name, reads, writes = "denoise", ("prompt_embeds",), ("latents",)

    def phase(self, req: Req) -> Phase:
        held_bytes = 2**30 * sum(map(int, words(req, "holds-")))
        return one_phase("denoise", "denoise", req.params.num_inference_steps or 1, held_bytes)

    def shrink(self, req: Req) -> bool:
        if "oom-large" not in req.params.prompt or req.max_forward_rows == 1:
            return False
        req.max_forward_rows = 1
        req.notes.append("planned with less memory")
        return True

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        for req in requests:
            done = req.done("denoise")
            for word in words(req, "sleep-"):
                time.sleep(int(word) / 1000)
            for unit, file in (word.split("-", 1) for word in words(req, "die-at-")):
                if done == int(unit):
                    cause_fault(f"die-once-{file}", 1)
            if done == FAULT_UNIT and not (req.max_forward_rows == 1 and "oom-large" in req.params.prompt):
                for word in req.params.prompt.split():
                    if word == "crash":
                        raise RuntimeError(f"cannot tokenise {req.params.prompt!r}")
                    cause_fault(word, len(requests))
        for req in requests:
            # One more with every step, so that a resumed request shows how many it has seen.
            req.latents = torch.zeros(1, 1, 1, 1) if req.latents is None else req.latents
            req.latents = req.latents + 1
        return []


def cause_fault(word: str, batch_size: int) -> None:
    if word in ("oom", "oom-large") or (word == "oom-shared" and batch_size > 1):
        raise MemoryError
    if word == "fail" or (word == "fail-shared" and batch_size > 1):
        raise InvalidRequest("prompt: got a word that fails", param="prompt")
    if word == "die":
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
    """The first half of a video's frames, then the rest; each frame's pixels are its number, or noise."""
    total, index = req.params.num_frames or 1, req.done("decode")
    last = index == num_chunks(req) - 1
    numbers = range(index * (total // 2), total if last else total // 2)
    height, width = req.params.height or 16, req.params.width or 16
    frames = torch.stack([torch.full((height, width, 3), number % 256, dtype=torch.uint8) for number in numbers])
    if req.params.prompt.startswith("noise-until-"):
        frames = torch.randint(0, 256, frames.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        while last and not Path(req.params.prompt.removeprefix("noise-until-")).exists():
            time.sleep(0.01)
    return OutputBatch(request_id=req.request_id, first_frame=numbers.start, last=last, frames=frames)


def num_chunks(req: Req) -> int:
    return 1 if req.params.num_frames == 1 else 2


class NullPipeline(ComposedPipelineBase):
    """Three stages that do nothing."""

    components: ClassVar[dict[str, ComponentLoader]] = {}

    def budget_bytes(self) -> int:
        return 1000 * 2**30

    def create_pipeline_stages(self) -> list[Stage]:
        return [NullEncoding(), NullDenoising(), NullDecoding()]

    def limits(self) -> TaskLimits:
        return TaskLimits(
            size_multiple=16, max_pixels=1 << 20, frame_stride=4, max_frames=1001, max_sequence_length=512
        )


class FragileDenoising(NullDenoising):
    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        if any(req.request_id.startswith(ID_PREFIX) for req in requests):
            cause_fault("die", 1)
        return super().step(requests)


class FragilePipeline(NullPipeline):
    def create_pipeline_stages(self) -> list[Stage]:
        return [NullEncoding(), FragileDenoising(), NullDecoding()]
