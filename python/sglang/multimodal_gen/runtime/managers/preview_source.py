"""The worker's side of previews: views leave the device while the next steps run, in a thread of their own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.worker_messages import PreviewLatents
from sglang.multimodal_gen.runtime.observability.logging_setup import fields
from sglang.multimodal_gen.runtime.pipelines_core.previews import Previewer, View
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

logger = logging.getLogger(__name__)


class _Leaving(NamedTuple):
    """A view on its way to the host; `arrived` tells when it is there, None when it already is."""

    request_id: str
    view: View
    latents: Tensor
    arrived: torch.cuda.Event | None


class PreviewSource:
    """Takes previews of the requests that a tick names. Costs nothing until the first is wanted."""

    def __init__(self, pipeline: Any, run_dir: RunDir, send: Callable[[PreviewLatents], None]) -> None:
        self._run_dir = run_dir
        self._send = send
        self._previewer = None
        if pipeline.gives_previews:
            self._previewer = Previewer(pipeline.stages, frame_stride=pipeline.limits().frame_stride)
        self._given_up: set[str] = set()
        self._leaving: queue.SimpleQueue[_Leaving] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def want(self, requests: Sequence[Req]) -> list[Req]:
        """Before a step: those of the requests of which there will be a preview."""
        wanted = [] if self._previewer is None else [r for r in requests if r.request_id not in self._given_up]
        for req in wanted:
            req.keeps_clean = True
        return wanted

    def take(self, requests: Sequence[Req], *, failed: bool, tick: int = 0, others_wait: bool = False) -> float:
        """After the step; the seconds of the worker that fits took, see Previewer. Whatever goes wrong here costs the
        request its previews and nothing else."""
        before = self._fit_seconds()
        assert self._previewer is not None or not requests, "only what can be had is wanted"
        for req in requests:
            if failed:
                req.keeps_clean = False
                continue
            try:
                view = self._view(req, tick=tick, others_wait=others_wait)
                if view is not None:
                    self._let_go(req.request_id, view)
            except Exception:
                logger.exception("there are no previews of the request", extra=fields(request_id=req.request_id))
                self._given_up.add(req.request_id)
        return self._fit_seconds() - before

    def _view(self, req: Req, *, tick: int, others_wait: bool) -> View | None:
        if self._previewer is None:
            return None
        return self._previewer.view(req, tick=tick, others_wait=others_wait)

    def _fit_seconds(self) -> float:
        return self._previewer.fit_seconds if self._previewer is not None else 0.0

    def release(self, request_id: str) -> None:
        """The request has left."""
        self._given_up.discard(request_id)
        if self._previewer is not None:
            self._previewer.forget(request_id)

    def _let_go(self, request_id: str, view: View) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
            self._thread.start()
        latents, arrived = view.latents, None
        if latents.is_cuda:
            latents = torch.empty(latents.shape, dtype=latents.dtype, pin_memory=True)
            latents.copy_(view.latents, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._leaving.put(_Leaving(request_id, view, latents, arrived))

    def _run(self) -> None:
        while True:
            self._write(self._leaving.get())

    def _write(self, leaving: _Leaving) -> None:
        if leaving.arrived is not None:
            leaving.arrived.synchronize()
        view = leaving.view
        try:
            latents = self._run_dir.send(leaving.latents.numpy())
        except StorageError as error:
            logger.warning("a preview is left out: %s", error, extra=fields(request_id=leaving.request_id))
            return
        self._send(
            PreviewLatents(
                request_id=leaving.request_id,
                step=view.step,
                latents=latents,
                basis=view.basis.weights.numpy().tobytes(),
                patch=view.basis.patch,
            )
        )
