"""`Req`: the running state of one request in a worker, and `OutputBatch`: decoded frames on their way out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams


@dataclass(kw_only=True)
class Req:
    """One output in the making. Stages read and write the tensor fields; `conditioning` holds a family's own object.

    latents [C, T, H, W] fp32 on the device, prompt_embeds and negative_prompt_embeds [L, D], timesteps [N] fp32.
    """

    request_id: str
    params: SamplingParams
    phases: tuple[Phase, ...] = ()
    notes: list[str] = field(default_factory=list)
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    latents: Tensor | None = None
    sampler: Any = None
    sampler_state: Any = None
    decoder_state: Any = None
    conditioning: Any = None
    units_done: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OutputBatch:
    """Frames [T, H, W, 3] uint8 on the CPU from `first_frame` on; `last` when no more follow."""

    request_id: str
    first_frame: int
    last: bool
    frames: Tensor
