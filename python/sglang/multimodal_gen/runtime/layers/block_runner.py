"""`BlockRunner`: where a transformer's forward passes its blocks, so that step caches can leave some out.

A row of a forward may have a cache. After the blocks in front the cache decides, from how much something changed since
an earlier step, whether the row passes the rest of the blocks or gets what they added then. Rows that skip leave the
forward, so they cost nothing there. Without a cache the runner is the plain loop over the blocks.

Shapes: B rows, S image or video tokens of this rank, D hidden_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding
from sglang.multimodal_gen.runtime.layers.table_cache import row_index
from sglang.multimodal_gen.runtime.layers.wide_attention import LayeredKeysValues

Streams = tuple[Tensor, ...]
"""What blocks change: image tokens [B, S, D], alone or with text beside them or in the same sequence."""
INPUT_SIGNAL = "input"
"""The first block's input under the timestep's modulation."""


class RowCache(Protocol):
    """The cache of one row at its present step."""

    @property
    def first_blocks(self) -> int:
        """Blocks that run before it decides."""
        ...

    @property
    def last_blocks(self) -> int:
        """Blocks at the end that run in any case."""
        ...

    @property
    def signal(self) -> str | None:
        """Which of the model's signals it watches; None: what the blocks in front added to the image tokens."""
        ...

    @property
    def before(self) -> Tensor | None:
        """What the signal [tokens, D] is compared with; None when the row must be computed whatever it is."""
        ...

    def decide(self, distance: float | None) -> bool:
        """Whether the row skips. `distance` is mean |signal - before| over mean |before|, None without a `before`."""
        ...

    def predicted(self) -> Tensor:
        """What the skipped blocks would add to the image tokens: [S, D]."""
        ...

    def keep(self, signal: Tensor, residual: Tensor | None) -> None:
        """Of the step: its signal, and what the blocks added to the image tokens, None where they were skipped."""
        ...


class PerRow(tuple[Any, ...]):
    """Plain values, one for each row."""


def call_block(layer: int, block: nn.Module, streams: Streams, *given: Any, **named: Any) -> Streams:
    """The streams behind one block, which is called with the streams and then what is given, its own part of that which
    differs from block to block."""
    own = (each.of_layer(layer) if isinstance(each, StepEmbedding | LayeredKeysValues) else each for each in given)
    found = block(*streams, *own, **named)
    return found if isinstance(found, tuple) else (found,)


@dataclass(frozen=True, kw_only=True)
class BlockRun:
    """Blocks one after another that are all called alike.

    `given` and `named`: what each block is given behind the streams; tensors in it have one row for each row of the
    streams, k rows for each (all first ones, then all second ones …), or one for all. `enter` makes the streams of
    those that the run before leaves. `tokens`: where in the first stream the image tokens are.
    """

    blocks: Sequence[nn.Module] | nn.ModuleList
    given: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    enter: Callable[[Streams], Streams] | None = None
    tokens: slice = field(default_factory=lambda: slice(None))
    call: Callable[..., Streams] = call_block

    def entered(self, streams: Streams) -> Streams:
        """The streams as its blocks want them."""
        return streams if self.enter is None else self.enter(streams)


