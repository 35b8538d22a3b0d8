"""The environment, read here and nowhere else.

Every option of `ServerArgs` has a variable: `SGLANG_DIFFUSION_` and its name in capitals. An empty one counts as unset.
Variables that libraries read for themselves are only described here, for the reference page.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sglang.multimodal_gen.errors import InvalidValue, MissingParameter

OPTION_PREFIX = "SGLANG_DIFFUSION_"
BENCH_API_KEY = "SGLANG_BENCH_API_KEY"
"""The key that `sglang bench serve` sends: not the server's own variable, since the server may be somebody else's."""
CACHE_ROOT = "SGLANG_DIFFUSION_CACHE_ROOT"
"""Directory of what is measured or compiled once and read again by later starts."""
DEFAULT_CACHE_ROOT = "~/.cache/sgl_diffusion"
_HIDDEN = "***"


@dataclass(frozen=True, kw_only=True)
class LibraryVariable:
    """A variable that a library of ours reads and that users of this package may need."""

    name: str
    library: str
    help: str


LIBRARY_VARIABLES = (
    LibraryVariable(
        name="HF_HUB_OFFLINE",
        library="huggingface_hub",
        help="1 takes checkpoints from the local cache only, never from the network.",
    ),
    LibraryVariable(
        name="HF_HOME", library="huggingface_hub", help="Directory of downloaded checkpoints and of the login token."
    ),
    LibraryVariable(name="HF_TOKEN", library="huggingface_hub", help="Login token for repositories that need one."),
    LibraryVariable(name="CUDA_VISIBLE_DEVICES", library="torch", help="The GPUs that are used, by number."),
    LibraryVariable(name="OMP_NUM_THREADS", library="torch", help="Threads of a worker that computes on the CPU."),
    LibraryVariable(
        name="AWS_*",
        library="obstore",
        help="Credentials of an object store that is given no key, and what else obstore's S3Store reads of them, such "
        "as `AWS_VIRTUAL_HOSTED_STYLE_REQUEST`.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class StoreVariable:
    """A variable that says where results are uploaded. The value of a `secret` one is shown nowhere."""

    name: str
    accepted: str
    unset: str
    help: str
    secret: bool = False


STORAGE_TYPE = StoreVariable(
    name="SGLANG_CLOUD_STORAGE_TYPE",
    accepted="s3",
    unset="results stay on this machine",
    help="Upload results to an object store that speaks S3.",
)
S3_BUCKET = StoreVariable(
    name="SGLANG_S3_BUCKET_NAME",
    accepted="the name of a bucket",
    unset="none; it must be given",
    help="Bucket that results go to. It must exist.",
)
S3_PREFIX = StoreVariable(
    name="SGLANG_S3_KEY_PREFIX",
    accepted="path segments with `/` between them",
    unset="no prefix",
    help="What stands before a file's name in its key, with a `/` after it.",
)
S3_ENDPOINT = StoreVariable(
    name="SGLANG_S3_ENDPOINT_URL",
    accepted="an http:// or https:// address",
    unset="that of AWS in the region",
    help="Address of the store. Presigned URLs begin with it, so clients must reach it too.",
)
S3_REGION = StoreVariable(
    name="SGLANG_S3_REGION_NAME", accepted="the name of a region", unset="us-east-1", help="Region of the bucket."
)
S3_ACCESS_KEY = StoreVariable(
    name="SGLANG_S3_ACCESS_KEY_ID",
    accepted="an access key, together with its secret",
    unset="the credentials of the AWS variables, or of the machine's role",
    help="Access key.",
    secret=True,
)
S3_SECRET_KEY = StoreVariable(
    name="SGLANG_S3_SECRET_ACCESS_KEY",
    accepted="a secret, together with its access key",
    unset="as the access key",
    help="The access key's secret.",
    secret=True,
)
S3_UPLOAD_TIMEOUT = StoreVariable(
    name="SGLANG_S3_UPLOAD_TIMEOUT",
    accepted="seconds from 1 to 3600",
    unset="60",
    help="What one request to the store may take, and for how long a failed one is tried again.",
)
S3_URL_LIFETIME = StoreVariable(
    name="SGLANG_S3_URL_LIFETIME",
    accepted="seconds from 1 to 604800",
    unset="3600",
    help="For how long a presigned URL is valid. The store's limit is a week.",
)
STORE_VARIABLES = (
    STORAGE_TYPE,
    S3_BUCKET,
    S3_PREFIX,
    S3_ENDPOINT,
    S3_REGION,
    S3_ACCESS_KEY,
    S3_SECRET_KEY,
    S3_UPLOAD_TIMEOUT,
    S3_URL_LIFETIME,
)
_OTHER_PREFIXES = ("SGLANG_S3_", "SGLANG_CLOUD_STORAGE_", "SGLANG_CACHE_DIT_")
CACHE_ENABLED = "SGLANG_CACHE_DIT_ENABLED"
"""Whether requests that do not say get the first-block cache."""
CACHE_VARIABLES: Mapping[str, str] = {
    "SGLANG_CACHE_DIT_FN": "Fn_compute_blocks",
    "SGLANG_CACHE_DIT_BN": "Bn_compute_blocks",
    "SGLANG_CACHE_DIT_WARMUP": "max_warmup_steps",
    "SGLANG_CACHE_DIT_RDT": "residual_diff_threshold",
    "SGLANG_CACHE_DIT_MC": "max_continuous_cached_steps",
    "SGLANG_CACHE_DIT_TAYLORSEER": "enable_taylorseer",
    "SGLANG_CACHE_DIT_TS_ORDER": "taylorseer_order",
}
"""Which key of `cache_dit_params` each sets, for requests that leave it open."""


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """The object store that results go to; `keys` are the access key and its secret, None for the machine's own."""

    bucket: str
    prefix: str
    endpoint_url: str | None
    region: str
    keys: tuple[str, str] | None = field(repr=False)
    timeout_s: float
    url_lifetime_s: int

    @property
    def place(self) -> str:
        """Where the bucket is, in words."""
        return self.endpoint_url or f"AWS, region {self.region}"


