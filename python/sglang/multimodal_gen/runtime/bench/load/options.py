"""Options of a load test, and what must hold between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import CLI_ONLY, arg
from sglang.multimodal_gen.configs.sample.sampling_params import MAX_SEED
from sglang.multimodal_gen.errors import IncompatibleParameters
from sglang.multimodal_gen.runtime.bench.load.plan import Plan, read_size_mix

_MIX = "sizes with their shares, such as 256x256:0.7,512x512:0.3"


def _url_problem(value: str) -> str | None:
    accepted = "an address such as http://127.0.0.1:30000 or https://host/v1, without a key or a query"
    try:
        parts = urlsplit(value)
        plain = parts.port is None or parts.port > 0  # reading the port checks it
    except ValueError:
        return accepted
    plain = plain and parts.username is None and not parts.query and not parts.fragment
    return None if plain and parts.scheme in ("http", "https") and parts.hostname else accepted


def _mix_problem(value: str) -> str | None:
    return None if read_size_mix(value) else _MIX


def _picture_problem(value: str) -> str | None:
    return None if value.endswith(".png") else "a name that ends with .png"


@dataclass(frozen=True, kw_only=True)
class LoadArgs:
    """Which server, how many requests, when, and what they ask for."""

    base_url: str = arg(
        "http://127.0.0.1:30000",
        help="Address of the server; `/v1` is added to one without a path.",
        group="server",
        exposed=CLI_ONLY,
        check=_url_problem,
        metavar="URL",
    )
    api_key: str | None = arg(
        None,
        help=f"Sent as `Authorization: Bearer KEY`. Give it as {envs.BENCH_API_KEY} in the environment: other users of "
        "the machine can read a command line.",
        group="server",
        unset=f"{envs.BENCH_API_KEY}, or none",
        exposed=CLI_ONLY,
        metavar="KEY",
        secret=True,
    )
    endpoint: str = arg(
        "images", help="What is asked for.", group="server", choices=("images", "videos"), exposed=CLI_ONLY
    )
    model: str | None = arg(
        None, help="Model that requests name.", group="server", unset="they name none", exposed=CLI_ONLY, metavar="NAME"
    )
    timeout_s: float = arg(
        600.0, help="Seconds after which a request has failed.", group="server", minimum=0.01, exposed=CLI_ONLY
    )
    poll_interval_s: float | None = arg(
        None,
        help="Seconds between two questions for a video's status, where the server sends no events.",
        group="server",
        unset="what its openai-poll-after-ms says, or 0.5",
        minimum=0.001,
        exposed=CLI_ONLY,
    )
    request_rate: float | None = arg(
        None,
        help="Requests a second, at random moments (Poisson), however many are unanswered.",
        group="arrivals",
        unset="as --max-concurrency says",
        minimum=0.001,
        maximum=100_000,
        exposed=CLI_ONLY,
    )
    max_concurrency: int | None = arg(
        None,
        help="Requests at a time: the next one is sent when one is answered.",
        group="arrivals",
        unset="1, or no bound with a rate",
        minimum=1,
        maximum=65536,
        exposed=CLI_ONLY,
    )
    num_requests: int | None = arg(
        None,
        help="Requests that are counted.",
        group="arrivals",
        unset="20, or as many as the duration takes",
        minimum=1,
        exposed=CLI_ONLY,
    )
    duration: float | None = arg(
        None,
        help="Seconds during which requests are sent; those under way are waited for.",
        group="arrivals",
        unset="until all are sent",
        minimum=0.01,
        exposed=CLI_ONLY,
    )
    warmup_requests: int = arg(
        1, help="Requests before the others, one by one, that are not counted.", group="arrivals", minimum=0,
        exposed=CLI_ONLY,
    )  # fmt: skip
    seed: int = arg(
        0, help="Of the moments at which requests arrive and of the choice of sizes.", group="arrivals", minimum=0,
        maximum=MAX_SEED, exposed=CLI_ONLY,
    )  # fmt: skip
    prompts_file: str | None = arg(
        None,
        help="UTF-8 file with one prompt a line, or, called *.jsonl, with one object a line: `prompt` and other fields "
        "of the request's body. They are taken in turn.",
        group="requests",
        unset="prompts of the package",
        exposed=CLI_ONLY,
        metavar="FILE",
    )
    size_mix: str | None = arg(
        None,
        help="Sizes with their shares, such as `256x256:0.7,512x512:0.3`.",
        group="requests",
        unset="the model's default size",
        exposed=CLI_ONLY,
        check=_mix_problem,
        metavar="SIZES",
    )
    extra_body: Mapping[str, Any] | None = arg(
        None,
        help='More fields of every request\'s body, such as `{"seed": 7}`; null leaves a field out.',
        group="requests",
        unset="no more fields",
        exposed=CLI_ONLY,
    )
    partial_images: int = arg(
        0,
        help="Ask for images as a stream with so many previews; 0 asks for no stream.",
        group="requests",
        minimum=0,
        maximum=3,
        exposed=CLI_ONLY,
    )
    slo_s: float | None = arg(
        None,
        help="Seconds within which a request should be answered; the report says how many were.",
        group="bench",
        unset="no such bound",
        minimum=0.0,
        exposed=CLI_ONLY,
    )
    plot: str | None = arg(
        None,
        help="Draw how latencies are distributed and when each request ran, as a PNG.",
        group="bench",
        unset="no picture",
        exposed=CLI_ONLY,
        check=_picture_problem,
        metavar="FILE",
    )


def check_load_options(options: Mapping[str, Any]) -> None:
    """What no declaration of one option can check.

    Raises:
        IncompatibleParameters: two options that contradict each other.
        UsageError: the file of prompts cannot be used.
    """
    if options["request_rate"] is not None and options["max_concurrency"] is not None:
        raise IncompatibleParameters(
            "request_rate: arrivals at a rate wait for nothing, accepted is --request-rate or --max-concurrency",
            param="request_rate",
        )
    if options["partial_images"] and options["endpoint"] != "images":
        raise IncompatibleParameters(
            "partial_images: only images have them, accepted is --endpoint images", param="partial_images"
        )
    Plan.from_options(options)
