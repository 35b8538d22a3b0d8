"""`bench serve`: load on a server that runs already, and what it bears."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from typing import Any

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.errors import MissingPackage
from sglang.multimodal_gen.runtime.bench.child import tell
from sglang.multimodal_gen.runtime.bench.load.plan import Plan
from sglang.multimodal_gen.runtime.bench.load.result import LoadResult, Target, load_result
from sglang.multimodal_gen.runtime.bench.load.server_metrics import server_side
from sglang.multimodal_gen.runtime.bench.load.tables import arrivals_in_words


def measure_serve(options: Mapping[str, Any]) -> LoadResult:
    """The result of one run. Ctrl-C ends it early, with what there is by then.

    Raises:
        MissingPackage: the HTTP client is not installed.
        ServerNotReachable, LoadRefused: the server is not there or takes no such requests.
        BenchmarkFailed: a warm-up request failed.
    """
    try:
        import aiohttp  # noqa: F401  # late: it comes with an extra, and only this benchmark needs it
    except ImportError as error:
        raise MissingPackage(
            f"bench serve: needs the package aiohttp, which cannot be imported ({error}); install it with pip"
        ) from None
    return asyncio.run(_measure(options, Plan.from_options(options)))


async def _measure(options: Mapping[str, Any], plan: Plan) -> LoadResult:
    from sglang.multimodal_gen.runtime.bench.load.client import LoadClient
    from sglang.multimodal_gen.runtime.bench.load.generator import LoadGenerator

    max_concurrency = None if plan.request_rate is not None else options["max_concurrency"] or 1
    api_key = options["api_key"] or envs.bench_api_key()
    endpoint, interval_s = options["endpoint"], options["poll_interval_s"]
    async with LoadClient(options["base_url"], api_key=api_key, poll_interval_s=interval_s) as client:
        await client.check()
        generator = LoadGenerator(client, endpoint=endpoint, timeout_s=options["timeout_s"])
        if options["warmup_requests"]:
            tell(f"warming up with {options['warmup_requests']} requests to {client.api}")
            await generator.warm_up(plan.warm_ups(options["warmup_requests"]))
        before = await client.metrics()
        tell(f"measuring {_amount(plan)}, {arrivals_in_words(plan.request_rate, max_concurrency)}")
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, _interrupt_once, generator.interrupt)
        try:
            await generator.run(plan, max_concurrency=max_concurrency or 1)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        after = await client.metrics()
        return load_result(
            generator.samples,
            target=Target(
                api=client.api,
                endpoint=endpoint,
                model=options["model"],
                follows_events=client.has_events,
                poll_interval_s=client.poll_interval_s,
            ),
            request_rate=plan.request_rate,
            max_concurrency=max_concurrency,
            delays=generator.delays,
            slo_s=options["slo_s"],
            server=server_side(before, after),
            was_interrupted=generator.was_interrupted,
        )


def _interrupt_once(interrupt: Any) -> None:
    """A second Ctrl-C ends the command at once."""
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    interrupt()


def _amount(plan: Plan) -> str:
    number = "" if plan.num_requests is None else f"{plan.num_requests} requests"
    time = "" if plan.duration_s is None else f"{plan.duration_s:g} s"
    return " or ".join(filter(None, (number, time)))
