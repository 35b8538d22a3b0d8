"""Whatever diffusers can run and we have no pipeline for: its own call, driven step by step.

Source: https://github.com/huggingface/diffusers
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
import transformers
from torch import nn

from sglang.multimodal_gen.configs.memory_args import ALL_RESIDENT, MemoryArgs
from sglang.multimodal_gen.configs.model_info import ModelInfo, TaskLimits
from sglang.multimodal_gen.configs.request_plan import Lane, Phase
from sglang.multimodal_gen.configs.sample.sampling_params import PARAMETERS_OF_SOME, SamplingParams
from sglang.multimodal_gen.errors import InvalidState, InvalidValue, UnsupportedParameter
from sglang.multimodal_gen.registry import ResolvedModel, load_config, read_model_index
from sglang.multimodal_gen.runtime.loader.quantization_wishes import check_wishes
from sglang.multimodal_gen.runtime.pipelines.diffusers_call import LibraryCall, SharedProcessors, private_copy
from sglang.multimodal_gen.runtime.pipelines.diffusers_facts import CallSignature, limits_of, own_defaults
from sglang.multimodal_gen.runtime.pipelines.diffusers_loading import find_class, load_library
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import (
    ComposedPipelineBase,
    Join,
    Report,
    alone,
)
from sglang.multimodal_gen.runtime.pipelines_core.memory import limit_memory
from sglang.multimodal_gen.runtime.pipelines_core.placement import place
from sglang.multimodal_gen.runtime.pipelines_core.residency import refuse_wishes
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

_ATTENTION_OPTIONS = ("attention_backend", "self_attention_backend", "cross_attention_backend")


class DiffusersPipeline(ComposedPipelineBase):
    """Runs each request in a copy of diffusers' pipeline that shares the weights; requests share no forward."""

    gives_previews: ClassVar[bool] = False  # each pipeline of the library lays its latents out in its own way
    takes_diffusers_kwargs: ClassVar[bool] = True
    own_parameters: ClassVar[frozenset[str]] = PARAMETERS_OF_SOME  # the call refuses what it does not take
    library: Any
    signature: CallSignature
    reason: str

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        components = self.library.components
        self.modules = {name: value for name, value in components.items() if isinstance(value, nn.Module)}

    @classmethod
    def load(
        cls,
        resolved: ResolvedModel,
        execution: ExecutionArgs,
        *,
        memory: MemoryArgs = ALL_RESIDENT,
        local_rank: int = 0,
        num_gpus: int = 1,
        join: Join = alone,
        sized: SamplingParams | None = None,
        random_weights: bool = False,
        report: Report = lambda _: None,
    ) -> Self:
        """See ComposedPipelineBase. Raises UnsupportedModel also for a class that makes nothing from a text."""
        assert resolved.entry is not None and resolved.local_path is not None, "resolved and downloaded before loading"
        start = time.perf_counter()
        _refuse_options(execution, random_weights)
        index = read_model_index(resolved.local_path)
        pipeline_class = find_class(str(index.get("_class_name")))
        signature = CallSignature.of(pipeline_class)
        why = "asked for" if resolved.backend == "diffusers" else "no native pipeline"
        reason = f"run by diffusers' {signature.class_name}: {why}"
        refuse_wishes(memory, resolved.name)
        placement = place(execution, local_rank=local_rank, num_gpus=num_gpus)
        limit_memory(placement.device, memory.gpu_memory_limit)
        num_ranks = join(placement.device).world.size
        if num_ranks > 1:
            raise InvalidValue("num_gpus", num_ranks, "1 for a pipeline that diffusers runs, or as many as dp_size")
        for line in (reason, *placement.reasons):
            report(line)
        library = load_library(
            pipeline_class, resolved.local_path, index, dtype=placement.dtype, device=placement.device
        )
        return cls(
            name=resolved.name,
            config=load_config(resolved.entry),
            defaults=resolved.defaults.filled_from(own_defaults(library, signature)),
            placement=placement,
            components={"library": library, "signature": signature, "reason": reason},
            load_seconds=time.perf_counter() - start,
        )

    def create_pipeline_stages(self) -> list[Stage]:
        return [
            LibraryNotes(self.library, self.signature, self.reason),
            LibraryDenoising(self.library, self.signature, defaults=self.defaults, device=self.device),
            LibraryDecoding(),
        ]

    def limits(self) -> TaskLimits:
        return limits_of(self.library, self.signature, self.defaults, self.config)

    def model_info(self) -> ModelInfo:
        name = f"diffusers.{self.signature.class_name}"
        return msgspec.structs.replace(super().model_info(), pipeline_class=name, tasks=self.signature.tasks())

    def saved_state(self, req: Req) -> dict[str, Any]:
        """Of nothing done: what the call has done so far lives on its stack."""
        return {"units_done": {}}

    def restore(self, req: Req, path: Path) -> None:
        """Raises: InvalidState, always."""
        raise InvalidState(f"diffusers' {self.signature.class_name} cannot go on in the middle")

    def release(self, req: Req) -> None:
        if req.library_call is not None:
            req.library_call.close()
        super().release(req)


