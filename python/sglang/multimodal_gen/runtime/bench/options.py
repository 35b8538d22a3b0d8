"""Options of the benchmarks, each declared once; those of the engine and of requests come from their declarations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen.configs.attention import ATTENTION_BACKENDS
from sglang.multimodal_gen.configs.declare import CLI_ONLY, Parameter, arg, parameters
from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.configs.sample.sampling_params import MAX_SEED, SamplingParams
from sglang.multimodal_gen.errors import InvalidValue, MissingParameter
from sglang.multimodal_gen.runtime.bench.load.options import LoadArgs, check_load_options
from sglang.multimodal_gen.runtime.bench.load.plan import BODY_OPTIONS
from sglang.multimodal_gen.runtime.server_args import server_options

DIFFUSERS, DIFFUSERS_COMPILED = "diffusers", "diffusers-compiled"
"""What `compare` may name."""
_MODULE_OPTIONS = ("model_path", "model_id", "revision", "random_weights", "device", "precision", "vae_precision")
_MODULE_OPTION_ENDING = "attention_backend"
_TRANSFORMER_OPTIONS = ("enable_gemm_autotune", "enable_torch_compile", *parameters(QuantizationArgs))
_REQUEST_OPTIONS_OF_ENGINE = ("scheduler",)
"""What the engine's requests are given, which means nothing without a model."""
_SIZE = ("width", "height", "num_frames")
_REQUEST_GROUPS = ("prompt", "size", "denoising")
# One benchmark has one seed; results are kept only as long as they are looked at.
_NOT_OF_A_BENCHMARK = ("seed", "num_outputs_per_prompt")
_NOT_OF_ITS_ENGINE = ("output_path",)


