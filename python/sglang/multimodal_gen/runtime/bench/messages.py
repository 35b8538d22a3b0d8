"""What a benchmark and its child processes tell each other: frozen structs, msgpack on the pipe."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.configs.model_info import ComponentRead
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.bench.statistics import Ratio, Summary
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig


class BenchMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all of them."""


# --- benchmark -> child, as its configuration ---


class ComponentTask(BenchMessage, frozen=True, kw_only=True):
    """Time one workload of the model that the engine's options name. Answered by ComponentResult or TaskFailed.

    Sizes that are None are the model's own defaults.
    """

    engine: EngineConfig
    workload: str
    width: int | None
    height: int | None
    num_frames: int | None
    max_sequence_length: int | None
    chunk_frames: int | None
    batch_size: int
    warmup_runs: int
    repeats: int
    min_seconds: float
    compare: str | None
    pause_seconds: float = 0.0
    profile: bool = False


class ParallelTask(BenchMessage, frozen=True, kw_only=True):
    """Time a step in each of the layouts, as one of `num_ranks`; ranks meet in files of the directory `meeting`. With
    `decode` also decoding, once for each number of ranks. Answered by ParallelResult or TaskFailed."""

    component: ComponentTask
    layouts: tuple[ReplicaShape, ...]
    decode: bool
    rank: int
    num_ranks: int
    meeting: str


class CostTask(BenchMessage, frozen=True, kw_only=True):
    """Count the FLOPs of a request of this size through the model that the engine's options name; see CostResult."""

    engine: EngineConfig
    width: int | None
    height: int | None
    num_frames: int | None
    max_sequence_length: int | None


class AttentionCase(BenchMessage, frozen=True, kw_only=True):
    """A shape of attention and who has it."""

    names: tuple[str, ...]
    batch_size: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    masked: bool = False


class AttentionTask(BenchMessage, frozen=True, kw_only=True):
    """Time these kernels, None for all, in the cases that have at most as many tokens. Answered by AttentionResult or
    TaskFailed. With `save` the table of choices is written."""

    engine: EngineConfig
    cases: tuple[AttentionCase, ...]
    max_tokens: int | None
    max_tokens_on_cpu: int
    kernels: tuple[str, ...] | None
    warmup_runs: int
    repeats: int
    min_seconds: float
    save: bool


class ReferenceTask(BenchMessage, frozen=True, kw_only=True):
    """Load the model's pipeline of diffusers. Answered by ReferenceReady, then each ReferenceCall by a ReferenceDone.

    `directory` is where frames may be left.
    """

    engine: EngineConfig
    directory: str


class ReferenceCall(BenchMessage, frozen=True, kw_only=True):
    """Generate an output for each of the seeds, all in one call. `params` is complete but for the seed."""

    params: SamplingParams
    seeds: tuple[int, ...]


class StartupTask(BenchMessage, frozen=True, kw_only=True):
    """Start an engine, generate twice, and tell when what happened. Answered by StartupTimes."""

    engine: EngineConfig
    num_inference_steps: int


# --- child -> benchmark ---


class Doing(BenchMessage, frozen=True, kw_only=True, tag="doing"):
    """What goes on, for whoever waits."""

    detail: str


class TaskFailed(BenchMessage, frozen=True, kw_only=True, tag="failed"):
    """The child gives up."""

    error: ErrorInfo


class OutputError(BenchMessage, frozen=True, kw_only=True):
    """How far an output is from what our module gives in fp32 throughout, with the same weights: the norm of the
    difference over the exact norm, and the peak signal-to-noise ratio of pixels in [-1, 1], None of anything else."""

    relative: float
    psnr_db: float | None


class QuantizationError(BenchMessage, frozen=True, kw_only=True):
    """What quantised weights cost and save, against the same ones as they were: the norm of the difference of one
    forward's output over the norm, the seconds of a forward, and the bytes of all weights."""

    relative: float
    unquantized_seconds: Summary
    unquantized_weight_bytes: int


class Side(BenchMessage, frozen=True, kw_only=True):
    """One implementation's part of a comparison. `peak_bytes` is what a warm run takes above the weights; `error` is
    None where it was not measured."""

    seconds: Summary
    peak_bytes: int | None
    flops_per_second: float
    matmul_ratio: float
    error: OutputError | None = None


LONGEST_KERNEL_NAME = 100
"""Names of templates go on for lines."""


class KernelTime(BenchMessage, frozen=True, kw_only=True):
    """All calls of one kernel in a run of ours, or on the CPU of one operation."""

    name: str
    calls: int
    seconds: float


class GpuState(BenchMessage, frozen=True, kw_only=True):
    """What nvidia-smi said of a GPU while timed runs and their warm-ups went on: clocks in MHz, power in W, temperature
    in °C. Medians unless the name says otherwise; None what it does not say of this GPU. `clock_reasons` are all those
    that it gave for clocks below the highest.
    """

    num_samples: int
    sm_clock_mhz: float
    lowest_sm_clock_mhz: float
    highest_sm_clock_mhz: float
    memory_clock_mhz: float | None
    power_w: float | None
    highest_power_w: float | None
    highest_temperature_c: float | None
    clock_reasons: tuple[str, ...]


