"""Steps of transformers that were measured on GPUs, for comparison with the model of costs, and the table of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sglang.multimodal_gen.configs.cost_model import H100, H200, Hardware, StepWork, step_cost
from sglang.multimodal_gen.configs.model_outline import ModelOutline, outline_of
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.registry import get_model_info

WAN_1_3B, WAN_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
FLUX, Z_IMAGE = "black-forest-labs/FLUX.1-dev", "Tongyi-MAI/Z-Image"
HEADER = "| step | layout | measured | reckoned | error |\n| --- | --- | --- | --- | --- |"


class Measured(NamedTuple):
    """A step, how it was spread, and how long it took, in seconds."""

    hub_id: str
    size: tuple[int, int, int]
    rows: int
    hardware: Hardware
    shape: ReplicaShape
    seconds: float

    def reckoned_s(self) -> float:
        """What the model of costs says."""
        outline = published_outline(self.hub_id)
        return step_cost(outline.shape, self.work(outline), self.shape, self.hardware).seconds

    def work(self, outline: ModelOutline) -> StepWork:
        """What is computed."""
        width, height, num_frames = self.size
        work = outline.work(SamplingParams(width=width, height=height, num_frames=num_frames))
        return StepWork(rows=self.rows, image_tokens=work.image_tokens, text_tokens=work.text_tokens)

    def as_row(self) -> str:
        """Of the table."""
        width, height, num_frames = self.size
        frames = "" if num_frames == 1 else f", {num_frames} frames"
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        what = f"{self.hub_id.rpartition('/')[2]}, {width}x{height}{frames}, {rows}, {self.hardware.name.upper()}"
        error = 100 * (self.reckoned_s() / self.seconds - 1)
        layout = "one GPU" if self.shape.num_ranks == 1 else str(self.shape)
        return f"| {what} | {layout} | {_time(self.seconds)} | {_time(self.reckoned_s())} | {error:+.0f} % |"


def published_outline(hub_id: str) -> ModelOutline:
    """Of a model whose configs ship with the package."""
    return outline_of(get_model_info(hub_id))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _forwards() -> Iterator[Measured]:
    """One row through our modules on one H100."""
    for hub_id, size, seconds in (
        (WAN_1_3B, (832, 480, 81), 0.537),
        (FLUX, (1024, 1024, 1), 0.166),
        ("Qwen/Qwen-Image", (1024, 1024, 1), 0.196),
        ("hunyuanvideo-community/HunyuanVideo", (960, 544, 61), 2.18),
        ("Lightricks/LTX-Video", (704, 512, 161), 0.095),
        (Z_IMAGE, (1024, 1024, 1), 0.1226),
        ("stabilityai/stable-diffusion-3.5-large", (1024, 1024, 1), 0.0987),
    ):
        yield Measured(hub_id, size, 1, H100, ReplicaShape(), seconds)


def _spread() -> Iterator[Measured]:
    """Steps on one and two H200 of one host, by `sglang bench parallel`."""
    for hub_id, size, rows, alone, speedups in (
        (WAN_1_3B, (832, 480, 81), 2, 1.05, {"cfg": 1.98, "ulysses": 1.83, "ring": 1.82, "tp": 1.42}),
        (WAN_14B, (832, 480, 81), 2, 5.70, {"cfg": 2.02, "ulysses": 1.88, "ring": 1.88, "tp": 1.52}),
        (FLUX, (1024, 1024, 1), 1, 0.158, {"ulysses": 1.48, "ring": 1.47, "tp": 1.45}),
    ):
        yield Measured(hub_id, size, rows, H200, ReplicaShape(), alone)
        for axis, speedup in speedups.items():
            yield Measured(hub_id, size, rows, H200, ReplicaShape(**{axis: 2}), alone / speedup)


MEASURED = (*_forwards(), *_spread())


def table() -> str:
    """What docs/parallel.md shows."""
    return "\n".join([HEADER, *(measured.as_row() for measured in MEASURED)])