def current() -> Mapping[str, str]:
    """The environment of this process."""
    return os.environ


def bench_api_key() -> str | None:
    """The key for the server that is measured, if the environment has one."""
    return os.environ.get(BENCH_API_KEY) or None


def cache_root() -> Path:
    """Where what is measured or compiled is kept; nobody has made it yet."""
    return Path(os.environ.get(CACHE_ROOT) or DEFAULT_CACHE_ROOT).expanduser()


def keep_compiled_code() -> None:
    """Let torch's compiler keep what it made where later starts read it, unless its variables are set."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_root() / "triton"))


def silence_profiler_library() -> None:
    """Keep torch's profiler from writing lines of its own to stderr, unless its variable is set; before torch loads."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def meet_on_loopback() -> None:
    """The ranks of a replica are on one machine: let gloo and NCCL meet there, unless their variables are set."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def option_variable(name: str) -> str:
    """The variable that sets the server option `name`."""
    return OPTION_PREFIX + name.upper()


def store_settings(environ: Mapping[str, str]) -> StoreSettings | None:
    """Where results are uploaded; None when they stay on this machine.

    Raises:
        InvalidValue: a variable's value is not accepted.
        MissingParameter: a variable that the others need is not set.
    """
    kind = environ.get(STORAGE_TYPE.name)
    if not kind:
        return None
    if kind.lower() != "s3":
        raise _bad(STORAGE_TYPE, kind)
    return StoreSettings(
        bucket=_required(environ, S3_BUCKET, because=f"{STORAGE_TYPE.name} is {kind}"),
        prefix=_prefix(environ.get(S3_PREFIX.name, "")),
        endpoint_url=_endpoint(environ.get(S3_ENDPOINT.name, "")),
        region=environ.get(S3_REGION.name) or S3_REGION.unset,
        keys=_keys(environ),
        timeout_s=_seconds(environ, S3_UPLOAD_TIMEOUT, most=3600),
        url_lifetime_s=_seconds(environ, S3_URL_LIFETIME, most=604_800),
    )


def _bad(variable: StoreVariable, value: str) -> InvalidValue:
    return InvalidValue(variable.name, _HIDDEN if variable.secret else value, variable.accepted)


def _required(environ: Mapping[str, str], variable: StoreVariable, *, because: str) -> str:
    value = environ.get(variable.name)
    if not value:
        raise MissingParameter(
            f"{variable.name}: not set, accepted is {variable.accepted}; it is needed since {because}",
            param=variable.name,
        )
    return value


def _prefix(text: str) -> str:
    """Without slashes around it."""
    prefix = text.strip("/")
    if prefix and (any(part in ("", ".", "..") for part in prefix.split("/")) or not prefix.isprintable()):
        raise _bad(S3_PREFIX, text)
    return prefix


def _endpoint(text: str) -> str | None:
    """Without a password in it, which the log would show."""
    if text and re.fullmatch(r"https?://[^/@\s?#]+(/[^\s?#]*)?", text) is None:
        raise _bad(S3_ENDPOINT, _HIDDEN if "@" in text else text)
    return text.rstrip("/") or None


def _keys(environ: Mapping[str, str]) -> tuple[str, str] | None:
    both = (S3_ACCESS_KEY, S3_SECRET_KEY)
    given = [variable.name for variable in both if environ.get(variable.name)]
    if not given:
        return None
    access_key, secret_key = (_required(environ, variable, because=f"{given[0]} is set") for variable in both)
    return access_key, secret_key


def _seconds(environ: Mapping[str, str], variable: StoreVariable, *, most: int) -> int:
    text = environ.get(variable.name) or variable.unset
    if re.fullmatch(r"[0-9]{1,7}", text) is None or not 1 <= int(text) <= most:
        raise _bad(variable, text)
    return int(text)


def unknown_variables(environ: Mapping[str, str], option_names: Iterable[str]) -> tuple[str, ...]:
    """One sentence for each variable that looks like ours and sets nothing."""
    known = [option_variable(name) for name in option_names] + [variable.name for variable in STORE_VARIABLES]
    known += [CACHE_ROOT, CACHE_ENABLED, *CACHE_VARIABLES]
    sentences = []
    for name in sorted(environ):
        if name.startswith((OPTION_PREFIX, *_OTHER_PREFIXES)) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            guess = f"; did you mean {close[0]}?" if close else ""
            sentences.append(f"the environment variable {name} is not known and has no effect{guess}")
    idle = [variable.name for variable in STORE_VARIABLES if environ.get(variable.name)]
    if idle and not environ.get(STORAGE_TYPE.name):
        sentences.append(f"{', '.join(idle)}: no effect, since {STORAGE_TYPE.name} is not set to s3")
    return tuple(sentences)
