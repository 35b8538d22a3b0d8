"""The family that does nothing, with faults: words in the prompt cause them in denoising unit 1.

Registered with `register_configs`, in place of the package's own. `sleep-MS` (in every unit), `fail`, `fail-shared`
(only in company), `bug`, `crash` (an error that is not ours and quotes the prompt), `die`, `die-once-FILE` (while FILE
does not exist), `hang`, `gpu-lost` (the device fails), `oom`, `oom-shared` (only in company), `oom-large` (until the
request is planned with less).
`die-at-K-FILE` dies at unit K once, `rank-bug-R-FILE` has a bug on rank R once.
`holds-N` makes the request hold N of the 1,000 GiB that the family says there are.
`key-NAME` keeps its forwards apart from those of another name. `until-FILE` makes denoising unit 1 last until FILE
exists, and a note of a request with `where` says which process holds it. With `noise-until-FILE` the frames are noise,
which has its size in a file, and the last ones come when FILE exists.

`image-model` takes up to two images, of which the first gives the size, with a mask, a last image, a video and a
strength; each frame's top row begins with what the worker saw (`seen`). `i2v-model` needs one image and nothing else.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from sglang.multimodal_gen.configs.model_info import InputLimits, SizeFromImage, TaskLimits
from sglang.multimodal_gen.configs.pipeline_configs.null import NULL
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.registry import register_configs
from sglang.multimodal_gen.runtime.managers.warm_up import ID_PREFIX
from sglang.multimodal_gen.runtime.pipelines.null import NullDecoding, NullDenoising, NullEncoding, NullPipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

FAULT_UNIT = 1
NULL_CONFIG = NULL


def register() -> None:
    """Make `null-model` known in this process and, through the engine's configuration, in its workers.

    `fragile-model` is the same family, but every warm-up kills its worker; the others are described above.
    """
    pipelines = {"null": "FaultyPipeline", "fragile": "FragilePipeline", "image": "ImagePipeline", "i2v": "I2VPipeline"}
    for name, pipeline in pipelines.items():
        register_configs(
            name=name,
            pipeline=f"{__name__}:{pipeline}",
            config=f"{__name__}:NULL_CONFIG",
            hub_ids=(f"{name}-model",),
            needs_checkpoint=False,
        )


def words(req: Req, prefix: str) -> list[str]:
    return [word.removeprefix(prefix) for word in req.params.prompt.split() if word.startswith(prefix)]


class FaultyDenoising(NullDenoising):
    def admit(self, req: Req) -> None:
        super().admit(req)
        if "where" in req.params.prompt.split():
            req.notes.append(f"pid {os.getpid()}")

    def phase(self, req: Req) -> Phase:
        held_bytes = 2**30 * sum(map(int, words(req, "holds-")))
        key = "-".join(["denoise", *words(req, "key-")])
        return msgspec.structs.replace(super().phase(req), held_bytes=held_bytes, batch_key=key)

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
            for rank, file in (word.split("-", 1) for word in words(req, "rank-bug-")):
                if done == FAULT_UNIT and self.parallel.world.rank == int(rank) and not Path(file).exists():
                    Path(file).touch()
                    raise ZeroDivisionError("the unit has a bug on this rank")
            if done == FAULT_UNIT and not (req.max_forward_rows == 1 and "oom-large" in req.params.prompt):
                for word in req.params.prompt.split():
                    if word == "crash":
                        raise RuntimeError(f"cannot tokenise {req.params.prompt!r}")
                    while word.startswith("until-") and not Path(word.removeprefix("until-")).exists():
                        time.sleep(0.01)
                    cause_fault(word, len(requests))
        return super().step(requests)


def cause_fault(word: str, batch_size: int) -> None:
    if word in ("oom", "oom-large") or (word == "oom-shared" and batch_size > 1):
        raise MemoryError
    if word == "fail" or (word == "fail-shared" and batch_size > 1):
        raise InvalidRequest("prompt: got a word that fails", param="prompt")
    if word == "bug":
        raise ZeroDivisionError("the unit has a bug")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word.startswith("die-once-"):
        marker = Path(word.removeprefix("die-once-"))
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif word == "gpu-lost":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    elif word == "hang":
        time.sleep(3600)


class NoisyDecoding(NullDecoding):
    def frames(self, req: Req, numbers: range, last: bool) -> torch.Tensor:
        frames = super().frames(req, numbers, last)
        if not req.params.prompt.startswith("noise-until-"):
            return frames
        generator = torch.Generator().manual_seed(req.done("decode"))
        while last and not Path(req.params.prompt.removeprefix("noise-until-")).exists():
            time.sleep(0.01)
        return torch.randint(0, 256, frames.shape, dtype=torch.uint8, generator=generator)


class FaultyPipeline(NullPipeline):
    def budget_bytes(self) -> int:
        return 1000 * 2**30

    def create_pipeline_stages(self) -> list[Stage]:
        return [NullEncoding(), FaultyDenoising(), NoisyDecoding()]


class FragileDenoising(FaultyDenoising):
    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        if any(req.request_id.startswith(ID_PREFIX) for req in requests):
            cause_fault("die", 1)
        return super().step(requests)


class FragilePipeline(FaultyPipeline):
    def create_pipeline_stages(self) -> list[Stage]:
        return [NullEncoding(), FragileDenoising(), NoisyDecoding()]


SIZE_FROM_IMAGE = SizeFromImage(area=64 * 64, multiple=32, source="first")


def seen(inputs: RequestInputs) -> list[int]:
    """One value of each input as the worker has it: images, mask, last image, video (0 where there is none), and the
    number of the video's frames."""
    arrays = [*inputs.images, *[None] * (2 - len(inputs.images)), inputs.mask, inputs.last_image, inputs.video]
    values = [0 if array is None else int(array.reshape(-1)[0]) for array in arrays]
    return [*values, 0 if inputs.video is None else len(inputs.video)]


class SeeingDecoding(NoisyDecoding):
    def frames(self, req: Req, numbers: range, last: bool) -> torch.Tensor:
        frames, values = super().frames(req, numbers, last), seen(req.inputs)
        frames[:, 0, : len(values), 0] = torch.tensor(values, dtype=torch.uint8)
        return frames


class ImagePipeline(FaultyPipeline):
    def create_pipeline_stages(self) -> list[Stage]:
        return [NullEncoding(), FaultyDenoising(), SeeingDecoding()]

    def limits(self) -> TaskLimits:
        inputs = InputLimits(
            max_images=2, takes_mask=True, takes_last_image=True, takes_video=True, takes_strength=True
        )
        return msgspec.structs.replace(super().limits(), inputs=inputs, size_from_image=SIZE_FROM_IMAGE)


class I2VPipeline(ImagePipeline):
    def limits(self) -> TaskLimits:
        return msgspec.structs.replace(super().limits(), inputs=InputLimits(min_images=1, max_images=1))
