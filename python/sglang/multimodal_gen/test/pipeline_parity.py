"""How pipelines are compared with diffusers': run alone or sharing batches, final latents and frames side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One comparison: which pipeline, and how far apart. `bf16_ratio`: our error in bf16 over the reference's own."""

    pipeline_class: str
    latent_error: float | None = None
    frame_difference: int | None = None
    bf16_ratio: float | None = None


_PIPELINES: dict[int, tuple[Req, str]] = {}
MEASUREMENTS: list[Measurement] = []
"""What this process compared, for the table of scripts/parity_table.py."""

# fp32 on the CPU: what differs is the order of summation, which measures 1e-6; the target is 1e-4.
LATENT_TOLERANCE = 1e-4
BF16_RATIO = 1.25


def load(directory: Path, *, precision: str = "fp32") -> Any:
    """Our pipeline of a checkpoint."""
    return build_pipeline(str(directory), ExecutionArgs(device="cpu", precision=precision))


Wish = Mapping[str, Any] | SamplingParams


def run(pipeline: Any, values: Wish, inputs: RequestInputs = EMPTY) -> tuple[Req, np.ndarray]:
    """A whole request alone: its state and its frames [T, H, W, 3]."""
    [(req, frames)] = run_together(pipeline, [(values, inputs)])
    return req, frames


def run_together(pipeline: Any, wishes: Sequence[tuple[Wish, RequestInputs]]) -> list[tuple[Req, np.ndarray]]:
    """Requests side by side, which share a forward wherever their batch keys agree, whatever their step."""
    return finished(pipeline, admitted(pipeline, wishes))


def admitted(pipeline: Any, wishes: Sequence[tuple[Wish, RequestInputs]]) -> list[Req]:
    """Requests of which nothing has run yet."""
    return [
        pipeline.admit(f"request {number}", _params(values), inputs) for number, (values, inputs) in enumerate(wishes)
    ]


def finished(pipeline: Any, requests: Sequence[Req]) -> list[tuple[Req, np.ndarray]]:
    """The requests, from wherever they stand, side by side to their end."""
    outputs: dict[str, list[OutputBatch]] = {req.request_id: [] for req in requests}
    while waiting := [(req, phase) for req in requests if (phase := present_phase(req)) is not None]:
        first = waiting[0][1]
        sharing = [req for req, phase in waiting if phase.batch_key == first.batch_key and phase.name == first.name]
        for output in pipeline.run_unit(first.name, sharing):
            outputs[output.request_id].append(output)
    for req in requests:
        _PIPELINES[id(req)] = (req, type(pipeline).__name__)
    return [(req, joined(outputs[req.request_id])) for req in requests]


def _params(values: Wish) -> SamplingParams:
    return values if isinstance(values, SamplingParams) else SamplingParams.from_values(values)


def present_phase(req: Req) -> Phase | None:
    """The one that its next unit belongs to; None when all is done."""
    return next((phase for phase in req.phases if req.done(phase.name) < phase.units), None)


def joined(outputs: Sequence[OutputBatch]) -> np.ndarray:
    """Chunks in order, without a gap, the last one marked."""
    if not outputs:
        return np.empty(0)
    starts = np.cumsum([0, *(len(output.frames) for output in outputs[:-1])])
    assert [output.first_frame for output in outputs] == starts.tolist()
    assert [output.last for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return torch.cat([output.frames for output in outputs]).numpy()


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found is not None
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def as_uint8(frames: np.ndarray) -> np.ndarray:
    """diffusers' frames in [0, 1] as it saves them."""
    return (frames * 255).round().astype(np.uint8)


def assert_same(found: tuple[Req, np.ndarray], latents: Tensor, frames: np.ndarray) -> None:
    """Ours against diffusers' latents [C, T, H, W] and frames [T, H, W, 3] uint8."""
    req, ours = found
    error = relative_error(req.latents, latents)
    assert ours.shape == frames.shape
    assert ours.dtype == np.uint8
    difference = int(np.abs(ours.astype(int) - frames.astype(int)).max())
    _record(req, latent_error=error, frame_difference=difference)
    assert error <= LATENT_TOLERANCE
    # A value that lies on the border between two steps of 1/255 may be rounded either way.
    assert difference <= 1
    assert ours.std() > 5, "a flat picture would agree with anything"


def assert_close_in_bf16(found: Req, theirs: Tensor, exact: Tensor) -> None:
    """Our latents in bf16 against fp32's, no worse than diffusers' latents in bf16 but for a quarter."""
    ratio = relative_error(found.latents, exact) / relative_error(theirs, exact)
    _record(found, bf16_ratio=ratio)
    assert ratio <= BF16_RATIO


def _record(req: Req, **values: Any) -> None:
    _, pipeline_class = _PIPELINES[id(req)]
    MEASUREMENTS.append(Measurement(pipeline_class=pipeline_class, **values))
