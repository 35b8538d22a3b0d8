"""Steps of transformers that were measured on GPUs, for comparison with the model of costs, and the table of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sglang.multimodal_gen.configs.cost_model import H100, H200, Hardware, StepWork, step_cost
from sglang.multimodal_gen.configs.model_outline import ModelOutline, outline_of
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.bench.parallel import layout_of

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
        (WAN_1_3B, (832, 480, 81), 0.434),
        (FLUX, (1024, 1024, 1), 0.112),
        ("hunyuanvideo-community/HunyuanVideo", (960, 544, 61), 1.762),
    ):
        yield Measured(hub_id, size, 1, H100, ReplicaShape(), seconds)


def _spread() -> Iterator[Measured]:
    """Steps on one, two and four H100 or H200 of one host, by `sglang bench parallel`."""
    for hub_id, size, rows, hardware, times in (
        (
            WAN_1_3B,
            (832, 480, 81),
            2,
            H100,
            {"": 0.875, "cfg2": 0.433, "ulysses2": 0.490, "ring2": 0.498, "cfg2-ulysses2": 0.240, "ulysses4": 0.248,
             "ring4": 0.297, "ulysses2-ring2": 0.278, "tp4": 0.355, "ulysses2-tp2": 0.325},
        ),
        (
            WAN_1_3B,
            (1280, 720, 81),
            2,
            H200,
            {"": 3.833, "cfg2-ulysses2": 1.022, "ulysses4": 1.032, "ring4": 1.145, "ulysses2-ring2": 1.147,
             "tp4": 1.237, "ulysses2-tp2": 1.162},
        ),
        (
            WAN_14B,
            (832, 480, 81),
            2,
            H200,
            {"": 5.043, "cfg2": 2.545, "ulysses2": 2.748, "ring2": 2.774, "tp2": 3.200, "cfg2-ulysses2": 1.407,
             "ulysses4": 1.433, "ring4": 1.572, "ulysses2-ring2": 1.574, "tp4": 1.781, "ulysses2-tp2": 1.642},
        ),
        (
            WAN_14B,
            (1280, 720, 81),
            2,
            H100,
            {"": 19.93, "cfg2-ulysses2": 5.10, "ulysses2-ring2": 5.69, "ulysses4": 5.11},
        ),
        (
            WAN_14B,
            (1280, 720, 81),
            2,
            H200,
            {"": 20.17, "cfg2-ulysses2": 5.181, "ring4": 6.120, "tp4": 6.161, "ulysses2-tp2": 5.757},
        ),
        (Z_IMAGE, (1024, 1024, 1), 2, H100, {"": 0.197, "cfg2": 0.102, "ulysses2": 0.119}),
        (
            FLUX,
            (1024, 1024, 1),
            1,
            H200,
            {"": 0.1151, "ulysses2": 0.0738, "ring2": 0.0748, "tp2": 0.0731, "ulysses4": 0.0414, "ring4": 0.0543,
             "ulysses2-ring2": 0.0489, "tp4": 0.0472, "ulysses2-tp2": 0.0464},
        ),
    ):  # fmt: skip
        for layout, seconds in times.items():
            yield Measured(hub_id, size, rows, hardware, layout_of(layout) if layout else ReplicaShape(), seconds)


MEASURED = (*_forwards(), *_spread())


def table() -> str:
    """What docs/parallel.md shows."""
    return "\n".join([HEADER, *(measured.as_row() for measured in MEASURED)])
