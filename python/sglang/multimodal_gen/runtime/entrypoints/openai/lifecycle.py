"""From running to ended: what is under way, and what must happen before the server ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

DrainHook = Callable[[float], Awaitable[None]]
"""Called once when draining begins, with the seconds that there are; the server ends when it is done."""


class Lifecycle:
    """Counts requests, and says when the last one has ended. Belongs to one event loop.

    What goes on without a request, such as a job, adds a hook to `on_drain`: it brings that to an end, or to where it
    can go on later, within the time it is given. A stream of events is not waited for: it follows what goes on anyway.
    """

    def __init__(self) -> None:
        self.draining = False
        self.on_drain: list[DrainHook] = []
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """A request has come."""
        self._num_running += 1
        self._idle.clear()

    def end(self) -> None:
        """It has been answered, or it need not be waited for."""
        self._num_running -= 1
        if self._num_running == 0:
            self._idle.set()

    async def drain(self, grace_s: float) -> None:
        """From now on nothing new is taken; returns when nothing runs any more, or after the grace time."""
        self.draining = True
        if self._num_running:
            logger.info("shutting down; requests that run get up to %g s", grace_s)
        hooks = [asyncio.ensure_future(hook(grace_s)) for hook in self.on_drain]
        tasks = [*hooks, asyncio.create_task(self._idle.wait())]
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        for outcome in await asyncio.gather(*hooks, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.error("something could not be brought to its end", exc_info=outcome)

    async def settle(self, seconds: float) -> None:
        """Wait for those that have been told that the time is over, to have their answers."""
        await asyncio.wait([asyncio.create_task(self._idle.wait())], timeout=seconds)
