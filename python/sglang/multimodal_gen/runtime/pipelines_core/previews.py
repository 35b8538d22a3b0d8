"""What unfinished latents look like: a linear map from a latent cell to colours, fitted on the request itself.

A fixed map that is fitted on random latents misses backgrounds and colours by far, since a decoder is only tame where
its encoder leads; docs/decisions/0013 has the numbers. So a small version of what the request predicts is decoded now
and then, and the map learned from it serves the whole picture and the steps that follow. While others wait for the
worker that is rare, and a map learned from many requests stands in: one learned from another single one would not do.

Shapes: C latent channels, T, h, w latent frames, height, width; F, H, W those of pixels; p pixels along a cell's side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import request_generator

MAX_FRAMES = 8
"""Latent frames that a preview shows."""
# A first frame is coded differently from those that follow; of these, two say enough.
_SAMPLE_FRAMES = 3
_SAMPLE_CELLS, _FEWEST_SAMPLE_CELLS = 16, 8
_SAMPLE_PIXELS = 256
_PATCH = 4
_RIDGE = 1e-3
_REFITS = 4
# While others wait for the worker, one of so many ticks may hold the first fit of a request, one of twice as many
# another: they lose a few hundredths of their time.
_TICKS_PER_FIT = 20
# So many requests tell about enough of a decoder; what is long ago counts less.
_ENOUGH_REQUESTS = 8
_KEPT = 0.9


class Basis(NamedTuple):
    """`weights` [2, C + 1, 3·p·p] fp32 on the CPU: what a cell and a 1 give, in [-1, 1], colours outermost.

    The first is for the first frame of a clip, the second for the others. `patch` is p.
    """

    weights: Tensor
    patch: int


class _Kind(NamedTuple):
    """Bases of one kind can be learned together."""

    is_clip: bool
    patch: int


class _Equations(NamedTuple):
    """The normal equations of both maps of a Basis: [2, C + 1, C + 1], [2, C + 1, 3·p·p]; of how many cells, [2]."""

    gram: Tensor
    cross: Tensor
    counts: Tensor

    def solved(self, patch: int) -> Basis:
        """By ridge regression."""
        penalty = _RIDGE * self.counts[:, None, None] * torch.eye(self.gram.shape[1], dtype=self.gram.dtype)
        return Basis(weights=torch.linalg.solve(self.gram + penalty, self.cross).float(), patch=patch)


@dataclass
class _Pool:
    """What was learned from many requests. `basis` is None until there were enough of them."""

    kind: _Kind
    basis: Basis | None = None
    _num_requests: int = 0
    _sum: _Equations | None = None

    def add(self, equations: _Equations, *, is_new: bool) -> None:
        """One more fit, `is_new` the first of its request."""
        self._num_requests += is_new
        if self._sum is not None:
            equations = _Equations(*(_KEPT * old + new for old, new in zip(self._sum, equations, strict=True)))
        self._sum = equations
        if self._num_requests >= _ENOUGH_REQUESTS:
            self.basis = equations.solved(self.kind.patch)


@dataclass(frozen=True, kw_only=True)
class View:
    """What a preview is made of: some frames [C, F, h, w] fp32 of the latents, the clip's first among them."""

    step: int
    latents: Tensor
    basis: Basis


