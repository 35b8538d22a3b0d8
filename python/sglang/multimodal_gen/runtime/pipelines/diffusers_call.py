"""One request's call of a pipeline of diffusers: what it is given, where it stops, what comes of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidRequest, UnsupportedModel, UnsupportedParameter
from sglang.multimodal_gen.runtime.pipelines.diffusers_facts import CallSignature
from sglang.multimodal_gen.runtime.pipelines.stepped_call import StepEnd, SteppedCall

# Where diffusers checks what it is given; what fails in a model's own code is not the client's fault.
_CHECKING_MODULES = ("pipelines", "schedulers", "image_processor", "video_processor", "guiders")
_MAX_REASON_CHARACTERS = 300
_PATH = re.compile(r"(?:/[\w.@+~-]+)+/([\w.@+~-]+)")


class SharedProcessors:
    """The attention processors of the shared modules, which some pipelines replace for the length of a call.

    Between two steps of a call the modules have their own again, and the call's are kept for it.
    """

    def __init__(self, pipeline: Any) -> None:
        modules = [value for value in pipeline.components.values() if isinstance(value, nn.Module)]
        everything = {id(part): part for module in modules for part in module.modules()}
        self._holders: list[Any] = [m for m in everything.values() if hasattr(m, "set_processor")]
        self._own = [holder.processor for holder in self._holders]

    @contextlib.contextmanager
    def of(self, kept: list[Any]) -> Iterator[None]:
        """With the processors that a call left when it stopped; `kept` holds them, and is empty before it began."""
        self._put(kept or self._own)
        try:
            yield
        finally:
            kept[:] = [holder.processor for holder in self._holders]
            self._put(self._own)

    def _put(self, processors: list[Any]) -> None:
        for holder, processor in zip(self._holders, processors, strict=True):
            if holder.processor is not processor:
                holder.set_processor(processor)


def private_copy(pipeline: Any, memo: dict[int, Any] | None = None) -> Any:
    """A pipeline with the same modules and tokenizers, and with samplers and other small parts of its own.

    A call keeps its state in these and in the pipeline's attributes, so calls of two copies do not disturb each other.
    """
    memo = {} if memo is None else memo  # parts that two pipelines of a combined one share stay shared
    twin = copy.copy(pipeline)
    for name, value in vars(pipeline).items():
        if isinstance(value, DiffusionPipeline):
            vars(twin)[name] = private_copy(value, memo)
        elif isinstance(value, ConfigMixin) and not isinstance(value, nn.Module):
            vars(twin)[name] = copy.deepcopy(value, memo)
    return twin


class LibraryCall(SteppedCall):
    """The call of one request. `pipeline` is a private copy."""

    def __init__(
        self,
        pipeline: Any,
        signature: CallSignature,
        arguments: Mapping[str, Any],
        params: SamplingParams,
        *,
        device: torch.device,
        processors: SharedProcessors,
    ) -> None:
        self.pipeline = pipeline
        self.signature = signature
        self.params = params
        self._arguments = arguments
        self._processors = processors
        self._kept: list[Any] = []
        super().__init__(self._call_pipeline, device=device)

    def _call_pipeline(self, step_ended: StepEnd) -> Any:
        assert isinstance(self.params.seed, int), "each output has one seed"
        ours: dict[str, Any] = {
            "generator": torch.Generator("cpu").manual_seed(self.params.seed),
            "output_type": "latent" if self.params.output_type == "latent" else "np",
            "use_resolution_binning": False,
        }
        if self.signature.steps_told == "callback_on_step_end":
            ours["callback_on_step_end"] = functools.partial(_on_step_end, step_ended)
        elif self.signature.steps_told == "callback":
            ours["callback"] = lambda step, timestep, latents: step_ended(latents)
        else:
            _hook_samplers(self.pipeline, step_ended)
        taken = {name: value for name, value in ours.items() if name in self.signature.arguments}
        return self.pipeline(**self._arguments, **taken)

    def advance(self, num_steps: int | None) -> None:
        """See SteppedCall. Raises InvalidRequest for what the library refuses."""
        with self._processors.of(self._kept):
            try:
                super().advance(num_steps)
            except (ValueError, TypeError) as error:
                if self.num_steps > 0 or not _was_raised_by_a_check(error):
                    raise
                raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> InvalidRequest:
        text = without_paths(str(error))
        named = re.findall(r"`(\w+)`", text)
        param = next((name for name in named if name in self.signature.arguments), None)
        sizes = {"height": "size", "width": "size"}
        return InvalidRequest(
            f"diffusers' {self.signature.class_name} refuses the request: {text}",
            param=None if param is None else sizes.get(param, param),
        )

    def total_steps(self, asked: int) -> int:
        """How often the call will say that a step has ended, as far as it is known after the first time."""
        counted = getattr(self.pipeline, "_num_timesteps", None)
        if self.signature.steps_told == "callback" or not isinstance(counted, int) or counted < 1:
            return asked
        return counted

    def final_latents(self) -> Tensor:
        """The latents after the last step without their batch axis, in the pipeline's own layout.

        Raises: UnsupportedParameter.
        """
        if self.params.output_type == "latent":
            self.advance(None)
            latents, param = self._output(), "output_type"
        else:
            latents, param = self.latents, "return_latents"
        if not isinstance(latents, Tensor):
            raise UnsupportedParameter(param, f"diffusers' {self.signature.class_name} does not give its latents")
        return latents[0]

    def frames(self) -> Tensor:
        """Frames [T, H, W, 3] uint8 on the CPU, rounded as diffusers does, once the call has run to its end.

        Raises: InvalidRequest when they are not of the size asked for, which some pipelines round.
        """
        num_steps = self.num_steps
        self.advance(None)
        if self.params.return_latents and self.num_steps > num_steps:
            reason = f"diffusers' {self.signature.class_name} takes more steps than it says"
            raise UnsupportedParameter("return_latents", reason)
        pixels = np.asarray(self._output())
        if pixels.ndim == 5 or (pixels.ndim == 4 and not self.signature.makes_videos):
            pixels = pixels[0]
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise UnsupportedModel(f"diffusers' {self.signature.class_name} gave no frames in red, green and blue")
        made, p = pixels.shape[:3], self.params
        if made != (p.num_frames, p.height, p.width):
            raise InvalidRequest(
                f"size: got {p.width}x{p.height} with {p.num_frames} frames, of which diffusers' "
                f"{self.signature.class_name} makes {made[2]}x{made[1]} with {made[0]}",
                param="num_frames" if made[1:] == (p.height, p.width) else "size",
            )
        return torch.from_numpy(np.ascontiguousarray(pixels)).float().mul(255).round_().to(torch.uint8)

    def _output(self) -> Any:
        """Raises UnsupportedModel for a pipeline that makes something else."""
        for name in ("frames", "images"):
            if getattr(self.result, name, None) is not None:
                return getattr(self.result, name)
        raise UnsupportedModel(f"diffusers' {self.signature.class_name} gave neither images nor frames")


def _on_step_end(
    step_ended: StepEnd, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
) -> dict[str, Any]:
    """A `callback_on_step_end`."""
    step_ended(tensors.get("latents"))
    return tensors


def _hook_samplers(pipeline: Any, step_ended: StepEnd) -> None:
    """For a call that does not say when a step has ended: the samplers of its own say it."""

    def hooked(step: Any) -> Any:
        @functools.wraps(step)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            step_ended(result[0])
            return result

        return wrapper

    for value in pipeline.components.values():
        if isinstance(value, ConfigMixin) and hasattr(value, "set_timesteps"):
            value.step = hooked(value.step)  # type: ignore[attr-defined]


def _was_raised_by_a_check(error: BaseException) -> bool:
    """Whether diffusers refused an argument, as against a model that failed."""
    traceback, module = error.__traceback__, ""
    while traceback is not None:
        module, traceback = str(traceback.tb_frame.f_globals.get("__name__")), traceback.tb_next
    package, _, rest = module.partition(".")
    return package == "diffusers" and rest.split(".")[0] in _CHECKING_MODULES


def without_paths(text: str) -> str:
    """A library's message as one line of bounded length, with names in place of this machine's paths."""
    line = _PATH.sub(r"\1", " ".join(text.split())).rstrip(".")
    return line if len(line) <= _MAX_REASON_CHARACTERS else line[: _MAX_REASON_CHARACTERS - 1] + "…"
