"""Pictures dealt to the ranks of a replica in strips, for autoencoders: who holds which rows, and what neighbours see.

A picture [.., H, W] is cut along its longer side, at whole cells: latent cells, of which each is a square of pixels. A
rank works on its strip through all resolutions. What looks beyond a cell asks for the rest: convolutions for the lines
at the edges of the neighbours' strips (`pad`), norms over the picture for the other ranks' moments (`moments`),
attention for their keys and values (`gather`). A picture with fewer cells than ranks stays whole, on every rank.

Shapes: B batch, C channels, T frames, H, W height and width of the picture, h, w of the strip that a rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.collectives import Exchange, all_gather_uneven
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis

ROWS, COLUMNS = -2, -1


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a picture is cut: rank r has cells `bounds[r]` to `bounds[r + 1]` along dimension `dim`."""

    dim: int
    bounds: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Cells of each rank."""
        return tuple(end - start for start, end in pairwise(self.bounds))


class StripSharding:
    """How the picture that is being coded is dealt. Autoencoders say of which cells it is made (`over_strip`,
    `over_whole`); their layers read it. On an axis of one rank, and outside of these two, nothing happens."""

    def __init__(self, axis: ProcessAxis = ALONE, *, why_whole: str = "") -> None:
        """`why_whole`: what keeps an autoencoder of several ranks from being dealt, for the log."""
        self.axis = axis
        self.why_whole = why_whole
        self._cut: Cut | None = None

    # What autoencoders ask for

    def cut(self, height: int, width: int) -> Cut | None:
        """Of a picture of so many cells; None where it stays whole. Every rank finds the same."""
        length, ranks = max(height, width), self.axis.size
        if ranks == 1 or length < ranks:
            return None
        bounds = tuple(length * rank // ranks for rank in range(ranks + 1))
        return Cut(dim=ROWS if height >= width else COLUMNS, bounds=bounds)

    def over_strip(self, network: Callable[[Tensor], Tensor], whole: Tensor) -> Tensor:
        """What the network makes of this rank's strip of a picture in cells [.., H, W]; every rank calls it."""
        cut = self.cut(*whole.shape[-2:])
        if cut is None:
            return network(whole)
        with self._dealt(cut):
            return network(self._strip(whole, cut))

    def over_whole(self, network: Callable[[Tensor], Tensor], whole: Tensor, *, ratio: int = 1) -> Tensor:
        """What the network makes of all strips, put together on every rank. `ratio` entries of [.., H, W] along each
        side are a cell."""
        height, width = whole.shape[-2:]
        cut = None if height % ratio or width % ratio else self.cut(height // ratio, width // ratio)
        if cut is None:
            return network(whole)
        with self._dealt(cut):
            return self.gather(network(self._strip(whole, cut)), dim=cut.dim)

    def own(self, picture: Tensor, height: int, width: int) -> Tensor:
        """This rank's strip of what was put together, of a picture of so many cells."""
        cut = self.cut(height, width)
        return picture if cut is None else self._strip(picture, cut)

    def collect(self, strip: Tensor, height: int, width: int) -> Tensor | None:
        """The picture of so many cells, of all ranks' strips [.., h, w], on the leader; None on the others."""
        cut = self.cut(height, width)
        if cut is None:
            return strip if self.axis.rank == 0 else None
        lines = strip.shape[cut.dim] // cut.sizes[self.axis.rank]
        exchange = Exchange(self.axis)
        if self.axis.rank:
            exchange.send(strip.contiguous(), 0)
        parts = [strip]
        for rank in range(1, self.axis.size) if self.axis.rank == 0 else ():
            shape = list(strip.shape)
            shape[cut.dim] = lines * cut.sizes[rank]
            parts.append(strip.new_empty(shape))
            exchange.receive(parts[-1], rank)
        exchange.start()
        exchange.wait()
        return torch.cat(parts, dim=cut.dim) if self.axis.rank == 0 else None

    def largest(self, height: int, width: int, *, ratio: int) -> tuple[int, int]:
        """Height and width in pixels of what a rank holds of such a picture at most, the neighbours' lines included."""
        cut = self.cut(height // ratio, width // ratio)
        if cut is None:
            return height, width
        side = max(cut.sizes) * ratio + 2
        return (min(height, side), width) if cut.dim == ROWS else (height, min(width, side))

    # What layers ask for

    @property
    def is_dealt(self) -> bool:
        """Whether what layers see is a strip."""
        return self._cut is not None

    def pad(self, strip: Tensor, sides: tuple[int, ...], mode: str = "constant") -> Tensor:
        """As torch's `pad`; where a neighbour's strip begins, its lines in place of padding."""
        if not any(sides):
            return strip
        if mode in ("constant", "replicate"):
            padded, inner = self.room(strip, sides)
            inner.copy_(strip)
            if mode == "replicate":
                repeat_edges(padded, sides)
        else:
            padded = F.pad(strip, sides, mode=mode)
        self.exchange(padded, sides)
        return padded

    def room(self, strip: Tensor, sides: tuple[int, ...], *, lead: int = 0) -> tuple[Tensor, Tensor]:
        """Memory for a strip between zeros, and the part of it where the strip belongs; `exchange` puts neighbours'
        lines in place of zeros. In front are `lead` more frames, in which nothing is yet."""
        return _between_zeros(strip, sides, lead)

    def exchange(self, padded: Tensor, sides: tuple[int, ...]) -> None:
        """Where a neighbour's strip begins, put its lines in place of padding."""
        if self._cut is not None:
            dim = self._cut.dim
            self._fill(padded, dim, *sides[-2 * dim - 2 : -2 * dim])

    def gather(self, strip: Tensor, *, dim: int) -> Tensor:
        """All ranks' strips side by side along `dim`, which holds lines of the picture or a number of tokens for each
        of them; what is whole stays."""
        if self._cut is None:
            return strip
        lines = strip.shape[dim] // self._cut.sizes[self.axis.rank]
        return all_gather_uneven(strip, [lines * size for size in self._cut.sizes], self.axis, dim=dim)

    def moments(self, variance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and mean [...] of all ranks' values, of those of each rank's strip."""
        if self._cut is None:
            return variance, mean
        # Moments around each rank's own mean: sums of squares would lose the digits that a large mean has.
        both = torch.stack((variance, mean))
        found = all_gather_uneven(both[None], [1] * self.axis.size, self.axis, dim=0)
        weights = torch.tensor(self._cut.sizes, dtype=found.dtype, device=found.device) / self._cut.bounds[-1]
        weights = weights.view(-1, *(1,) * mean.ndim)
        whole_mean = (weights * found[:, 1]).sum(dim=0)
        return (weights * (found[:, 0] + (found[:, 1] - whole_mean) ** 2)).sum(dim=0), whole_mean

    def _fill(self, padded: Tensor, dim: int, before: int, after: int) -> None:
        """Put the neighbours' lines where there is padding for them. A neighbour's strip was padded in the other
        dimensions as this one, so that its lines fit as they are."""
        if not (before or after):
            return
        rank, last = self.axis.rank, self.axis.size - 1
        own = padded.shape[dim] - before - after
        assert own >= max(before, after), f"strips of {own} lines have not enough for a neighbour's {before}, {after}"
        exchange = Exchange(self.axis)
        received = []
        for peer, ours, theirs in (
            (rank - 1, (before, after), (0, before)),
            (rank + 1, (own, before), (before + own, after)),
        ):
            if not 0 <= peer <= last:
                continue
            if ours[1]:
                exchange.send(padded.narrow(dim, *ours).contiguous(), peer)
            if theirs[1]:
                place = padded.narrow(dim, *theirs)
                lines = torch.empty(place.shape, dtype=padded.dtype, device=padded.device)
                exchange.receive(lines, peer)
                received.append((place, lines))
        exchange.start()
        exchange.wait()
        for place, lines in received:
            place.copy_(lines)

    @contextmanager
    def _dealt(self, cut: Cut) -> Iterator[None]:
        assert self._cut is None, "a strip is not cut again"
        self._cut = cut
        try:
            yield
        finally:
            self._cut = None

    def _strip(self, whole: Tensor, cut: Cut) -> Tensor:
        lines = whole.shape[cut.dim] // cut.bounds[-1]
        start, end = cut.bounds[self.axis.rank : self.axis.rank + 2]
        return whole.narrow(cut.dim, lines * start, lines * (end - start))


def _between_zeros(strip: Tensor, sides: tuple[int, ...], lead: int) -> tuple[Tensor, Tensor]:
    """As F.pad, which writes all of the result twice, but without the strip itself; and where that belongs."""
    shape, inside, around = list(strip.shape), [slice(None)] * strip.ndim, []
    for dim, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True), start=1):
        length = shape[-dim]
        shape[-dim] = before + length + after
        inside[-dim] = slice(before, before + length)
        around += [(-dim, 0, before), (-dim, before + length, after)]
    if lead:
        shape[2] += lead
        inside[2] = slice(lead, shape[2])
        around = [place for place in around if place[2]]
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(strip.ndim, torch.contiguous_format)
    # Channels that lie side by side may be some of more, of which the result has no memory.
    if not (strip.is_contiguous(memory_format=layout) or (strip.shape[1] > 1 and strip.stride(1) == 1)):
        layout = torch.contiguous_format
    padded = torch.empty(shape, dtype=strip.dtype, device=strip.device, memory_format=layout)
    for place in around:
        padded.narrow(*place).zero_()
    return padded, padded[tuple(inside)]


def repeat_edges(padded: Tensor, sides: tuple[int, ...]) -> None:
    """Fill what lies around the inner part of a room with copies of its edges. F.pad would do so in an order of memory
    of its own."""
    for dim, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True), start=1):
        end = padded.shape[-dim] - after
        for start, count, edge in ((0, before, before), (end, after, end - 1)):
            if count:
                # Dimension by dimension at full extent, so that corners come of edges.
                padded.narrow(-dim, start, count).copy_(padded.narrow(-dim, edge, 1))


def explain_strips(components: Mapping[str, Any]) -> Iterable[str]:
    """For the log: which components deal their pictures to several ranks, and what does not."""
    for name, component in components.items():
        strips = getattr(component, "strips", None)
        if not isinstance(strips, StripSharding):
            continue
        if strips.axis.size > 1:
            yield f"{name}: pictures are dealt to {strips.axis.size} ranks in strips"
        elif strips.why_whole:
            yield f"{name}: whole on every rank, and one rank decodes, because {strips.why_whole}"