class ComponentResult(BenchMessage, frozen=True, kw_only=True, tag="component"):
    """What was measured of a module. FLOPs count 2 for a multiply-add, of matrix products and convolutions alone.

    `matmul_flops_per_second` is the best rate of a large square product in the same precision, in the same run;
    `max_relative_difference` the largest difference of the outputs over the reference's largest value. `kernels`, if
    asked for: those that took longest. `quantization` is of weights that were quantised while they loaded. The fields
    `compiled_…` are of the reference's module through torch's compiler, in the same turns. `gpu_state` is None on a CPU
    and where nobody could be asked.
    """

    component: str
    module: str
    device: str
    device_name: str
    precision: str
    num_threads: int
    num_parameters: int
    weight_bytes: int
    load_seconds: float
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    flops: int
    matmul_flops_per_second: float
    ours: Side
    reference: Side | None
    reference_module: str | None
    ratio: Ratio | None
    max_relative_difference: float | None
    notes: tuple[str, ...]
    kernels: tuple[KernelTime, ...] = ()
    quantization: QuantizationError | None = None
    compiled_reference: Side | None = None
    compiled_ratio: Ratio | None = None
    compiled_max_relative_difference: float | None = None
    gpu_state: GpuState | None = None


class LayoutResult(BenchMessage, frozen=True, kw_only=True):
    """A step in one layout, or decoding, which asks only for the number of ranks.

    `relative_difference` is the norm of the difference from one rank's output over its norm; the exposed communication
    that in which the GPU did nothing else; `host_ms` is what this process takes to launch a step: where that is as long
    as the step, GPUs wait for it.
    """

    shape: ReplicaShape
    seconds: Summary
    peak_bytes: int | None
    relative_difference: float
    exposed_communication_ms: float | None
    host_ms: float


class ParallelResult(BenchMessage, frozen=True, kw_only=True, tag="parallel"):
    """What one rank measured in the layouts that it was in; `decoding` by `decoder`, where it was asked for, has its
    own precision and `chunk_frames` latent frames at a time, by layout."""

    module: str
    device: str
    device_name: str
    precision: str
    layouts: tuple[LayoutResult, ...]
    decoder: str = ""
    decoder_precision: str = ""
    decoding: tuple[LayoutResult, ...] = ()
    chunk_frames: tuple[int, ...] = ()


class CostResult(BenchMessage, frozen=True, kw_only=True, tag="cost"):
    """FLOPs of one row of one denoising step, which has `num_tokens`, and of decoding one output, 0 where not counted.

    `matmul_flops_per_second` is the best rate of a large square product in the precision of a phase, by phase.
    """

    num_tokens: int
    step_flops: int
    decode_flops: int
    matmul_flops_per_second: dict[str, float]


class AttentionTimes(BenchMessage, frozen=True, kw_only=True):
    """A kernel in one case. `error` is the norm of the difference from attention in fp32 over its norm, None where the
    memory did not suffice for it."""

    seconds: Summary
    flops_per_second: float
    matmul_ratio: float
    error: float | None
    lossy: bool


class AttentionCaseResult(BenchMessage, frozen=True, kw_only=True):
    """`problems` are of kernels that did not run; `usual` is what the fixed order takes, `chosen` what a table with
    these times would, empty where no exact kernel ran."""

    case: AttentionCase
    flops: int
    kernels: dict[str, AttentionTimes]
    problems: dict[str, str]
    usual: str
    chosen: str


class AttentionResult(BenchMessage, frozen=True, kw_only=True, tag="attention"):
    """FLOPs count 2 for a multiply-add of both products. `table` is the file that was written, `num_left_out` counts
    cases of more than `max_tokens`."""

    device: str
    device_name: str
    precision: str
    matmul_flops_per_second: float
    cases: tuple[AttentionCaseResult, ...]
    num_left_out: int
    max_tokens: int | None
    table: str


class ReferenceReady(BenchMessage, frozen=True, kw_only=True, tag="reference_ready"):
    """The pipeline is loaded."""

    pipeline: str
    load_seconds: float


class ReferenceDone(BenchMessage, frozen=True, kw_only=True, tag="reference_done"):
    """The outputs N are made; their frames, uint8 [N, T, H, W, 3], lie in a NumPy file that the reader removes.

    `refusal` says why a call of several outputs gave none; all else is empty then.
    """

    seconds: float = 0.0
    step_ms: tuple[float, ...] = ()
    frames_file: str = ""
    refusal: str | None = None


class StartupTimes(BenchMessage, frozen=True, kw_only=True, tag="startup"):
    """Moments of the monotonic clock, which all processes of a machine share, by what happened then, in order; and what
    reading the weights took a worker."""

    moments: tuple[tuple[str, float], ...]
    reads: tuple[ComponentRead, ...] = ()


FromChild = (
    Doing
    | TaskFailed
    | ComponentResult
    | ParallelResult
    | CostResult
    | AttentionResult
    | ReferenceReady
    | ReferenceDone
    | StartupTimes
)


def encode(message: BenchMessage) -> bytes:
    """For the pipe."""
    return msgspec.msgpack.encode(message)