class Previewer:
    """Makes views of requests' predicted clean latents. Belongs to the thread that runs their units."""

    def __init__(self, stages: Sequence[Stage], *, frame_stride: int) -> None:
        """`stages` of the whole pipeline; `frame_stride` frames are in each latent frame but the first."""
        self._stages = stages
        self._frame_stride = frame_stride
        self._fitted: dict[str, tuple[int, Basis]] = {}
        self._pools: dict[_Kind, _Pool] = {}
        self._tried_at: int | None = None
        self.fit_seconds = 0.0

    def view(self, req: Req, *, tick: int = 0, others_wait: bool = False) -> View | None:
        """Of what the last step predicted; None when it kept nothing, or when it would take a fit that others have no
        time for now. Reads nothing that the next step writes.

        `tick` rises by one with each, alike on all ranks. What fits take is added to `fit_seconds`.
        """
        clean, req.clean_latents, req.keeps_clean = req.clean_latents, None, False
        if clean is None or req.latent_shape is None:
            return None
        clean = clean[:, clean.shape[1] - req.latent_shape[1] :]  # frames before the clip's own are not shown
        step = sum(req.done(phase.name) for phase in req.phases if phase.lane == "denoise")
        num_frames = clean.shape[1]
        shown = torch.linspace(0, num_frames - 1, min(num_frames, MAX_FRAMES)).round().int().tolist()
        basis = self._basis(req, clean, step, tick=tick, others_wait=others_wait)
        if basis is None:
            return None
        latents = torch.stack([clean[:, frame] for frame in shown], dim=1)  # a copy, and no index for a GPU to wait for
        return View(step=step, latents=latents, basis=basis)

    def forget(self, request_id: str) -> None:
        """The request has left."""
        self._fitted.pop(request_id, None)

    def _basis(self, req: Req, clean: Tensor, step: int, *, tick: int, others_wait: bool) -> Basis | None:
        """That of the request's last fit, unless much has changed since and there is a better one."""
        assert req.latent_shape is not None and req.params.height, "checked at admission"
        ratio = req.params.height // req.latent_shape[2]
        sample, is_whole = small_version(clean[:, :_SAMPLE_FRAMES], ratio)
        kind = _Kind(is_clip=clean.shape[1] > 1, patch=_PATCH if is_whole and ratio % _PATCH == 0 else 1)
        total = sum(phase.units for phase in req.phases if phase.lane == "denoise")
        fitted_at, basis = self._fitted.get(req.request_id, (None, None))
        if fitted_at is not None and step - fitted_at < max(1, total // _REFITS):
            return basis
        pool = self._pools.setdefault(kind, _Pool(kind))
        pause = _TICKS_PER_FIT if basis is None else 2 * _TICKS_PER_FIT
        if others_wait and self._tried_at is not None and tick - self._tried_at < pause:
            return pool.basis or basis
        self._tried_at = tick
        equations = self._equations(req, sample, ratio, kind.patch)
        pool.add(equations, is_new=basis is None)
        basis = equations.solved(kind.patch)
        self._fitted[req.request_id] = (step, basis)
        return basis

    def _equations(self, req: Req, sample: Tensor, ratio: int, patch: int) -> _Equations:
        begin = time.perf_counter()
        try:
            frames = self._decoded(req, sample, ratio)
            return _equations(sample, frames, frame_stride=self._frame_stride, patch=patch)
        finally:
            self.fit_seconds += time.perf_counter() - begin

    def _decoded(self, req: Req, sample: Tensor, ratio: int) -> Tensor:
        """Latents [C, T, h, w] -> their frames [F, H, W, 3] uint8, by all that comes after denoising."""
        _, num_frames, height, width = sample.shape
        params = dataclasses.replace(
            req.params,
            height=height * ratio,
            width=width * ratio,
            num_frames=1 + (num_frames - 1) * self._frame_stride,
            output_type="pixels",
        )
        twin = Req(request_id=req.request_id, params=params, latents=sample)
        twin.latent_shape, twin.generator = (sample.shape[0], num_frames, height, width), request_generator(req)
        denoising = {phase.name for phase in req.phases if phase.lane == "denoise"}
        last = max(index for index, stage in enumerate(self._stages) if stage.name in denoising)
        return torch.cat([frames for stage in self._stages[last + 1 :] for frames in _run(stage, twin)])


def _run(stage: Stage, req: Req) -> list[Tensor]:
    """All units of one stage, and the frames that they give."""
    stage.admit(req)
    stage.begin(req)
    phase = stage.phase(req)
    frames: list[Tensor] = []
    for unit in range(0 if phase is None else phase.units):
        frames += [output.frames for output in stage.step([req]) or []]
        req.units_done[stage.name] = unit + 1
    return frames


def small_version(latents: Tensor, ratio: int) -> tuple[Tensor, bool]:
    """Latents [C, T, h, w] averaged down to what is decoded at once, and whether they are still as they were.

    `ratio`: pixels along a cell's side.
    """
    longest = max(_FEWEST_SAMPLE_CELLS, min(_SAMPLE_CELLS, _SAMPLE_PIXELS // ratio))
    height, width = latents.shape[2:]
    if max(height, width) <= longest:
        return latents, True
    scale = longest / max(height, width)
    size = (max(2, round(height * scale)), max(2, round(width * scale)))
    return F.adaptive_avg_pool2d(latents, size), False


def fitted(latents: Tensor, frames: Tensor, *, frame_stride: int, patch: int) -> Basis:
    """The map that comes nearest, by ridge regression, from latents [C, T, h, w] to frames [F, H, W, 3] uint8.

    H and W are multiples of h·p and w·p. Frames count from the end: the last `frame_stride` belong to the last latent
    frame, and what is left to the first; a decoder that drops some at the start leaves the first without.
    """
    return _equations(latents, frames, frame_stride=frame_stride, patch=patch).solved(patch)


def _equations(latents: Tensor, frames: Tensor, *, frame_stride: int, patch: int) -> _Equations:
    """See `fitted`."""
    num_latent_frames, height, width = latents.shape[1:]
    colours = frames.permute(0, 3, 1, 2).double() / 127.5 - 1
    cells: list[Tensor] = []
    pixels: list[Tensor] = []
    for index in range(num_latent_frames):
        end = len(frames) - (num_latent_frames - 1 - index) * frame_stride
        if end <= 0:
            continue
        start = 0 if index == 0 else max(0, end - frame_stride)
        shown = F.adaptive_avg_pool2d(colours[start:end].mean(0), (height * patch, width * patch))
        grid = shown.unflatten(2, (width, patch)).unflatten(1, (height, patch))  # [3, h, p, w, p]
        cells.append(_with_one(latents[:, index].double().cpu().flatten(1).T))
        pixels.append(grid.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1))
    later_cells, later_pixels = cells[1:] or cells, pixels[1:] or pixels
    later = (torch.cat(later_cells), torch.cat(later_pixels))
    first = (cells[0], pixels[0]) if len(cells) == num_latent_frames else later
    return _Equations(
        gram=torch.stack([x.T @ x for x, _ in (first, later)]),
        cross=torch.stack([x.T @ y for x, y in (first, later)]),
        counts=torch.tensor([float(len(x)) for x, _ in (first, later)], dtype=torch.float64),
    )


def _with_one(cells: Tensor) -> Tensor:
    """[S, C] -> [S, C + 1]."""
    return torch.cat((cells, torch.ones_like(cells[:, :1])), dim=1)
