"""What unfinished latents look like: a linear map from a latent cell to colours, fitted on the request itself.

A fixed map that is fitted on random latents misses backgrounds and colours by far, since a decoder is only tame where
its encoder leads; docs/decisions/0013 has the numbers. So a small version of what the request predicts is decoded now
and then, and the map learned from it serves the whole picture and the steps that follow.

Shapes: C latent channels, T, h, w latent frames, height, width; F, H, W those of pixels; p pixels along a cell's side.
"""

from __future__ import annotations

import dataclasses
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


class Basis(NamedTuple):
    """`weights` [2, C + 1, 3·p·p] fp32 on the CPU: what a cell and a 1 give, in [-1, 1], colours outermost.

    The first is for the first frame of a clip, the second for the others. `patch` is p.
    """

    weights: Tensor
    patch: int


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

    def view(self, req: Req) -> View | None:
        """Of what the last step predicted; None when it kept nothing. Reads nothing that the next step writes."""
        clean, req.clean_latents, req.keeps_clean = req.clean_latents, None, False
        if clean is None or req.latent_shape is None:
            return None
        clean = clean[:, clean.shape[1] - req.latent_shape[1] :]  # frames before the clip's own are not shown
        step = sum(req.done(phase.name) for phase in req.phases if phase.lane == "denoise")
        num_frames = clean.shape[1]
        shown = torch.linspace(0, num_frames - 1, min(num_frames, MAX_FRAMES)).round().int().tolist()
        latents = torch.stack([clean[:, frame] for frame in shown], dim=1)  # a copy, and no index for a GPU to wait for
        return View(step=step, latents=latents, basis=self._basis(req, clean, step))

    def forget(self, request_id: str) -> None:
        """The request has left."""
        self._fitted.pop(request_id, None)

    def _basis(self, req: Req, clean: Tensor, step: int) -> Basis:
        """That of the last fit, unless much has changed since."""
        total = sum(phase.units for phase in req.phases if phase.lane == "denoise")
        fitted_at, basis = self._fitted.get(req.request_id, (-total, None))
        if basis is None or step - fitted_at >= max(1, total // _REFITS):
            basis = self._fit(req, clean)
            self._fitted[req.request_id] = (step, basis)
        return basis

    def _fit(self, req: Req, clean: Tensor) -> Basis:
        assert req.latent_shape is not None and req.params.height, "checked at admission"
        ratio = req.params.height // req.latent_shape[2]
        sample, is_whole = small_version(clean[:, :_SAMPLE_FRAMES], ratio)
        patch = _PATCH if is_whole and ratio % _PATCH == 0 else 1
        return fitted(sample, self._decoded(req, sample, ratio), frame_stride=self._frame_stride, patch=patch)

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
    has_first = len(cells) == num_latent_frames
    later = _ridge(torch.cat(later_cells), torch.cat(later_pixels))
    first = _ridge(cells[0], pixels[0]) if has_first else later
    return Basis(weights=torch.stack((first, later)).float(), patch=patch)


def _with_one(cells: Tensor) -> Tensor:
    """[S, C] -> [S, C + 1]."""
    return torch.cat((cells, torch.ones_like(cells[:, :1])), dim=1)


def _ridge(cells: Tensor, pixels: Tensor) -> Tensor:
    """[S, C + 1], [S, N] -> [C + 1, N]."""
    penalty = _RIDGE * len(cells) * torch.eye(cells.shape[1], dtype=cells.dtype)
    return torch.linalg.solve(cells.T @ cells + penalty, cells.T @ pixels)
