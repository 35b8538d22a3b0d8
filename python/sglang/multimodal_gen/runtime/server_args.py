"""`ServerArgs`: every option of the server and the engine, in groups; each field declared once.

`resolve_server_args` is the only place where flags, environment, configuration file and defaults meet.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.attention import ATTENTION_BACKENDS
from sglang.multimodal_gen.configs.declare import HIDDEN, Parameter, arg, check_names, coerce, from_text, parameters
from sglang.multimodal_gen.configs.lora_args import LoraArgs
from sglang.multimodal_gen.configs.memory_args import MemoryArgs
from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.schedulers import SCHEDULER_NAMES
from sglang.multimodal_gen.configs.speed_args import SpeedArgs
from sglang.multimodal_gen.errors import FieldError, InvalidValue
from sglang.multimodal_gen.registry import BACKENDS

if TYPE_CHECKING:
    from sglang.multimodal_gen.configs.config_file import ConfigFile

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "demo"
_MAX_GPUS = 1024
_MIN_KEY_CHARACTERS = 16
_WEB_ADDRESS = re.compile(r"https?://[^\s/@?#]+(/[^\s#]*)?")
_WEBHOOK_SECRET = re.compile(r"whsec_(?:[A-Za-z0-9+/]{4}){8,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?|[0-9A-Fa-f:.]{2,45}")
_ORIGIN = re.compile(r"https?://([a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_])?|\[[0-9a-f:.]{2,45}\])(:[0-9]{1,5})?")
_MAX_COST = 1 << 60


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
    backend: str = arg(
        "auto",
        help="What runs the model: `native` is a pipeline of ours, `diffusers` the library's own, `auto` ours where "
        "there is one.",
        group="model",
        choices=BACKENDS,
    )
    random_weights: bool = arg(
        False,
        help="Random numbers in place of the weights, for benchmarks: a hub id needs no download then.",
        group="model",
    )
    served_model_name: str | None = arg(
        None, help="Name in /v1/models and in replies.", group="model", unset="the model's own name", metavar="NAME"
    )


def model_names(args: ModelArgs) -> tuple[str, ...]:
    """The name that the server goes by, then the other accepted ones. Never a directory of this machine.

    Without a served name, a hub id is its own name and a directory goes by its last part.
    """
    last_part = Path(args.model_path.rstrip("/")).name or "model"
    is_hub_id = (
        args.model_path.count("/") == 1 and args.model_path[0] not in "./~" and not Path(args.model_path).exists()
    )
    own_names = (args.model_path, last_part) if is_hub_id else (last_part,)
    return tuple(dict.fromkeys(name for name in (args.served_model_name, args.model_id, *own_names) if name))


@dataclass(frozen=True, kw_only=True)
class ExecutionArgs(SpeedArgs, QuantizationArgs):
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
    vae_precision: str = arg(
        "auto",
        help="Number format of the autoencoder of models that run natively; `auto` is that of the other weights, and "
        "fp32 where that is fp16, whose range it may exceed.",
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
    cuda_graphs: str = arg(
        "auto",
        help="Whether short forwards of the transformer, which the host takes as long to begin as the GPU to run, are "
        "captured as CUDA graphs the second time that a size is seen; `off` saves their memory.",
        group="execution",
        choices=("auto", "off"),
    )
    encoder_parallel: str = arg(
        "auto",
        help="Whether the weights of text encoders are dealt to all GPUs of a replica; `auto` deals those of 1 GiB and "
        "more, `on` small ones too, and `off` keeps all of them whole on every GPU.",
        group="parallel",
        choices=("auto", "on", "off"),
    )
    scheduler: str | None = arg(
        None,
        help="Sampler of requests that name none.",
        group="execution",
        unset="the checkpoint's own",
        choices=SCHEDULER_NAMES,
    )
    deterministic: bool = arg(
        False,
        help="One request per forward, so that results are equal to the byte whatever else runs.",
        group="execution",
    )
    conditioning_cache_mib: int = arg(
        256,
        help="Memory for the embeddings of texts and pictures seen before, in MiB; 0 keeps none.",
        group="execution",
        minimum=0,
        maximum=1 << 20,
    )
    batching_max_size: int | None = arg(
        None,
        help="Most requests that share a forward.",
        group="execution",
        unset="as many as memory allows and as make it faster, by measurement, up to 16",
        minimum=1,
        maximum=64,
    )
    max_queued_requests: int = arg(
        1024, help="Requests waiting before new ones are refused.", group="execution", minimum=1, maximum=1_000_000
    )
    preview_max_per_second: float = arg(
        2.0,
        help="Most previews a second of each video that somebody watches; those that a request itself asks for, such as"
        " `partial_images`, are not counted. 0 makes none of either.",
        group="execution",
        minimum=0.0,
        maximum=30.0,
    )
    max_queued_cost: int | None = arg(
        None,
        help="Work waiting before new requests are refused: pixels x frames x steps of all of them.",
        group="execution",
        unset="that of `max-queued-requests` requests at the model's defaults, or of 64 steps of a megapixel each",
        metavar="COST",
        minimum=1,
        maximum=_MAX_COST,
    )
    max_request_cost: int | None = arg(
        None,
        help="Work that one request may ask for: pixels x frames x steps x outputs.",
        group="execution",
        unset="1,000 steps at the model's default size and frames, or of a megapixel where that is more",
        metavar="COST",
        minimum=1,
        maximum=_MAX_COST,
    )
    checkpoint_every: int = arg(
        10,
        help="Denoising steps after which a request's state is saved, to go on from there when its worker is lost; "
        "0 saves none.",
        group="execution",
        minimum=0,
        maximum=1000,
    )
    preempt_after_s: float = arg(
        10.0,
        help="Seconds that a request waits for memory until one with more work left is put aside for it; 0 puts none "
        "aside.",
        group="execution",
        minimum=0.0,
        maximum=86_400.0,
    )


def split_size(size: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` -> the two numbers. Raises ValueError."""
    width, height = size.lower().split("x")
    return int(width), int(height)


