"""`ServerArgs`: every option of the server and the engine, in groups; each field declared once.

`resolve_server_args` is the only place where flags, environment, configuration file and defaults meet.
"""

from __future__ import annotations

import functools
import logging
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.attention import ATTENTION_BACKENDS
from sglang.multimodal_gen.configs.declare import Parameter, arg, check_names, coerce, from_text, parameters
from sglang.multimodal_gen.errors import FieldError, InvalidValue

if TYPE_CHECKING:
    from sglang.multimodal_gen.configs.config_file import ConfigFile

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "demo"
_MAX_GPUS = 1024


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Which checkpoint to serve."""

    model_path: str = arg(
        DEFAULT_MODEL,
        help="Diffusers directory, hub id, or `demo` for the model that ships with the package.",
        group="model",
        metavar="MODEL",
    )
    model_id: str | None = arg(
        None,
        help="Hub id to look the model's defaults up by, for a directory with another name.",
        group="model",
        unset="the directory's name",
        metavar="ID",
    )
    revision: str | None = arg(
        None, help="Branch, tag or commit of the hub repository.", group="model", unset="the main branch"
    )
    served_model_name: str | None = arg(
        None, help="Name in /v1/models and in replies.", group="model", unset="the model's own name", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class ExecutionArgs:
    """How the model computes."""

    device: str = arg(
        "auto", help="`auto` takes CUDA when there is a GPU.", group="execution", choices=("auto", "cuda", "cpu")
    )
    precision: str = arg(
        "auto",
        help="Number format of the weights; `auto` is bf16 on GPUs and fp32 on CPUs.",
        group="execution",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    attention_backend: str | None = arg(
        None,
        help="Attention kernel of the transformer; `fa` is the FlashAttention that suits the GPU best, and `sage_attn` "
        "is not exact.",
        group="execution",
        unset="the fastest exact one that fits",
        choices=ATTENTION_BACKENDS,
    )
    self_attention_backend: str | None = arg(
        None,
        help="Kernel of the transformer's self-attention alone.",
        group="execution",
        unset="as the attention backend",
        choices=ATTENTION_BACKENDS,
    )
    cross_attention_backend: str | None = arg(
        None,
        help="Kernel of the transformer's attention to the text alone.",
        group="execution",
        unset="as the attention backend",
        choices=ATTENTION_BACKENDS,
    )
    deterministic: bool = arg(
        False,
        help="One request per forward, so that results are equal to the byte whatever else runs.",
        group="execution",
    )
    max_batch_size: int = arg(8, help="Most requests that share a forward.", group="execution", minimum=1, maximum=64)
    max_queued_requests: int = arg(
        1024, help="Requests waiting before new ones are refused.", group="execution", minimum=1, maximum=1_000_000
    )


@dataclass(frozen=True, kw_only=True)
class ParallelArgs:
    """How the model is spread over GPUs. num_gpus is the product of all the others."""

    num_gpus: int = arg(1, help="GPUs to use in all.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    dp_size: int = arg(1, help="Independent replicas.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    cfg_parallel_size: int = arg(
        1, help="Ranks that the guidance branches are dealt to.", group="parallel", minimum=1, maximum=_MAX_GPUS
    )
    ring_degree: int = arg(1, help="Ring-attention ranks.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    ulysses_degree: int = arg(1, help="Ulysses ranks.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    tp_size: int = arg(1, help="Tensor-parallel ranks.", group="parallel", minimum=1, maximum=_MAX_GPUS)


@dataclass(frozen=True, kw_only=True)
class HttpArgs:
    """Where the server listens."""

    host: str = arg("127.0.0.1", help="Address to listen on.", group="http", metavar="ADDRESS")
    port: int = arg(30000, help="Port to listen on; 0 takes a free one.", group="http", minimum=0, maximum=65535)


@dataclass(frozen=True, kw_only=True)
class StorageArgs:
    """Where files go."""

    output_path: str = arg("outputs", help="Directory for results.", group="storage", metavar="DIR")
    state_dir: str | None = arg(
        None,
        help="Directory that belongs to this server alone.",
        group="storage",
        unset="a private temporary one",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class LoggingArgs:
    """What is logged."""

    log_level: str = arg(
        "info", help="Least severe level to log.", group="logging", choices=("debug", "info", "warning", "error")
    )
    log_format: str = arg("text", help="Log lines as text or JSON.", group="logging", choices=("text", "json"))


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """All groups. Field names are unique over groups, so flags, YAML keys and Python keywords are flat."""

    model: ModelArgs = field(default_factory=ModelArgs)
    execution: ExecutionArgs = field(default_factory=ExecutionArgs)
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    http: HttpArgs = field(default_factory=HttpArgs)
    storage: StorageArgs = field(default_factory=StorageArgs)
    logging: LoggingArgs = field(default_factory=LoggingArgs)

    @classmethod
    def from_kwargs(cls, **options: Any) -> ServerArgs:
        """From flat keywords, then the environment, then the defaults.

        Raises:
            UnknownParameter: a keyword is no option; the message names the nearest one.
            FieldError: a value is not accepted.
        """
        resolved = resolve_server_args(options, environ=envs.current())
        for warning in resolved.warnings:
            logger.warning("%s", warning)
        return resolved.args


class Setting(NamedTuple):
    """A value and where it came from: `flag`, `env NAME`, `config FILE`, `chosen` or `default`."""

    value: Any
    source: str


@dataclass(frozen=True, kw_only=True)
class ResolvedServerArgs:
    """The options, the source of each by name, and sentences that the user should see."""

    args: ServerArgs
    sources: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@functools.cache
def option_groups() -> Mapping[str, type]:
    """The dataclass of each group of `ServerArgs`."""
    return types.MappingProxyType(typing.get_type_hints(ServerArgs))


@functools.cache
def server_options() -> Mapping[str, Parameter]:
    """Every option by name, in order of declaration."""
    return types.MappingProxyType(
        {name: option for group in option_groups().values() for name, option in parameters(group).items()}
    )


def resolve_server_args(
    flags: Mapping[str, Any], *, environ: Mapping[str, str], config_file: ConfigFile | None = None
) -> ResolvedServerArgs:
    """Each option from the first of flags, environment, configuration file and default that sets it.

    `flags` holds typed values by option name. Values that a stronger source overrules are checked all the same.

    Raises:
        UnknownParameter: a name in `flags` or in the file is no option.
        FieldError: a value is not accepted; the error names the flag, the variable or the line of the file.
    """
    options = server_options()
    check_names(flags, options, what="option")
    settings = {name: Setting(option.default, "default") for name, option in options.items()}
    if config_file is not None:
        read = config_file.read(options)
        settings |= {name: Setting(value, f"config {config_file.name}") for name, value in read.items()}
    settings |= _read_environment(environ, options)
    settings |= {name: Setting(coerce(options[name], value), "flag") for name, value in flags.items()}
    settings |= _choose_degrees(settings)
    _check_degrees(settings)
    return ResolvedServerArgs(
        args=_grouped({name: setting.value for name, setting in settings.items()}),
        sources=types.MappingProxyType({name: setting.source for name, setting in settings.items()}),
        warnings=envs.unknown_variables(environ, options),
    )


def _read_environment(environ: Mapping[str, str], options: Mapping[str, Parameter]) -> dict[str, Setting]:
    settings = {}
    for name, option in options.items():
        variable = envs.option_variable(name)
        if text := environ.get(variable):
            try:
                settings[name] = Setting(from_text(option, text), f"env {variable}")
            except FieldError as error:
                raise error.named(variable) from None
    return settings


def _choose_degrees(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Degrees left unset: num_gpus is the product of those given, or Ulysses takes the GPUs that are left."""
    degrees = [name for name in parameters(ParallelArgs) if name != "num_gpus"]
    product = math.prod(settings[name].value for name in degrees)
    if settings["num_gpus"].source == "default":
        return {"num_gpus": Setting(product, "chosen")} if product > 1 else {}
    num_gpus = settings["num_gpus"].value
    if settings["ulysses_degree"].source == "default" and num_gpus > product and num_gpus % product == 0:
        return {"ulysses_degree": Setting(num_gpus // product, "chosen")}
    return {}


def _check_degrees(settings: Mapping[str, Setting]) -> None:
    """Raises InvalidValue when the degrees do not multiply to num_gpus, or when there is more than one GPU."""
    num_gpus = settings["num_gpus"].value
    degrees = {name: settings[name].value for name in parameters(ParallelArgs) if name != "num_gpus"}
    product = math.prod(degrees.values())
    if product != num_gpus:
        arithmetic = " × ".join(f"{name} {value}" for name, value in degrees.items())
        raise InvalidValue("num_gpus", num_gpus, f"the product of the parallel degrees: {arithmetic} = {product}")
    if num_gpus > 1:
        given = [name for name, value in degrees.items() if value > 1 and settings[name].source != "chosen"]
        name = given[0] if given else "num_gpus"
        raise InvalidValue(name, settings[name].value, "1; running a model on several GPUs comes with a later release")


def _grouped(values: Mapping[str, Any]) -> ServerArgs:
    groups = {
        group: owner(**{name: values[name] for name in parameters(owner)}) for group, owner in option_groups().items()
    }
    return ServerArgs(**groups)
