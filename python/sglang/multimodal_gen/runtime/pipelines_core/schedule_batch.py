"""`Req`: the running state of one request in a worker, and `OutputBatch`: decoded frames on their way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.cache.step_cache import StepCache
from sglang.multimodal_gen.runtime.models.schedulers import Sampler, SamplerState
from sglang.multimodal_gen.runtime.pipelines_core.adapters import AdapterUse
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text on its way to the encoders, as token ids; equal prompts have equal embeddings, so it is a cache's key.

    `ids` are those of the encoder of the token sequence, `pooled_ids` those of an encoder that gives one vector, both
    without padding. `num_tokens` is how many ids the whole text would have; `options` what else the request tells the
    family's encoder. `images` are pictures that the encoder sees beside the text, known by their `digest`.
    """

    ids: tuple[int, ...]
    num_tokens: int
    pooled_ids: tuple[tuple[int, ...], ...] = ()
    max_length: int = 0
    options: tuple[int, ...] = ()
    digest: str = ""
    images: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    @property
    def was_cut(self) -> bool:
        """Whether the text did not fit."""
        return len(self.ids) < self.num_tokens


class TextCondition(NamedTuple):
    """What a guidance branch is steered by: token embeddings [L, D], where those from `length` on are padding, and the
    vector [P] of encoders that give one."""

    embeds: Tensor
    length: int
    pooled: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """As a tree of tensors and numbers."""
        return self._asdict()


class EmbeddedSteps(NamedTuple):
    """What a transformer makes of steps from `first` on, [T, V]; with a text's vector [P] if it is told one."""

    first: int
    pooled: Tensor | None
    values: Tensor


class EmbeddedText(NamedTuple):
    """What a transformer makes of a text whose embeddings are `embeds`, [..., L, D]."""

    transformer: nn.Module
    embeds: Tensor
    values: Tensor


@dataclass(kw_only=True)
class Req:
    """One output in the making. Stages read and write the fields; `conditioning` holds a family's own tensors, by name,
    `library_call` a pipeline of another library that runs in a thread for this request.

    `latent_shape` is (C, T, H, W); latents [C, T, H, W] fp32, texts and conditioning lie on the device.
    `max_forward_rows` None: all guidance branches in one forward; `max_text_rows` None: all texts in one. `units_done`
    counts by phase. With `embeds_ahead` what transformers make of texts and steps is computed ahead of their forwards
    and kept, in `embedded_texts` and `embedded_steps`. `keeps_clean`: the next step leaves what it predicts of the
    clean latents in `clean_latents`. `generator` draws the request's noise, on the CPU; a `strength` below 1 keeps some
    of the picture that it starts from.
    """

    request_id: str
    params: SamplingParams
    inputs: RequestInputs = EMPTY
    adapters: tuple[AdapterUse, ...] = ()
    phases: tuple[Phase, ...] = ()
    notes: list[str] = field(default_factory=list)
    units_done: dict[str, int] = field(default_factory=dict)
    prompt: Prompt | None = None
    negative_prompt: Prompt | None = None
    text: TextCondition | None = None
    negative_text: TextCondition | None = None
    latent_shape: tuple[int, int, int, int] | None = None
    strength: float = 1.0
    generator: torch.Generator | None = None
    latents: Tensor | None = None
    sampler: Sampler | None = None
    sampler_state: SamplerState | None = None
    keeps_clean: bool = False
    clean_latents: Tensor | None = None
    step_cache: StepCache | None = None
    embeds_ahead: bool = True
    embedded_texts: list[EmbeddedText] = field(default_factory=list)
    embedded_steps: list[EmbeddedSteps] = field(default_factory=list)
    max_text_rows: int | None = None
    max_forward_rows: int | None = None
    decode_plan: Any = None
    decoder_state: Any = None
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    library_call: Any = None

    @property
    def needed_bytes(self) -> int:
        """Of its largest phase: what a unit takes, and what it holds between units."""
        return max((phase.peak_bytes + phase.held_bytes for phase in self.phases), default=0)

    def done(self, phase: str) -> int:
        """Units of a phase that are finished."""
        return self.units_done.get(phase, 0)

    def state_dict(self) -> dict[str, Any]:
        """All that cannot be computed again from the parameters: tensors, ints, and dicts and lists of them."""
        return {
            "units_done": dict(self.units_done),
            "text": None if self.text is None else self.text.state_dict(),
            "negative_text": None if self.negative_text is None else self.negative_text.state_dict(),
            "conditioning": dict(self.conditioning),
            "max_forward_rows": self.max_forward_rows,
            "embeds_ahead": self.embeds_ahead,
            "generator": None if self.generator is None else self.generator.get_state(),
            "latents": self.latents,
            "sampler_state": None if self.sampler_state is None else self.sampler_state.state_dict(),
            "step_cache": None if self.step_cache is None else self.step_cache.state_dict(),
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on, with equal bits, from what `state_dict` returned of a request with the same parameters."""
        self.units_done = dict(values["units_done"])
        self.text, self.negative_text = (
            None if values[name] is None else TextCondition(**values[name]) for name in ("text", "negative_text")
        )
        self.conditioning = dict(values["conditioning"])
        self.max_forward_rows, self.embeds_ahead = values["max_forward_rows"], values["embeds_ahead"]
        self.forget_embedded()
        if values["generator"] is not None:
            self.generator = torch.Generator("cpu")
            self.generator.set_state(values["generator"].cpu())
        self.latents = values["latents"]
        state = values["sampler_state"]
        self.sampler_state = None if state is None else SamplerState.from_state_dict(state)
        if self.step_cache is not None and values["step_cache"] is not None:
            note = self.step_cache.load_state_dict(values["step_cache"])
            self.notes += [] if note is None else [note]

    def drop_tensors(self) -> None:
        """Free what the request holds on the device, and its inputs."""
        self.text = self.negative_text = self.latents = self.clean_latents = self.generator = None
        self.sampler_state = self.step_cache = self.decoder_state = self.library_call = None
        self.conditioning, self.inputs, self.adapters = {}, EMPTY, ()
        self.forget_embedded()

    def forget_embedded(self) -> None:
        """Drop what can be made again of texts and steps."""
        self.embedded_texts, self.embedded_steps = [], []


@dataclass(frozen=True, kw_only=True)
class OutputBatch:
    """Frames [T, H, W, 3] uint8 on the CPU from `first_frame` on; `last` when no more follow."""

    request_id: str
    first_frame: int
    last: bool
    frames: Tensor
