"""GET /metrics: the scheduler's numbers and the HTTP server's own, for Prometheus."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine
from sglang.multimodal_gen.runtime.observability.metrics import (
    OPEN_METRICS_TYPE,
    TEXT_TYPE,
    HttpMetrics,
    wants_open_metrics,
)

# A scheduler that lives answers within milliseconds; scrapers give up after ten seconds.
_SCHEDULER_ANSWERS_S = 2.0


class MetricsApi:
    """The route. It answers 200 also while there is no scheduler: then with what this process knows."""

    def __init__(self, engine: Engine, metrics: HttpMetrics) -> None:
        self._engine = engine
        self._metrics = metrics

    async def scrape(self, request: Request) -> Response:
        """Metrics in Prometheus' text format 0.0.4, or as OpenMetrics when the Accept header asks for it."""
        open_metrics = wants_open_metrics(request.headers.get("accept", ""))
        text = self._metrics.text(await self._engine_text(open_metrics), open_metrics=open_metrics)
        # A media type in the header, since Starlette would add a second charset to one given as argument.
        return Response(text, headers={"content-type": OPEN_METRICS_TYPE if open_metrics else TEXT_TYPE})

    async def _engine_text(self, open_metrics: bool) -> str | None:
        try:
            async with asyncio.timeout(_SCHEDULER_ANSWERS_S):
                return await self._engine.metrics(open_metrics=open_metrics)
        except (TimeoutError, ServingError):
            return None
