"""Steps of transformers that were measured on GPUs, for comparison with the model of costs, and the table of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sglang.multimodal_gen.configs.cost_model import H100, Hardware, StepWork, step_cost
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
        (FLUX, (1024, 1024, 1), 0.126),
        ("Qwen/Qwen-Image", (1024, 1024, 1), 0.135),
        (Z_IMAGE, (1024, 1024, 1), 0.105),
    ):
        yield Measured(hub_id, size, 1, H100, ReplicaShape(), seconds)


def _spread() -> Iterator[Measured]:
    """Steps on one, two and four H100 of one host, by `sglang bench parallel`."""
    for hub_id, size, rows, times in (
        (
            WAN_1_3B,
            (832, 480, 81),
            2,
            {"": 0.875, "cfg2": 0.433, "ulysses2": 0.490, "ring2": 0.498, "tp2": 0.609, "cfg2-ulysses2": 0.240,
             "ulysses4": 0.248, "ring4": 0.297, "ulysses2-ring2": 0.277, "tp4": 0.378, "ulysses2-tp2": 0.327},
        ),
        (WAN_14B, (1280, 720, 81), 2, {"": 19.73, "cfg2-ulysses2": 5.10, "ulysses2-ring2": 5.80, "ulysses4": 5.16}),
        (Z_IMAGE, (1024, 1024, 1), 2, {"": 0.208, "cfg2": 0.108, "ulysses2": 0.124}),
        (
            FLUX,
            (1024, 1024, 1),
            1,
            {"": 0.125, "ulysses2": 0.0845, "ring2": 0.0986, "tp2": 0.0863, "ulysses4": 0.0894, "ring4": 0.152,
             "ulysses2-ring2": 0.120, "tp4": 0.0786, "ulysses2-tp2": 0.0976},
        ),
    ):  # fmt: skip
        for layout, seconds in times.items():
            yield Measured(hub_id, size, rows, H100, layout_of(layout) if layout else ReplicaShape(), seconds)


MEASURED = (*_forwards(), *_spread())


def table() -> str:
    """What docs/parallel.md shows."""
    return "\n".join([HEADER, *(measured.as_row() for measured in MEASURED)])
