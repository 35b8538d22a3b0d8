"""Sends requests as OpenAI's own client does, and watches the replies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import aiohttp

from sglang.multimodal_gen.errors import LoadRefused, ServerNotReachable
from sglang.multimodal_gen.runtime.bench.load.observation import (
    COMPLETED,
    RUNNING,
    WAITING,
    Observation,
    RequestFailure,
    error_facts,
    failure_of,
    json_object,
)
from sglang.multimodal_gen.runtime.bench.load.sse import EventDecoder

_POLL_S = 0.5
_ANSWERS_S = 10.0
_EVENT_STREAM = "text/event-stream"
# Servers close a connection that was idle for 5 s or more; one that is closed while a request is on its way would
# look like a fault of the server.
_KEEP_ALIVE_S = 4.0


class LoadClient:
    """One server. Use as `async with`."""

    def __init__(self, base_url: str, *, api_key: str | None, poll_interval_s: float | None) -> None:
        path = urlsplit(base_url).path.rstrip("/")
        self.api = base_url.rstrip("/") + ("" if path else "/v1")
        self.metrics_url = self.api.removesuffix("/v1") + "/metrics"
        self.has_events: bool | None = None
        self.poll_interval_s: float | None = None
        self._wanted_interval_s = poll_interval_s
        self._headers = {"Accept-Encoding": "identity"}  # bytes are counted as they travel
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> LoadClient:
        # No limit: a request that waits for a connection here would not be load on the server.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None)  # whoever sends a request has a deadline of its own
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar()
        )
        keyless = {name: value for name, value in self._headers.items() if name != "Authorization"}
        self._elsewhere = aiohttp.ClientSession(
            connector=connector,
            connector_owner=False,
            timeout=timeout,
            headers=keyless,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._elsewhere.close()
        await self._session.close()

    async def check(self) -> None:
        """That something answers at the address, whatever it thinks of the question.

        Raises:
            ServerNotReachable: nothing does, or it does not speak HTTP.
            LoadRefused: it wants another key.
        """
        url = f"{self.api}/models"
        try:
            async with asyncio.timeout(_ANSWERS_S), self._session.get(url) as reply:
                status, data = reply.status, await reply.read()
        except TimeoutError:
            raise ServerNotReachable(self.api, f"none within {_ANSWERS_S:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ServerNotReachable(self.api, _reason(error)) from None
        if status in (401, 403):
            remedy = "give the server's key as SGLANG_BENCH_API_KEY or with --api-key"
            raise LoadRefused(url, status=status, reason=failure_of(status, data).detail, remedy=remedy)

    async def metrics(self) -> str | None:
        """The text of /metrics; None when there is none."""
        try:
            async with asyncio.timeout(_ANSWERS_S), self._session.get(self.metrics_url) as reply:
                return await reply.text() if reply.status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return None

    async def image(self, body: Mapping[str, Any], seen: Observation) -> None:
        """One call for images. Raises RequestFailure."""
        async with self._request("POST", "/images/generations", seen, json=dict(body)) as reply:
            if reply.content_type == _EVENT_STREAM:
                await self._image_events(reply, seen)
                return
            data = await _read(reply, seen)
        seen.end()
        found = json_object(data)
        images = found.get("data")
        if not isinstance(images, list) or not images:
            raise RequestFailure("invalid reply", "the reply has no images")
        seen.says(found)
        urls = [str(image["url"]) for image in images if isinstance(image, dict) and image.get("url")]
        if urls:
            await asyncio.gather(*(self._fetch(url, seen) for url in urls))
            seen.end()
        seen.num_outputs = len(images)

    async def _fetch(self, url: str, seen: Observation) -> None:
        """The bytes of one image, from this server or, without its key, from another. Raises RequestFailure."""
        address = urljoin(self.api + "/", url)
        is_own = urlsplit(address)[:2] == urlsplit(self.api)[:2]
        try:
            async with (self._session if is_own else self._elsewhere).get(address) as reply:
                data = await _read(reply, seen, keep=reply.status != 200)
                if reply.status != 200:
                    raise failure_of(reply.status, data)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RequestFailure("connection", _reason(error)) from None

    async def _image_events(self, reply: aiohttp.ClientResponse, seen: Observation) -> None:
        async for kind, found in _events(reply, seen):
            if kind.endswith(".partial_image"):
                seen.preview()
            elif kind.endswith(".completed"):
                seen.end()
                seen.num_outputs += 1
                seen.says(found)
        if not seen.num_outputs:
            raise RequestFailure("invalid reply", "the stream ended without an image")

    async def video(self, body: Mapping[str, Any], seen: Observation) -> None:
        """One video: created, followed to its end, fetched. Raises RequestFailure."""
        async with self._request("POST", "/videos", seen, data=_form(body)) as reply:
            job = json_object(await _read(reply, seen))
            self.poll_interval_s = self._interval_s(reply)
        if not isinstance(job.get("id"), str):
            raise RequestFailure("invalid reply", "the reply has no video's id")
        seen.job_id = job["id"]
        if _goes_on(job, seen) and self.has_events is not False:
            job = await self._follow(job, seen)
        while _goes_on(job, seen):
            await asyncio.sleep(self.poll_interval_s)
            async with self._request("GET", self._video(seen), seen) as reply:
                job = json_object(await _read(reply, seen))
        if job.get("status") != COMPLETED:
            code, message = error_facts(job)
            raise RequestFailure(code or f"status {job.get('status')}", message or "the video failed")
        async with self._request("GET", self._video(seen) + "/content", seen) as reply:
            await _read(reply, seen, keep=False)
        seen.end()
        seen.num_outputs = 1

    async def _follow(self, job: dict[str, Any], seen: Observation) -> dict[str, Any]:
        """The last that the video's events say; the job as given when the server sends none."""
        headers = {"Accept": _EVENT_STREAM}
        path = self._video(seen) + "/events"
        try:
            async with self._request("GET", path, seen, headers=headers) as reply:
                if reply.content_type != _EVENT_STREAM:
                    raise RequestFailure("invalid reply", "no events")
                self.has_events = True
                async with contextlib.aclosing(_events(reply, seen)) as events:
                    async for kind, found in events:
                        if kind.endswith(".preview"):
                            seen.preview()
                        elif isinstance(found.get("video"), dict):
                            job = found["video"]
                            if not _goes_on(job, seen):
                                break
        except RequestFailure:
            self.has_events = self.has_events or False  # a server that once sent events may do so again
        return job

    async def delete(self, job_id: str) -> None:
        """Remove a video, and stop it where the server can; a server that cannot is left alone."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(_ANSWERS_S):
                async with self._session.delete(f"{self.api}/videos/{quote(job_id, safe='')}") as reply:
                    await reply.read()

    def _video(self, seen: Observation) -> str:
        assert seen.job_id is not None, "the video was created"
        return f"/videos/{quote(seen.job_id, safe='')}"

    def _interval_s(self, reply: aiohttp.ClientResponse) -> float:
        """Between two questions for a status; the server may say how long, as it does to OpenAI's client."""
        if self._wanted_interval_s is not None:
            return self._wanted_interval_s
        wanted = reply.headers.get("openai-poll-after-ms", "")
        return int(wanted) / 1000 if wanted.isdecimal() else _POLL_S

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, seen: Observation, **content: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A reply with a status of success. Raises RequestFailure for every other end but a cancellation."""
        try:
            # A redirect would make a GET of a POST, and say nothing about the server that was named.
            async with self._session.request(method, self.api + path, allow_redirects=False, **content) as reply:
                if not 200 <= reply.status < 300:
                    raise failure_of(reply.status, await _read(reply, seen))
                yield reply
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailure("connection", _reason(error)) from None


async def _read(reply: aiohttp.ClientResponse, seen: Observation, *, keep: bool = True) -> bytes:
    """The body, counted; empty when nobody keeps it."""
    kept: list[bytes] = []
    async for chunk in reply.content.iter_any():
        seen.bytes_received += len(chunk)
        if keep:
            kept.append(chunk)
    return b"".join(kept)


async def _events(reply: aiohttp.ClientResponse, seen: Observation) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """(type, data) of each event. Raises RequestFailure when one of them is an error."""
    decoder = EventDecoder()
    async for chunk in reply.content.iter_any():
        seen.bytes_received += len(chunk)
        for kind, data in decoder.feed(chunk):
            if data == "[DONE]":
                return
            found = json_object(data)
            kind = str(found.get("type") or kind)
            if kind == "error" or isinstance(found.get("error"), dict):
                code, message = error_facts(found)
                raise RequestFailure(code or "error in the stream", message)
            yield kind, found


def _goes_on(job: Mapping[str, Any], seen: Observation) -> bool:
    """Whether the video is not at its end; what its object says is noted."""
    seen.status(str(job.get("status")))
    seen.says(job)
    return job.get("status") in (WAITING, RUNNING)


def _form(body: Mapping[str, Any]) -> aiohttp.FormData:
    """multipart/form-data, which is how OpenAI's client creates videos: texts bare, all else as in JSON."""
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in body.items():
        form.add_field(name, value if isinstance(value, str) else json.dumps(value))
    return form


def _reason(error: BaseException) -> str:
    """What a foreign error says, on one line."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    text = str(cause)
    if isinstance(cause, OSError) and cause.strerror:
        # asyncio writes addresses into it; a name that cannot be resolved has a number of another kind.
        number = cause.errno or 0
        text = os.strerror(number) if number > 0 else cause.strerror
    return " ".join(text.split()) or type(error).__name__
