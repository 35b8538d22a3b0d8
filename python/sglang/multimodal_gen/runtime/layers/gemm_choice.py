"""Which algorithm a product is computed by: measured once for a shape on a kind of GPU, and kept in a file.

Until a shape is known, and where nothing is gained, torch's own choice serves. So do fp32, gradients and compilers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.collectives import handed_on
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext
from sglang.multimodal_gen.runtime.layers.device_timing import time_in_turns, timer_for
from sglang.multimodal_gen.runtime.layers.gemm_kernels import CublasLt, Gemm, GemmLibrary, GemmNotAvailable, GemmShape
from sglang.multimodal_gen.runtime.layers.measured_file import MeasuredFile, device_identity

SCHEMA_VERSION = 1
WORTHWHILE = 0.02
"""An algorithm goes before torch's choice only if it takes less time by this share."""
FEWEST_FLOPS, FEWEST_TOKENS = 20_000_000_000, 1_024
"""Of products that are worth a choice: what is smaller takes no time, and texts are of many lengths."""
TOKEN_STEP = 256
"""Numbers of tokens are rounded up to a multiple of this, which is that of the largest tiles."""
_RUN_SECONDS = 8e-3
_ROUNDS = 3
# What measuring may take of a process's time in all: a server that is sent ever new sizes shall go on.
_MOST_SECONDS = 20.0
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}

logger = logging.getLogger(__name__)

Measure = Callable[[Sequence[Callable[[], Tensor]]], list[float]]


class GemmEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A shape with its tokens rounded up, the algorithm for it, "" for torch's choice, and the seconds of both."""

    shape: GemmShape
    algorithm: str
    seconds: float
    usual_seconds: float