def _is_size(size: Any) -> str | None:
    try:
        good = min(split_size(size)) > 0
    except ValueError:
        good = False
    return None if good else "WIDTHxHEIGHT in pixels, such as 832x480"


@dataclass(frozen=True, kw_only=True)
class WarmupArgs:
    """What runs before the first request, so that no request's time holds what only happens once."""

    warmup_mode: str | None = arg(
        None,
        help="`server` warms up before the engine is ready, `request` before the first request of each size.",
        group="warmup",
        unset="`server` for `sglang serve` on a GPU, else `off`",
        choices=("off", "request", "server"),
    )
    warmup_resolutions: tuple[str, ...] | None = arg(
        None,
        help="Sizes that `server` warms up, and for the largest of which memory is planned.",
        group="warmup",
        unset="the model's own size",
        metavar="WxH",
        check=_is_size,
    )
    warmup_num_frames: int | None = arg(
        None,
        help="Frames that `server` warms up, and for which memory is planned.",
        group="warmup",
        unset="the model's own number",
        minimum=1,
        maximum=100_000,
    )
    warmup_steps: int = arg(1, help="Denoising steps of a warm-up.", group="warmup", minimum=1, maximum=1000)

    @property
    def largest(self) -> SamplingParams | None:
        """The size with the most pixels of those asked for; what is not said is the model's own. None for nothing."""
        if self.warmup_resolutions is None and self.warmup_num_frames is None:
            return None
        sizes = [split_size(size) for size in self.warmup_resolutions or ()]
        width, height = max(sizes, key=math.prod, default=(None, None))
        return SamplingParams(width=width, height=height, num_frames=self.warmup_num_frames)


