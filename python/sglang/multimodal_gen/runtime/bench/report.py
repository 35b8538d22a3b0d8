"""A benchmark's result for people, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang.multimodal_gen.runtime.bench.attention_tables import attention_sections
from sglang.multimodal_gen.runtime.bench.engine import EngineResult
from sglang.multimodal_gen.runtime.bench.load.result import LoadResult
from sglang.multimodal_gen.runtime.bench.load.tables import load_sections
from sglang.multimodal_gen.runtime.bench.machine import Machine
from sglang.multimodal_gen.runtime.bench.messages import (
    AttentionResult,
    ComponentResult,
    GpuState,
    LayoutResult,
    ParallelResult,
    Side,
)
from sglang.multimodal_gen.runtime.bench.pipeline_result import (
    Alone,
    BesideReference,
    PipelineResult,
    Reference,
    Together,
)
from sglang.multimodal_gen.runtime.bench.startup import StartupResult
from sglang.multimodal_gen.runtime.bench.statistics import Ratio, Summary
from sglang.multimodal_gen.runtime.bench.tables import Row, Section, as_flops, as_size, as_time, show_sections

_SHORTEST_SHOWN_S = 0.0005
_COMPILED = "diffusers compiled"

Result = ComponentResult | AttentionResult | ParallelResult | PipelineResult | EngineResult | StartupResult | LoadResult


def show(name: str, machine: Machine, result: Result) -> None:
    """Print the tables on stdout."""
    show_sections([_machine(machine), *_sections(name, result)])


def _sections(name: str, result: Result) -> Iterator[Section]:
    if isinstance(result, ComponentResult):
        return _component(name, result)
    if isinstance(result, AttentionResult):
        return attention_sections(result)
    if isinstance(result, ParallelResult):
        return _parallel(result)
    if isinstance(result, PipelineResult):
        return _pipeline(result)
    if isinstance(result, EngineResult):
        return _engine(result)
    if isinstance(result, LoadResult):
        return load_sections(result)
    return _startup(result)


def _machine(machine: Machine) -> Section:
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    rows = [
        ("processor", f"{machine.processor}, {machine.num_cores} cores, {as_size(machine.memory_bytes)}"),
        ("load", f"{machine.load_average:.2f} in the minute before"),
        ("packages", packages),
    ]
    if machine.gpus:
        rows.insert(1, ("GPUs", ", ".join(machine.gpus)))
    return Section("machine", rows)


def _component(name: str, result: ComponentResult) -> Iterator[Section]:
    shapes = ", ".join("x".join(map(str, shape)) for shape in result.input_shapes)
    device = result.device + (f" ({result.device_name})" if result.device_name else f", {result.num_threads} threads")
    yield Section(
        f"{name}: {result.module}",
        [
            ("device", device),
            ("precision", result.precision),
            ("parameters", _parameters(result.num_parameters, result.weight_bytes, result.load_seconds)),
            ("inputs", shapes),
            ("work", as_flops(result.flops)),
            ("matrix products", as_flops(result.matmul_flops_per_second) + "/s"),
            *_gpu_state(result.gpu_state),
            *(("note", note) for note in result.notes),
        ],
    )
    sides = [("sglang", result.ours)]
    if result.reference is not None:
        sides.append((result.reference_module or "", result.reference))
    if result.compiled_reference is not None:
        sides.append((_COMPILED, result.compiled_reference))
    header = ("", "median", "p10", "p90", "runs", "rate", "of matrix products", "peak memory")
    yield Section("time of a run", [_side(name, side) for name, side in sides], header)
    yield from _errors(sides)
    yield from _unquantized(result)
    yield from _against(result)
    if result.kernels:
        kernels = [(each.name, as_time(each.seconds), str(each.calls)) for each in result.kernels]
        yield Section("where a run of ours spends its time", kernels, ("", "time", "calls"))


def _gpu_state(state: GpuState | None) -> Iterator[Row]:
    if state is None:
        return
    clocks = f"{state.sm_clock_mhz:.0f} MHz ({state.lowest_sm_clock_mhz:.0f} to {state.highest_sm_clock_mhz:.0f})"
    if state.memory_clock_mhz is not None:
        clocks += f", memory {state.memory_clock_mhz:.0f} MHz"
    if state.clock_reasons:
        clocks += f"; lowered by: {', '.join(state.clock_reasons)}"
    yield "clocks", clocks
    power = []
    if state.power_w is not None:
        power.append(f"{state.power_w:.0f} W, at most {state.highest_power_w:.0f} W")
    if state.highest_temperature_c is not None:
        power.append(f"at most {state.highest_temperature_c:.0f} °C")
    yield "power", "; ".join((*power, f"{state.num_samples} samples"))


def _errors(sides: Sequence[tuple[str, Side]]) -> Iterator[Section]:
    errors = [(name, side.error) for name, side in sides if side.error is not None]
    if not errors:
        return
    if all(error.psnr_db is None for _, error in errors):  # no pixels
        yield Section("difference from fp32", [(name, f"{error.relative:.2e}") for name, error in errors])
        return
    rows = [
        (name, f"{error.relative:.2e}", "" if error.psnr_db is None else f"{error.psnr_db:.1f} dB")
        for name, error in errors
    ]
    yield Section("difference from fp32", rows, ("", "relative", "PSNR"))


def _unquantized(result: ComponentResult) -> Iterator[Section]:
    before = result.quantization
    if before is None:
        return
    faster = before.unquantized_seconds.median / result.ours.seconds.median
    yield Section(
        "against the same weights unquantised",
        [
            ("difference", f"{before.relative:.2e}"),
            ("times as fast", f"{faster:.2f} (unquantised {as_time(before.unquantized_seconds.median)})"),
            ("weights", f"{as_size(result.weight_bytes)} of {as_size(before.unquantized_weight_bytes)}"),
        ],
    )


def _against(result: ComponentResult) -> Iterator[Section]:
    if result.ratio is None or result.max_relative_difference is None:
        return
    faster, difference = [_ratio(result.ratio)], [f"{result.max_relative_difference:.2e}"]
    title, header = "sglang against it", Row()
    if result.compiled_ratio is not None:
        faster.append(_ratio(result.compiled_ratio))
        difference.append(f"{result.compiled_max_relative_difference:.2e}")
        title, header = "sglang against them", ("", result.reference_module or "", _COMPILED)
    yield Section(title, [("times as fast", *faster), ("largest difference", *difference)], header)


def _parallel(result: ParallelResult) -> Iterator[Section]:
    device = result.device_name or result.device
    names = [str(layout.shape) for layout in result.layouts]
    title = f"a step of {result.module}, {result.precision} on {device}"
    yield _layouts(title, names, result.layouts)
    if result.decoding:
        names = [
            f"{layout.shape.num_ranks} ranks, {frames} latent frames at a time"
            for layout, frames in zip(result.decoding, result.chunk_frames, strict=True)
        ]
        yield _layouts(f"decoding by {result.decoder}, {result.decoder_precision}", names, result.decoding)


def _layouts(title: str, names: Sequence[str], layouts: Sequence[LayoutResult]) -> Section:
    one = layouts[0].seconds.median
    header = ("", "median", "p10", "p90", "times as fast", "difference", "peak memory", "host", "exposed communication")
    rows = [
        (
            name,
            *_summary(layout.seconds),
            f"{one / layout.seconds.median:.2f}",
            f"{layout.relative_difference:.1e}",
            "unknown" if layout.peak_bytes is None else as_size(layout.peak_bytes),
            f"{layout.host_ms:.0f} ms",
            "" if layout.exposed_communication_ms is None else f"{layout.exposed_communication_ms:.1f} ms",
        )
        for name, layout in zip(names, layouts, strict=True)
    ]
    return Section(title, rows, header)


def _side(name: str, side: Side) -> Row:
    return (
        name,
        *_summary(side.seconds),
        str(len(side.seconds.samples)),
        as_flops(side.flops_per_second) + "/s",
        f"{side.matmul_ratio:.1%}",
        "unknown" if side.peak_bytes is None else as_size(side.peak_bytes),
    )


def _pipeline(result: PipelineResult) -> Iterator[Section]:
    model, request, alone = result.model, result.request, result.alone
    yield Section(
        f"pipeline: {model.name} ({model.pipeline_class})",
        [
            ("device", f"{model.device}, {model.precision}"),
            ("parameters", _parameters(model.num_parameters, model.weight_bytes, model.load_seconds)),
            ("request", f"{request['width']}x{request['height']}, {request['num_frames']} frames, "
                        f"{request['num_inference_steps']} steps, guidance {request['guidance_scale']:g}"),
            ("throughput", f"{alone.requests_per_second:.3g} outputs/s"),
            ("peak memory", as_size(alone.peak_memory_bytes)),
            *(("note", note) for note in result.notes),
        ],
    )  # fmt: skip
    rows = [("request", *_summary(alone.seconds), "", "")]
    for stage, seconds in alone.stage_seconds.items():
        rate = result.rates.get(stage)
        rates = ("", "") if rate is None else (as_flops(rate.flops_per_second) + "/s", f"{rate.matmul_ratio:.1%}")
        rows.append((f"  {stage}", *_summary(seconds), *rates))
    rows.append(("step", *_summary(alone.step_ms, scale=1e-3), "", ""))
    yield Section("one request at a time", rows, ("", "median", "p10", "p90", "rate", "of matrix products"))
    yield from _together(result)
    yield from _idle(result)
    if result.reference is not None:
        name, batch = result.reference.pipeline, result.reference.batch
        yield from _beside(f"beside {name}", name, result.reference)
        if batch is not None:
            yield from _beside(f"{batch.size} outputs together, beside one call of {name}", name, batch)
        yield _outputs_per_second(result.alone, result.together, result.reference)


def _beside(title: str, name: str, other: BesideReference) -> Iterator[Section]:
    compared: list[Row] = [("sglang", *_summary(other.ours_seconds)), (name, *_summary(other.seconds))]
    if other.step_ms is not None:
        compared.append(("  step", *_summary(other.step_ms, scale=1e-3)))
    yield Section(title, compared, ("", "median", "p10", "p90"))
    yield Section(
        "sglang against it",
        [
            ("times as fast", _ratio(other.ratio)),
            ("largest difference", f"{other.max_frame_difference} of 255"),
            ("mean difference", f"{other.mean_frame_difference:.4f} of 255"),
        ],
    )


def _outputs_per_second(alone: Alone, shared: Together | None, other: Reference) -> Section:
    ours, theirs = [f"{alone.requests_per_second:.3g}"], [f"{other.outputs_per_second:.3g}"]
    header = ["", "one by one"]
    if shared is not None:
        header.append(f"{shared.concurrency} together")
        ours.append(f"{shared.requests_per_second:.3g}")
        theirs.append("none" if other.batch is None else f"{other.batch.outputs_per_second:.3g}")
    return Section("outputs/s", [("sglang", *ours), (other.pipeline, *theirs)], tuple(header))


def _idle(result: PipelineResult) -> Iterator[Section]:
    idle = result.idle
    if idle is None:
        return
    work = "kernels" if result.model.device.startswith("cuda") else "operations"
    rows: list[Row] = [
        (f"between {work}", f"{as_time(idle.idle_seconds)} of {as_time(idle.seconds)}, {idle.share:.2%}"),
        ("of it waiting", f"{as_time(idle.waiting_seconds)}, {idle.waiting_share:.2%}"),
    ]
    rows += [(as_time(gap.seconds), f"after {gap.after}, before {gap.before}") for gap in idle.gaps]
    rows.append(("trace", idle.trace))
    yield Section("nothing ran in recorded steps", rows)


def _together(result: PipelineResult) -> Iterator[Section]:
    shared = result.together
    if shared is None:
        return
    yield Section(
        f"{shared.concurrency} requests",
        [
            ("all", *_pair(shared.seconds, shared.seconds_one_by_one, shared.ratio)),
            ("  denoising", *_pair(shared.denoise_seconds, shared.denoise_seconds_one_by_one, shared.denoise_ratio)),
            ("outputs/s", f"{shared.requests_per_second:.3g}", f"{result.alone.requests_per_second:.3g}", ""),
            ("one request", as_time(shared.request_seconds.median), as_time(result.alone.seconds.median), ""),
            ("peak memory", as_size(shared.peak_memory_bytes), as_size(result.alone.peak_memory_bytes), ""),
            ("requests in a step", f"{shared.mean_batch_size:.2f}", "1", ""),
        ],
        ("", "together", "one by one", "times as fast"),
    )


def _pair(ours: Summary, other: Summary, ratio: Ratio) -> Row:
    return as_time(ours.median), as_time(other.median), _ratio(ratio)


def _engine(result: EngineResult) -> Iterator[Section]:
    yield Section(
        "engine without a model",
        [
            ("a request of one step", *_summary(result.request_ms, scale=1e-3)),
            ("each further step", *_summary(result.step_ms, scale=1e-3)),
        ],
        ("", "median", "p10", "p90"),
    )
    yield Section(
        "throughput, requests/s",
        [
            (str(t.concurrency), *(f"{v:.4g}" for v in (t.requests_per_second.median, t.requests_per_second.p10,
                                                        t.requests_per_second.p90)))
            for t in result.throughput
        ],
        ("at a time", "median", "p10", "p90"),
    )  # fmt: skip


def _startup(result: StartupResult) -> Iterator[Section]:
    rows = [
        (name, *_summary(seconds)) for name, seconds in result.intervals.items() if seconds.maximum >= _SHORTEST_SHOWN_S
    ]
    header = ("", "median", "p10", "p90")
    yield Section(f"start of {result.entry_point}, {len(result.ready_seconds.samples)} times", rows, header)
    totals = [("ready", *_summary(result.ready_seconds))]
    if result.first_result_seconds is not None:
        totals.append(("first result", *_summary(result.first_result_seconds)))
    yield Section("since the process's start", totals, header)
    if result.page_cache is not None:
        cache = result.page_cache
        rates = f"{_rate(cache.bytes_per_second)} by {cache.num_threads} threads"
        rates += f", {_rate(cache.bytes_per_second_of_one)} by one"
        yield Section("page cache", [("the same files", f"{as_size(cache.num_bytes)}, {rates}")])
    if result.reads:
        weights = [
            (
                name,
                as_size(read.num_bytes),
                as_time(read.seconds.median),
                _rate(read.bytes_per_second),
                "" if read.page_cache_ratio is None else f"{read.page_cache_ratio:.0%}",
                "" if read.rest_seconds is None else as_time(read.rest_seconds),
            )
            for name, read in result.reads.items()
        ]
        yield Section("weights", weights, ("", "size", "reading", "rate", "of the page cache", "building and joining"))
    yield Section("most of the time until ready", [(result.dominant, f"{result.dominant_share:.0%}")])


def _summary(summary: Summary, *, scale: float = 1.0) -> tuple[str, str, str]:
    """Median, p10 and p90, as times."""
    return as_time(scale * summary.median), as_time(scale * summary.p10), as_time(scale * summary.p90)


def _parameters(number: int, num_bytes: int, load_seconds: float) -> str:
    return f"{number:,}, {as_size(num_bytes)}, loaded in {as_time(load_seconds)}"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"
