"""`Req`: the running state of one request in a worker, and `OutputBatch`: decoded frames on their way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.loader.tokenizer import TokenizedText
from sglang.multimodal_gen.runtime.models.schedulers import Sampler, SamplerState
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs


@dataclass(kw_only=True)
class Req:
    """One output in the making. Stages read and write the fields; `conditioning` holds a family's own object.

    `latent_shape` is (C, T, H, W); latents [C, T, H, W] fp32 and the embeddings [L, D] lie on the device.
    `max_forward_rows` None: all guidance branches in one forward; `max_text_rows` None: all texts in one. `units_done`
    counts by phase. `generator` draws the request's noise, on the CPU.
    """

    request_id: str
    params: SamplingParams
    inputs: RequestInputs = EMPTY
    phases: tuple[Phase, ...] = ()
    notes: list[str] = field(default_factory=list)
    units_done: dict[str, int] = field(default_factory=dict)
    prompt_tokens: TokenizedText | None = None
    negative_prompt_tokens: TokenizedText | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    latent_shape: tuple[int, int, int, int] | None = None
    generator: torch.Generator | None = None
    latents: Tensor | None = None
    sampler: Sampler | None = None
    sampler_state: SamplerState | None = None
    max_text_rows: int | None = None
    max_forward_rows: int | None = None
    decode_plan: Any = None
    decoder_state: Any = None
    conditioning: Any = None

    def done(self, phase: str) -> int:
        """Units of a phase that are finished."""
        return self.units_done.get(phase, 0)

    def state_dict(self) -> dict[str, Any]:
        """All that cannot be computed again from the parameters: tensors, ints, and dicts and lists of them."""
        return {
            "units_done": dict(self.units_done),
            "prompt_embeds": self.prompt_embeds,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "max_forward_rows": self.max_forward_rows,
            "generator": None if self.generator is None else self.generator.get_state(),
            "latents": self.latents,
            "sampler_state": None if self.sampler_state is None else self.sampler_state.state_dict(),
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on, with equal bits, from what `state_dict` returned of a request with the same parameters."""
        self.units_done = dict(values["units_done"])
        self.prompt_embeds = values["prompt_embeds"]
        self.negative_prompt_embeds = values["negative_prompt_embeds"]
        self.max_forward_rows = values["max_forward_rows"]
        if values["generator"] is not None:
            self.generator = torch.Generator("cpu")
            self.generator.set_state(values["generator"].cpu())
        self.latents = values["latents"]
        state = values["sampler_state"]
        self.sampler_state = None if state is None else SamplerState.from_state_dict(state)

    def drop_tensors(self) -> None:
        """Free what the request holds on the device, and its inputs."""
        self.inputs = EMPTY
        self.prompt_embeds = self.negative_prompt_embeds = self.latents = self.generator = None
        self.sampler_state = self.decoder_state = self.conditioning = None


@dataclass(frozen=True, kw_only=True)
class OutputBatch:
    """Frames [T, H, W, 3] uint8 on the CPU from `first_frame` on; `last` when no more follow."""

    request_id: str
    first_frame: int
    last: bool
    frames: Tensor