class BlockRunner:
    """Runs a transformer's blocks, with the caches of the present forward's rows if they have any.

    `num_blocks` are all blocks, `changes_text` whether they change text tokens beside the image's. `signals` are the
    names of what a cache can watch before the first block, the usual one first.
    """

    def __init__(
        self,
        context: LayerContext,
        *,
        num_blocks: int,
        changes_text: bool,
        signals: tuple[str, ...] = (INPUT_SIGNAL,),
    ) -> None:
        self.num_blocks = num_blocks
        self.changes_text = changes_text
        self.signals = signals
        self.tokens, self.adapters = context.tokens, context.adapters
        self._axes = (context.tokens.axis, context.parallel.tp)
        self._caches: Sequence[RowCache | None] | None = None

    @property
    def shares_features(self) -> bool:
        """Whether ranks add up features within a block."""
        return self._axes[1].size > 1

    @property
    def is_caching(self) -> bool:
        """Whether the present forward has rows with a cache: what it computes then depends on its data."""
        return self._caches is not None

    @property
    def is_plain(self) -> bool:
        """Whether the present forward's rows have neither caches nor adapters, so that shapes say all that it does."""
        return self._caches is None and self.adapters.uses is None

    @contextlib.contextmanager
    def using(self, caches: Sequence[RowCache | None]) -> Iterator[None]:
        """Forwards inside have these rows; None for a row without a cache."""
        before = self._caches
        self._caches = caches if any(cache is not None for cache in caches) else None
        try:
            yield
        finally:
            self._caches = before

    def run(
        self,
        streams: Streams,
        *runs: BlockRun,
        num_tokens: int,
        signal: Callable[[str, Tensor], Tensor],
    ) -> Tensor:
        """The image tokens [B, S, D] behind all blocks. Who calls should hold no stream itself: it would stay alive.

        `num_tokens` image tokens are dealt to the ranks. `signal` gives the signal of a name, [B, tokens, D], for the
        image tokens [B, S, D] in front of all blocks.
        """
        if self._caches is None:
            for run in runs:
                streams = run.entered(streams)
                for layer, block in enumerate(run.blocks):
                    streams = run.call(layer, block, streams, *run.given, **run.named)
            return streams[0][:, runs[-1].tokens]
        assert len(self._caches) == streams[0].shape[0], "one cache, or None, for each row"
        assert sum(len(run.blocks) for run in runs) == self.num_blocks, "all of the blocks are run"
        return _CachedForward(self, self._caches, streams, runs, num_tokens=num_tokens, signal=signal).run()

    def distances(self, pairs: Sequence[tuple[Tensor, Tensor]], *, num_tokens: int) -> list[float]:
        """mean |now - before| over mean |before| of each pair [tokens, D], over the tokens of all ranks.

        Every rank that computes the same row finds the same numbers, to the bit, and so decides alike.
        """
        share, held = self.tokens.share(num_tokens), self.tokens.num_held(num_tokens, num_tokens)
        sums = []
        for now, before in pairs:
            real = slice(held if now.shape[0] == share else None)  # without what is padding on the last rank
            then = before[real].float()
            sums.append(torch.stack(((now[real].float() - then).abs().sum(), then.abs().sum())))
        found = torch.stack(sums)
        for axis in self._axes:
            found = all_reduce(found, axis)
        return [_ratio(change, size) for change, size in found.tolist()]


def _ratio(change: float, size: float) -> float:
    if size > 0:
        return change / size
    return float("inf") if change > 0 else 0.0