def _refuse_options(execution: ExecutionArgs, random_weights: bool) -> None:
    """Raises UnsupportedParameter for options that the library would not hear of."""
    if random_weights:
        raise UnsupportedParameter("random_weights", "diffusers loads the checkpoint's own")
    check_wishes(execution, {})
    for name in _ATTENTION_OPTIONS:
        if getattr(execution, name) is not None:
            raise UnsupportedParameter(name, "diffusers chooses the kernels of its pipelines")


class LibraryNotes(Stage):
    """Says what runs the request, and which tokenizers cut its prompt."""

    name: str = "library"
    reads: ClassVar[tuple[str, ...]] = ("params",)

    def __init__(self, library: Any, signature: CallSignature, reason: str) -> None:
        components = library.components.items()
        self.tokenizers = {n: c for n, c in components if isinstance(c, transformers.PreTrainedTokenizerBase)}
        self.takes_length = "max_sequence_length" in signature.arguments
        self.reason = reason

    def admit(self, req: Req) -> None:
        """Raises: EmptyPrompt, or UnsupportedParameter for a profile, which would be empty."""
        req.params.require_prompt()
        if req.params.profile:
            raise UnsupportedParameter("profile", "diffusers runs in a thread of its own, where torch records nothing")
        req.notes.append(self.reason)
        asked = req.params.max_sequence_length if self.takes_length else None
        for name, tokenizer in self.tokenizers.items():
            limit = min(tokenizer.model_max_length, asked or tokenizer.model_max_length)
            num_tokens = len(tokenizer(req.params.prompt, verbose=False).input_ids)
            if num_tokens > limit:
                req.notes.append(f"prompt cut to {limit} of {num_tokens} tokens by the {name}")


class LibraryDenoising(Stage):
    """The library's call up to the end of its last step, a step a unit; the first has all that comes before besides."""

    name: str = "denoise"
    reads: ClassVar[tuple[str, ...]] = ("params",)
    writes: ClassVar[tuple[str, ...]] = ("library_call", "latents")

    def __init__(
        self, library: Any, signature: CallSignature, *, defaults: SamplingParams, device: torch.device
    ) -> None:
        self.library = library
        self.signature = signature
        self.defaults = defaults
        self.device = device
        self.processors = SharedProcessors(library)

    def admit(self, req: Req) -> None:
        """Raises: InvalidRequest for what the call does not take, and for what it needs and is not given."""
        self._arguments(req)

    def _arguments(self, req: Req) -> dict[str, Any]:
        return self.signature.call_arguments(req.params, self.defaults, req.inputs)

    def phase(self, req: Req) -> Phase:
        return _phase(req, self.name, "denoise", self.signature.num_steps(self._arguments(req)))

    def begin(self, req: Req) -> None:
        if req.library_call is not None:  # of a first unit that failed
            req.library_call.close()
        req.library_call = LibraryCall(
            private_copy(self.library),
            self.signature,
            self._arguments(req),
            req.params,
            device=self.device,
            processors=self.processors,
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        [req] = requests
        call: LibraryCall = req.library_call
        [units] = [phase.units for phase in req.phases if phase.name == self.name]
        unit = req.done(self.name)
        if unit == 0:
            call.advance(1)  # now it knows how many there are
        # Some samplers take two steps for one, or one more than asked: the units share all there are.
        call.advance(-(-call.total_steps(units) * (unit + 1) // units))
        if unit == units - 1 and (req.params.return_latents or req.params.output_type == "latent"):
            req.latents = call.final_latents()
        return []


class LibraryDecoding(Stage):
    """The rest of the library's call, and the frames that it gives."""

    name: str = "decode"
    reads: ClassVar[tuple[str, ...]] = ("library_call",)

    def phase(self, req: Req) -> Phase | None:
        return None if req.params.output_type == "latent" else _phase(req, self.name, "decode", 1)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        [req] = requests
        call: LibraryCall = req.library_call
        return [OutputBatch(request_id=req.request_id, first_frame=0, last=True, frames=call.frames())]


def _phase(req: Req, name: str, lane: Lane, units: int) -> Phase:
    """What a unit takes is not estimated: with one byte, the scheduler goes by what it measures.

    The key holds what changes a unit's time: one that takes much longer than others of its key counts as stuck.
    """
    p = req.params
    assert p.width and p.height and p.num_frames, "completed by the pipeline's defaults"
    guided = "guided" if (p.guidance_scale or 0.0) > 1 else "unguided"
    return Phase(
        name=name,
        lane=lane,
        units=units,
        batch_key=f"{name}:{p.num_frames}x{p.height}x{p.width}:{guided}:{','.join(sorted(p.diffusers_kwargs or ()))}",
        cost=float(p.width * p.height * p.num_frames),
        peak_bytes=1,
        alone=True,
    )