@dataclass(frozen=True, kw_only=True)
class JsonArgs:
    """Where the result goes."""

    json: str | None = arg(
        None,
        help="Write everything that was measured, every sample included, as JSON; `-` writes it to the terminal "
        "in place of the table.",
        group="bench",
        unset="the table alone",
        exposed=CLI_ONLY,
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class RepeatArgs:
    """How often what is measured runs."""

    warmup_runs: int = arg(
        1, help="Runs that are not counted, before the others.", group="bench", minimum=0, exposed=CLI_ONLY
    )
    repeats: int = arg(5, help="Runs that are counted, at least.", group="bench", minimum=1, exposed=CLI_ONLY)
    min_seconds: float = arg(
        0.0, help="Go on until the counted runs together took this long.", group="bench", minimum=0, exposed=CLI_ONLY
    )


@dataclass(frozen=True, kw_only=True)
class TimingArgs(JsonArgs, RepeatArgs):
    """How often what is measured runs, and where the result goes."""


def _compare(*references: str, more: str = "") -> Any:
    """The option that names one of these."""
    return arg(
        None,
        help=f"Run the same work through this library, in turns with ours.{more}",
        group="bench",
        unset="nothing",
        choices=references,
        exposed=CLI_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class ComparedArgs(TimingArgs):
    """What can be compared with another implementation."""

    compare: str | None = _compare(DIFFUSERS)


@dataclass(frozen=True, kw_only=True)
class ComponentArgs(ComparedArgs):
    """One module of a model."""

    batch_size: int = arg(
        1, help="Rows of the forward; a request with guidance has two.", group="bench", minimum=1, exposed=CLI_ONLY
    )
    pause_seconds: float = arg(
        0.0,
        help="Wait so long before each run, as a GPU does that is asked now and then; one that is always busy meets "
        "its limit of power and slows down.",
        group="bench",
        minimum=0,
        exposed=CLI_ONLY,
    )
    profile: bool = arg(
        False,
        help="Also say which kernels, or on the CPU operations, a run of ours spends its time in.",
        group="bench",
        exposed=CLI_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class TransformerArgs(ComponentArgs):
    """The transformer, whose blocks the other library can compile."""

    compare: str | None = _compare(
        DIFFUSERS,
        DIFFUSERS_COMPILED,
        more=f" `{DIFFUSERS_COMPILED}`: as it is and, beside that, with its blocks through torch's compiler.",
    )


@dataclass(frozen=True, kw_only=True)
class SpreadArgs(JsonArgs):
    """One module over several devices."""

    layouts: tuple[str, ...] = arg(
        ("cfg2", "ulysses2", "ring2", "tp2"),
        help="How the ranks are laid out, one measurement each: degrees joined by `-`, such as cfg2-ulysses2.",
        group="bench",
        metavar="LAYOUT",
        exposed=CLI_ONLY,
    )
    batch_size: int = arg(
        2, help="Rows of the step; a request with guidance has two.", group="bench", minimum=1, exposed=CLI_ONLY
    )
    decode: bool = arg(
        False,
        help="Also decode one clip on one rank and on as many as each layout has.",
        group="bench",
        exposed=CLI_ONLY,
    )
    chunk_frames: int | None = arg(
        None,
        help="Latent frames that are decoded at a time.",
        group="bench",
        unset="as many as requests have",
        minimum=1,
        exposed=CLI_ONLY,
    )
    warmup_runs: int = arg(
        1, help="Runs that are not counted, before the others.", group="bench", minimum=0, exposed=CLI_ONLY
    )
    repeats: int = arg(5, help="Runs that are counted.", group="bench", minimum=1, exposed=CLI_ONLY)


@dataclass(frozen=True, kw_only=True)
class VAEArgs(ComponentArgs):
    """The autoencoder."""

    direction: str = arg("decode", help="Which half.", group="bench", choices=("decode", "encode"), exposed=CLI_ONLY)
    chunk_frames: int | None = arg(
        None,
        help="Latent frames that go through at a time.",
        group="bench",
        unset="as many as requests have",
        minimum=1,
        exposed=CLI_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class PipelineArgs(ComparedArgs):
    """Whole requests."""

    seed: int = arg(
        0, help="Seed of the first request; each other has the next.", group="denoising", minimum=0,
        maximum=MAX_SEED, exposed=CLI_ONLY,
    )  # fmt: skip
    concurrency: int = arg(
        1,
        help="Requests at a time. With more than 1, their shared steps are compared with one after another, and with "
        "--compare with one call for as many outputs.",
        group="bench",
        minimum=1,
        maximum=1024,
        exposed=CLI_ONLY,
    )
    profile: bool = arg(
        False,
        help="Also record some steps of one more request, and say how long the GPU had nothing to do during them.",
        group="bench",
        exposed=CLI_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class EngineArgs(TimingArgs):
    """The engine without a model."""

    steps: int = arg(
        200, help="Steps of the request that shows what a step costs.", group="bench", minimum=2, maximum=1000,
        exposed=CLI_ONLY,
    )  # fmt: skip
    concurrency: int | tuple[int, ...] = arg(
        (1, 8, 32),
        help="How many requests at a time, one or several numbers.",
        group="bench",
        minimum=1,
        maximum=1024,
        exposed=CLI_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class StartupArgs(TimingArgs):
    """From the process's start to the first result."""

    entry_point: str = arg(
        "python",
        help="What is started: `DiffGenerator` in a fresh interpreter, or `sglang serve`.",
        group="bench",
        choices=("python", "serve"),
        exposed=CLI_ONLY,
    )
    num_inference_steps: int = arg(
        2, help="Denoising steps of the first results.", group="bench", minimum=1, maximum=1000, exposed=CLI_ONLY
    )


@dataclass(frozen=True, kw_only=True)
class AttentionArgs(TimingArgs):
    """Attention kernels at given shapes."""

    models: tuple[str, ...] | None = arg(
        None,
        help="Take the shapes of these published models, of a step of a request with their defaults.",
        group="bench",
        unset="all of them",
        metavar="MODEL",
        exposed=CLI_ONLY,
    )
    queries: int | None = arg(
        None, help="Query tokens of a shape of one's own, in place of the models'.", group="bench",
        unset="the models' shapes", minimum=1, exposed=CLI_ONLY,
    )  # fmt: skip
    keys: int | None = arg(
        None, help="Key tokens of it.", group="bench", unset="as many as queries", minimum=1, exposed=CLI_ONLY
    )
    heads: int | None = arg(
        None, help="Heads of it.", group="bench", unset="needed with --queries", minimum=1, exposed=CLI_ONLY
    )
    head_dim: int | None = arg(
        None, help="Channels of a head of it.", group="bench", unset="needed with --queries", minimum=1,
        maximum=1024, exposed=CLI_ONLY,
    )  # fmt: skip
    batch_size: int = arg(1, help="Rows of it.", group="bench", minimum=1, exposed=CLI_ONLY)
    masked: bool = arg(
        False, help="With a mask that hides the last eighth of its keys.", group="bench", exposed=CLI_ONLY
    )
    kernels: tuple[str, ...] | None = arg(
        None,
        help="Only these kernels.",
        group="bench",
        unset="every one that runs here",
        choices=tuple(name for name in ATTENTION_BACKENDS if name != "fa"),
        exposed=CLI_ONLY,
    )
    max_tokens: int | None = arg(
        None,
        help="Leave shapes with more tokens out.",
        group="bench",
        unset="none on a GPU, 2048 on a CPU",
        minimum=1,
        exposed=CLI_ONLY,
    )
    save: bool = arg(
        False,
        help="Write what was found into this GPU's table, from which engines choose.",
        group="bench",
        exposed=CLI_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class ServeArgs(JsonArgs, LoadArgs):
    """Load on a server."""


_OWN_SHAPE = ("queries", "heads", "head_dim")


def check_attention_options(options: Mapping[str, Any]) -> None:
    """Raises MissingParameter for a shape that is not complete, InvalidValue for a model beside a shape."""
    given = [name for name in _OWN_SHAPE if options[name] is not None]
    if given and (missing := [name for name in _OWN_SHAPE if options[name] is None]):
        raise MissingParameter(f"{missing[0]}: not set, but a shape of one's own needs it", param=missing[0])
    if given and options["models"]:
        raise InvalidValue("models", ", ".join(options["models"]), "none beside a shape of one's own")
    if not given and (options["keys"] is not None or options["masked"]):
        name = "keys" if options["keys"] is not None else "masked"
        raise MissingParameter(f"queries: not set, but {name} belongs to a shape of one's own", param="queries")


def _nothing_to_check(options: Mapping[str, Any]) -> None:
    """Most benchmarks' options do not depend on each other."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One of the benchmarks: what it measures, its own options, and which of the shared ones it takes.

    `check` raises InvalidRequest when options do not go together.
    """

    summary: str
    own: type
    check: Callable[[Mapping[str, Any]], None] = _nothing_to_check
    of_requests: Callable[[Parameter], bool] = lambda option: False
    of_engine: Callable[[Parameter], bool] = lambda option: False

    def request_options(self) -> Mapping[str, Parameter]:
        """Those that SamplingParams declares; an option that the engine has too is the engine's."""
        left_out = {*_NOT_OF_A_BENCHMARK, *server_options()}
        return {
            name: option
            for name, option in parameters(SamplingParams).items()
            if "cli" in option.declaration.exposed and name not in left_out and self.of_requests(option)
        }

    def engine_options(self) -> Mapping[str, Parameter]:
        """Those that ServerArgs declares."""
        return {name: option for name, option in server_options().items() if self.of_engine(option)}

    def own_options(self) -> Mapping[str, Parameter]:
        """Those that no other command has."""
        return parameters(self.own)


def _of_module(option: Parameter) -> bool:
    return option.name in _MODULE_OPTIONS or option.name.endswith(_MODULE_OPTION_ENDING)


def _of_component(option: Parameter) -> bool:
    return _of_module(option) or option.declaration.group == "memory"


def _of_transformer(option: Parameter) -> bool:
    return _of_component(option) or option.name in _TRANSFORMER_OPTIONS


def _of_whole_engine(option: Parameter) -> bool:
    return option.declaration.group != "http" and option.name not in _NOT_OF_ITS_ENGINE


def _of_engine_alone(option: Parameter) -> bool:
    of_model = option.declaration.group == "model" or option.name in _REQUEST_OPTIONS_OF_ENGINE
    return _of_whole_engine(option) and not of_model and not _of_transformer(option)


BENCHMARKS: Mapping[str, Benchmark] = {
    "dit": Benchmark(
        summary="one forward of the transformer",
        own=TransformerArgs,
        of_requests=lambda option: option.name in (*_SIZE, "max_sequence_length"),
        of_engine=_of_transformer,
    ),
    "parallel": Benchmark(
        summary="one denoising step spread over several devices, layout by layout",
        own=SpreadArgs,
        of_requests=lambda option: option.name in (*_SIZE, "max_sequence_length"),
        of_engine=_of_transformer,
    ),
    "vae": Benchmark(
        summary="decoding or encoding one clip",
        own=VAEArgs,
        of_requests=lambda option: option.name in _SIZE,
        of_engine=_of_component,
    ),
    "encoder": Benchmark(
        summary="one forward of the text encoder",
        own=ComponentArgs,
        of_requests=lambda option: option.name == "max_sequence_length",
        of_engine=_of_component,
    ),
    "attention": Benchmark(
        summary="the attention kernels of this device, shape by shape",
        own=AttentionArgs,
        check=check_attention_options,
        of_engine=lambda option: option.name in ("device", "precision"),
    ),
    "pipeline": Benchmark(
        summary="whole requests: latency of each stage, throughput, sharing of steps",
        own=PipelineArgs,
        of_requests=lambda option: option.declaration.group in _REQUEST_GROUPS,
        of_engine=_of_whole_engine,
    ),
    "engine": Benchmark(
        summary="the engine without a model: what a step and a request cost", own=EngineArgs, of_engine=_of_engine_alone
    ),
    "startup": Benchmark(
        summary="from the process's start to the first result",
        own=StartupArgs,
        of_engine=_of_whole_engine,
    ),
    "serve": Benchmark(
        summary="a running server under load, ours or another with OpenAI's interface",
        own=ServeArgs,
        check=check_load_options,
        of_requests=lambda option: option.name in BODY_OPTIONS,
    ),
}