class GemmChoices:
    """The algorithms of a process. With `measures` a shape that is unknown is measured when it is first met."""

    def __init__(
        self,
        library: GemmLibrary,
        entries: Sequence[GemmEntry],
        *,
        measure: Measure | None,
        keep: Callable[[Sequence[GemmEntry]], None] = lambda entries: None,
    ) -> None:
        self._library, self._measure, self._keep = library, measure, keep
        self._entries = {entry.shape: entry for entry in entries}
        self._gemms: dict[tuple[object, ...], Gemm | None] = {}
        self._seconds_left = _MOST_SECONDS

    @property
    def entries(self) -> Mapping[GemmShape, GemmEntry]:
        """What is known, by shape."""
        return self._entries

    def product(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool, out: Tensor | None = None
    ) -> Tensor | None:
        """[N, I], [O, I] and [O] -> [N, O], in `out` where given; None where torch's choice serves."""
        if inputs.shape[0] < FEWEST_TOKENS:
            return None
        # What a shape is made of, and quicker to look up.
        dtypes = (inputs.dtype, weight.dtype, None if bias is None else bias.dtype)
        place = (-(-inputs.shape[0] // TOKEN_STEP), weight.shape, inputs.stride(), weight.stride(), dtypes, gelu)
        if place not in self._gemms:
            shape = shape_of(inputs, weight, bias, gelu=gelu)
            if shape is not None and shape not in self._entries:
                if not self._can_measure():
                    return None
                self._measure_shape(shape, inputs, weight, bias)
            algorithm = "" if shape is None else self._entries[shape].algorithm
            self._gemms[place] = self._library.gemm(shape, algorithm) if shape is not None and algorithm else None
        gemm = self._gemms[place]
        if gemm is None:
            return None
        try:
            return gemm(inputs, weight, bias, out)
        except GemmNotAvailable as error:  # for another number of tokens than it was measured with
            logger.warning("a product of %d tokens goes by torch's choice: %s", inputs.shape[0], error)
            self._gemms[place] = None
            return None

    def _can_measure(self) -> bool:
        return self._measure is not None and self._seconds_left > 0 and not _is_captured()

    def _measure_shape(self, shape: GemmShape, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        assert self._measure is not None, "the caller has asked"
        found = {name: self._library.gemm(shape, name) for name in self._library.candidates(shape)}
        gemms = {name: gemm for name, gemm in found.items() if _can_run(gemm, inputs, weight, bias)}
        runs = [lambda gemm=gemm: gemm(inputs, weight, bias) for gemm in gemms.values()]
        usual, *times = self._measure([lambda: usual_product(inputs, weight, bias, gelu=shape.gelu), *runs])
        self._seconds_left -= (1 + len(times)) * (_ROUNDS + 1) * max(_RUN_SECONDS, usual)
        best = min(zip(times, gemms, strict=True), default=(usual, ""))
        seconds, algorithm = best if best[0] <= (1 - WORTHWHILE) * usual else (usual, "")
        entry = GemmEntry(shape=shape, algorithm=algorithm, seconds=seconds, usual_seconds=usual)
        logger.info("product of %s: %.3f ms, %.3f by torch's choice", shape, 1e3 * seconds, 1e3 * usual)
        self._entries[shape] = entry
        self._keep([entry])


def usual_product(inputs: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> Tensor:
    """By torch's choice: [N, I], [O, I] and [O] -> [N, O]."""
    if not gelu:
        return F.linear(inputs, weight, bias)
    if bias is None:
        return F.gelu(F.linear(inputs, weight), approximate="tanh")
    return torch._addmm_activation(bias, inputs, weight.t(), use_gelu=True)


def in_turns(runs: Sequence[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """Seconds of each, in bursts, run A B A B …, so that all of them meet the same limit of power."""
    timer = timer_for(device)
    timer(runs[0])
    count = max(1, int(_RUN_SECONDS / max(timer(runs[0]), 1e-6)))

    def burst(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def repeated() -> Tensor:
            for _ in range(count - 1):
                run()
            return run()

        return repeated

    samples = time_in_turns([burst(run) for run in runs], timer, warmup_runs=1, repeats=_ROUNDS)
    return [sorted(own)[len(own) // 2] / count for own in samples]


def gemm_choices(
    device: torch.device, parallel: ParallelContext, directory: Path, *, report: Callable[[str], None]
) -> GemmChoices | None:
    """Those of a GPU, from its file, the first rank's on every rank; None where there is no library for them. What is
    wrong is reported. A process that is alone measures what the file lacks; several ranks would find unequal times.
    """
    if device.type != "cuda":
        return None
    try:
        library = CublasLt()
    except Exception as error:  # of the bindings' own kinds
        report(f"products run by torch's choice: cuBLASLt cannot be had ({type(error).__name__})")
        return None
    identity = device_identity(device) | {"cublaslt": library.version}
    file = MeasuredFile(directory, "gemm", GemmEntry, identity, schema_version=SCHEMA_VERSION)
    entries: tuple[GemmEntry, ...] = ()
    if parallel.leads:
        entries, problem = file.read()
        if problem:
            report(problem)
    handed = handed_on(msgspec.msgpack.encode(entries), parallel.world)
    entries = msgspec.msgpack.decode(handed, type=tuple[GemmEntry, ...])

    def keep(new: Sequence[GemmEntry]) -> None:
        before, _ = file.read()
        try:
            file.write(tuple(({e.shape: e for e in before} | {e.shape: e for e in new}).values()))
        except OSError as error:
            logger.warning("the gemm table %s cannot be written: %s", file.path.name, error.strerror)

    alone = parallel.world.size == 1
    return GemmChoices(library, entries, measure=(lambda runs: in_turns(runs, device)) if alone else None, keep=keep)


_in_use: GemmChoices | None = None


def use_gemm_choices(choices: GemmChoices | None) -> None:
    """All products of this process go by these from now on."""
    global _in_use
    _in_use = choices


def chosen_product(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False, out: Tensor | None = None
) -> Tensor | None:
    """[..., I], [O, I] and [O] -> [..., O] by a measured algorithm, in `out` [N, O] where given, whose rows lie one
    behind the other; None where torch's choice serves."""
    if _in_use is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    product = _in_use.product(hidden_states.reshape(-1, hidden_states.shape[-1]), weight, bias, gelu=gelu, out=out)
    return None if product is None else product.view(*hidden_states.shape[:-1], -1)


def shape_of(inputs: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> GemmShape | None:
    """None for products that are not worth a choice, or none of the library's."""
    precision = _PRECISIONS.get(inputs.dtype)
    alike = [weight] if bias is None else [weight, bias]
    if precision is None or any((each.dtype, each.device) != (inputs.dtype, inputs.device) for each in alike):
        return None
    if inputs.stride(1) != 1 or weight.stride(1) != 1:
        return None
    shape = GemmShape(
        precision=precision,
        tokens=-(-inputs.shape[0] // TOKEN_STEP) * TOKEN_STEP,
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        input_stride=inputs.stride(0),
        weight_stride=weight.stride(0),
        bias=bias is not None,
        gelu=gelu,
    )
    return shape if shape.flops >= FEWEST_FLOPS else None


def _can_run(gemm: Gemm, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    try:
        gemm(inputs, weight, bias)
    except GemmNotAvailable:
        return False
    return True


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