class _CachedForward:
    """One forward in which some rows have a cache. `rows` are those that the streams hold at the moment."""

    def __init__(
        self,
        runner: BlockRunner,
        caches: Sequence[RowCache | None],
        streams: Streams,
        runs: Sequence[BlockRun],
        *,
        num_tokens: int,
        signal: Callable[[str, Tensor], Tensor],
    ) -> None:
        self.runner, self.runs, self.num_tokens = runner, runs, num_tokens
        self.caches = {row: cache for row, cache in enumerate(caches) if cache is not None}
        self.count = len(caches)
        self.streams, self.rows = streams, list(range(self.count))
        self.start = streams[0][:, runs[0].tokens]
        self.signals = {
            name: signal(name, self.start)
            for name in {cache.signal for cache in self.caches.values()}
            if name is not None
        }
        self.place, self.given = 0, runs[0]
        self.left = [(index, layer) for index, run in enumerate(runs) for layer in range(len(run.blocks))]
        self.opened: dict[int, tuple[Tensor, Tensor]] = {}  # of rows that are computed: signal, image tokens
        self.skipped: dict[int, Tensor] = {}  # of those that are not: the image tokens that come out

    def run(self) -> Tensor:
        """See BlockRunner."""
        num_blocks = len(self.left)
        ends = {row: num_blocks - cache.last_blocks for row, cache in self.caches.items()}
        gates = {row: cache.first_blocks for row, cache in self.caches.items()}
        passed = 0
        for stop in sorted({*ends.values(), *gates.values(), num_blocks}):
            self._pass(self.left[passed:stop])
            passed = stop
            if stop < num_blocks:
                self._return([row for row in self.skipped if ends[row] == stop])
            else:
                self._enter(len(self.runs) - 1)
            self._close([row for row in self.opened if ends[row] == stop])
            self._open([row for row in self.rows if gates.get(row) == stop])
        return self._image_of_all()

    def _image(self) -> Tensor:
        return self.streams[0][:, self.runs[self.place].tokens]

    def _pass(self, blocks: Sequence[tuple[int, int]]) -> None:
        if not self.rows:
            return
        with self.runner.adapters.only(self.rows):
            for index, layer in blocks:
                self._enter(index)
                run = self.given
                self.streams = run.call(layer, run.blocks[layer], self.streams, *run.given, **run.named)

    def _enter(self, index: int) -> None:
        """Go on to the run of this index."""
        while self.rows and self.place < index:
            self.place += 1
            self.streams = self.runs[self.place].entered(self.streams)
            self._give()

    def _give(self) -> None:
        """What the present run's blocks are given, for the rows that are there."""
        run = self.runs[self.place]
        if self.rows == list(range(self.count)):
            self.given = run
            return
        given, named = (rows_of(value, self.rows, self.count) for value in (run.given, dict(run.named)))
        self.given = BlockRun(
            blocks=run.blocks, given=given, named=named, enter=run.enter, tokens=run.tokens, call=run.call
        )

    def _open(self, rows: Sequence[int]) -> None:
        """Decide of these rows; those that skip leave."""
        if not rows:
            return
        image = self._image()
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for row in rows:
            name, own = self.caches[row].signal, image[self.rows.index(row)]
            found[row] = (own - self.start[row] if name is None else self.signals[name][row], own)
        pairs = {row: (found[row][0], before) for row in rows if (before := self.caches[row].before) is not None}
        measured = self.runner.distances(list(pairs.values()), num_tokens=self.num_tokens) if pairs else []
        distances = dict(zip(pairs, measured, strict=True))
        for row in rows:
            cache, (signal, own) = self.caches[row], found[row]
            if cache.decide(distances.get(row)):
                self.skipped[row] = own + cache.predicted()
                cache.keep(_alone(signal), None)
            else:
                self.opened[row] = (signal, own)
        self._hold([row for row in self.rows if row not in self.skipped])

    def _hold(self, rows: list[int]) -> None:
        """Go on with these of the rows that are there."""
        if rows == self.rows:
            return
        places = [self.rows.index(row) for row in rows]
        self.streams = tuple(stream[row_index(places, stream.device)] for stream in self.streams)
        self.rows = rows
        self._give()

    def _return(self, rows: Sequence[int]) -> None:
        """These rows, which skipped, pass the blocks that are left."""
        if not rows:
            return
        assert len(self.streams) == 1, "blocks at the end that run in any case are refused where text changes too"
        self.streams = (torch.cat((self.streams[0], torch.stack([self.skipped.pop(row) for row in rows]))),)
        self.rows = [*self.rows, *rows]
        self._give()

    def _close(self, rows: Sequence[int]) -> None:
        """Keep what the blocks added to these rows."""
        image = self._image()
        for row in rows:
            signal, before = self.opened.pop(row)
            self.caches[row].keep(_alone(signal), image[self.rows.index(row)] - before)

    def _image_of_all(self) -> Tensor:
        image = self._image()
        if self.rows == list(range(self.count)):
            return image
        places = {row: place for place, row in enumerate(self.rows)}
        return torch.stack(
            [self.skipped[row] if row in self.skipped else image[places[row]] for row in range(self.count)]
        )


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, so that it keeps nothing else alive."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def rows_of(value: Any, rows: Sequence[int], count: int) -> Any:
    """What belongs to these of `count` rows, wherever a tensor of `value` has rows; the rest stays."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or (value.shape[0] == 1 and count > 1):
            return value
        assert value.shape[0] % count == 0, f"{value.shape[0]} rows are none for each of {count}"
        return value.unflatten(0, (-1, count))[:, row_index(rows, value.device)].flatten(0, 1)
    if isinstance(value, PerRow):
        return PerRow(value[row] for row in rows)
    if isinstance(value, Mapping):
        return {name: rows_of(item, rows, count) for name, item in value.items()}
    if isinstance(value, tuple):
        items = (rows_of(item, rows, count) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
