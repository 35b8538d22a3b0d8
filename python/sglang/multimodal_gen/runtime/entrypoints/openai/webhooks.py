"""Webhooks: a signed POST for each video that is completed or failed, in the form that OpenAI's client verifies.

Source of the signature: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import logging
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang.multimodal_gen.runtime.managers.job_store import VideoJob
from sglang.multimodal_gen.runtime.observability.logging_setup import fields

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_AT_ONCE = 4
# Seconds between attempts; with the last one repeated, a day in all.
_DELAYS_S = (5.0, 30.0, 120.0, 600.0, *(3600.0,) * 24)


@dataclass(frozen=True, kw_only=True)
class WebhookTarget:
    """Who is told. `secret` begins with `whsec_`; the rest of it is the key in base64."""

    url: str
    secret: str = field(repr=False)
    delays_s: tuple[float, ...] = _DELAYS_S

    def headers(self, event_id: str, body: bytes, *, now: int) -> dict[str, str]:
        """The signature of this attempt."""
        key = base64.b64decode(self.secret.removeprefix("whsec_"))
        signed = b".".join((event_id.encode("ascii"), str(now).encode("ascii"), body))
        signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode("ascii")
        return {
            "content-type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": str(now),
            "webhook-signature": f"v1,{signature}",
        }


class Webhooks:
    """Tells the target of jobs' ends, each until it is taken or a day has passed. `settled` hears of either."""

    def __init__(self, target: WebhookTarget, settled: Callable[[VideoJob, bool], None]) -> None:
        self._target = target
        self._settled = settled
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    def tell(self, job: VideoJob) -> None:
        """Start telling of a job that is final; returns at once."""
        task = asyncio.create_task(self._tell(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop; what was not taken is told after the next start."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, job: VideoJob) -> None:
        event_id = f"evt_{job.id.removeprefix('video_')}"  # the same after a restart: who receives it knows it again
        event = {
            "id": event_id,
            "object": "event",
            "created_at": job.completed_at,
            "type": f"video.{job.status}",
            "data": {"id": job.id},
        }
        body = json.dumps(event).encode("ascii")
        for delay in (*self._target.delays_s, None):
            async with self._slots:
                problem = await asyncio.to_thread(self._post, event_id, body)
            if problem is None:
                self._settled(job, True)
                return
            logger.warning("a webhook was not taken (%s)", problem, extra=fields(request_id=job.id))
            if delay is not None:
                await asyncio.sleep(delay)
        self._settled(job, False)

    def _post(self, event_id: str, body: bytes) -> str | None:
        """One attempt; why it failed. Redirects are failures: what is signed goes to nobody else."""
        parts = urllib.parse.urlsplit(self._target.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        path = parts._replace(scheme="", netloc="").geturl() or "/"
        connection = kind(parts.netloc, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", path, body, self._target.headers(event_id, body, now=int(time.time())))
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        finally:
            connection.close()
        return None if status // 100 == 2 else f"HTTP {status}"