@dataclass(frozen=True, kw_only=True)
class ParallelArgs:
    """How the model is spread over GPUs. num_gpus is the product of all the others.

    Degrees that are left out are chosen by the model, its own size and the GPUs' memory: `sglang plan`.
    """

    num_gpus: int = arg(
        1,
        help="GPUs to use in all; degrees that are left out are then chosen, as `sglang plan` shows.",
        group="parallel",
        minimum=1,
        maximum=_MAX_GPUS,
    )
    dp_size: int = arg(1, help="Independent replicas.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    cfg_parallel_size: int = arg(
        1, help="Ranks that the guidance branches are dealt to.", group="parallel", minimum=1, maximum=_MAX_GPUS
    )
    ring_degree: int = arg(1, help="Ring-attention ranks.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    ulysses_degree: int = arg(1, help="Ulysses ranks.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    tp_size: int = arg(1, help="Tensor-parallel ranks.", group="parallel", minimum=1, maximum=_MAX_GPUS)
    gpu_ids: tuple[int, ...] | None = arg(
        None,
        help="Which of the visible GPUs to use, replica by replica.",
        group="parallel",
        unset="the first ones",
        metavar="GPU",
        minimum=0,
        maximum=_MAX_GPUS,
    )

    @property
    def replica(self) -> ReplicaShape:
        """How the ranks of each replica are laid out."""
        return ReplicaShape(
            cfg=self.cfg_parallel_size, ring=self.ring_degree, ulysses=self.ulysses_degree, tp=self.tp_size
        )


def key_problem(key: str) -> str | None:
    """What would be accepted instead of `key`, or None when it can be a header's value and is hard to guess."""
    if len(key) < _MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        return f"at least {_MIN_KEY_CHARACTERS} visible ASCII characters without spaces"
    return None


def _not_http(url: str) -> str | None:
    return None if _WEB_ADDRESS.fullmatch(url) else "an http:// or https:// address without a user"


def _no_webhook_secret(secret: str) -> str | None:
    return None if _WEBHOOK_SECRET.fullmatch(secret) else "`whsec_` and at least 24 bytes in base64"


def _origin_problem(text: str) -> str | None:
    good = _ORIGIN.fullmatch(text) is not None
    return None if good else "an origin as browsers send it, such as https://studio.example.com"


def _host_problem(text: str) -> str | None:
    good = text == "*" or _HOST_NAME.fullmatch(text) is not None
    return None if good else "a host name or address without port, such as images.example.com, or *"


@dataclass(frozen=True, kw_only=True)
class HttpArgs:
    """Where the server listens, to whom it answers, and how long it waits."""

    host: str = arg("127.0.0.1", help="Address to listen on.", group="http", metavar="ADDRESS")
    port: int = arg(30000, help="Port to listen on; 0 takes a free one.", group="http", minimum=0, maximum=65535)
    api_key: tuple[str, ...] | None = arg(
        None,
        help="Keys of clients: requests must carry one as `Authorization: Bearer KEY`. Better in --api-key-file: other "
        "users of the machine can read a command line.",
        group="http",
        unset="anybody may use the server",
        metavar="KEY",
        check=key_problem,
        secret=True,
    )
    api_key_file: str | None = arg(
        None,
        help="File of further keys of clients, one a line; lines that begin with # are comments.",
        group="http",
        unset="no file",
        metavar="FILE",
    )
    admin_api_key: str | None = arg(
        None,
        help="Whoever sends it as `Authorization: Bearer KEY` may use the routes and fields for administrators, such "
        "as `/update_weights_from_disk` and `profile`, and everything else. Give it in the environment or a file: "
        "other users of the machine can read a command line.",
        group="http",
        unset="nobody may",
        metavar="KEY",
        check=key_problem,
        secret=True,
    )
    webhook_url: str | None = arg(
        None,
        help="Told of each video that is completed or failed, as OpenAI's webhooks do: a signed POST, sent again for a "
        "day until it is answered with 2xx.",
        group="http",
        unset="nobody is told",
        metavar="URL",
        check=_not_http,
    )
    webhook_secret: str | None = arg(
        None,
        help="Signs webhooks, as OpenAI's client checks it: `whsec_` and at least 24 bytes in base64.",
        group="http",
        unset="a webhook needs one",
        metavar="SECRET",
        check=_no_webhook_secret,
        secret=True,
    )
    allowed_host: tuple[str, ...] | None = arg(
        None,
        help="Names by which the server may be called, besides the loopback ones; * for any. A web page whose name "
        "points at this machine cannot use the server then.",
        group="http",
        unset="the address listened on; any, where that is all addresses",
        metavar="NAME",
        check=_host_problem,
    )
    cors_origin: tuple[str, ...] | None = arg(
        None,
        help="Origins of web pages that may use the server from a browser.",
        group="http",
        unset="the server's own alone",
        metavar="ORIGIN",
        check=_origin_problem,
    )
    header_timeout_s: float = arg(
        10.0,
        help="Seconds that the head of a request may take, and that a connection may be idle.",
        group="http",
        minimum=0.1,
        maximum=3600.0,
    )
    body_timeout_s: float = arg(
        30.0,
        help="Seconds that the body of a request may take; longer for one that comes with 64 KiB a second.",
        group="http",
        minimum=0.1,
        maximum=3600.0,
    )
    max_header_kib: int = arg(64, help="Largest head of a request, in KiB.", group="http", minimum=4, maximum=1024)
    max_upload_mib: int = arg(
        256,
        help="Largest body with files, in MiB; a fourth of it where files come in JSON.",
        group="http",
        minimum=4,
        maximum=65_536,
    )
    max_connections_per_ip: int = arg(
        0,
        help="Most connections from one address at a time; 0 is without limit. Leave it at 0 behind a proxy.",
        group="http",
        minimum=0,
        maximum=1_000_000,
    )
    shutdown_grace_s: float = arg(
        30.0,
        help="Seconds that running requests get to finish after SIGTERM or Ctrl-C; a second signal ends at once.",
        group="http",
        minimum=0.0,
        maximum=86_400.0,
    )
    studio: bool = arg(True, help="Offer a page for browsers at /studio.", group="http")


@dataclass(frozen=True, kw_only=True)
class StorageArgs:
    """Where files go."""

    output_path: str = arg("outputs", help="Directory for results.", group="storage", metavar="DIR")
    profile_dir: str | None = arg(
        None,
        help="Directory for the traces of profiled requests.",
        group="storage",
        unset="`profiles` in the output path",
        metavar="DIR",
    )
    state_dir: str | None = arg(
        None,
        help="Directory that belongs to this server alone: its jobs, their results, saved states. A server that starts "
        "with the directory of one that ended, or was killed, goes on with its jobs.",
        group="storage",
        unset="one for each port in the user's state directory; in Python, and with port 0, a private temporary one",
        metavar="DIR",
    )
    max_jobs: int = arg(
        10_000,
        help="Video jobs that a server keeps; the oldest finished one goes first.",
        group="storage",
        minimum=1,
        maximum=1_000_000,
    )
    job_lifetime_h: float = arg(
        168.0,
        help="Hours that a finished video job and its files are kept.",
        group="storage",
        metavar="HOURS",
        minimum=0.001,
        maximum=100_000.0,
    )
    max_output_gib: float = arg(
        50.0,
        help="Space for the files of finished video jobs, also in a bucket, and for what unfinished ones start from; "
        "beyond it the oldest go first. Images that wait to be fetched by URL may take as much.",
        group="storage",
        metavar="GIB",
        minimum=0.001,
        maximum=1_000_000.0,
    )


@dataclass(frozen=True, kw_only=True)
class LoggingArgs:
    """What is logged."""

    log_level: str | None = arg(
        None,
        help="Least severe level to log.",
        group="logging",
        unset="`info` for `sglang serve`, `warning` for `sglang generate` and in Python",
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = arg("text", help="Log lines as text or JSON.", group="logging", choices=("text", "json"))
    log_prompts: bool = arg(
        False,
        help="Log prompts, and errors as they are. Without it no line repeats what a user wrote.",
        group="logging",
    )


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """All groups. Field names are unique over groups, so flags, YAML keys and Python keywords are flat."""

    model: ModelArgs = field(default_factory=ModelArgs)
    execution: ExecutionArgs = field(default_factory=ExecutionArgs)
    memory: MemoryArgs = field(default_factory=MemoryArgs)
    warmup: WarmupArgs = field(default_factory=WarmupArgs)
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    http: HttpArgs = field(default_factory=HttpArgs)
    storage: StorageArgs = field(default_factory=StorageArgs)
    lora: LoraArgs = field(default_factory=LoraArgs)
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
        for note in resolved.notes:
            logger.info("%s", note)
        return resolved.args


class Setting(NamedTuple):
    """A value and where it came from: `flag`, `env NAME`, `config FILE`, `chosen` or `default`."""

    value: Any
    source: str


@dataclass(frozen=True, kw_only=True)
class ResolvedServerArgs:
    """The options, the source of each by name, sentences that the user should see, and why some were chosen so."""

    args: ServerArgs
    sources: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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


def shown_options(args: ServerArgs, sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Each option's value and source by its name, for showing: secrets stay hidden."""
    found = {}
    for group, owner in option_groups().items():
        for name, option in parameters(owner).items():
            value = getattr(getattr(args, group), name)
            hidden = option.declaration.secret and value is not None
            found[name] = {"value": HIDDEN if hidden else value, "source": sources.get(name, "default")}
    return found


def resolve_server_args(
    flags: Mapping[str, Any], *, environ: Mapping[str, str], config_file: ConfigFile | None = None
) -> ResolvedServerArgs:
    """Each option from the first of flags, environment, configuration file and default that sets it.

    `flags` holds typed values by option name. Values that a stronger source overrules are checked all the same.

    Raises:
        UnknownParameter: a name in `flags` or in the file is no option.
        FieldError: a value is not accepted; the error names the flag, the variable or the line of the file.
        MissingParameter: an object store's variables are not complete.
    """
    options = server_options()
    check_names(flags, options, what="option")
    envs.store_settings(environ)  # read where it is used; what is wrong with it shows before anything starts
    settings = {name: Setting(option.default, "default") for name, option in options.items()}
    if config_file is not None:
        read = config_file.read(options)
        settings |= {name: Setting(value, f"config {config_file.name}") for name, value in read.items()}
    settings |= _read_environment(environ, options)
    settings |= {name: Setting(coerce(options[name], value), "flag") for name, value in flags.items()}
    settings |= _count_gpu_ids(settings)
    chosen, notes, doubts = _choose_degrees(settings)
    settings |= chosen
    _check_degrees(settings)
    _check_webhook(settings)
    return ResolvedServerArgs(
        args=_grouped({name: setting.value for name, setting in settings.items()}),
        sources=types.MappingProxyType({name: setting.source for name, setting in settings.items()}),
        warnings=(*envs.unknown_variables(environ, options), *doubts),
        notes=notes,
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


def _count_gpu_ids(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """As many GPUs as are named. Raises InvalidValue for another number than was asked for, or one that is twice."""
    ids, num_gpus = settings["gpu_ids"].value, settings["num_gpus"]
    if ids is None:
        return {}
    if len(set(ids)) < len(ids):
        raise InvalidValue("gpu_ids", ids, "each GPU once")
    if num_gpus.source == "default":
        return {"num_gpus": Setting(len(ids), "chosen")}
    if len(ids) != num_gpus.value:
        raise InvalidValue("gpu_ids", ids, f"as many as num_gpus: {num_gpus.value}, not {len(ids)}")
    return {}


def _choose_degrees(
    settings: Mapping[str, Setting],
) -> tuple[dict[str, Setting], tuple[str, ...], tuple[str, ...]]:
    """num_gpus or the degrees left unset, why, and what speaks against it.

    Raises: InvalidValue for degrees that the model cannot have.
    """
    given = {name: settings[name].value for name in _degrees() if settings[name].source != "default"}
    product = math.prod(given.values())
    chosen, num_gpus = {}, settings["num_gpus"].value
    if settings["num_gpus"].source == "default":
        num_gpus = product
        chosen = {"num_gpus": Setting(product, "chosen")} if product > 1 else {}
    if num_gpus == 1 or num_gpus % product or (len(given) == len(_degrees()) and num_gpus != product):
        return chosen, (), ()  # nothing to choose, or nothing that can be: the check says so
    # late: commands on one GPU start without the model of costs
    from sglang.multimodal_gen.configs.parallel_choice import ModelChoice, choose_degrees

    path, model_id, backend, precision, encoders = (
        settings[name].value for name in ("model_path", "model_id", "backend", "precision", "encoder_parallel")
    )
    model = ModelChoice(
        path=path,
        id=model_id,
        backend=backend,
        precision=precision,
        encoder_parallel=encoders,
        quantized=settings["quantization"].value is not None,
    )
    choice = choose_degrees(model, num_gpus, given)
    chosen |= {name: Setting(value, "chosen") for name, value in choice.degrees.items()}
    reasons = (choice.reason,) if choice.reason else ()
    return (chosen, (), reasons) if choice.doubt else (chosen, reasons, ())


def _degrees() -> list[str]:
    return [name for name in parameters(ParallelArgs) if name not in ("num_gpus", "gpu_ids")]


def _check_degrees(settings: Mapping[str, Setting]) -> None:
    """Raises InvalidValue when the degrees do not multiply to num_gpus."""
    num_gpus = settings["num_gpus"].value
    degrees = {name: settings[name].value for name in _degrees()}
    product = math.prod(degrees.values())
    if product != num_gpus:
        arithmetic = " × ".join(f"{name} {value}" for name, value in degrees.items())
        below = num_gpus // product * product
        near = " or ".join(str(number) for number in (below, below + product) if number)
        unset = any(settings[name].source == "default" for name in degrees)
        nearest = f"; with those left unset chosen to fit, {near}" if unset else ""
        raise InvalidValue(
            "num_gpus", num_gpus, f"the product of the parallel degrees: {arithmetic} = {product}{nearest}"
        )


def _check_webhook(settings: Mapping[str, Setting]) -> None:
    """Raises InvalidValue for an address without a secret, or a secret for nobody."""
    for name, other in (("webhook_url", "webhook_secret"), ("webhook_secret", "webhook_url")):
        if settings[name].value is not None and settings[other].value is None:
            given = "(hidden)" if name == "webhook_secret" else settings[name].value
            raise InvalidValue(name, given, f"a {name} with a {other}, which is not set")


def _grouped(values: Mapping[str, Any]) -> ServerArgs:
    groups = {
        group: owner(**{name: values[name] for name in parameters(owner)}) for group, owner in option_groups().items()
    }
    return ServerArgs(**groups)
