"""The scheduler's side of previews: after which steps there is one, and that no client is sent more than it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from sglang.multimodal_gen.runtime.managers.messages import Preview, PreviewTaken, WatchRequest
from sglang.multimodal_gen.runtime.managers.output_link import Ledger, OutputLink
from sglang.multimodal_gen.runtime.managers.output_messages import PreviewRendered, RenderPreview
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.worker_messages import PreviewLatents, Unit

Requests = Mapping[str, RequestRecord]


@dataclass
class _View:
    """How a request's client sees it. `is_taking`: the client was sent one and has not asked for the next yet."""

    watched: bool = False
    chosen_at: float = -math.inf
    is_taking: bool = False
    unsent: Preview | None = None


class Previews:
    """Nothing is kept of requests without previews."""

    def __init__(
        self,
        requests: Requests,
        tell: Callable[[RequestRecord, Preview], None],
        *,
        ledger: Ledger,
        output: OutputLink,
        max_per_second: float,
    ) -> None:
        """`max_per_second` is for those that are watched; 0 is for all: there are no previews."""
        self._requests = requests
        self._tell = tell
        self._ledger = ledger
        self._output = output
        self._max_per_second = max_per_second
        self._views: dict[str, _View] = {}

    def choose(self, units: tuple[Unit, ...], requests: Requests) -> tuple[str, ...]:
        """Of the denoising units of a tick, the requests that are to be seen after it."""
        return tuple(unit.request_id for unit in units if self._is_due(requests[unit.request_id], unit))

    def _is_due(self, record: RequestRecord, unit: Unit) -> bool:
        view, number = self._views.get(record.request_id), record.params.num_previews
        if self._max_per_second == 0 or record.client is None or (view is None and number == 0):
            return False
        step, total = record.step_of(unit), record.steps()[1]
        now = time.monotonic()
        is_due = step in preview_steps(number, total)
        if view is not None and view.watched and not view.is_taking and step < total:
            is_due |= (now - view.chosen_at) * self._max_per_second >= 1
        if is_due:
            self._view(record).chosen_at = now
        return is_due

    def _view(self, record: RequestRecord) -> _View:
        return self._views.setdefault(record.request_id, _View())

    def heard(self, client: bytes, message: WatchRequest | PreviewTaken) -> None:
        """What a client says of a request of its own."""
        record = self._requests.get(message.request_id)
        if record is None or record.client != client:
            return
        view = self._view(record)
        if isinstance(message, WatchRequest):
            view.watched = message.watched
            return
        view.is_taking = False
        if view.unsent is not None:
            preview, view.unsent = view.unsent, None
            self._send(record, preview)

    def on_latents(self, message: PreviewLatents) -> None:
        """A worker gave what a preview is made of."""
        record = self._requests.get(message.request_id)
        if record is None or record.cursor is None:
            self._ledger.run_dir.discard(message.latents)
            return
        self._ledger.add(message.request_id, message.latents)
        self._output.send(RenderPreview(latents=message, params=record.params))

    def on_rendered(self, message: PreviewRendered) -> None:
        """It is made: send it, or keep it while the client has not taken the one before."""
        record = self._requests.get(message.request_id)
        if record is None or record.cursor is None:
            return
        preview = Preview(
            request_id=message.request_id,
            step=message.step,
            total_steps=record.steps()[1],
            media_type=message.media_type,
            image=message.image,
        )
        view = self._view(record)
        if view.is_taking:
            view.unsent = preview
        else:
            self._send(record, preview)

    def _send(self, record: RequestRecord, preview: Preview) -> None:
        self._view(record).is_taking = True
        self._tell(record, preview)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._views.pop(request_id, None)


@lru_cache(maxsize=256)
def preview_steps(number: int, total: int) -> frozenset[int]:
    """After which of `total` steps, counted from 1, there is a preview: `number` of them, evenly spread between the
    start and the result, or fewer when there are not as many steps."""
    return frozenset(round(total * (index + 1) / (number + 1)) for index in range(number)) - {0, total}
