"""Draws scenes with signed distance functions: whole batches at once, anti-aliased, on any device.

Shapes: B clips, T frames, H, W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from demo_model.scenes import Scenes
from demo_model.vocabulary import BACKGROUNDS, CIRCUMRADIUS, COLOURS, FRAME_SIDE, NUM_FRAMES, SHAPES

# Corners are rounded by this share of the nominal radius.
_ROUNDING = 0.09
# Points (or corners) of each shape and the half-angle (π/m) at which an edge meets the axis: see `_star_distance`.
# The circle is drawn by its radius alone.
_NUM_POINTS = torch.tensor([4.0, 4.0, 3.0, 5.0])
_EDGE_ANGLE = torch.tensor([math.pi / 2, math.pi / 2, math.pi / 2, math.pi / 3])
# Heading of the first corner: squares lie on a side, triangles and stars point up.
_FIRST_CORNER = torch.tensor([0.0, math.pi / 4, 0.0, 0.0])
_CIRCUMRADIUS = torch.tensor([CIRCUMRADIUS[shape] for shape in SHAPES])


def frame_times(num_frames: int) -> np.ndarray:
    """Times in 0 … 1 of a clip's frames; a single image is a moment in the middle."""
    return np.linspace(0, 1, num_frames) if num_frames > 1 else np.array([0.5])


@torch.no_grad()
def render(
    scenes: Scenes,
    *,
    num_frames: int = NUM_FRAMES,
    times: np.ndarray | None = None,
    outline: float | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw scenes: [B, T, 128, 128, 3], sRGB in 0 … 1, float32. `times` picks other frames than a whole clip's. With
    `outline` only a line of that width in pixels is drawn, along the inner side of each object's edge."""
    times = frame_times(num_frames) if times is None else times
    motion = np.concatenate(
        (scenes.centres_at(times), scenes.radii_at(times)[..., None], scenes.angles_at(times)[..., None]), axis=-1
    )
    tracks = torch.from_numpy(motion).float().to(device, non_blocking=True)  # [B, 2, T, (x, y, radius, angle)]
    colours = _palette(COLOURS, scenes.colour).to(device)
    backgrounds = _palette(BACKGROUNDS, scenes.background).to(device)
    frames = backgrounds[:, None, None, None].repeat(1, len(times), FRAME_SIDE, FRAME_SIDE, 1)
    for slot in range(2):
        rows = np.flatnonzero(scenes.num_objects > slot)
        if len(rows) == 0:
            continue
        index = torch.from_numpy(rows).to(device)
        kind = torch.from_numpy(scenes.shape[rows, slot])
        distance = _distance(tracks[index, slot], kind)
        if outline is not None:
            distance = (distance + outline / 2).abs() - outline / 2
        alpha = (0.5 - distance).clamp_(0, 1).unsqueeze(-1)
        frames[index] = torch.lerp(frames[index], colours[index, slot][:, None, None, None], alpha)
    return frames


def to_uint8(frames: Tensor) -> np.ndarray:
    """[..., 3] in 0 … 1 -> uint8 on the CPU."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_model_range(frames: Tensor) -> Tensor:
    """[B, T, H, W, 3] in 0 … 1 -> [B, 3, T, H, W] in -1 … 1."""
    return frames.permute(0, 4, 1, 2, 3) * 2 - 1


def _palette(colours: dict[str, tuple[int, int, int]], index: np.ndarray) -> Tensor:
    """[...] -> [..., 3] in 0 … 1."""
    return torch.tensor(list(colours.values()), dtype=torch.float32)[torch.from_numpy(index)] / 255


def _distance(track: Tensor, kind: Tensor) -> Tensor:
    """Signed distance in pixels, negative inside: track [B, T, 4], shape indices [B] on the CPU -> [B, T, H, W]."""
    device = track.device
    grid = torch.arange(FRAME_SIDE, device=device, dtype=torch.float32) + 0.5
    centre_x, centre_y, radius, angle = (value[..., None, None] for value in track.unbind(-1))
    x, y = grid - centre_x, grid[:, None] - centre_y  # [B, T, 1, W], [B, T, H, 1]
    length = torch.sqrt(x * x + y * y)
    distance = length - radius
    # The index list is known on the CPU, so nothing waits for the device.
    rows = torch.nonzero(kind > 0).squeeze(1)
    if len(rows):
        tables = (_NUM_POINTS, _EDGE_ANGLE, _CIRCUMRADIUS, _FIRST_CORNER)
        points, edge, reach, corner = (table[kind[rows]].to(device) for table in tables)
        index = rows.to(device)
        heading = torch.atan2(x[index], -y[index]) - angle[index]  # clockwise from the top
        heading = heading - corner[:, None, None, None]
        rounding = radius[index] * _ROUNDING
        outer = radius[index] * reach[:, None, None, None] - rounding
        distance[index] = _star_distance(length[index], heading, outer, points, edge) - rounding
    return distance


def _star_distance(length: Tensor, heading: Tensor, outer: Tensor, points: Tensor, edge: Tensor) -> Tensor:
    """Distance to a star of `points` corners at distance `outer`, one of them at heading 0.

    The plane is folded into one wedge of ±π/points; there a single edge leaves the corner at the angle `edge`:
    π/2 gives the regular polygon, π/3 a star. Source: https://iquilezles.org/articles/distfunctions2d (sdStar).
    """
    half, edge = (math.pi / points)[:, None, None, None], edge[:, None, None, None]
    folded = torch.remainder(heading, 2 * half) - half
    x = length * torch.cos(folded) - outer * torch.cos(half)
    y = length * torch.sin(folded).abs() - outer * torch.sin(half)
    edge_x, edge_y = torch.cos(edge), torch.sin(edge)
    longest = outer * torch.sin(half) / edge_y
    along = torch.minimum((-(x * edge_x + y * edge_y)).clamp_min(0), longest)
    x, y = x + edge_x * along, y + edge_y * along
    return torch.sqrt(x * x + y * y) * torch.sign(x)
