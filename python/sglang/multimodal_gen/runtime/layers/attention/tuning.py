"""Times the attention kernels of a device at one shape, in turns.

Shapes: B batch, S query tokens, L key tokens, H heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.attention.choice_table import AttentionShape, TableEntry, ranked
from sglang.multimodal_gen.runtime.layers.attention.dispatch import choose_kernel, obstacle
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel, MaskedKernel, TorchReference
from sglang.multimodal_gen.runtime.layers.attention.registry import KERNELS, load_kernel
from sglang.multimodal_gen.runtime.layers.attention.tabled import SeenShape
from sglang.multimodal_gen.runtime.layers.attention.traits import DeviceFacts, LayerNeeds
from sglang.multimodal_gen.runtime.layers.device_timing import time_in_turns, timer_for

_SEED = 0
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHECKED_QUERIES = 256
_MOST_LOGIT_BYTES = 1 << 30
"""Above which the reference, which writes all logits out, is not timed."""


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Queries [B, S, H, E], keys and values [B, L, H, E], a mask or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    @classmethod
    def drawn(
        cls, precision: str, size: Sequence[int], *, num_keys: int, masked: bool, device: torch.device
    ) -> AttentionInputs:
        """Normal numbers for a size [B, S, H, E]; the mask hides the last eighth of the keys."""
        generator = torch.Generator(device).manual_seed(_SEED)
        batch, queries, heads, width = size

        def drawn(tokens: int) -> Tensor:
            dtype = _DTYPES[precision]
            return torch.randn(batch, tokens, heads, width, generator=generator, device=device, dtype=dtype)

        mask = None
        if masked:
            mask = (torch.arange(num_keys, device=device) < max(1, num_keys - num_keys // 8))[None, None, None]
        return cls(query=drawn(queries), key=drawn(num_keys), value=drawn(num_keys), mask=mask)

    @property
    def shape(self) -> AttentionShape:
        """Which entry of a table this is."""
        return AttentionShape.of(self.query, self.key, masked=self.mask is not None)

    @property
    def flops(self) -> int:
        """Of both products, 2 for a multiply-add; masked keys count."""
        batch, queries, heads, width = self.query.shape
        return 4 * batch * queries * self.key.shape[1] * heads * width

    def attended_by(self, kernel: AttentionKernel) -> Tensor:
        """[B, S, H, E]."""
        scale = self.query.shape[3] ** -0.5
        if self.mask is None:
            return kernel(self.query, self.key, self.value, scale=scale)
        return cast(MaskedKernel, kernel)(self.query, self.key, self.value, scale=scale, mask=self.mask)

    def error_of(self, attended: Tensor) -> float:
        """The norm of the difference from attention in fp32 over its norm, of some hundred queries of all heads."""
        step = max(1, self.query.shape[1] // _CHECKED_QUERIES)
        query, key, value = (part.float() for part in (self.query[:, ::step], self.key, self.value))
        exact = TorchReference()(query, key, value, scale=self.query.shape[3] ** -0.5, mask=self.mask)
        return ((attended[:, ::step].float() - exact).norm() / exact.norm()).item()


def timed_kernels(
    inputs: AttentionInputs,
    names: Sequence[str],
    *,
    device: torch.device,
    warmup_runs: int,
    repeats: int,
    min_seconds: float = 0.0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each call by kernel, taken in turns; and of kernels that do not run what stopped them."""
    sides: dict[str, Callable[[], Tensor]] = {}
    problems: dict[str, str] = {}
    for name in names:
        batch, queries, heads, _ = inputs.query.shape
        if name == TorchReference.name and 4 * batch * queries * heads * inputs.key.shape[1] > _MOST_LOGIT_BYTES:
            problems[name] = "its logits would take more than a GiB"
            continue
        run = partial(inputs.attended_by, load_kernel(name))
        try:
            run()
        except RuntimeError as error:  # a kernel may refuse a shape that its traits allow, or run out of memory
            problems[name] = next(iter(str(error).splitlines()), type(error).__name__)
            continue
        sides[name] = run
    samples = time_in_turns(
        list(sides.values()), timer_for(device), warmup_runs=warmup_runs, repeats=repeats, min_seconds=min_seconds
    ) if sides else []  # fmt: skip
    return dict(zip(sides, samples, strict=True)), problems


def exact_kernels(needs: LayerNeeds, facts: DeviceFacts) -> list[str]:
    """Those that may be chosen without being asked for, apart from the reference."""
    return [
        name
        for name, entry in KERNELS.items()
        if not entry.traits.lossy and name != TorchReference.name and obstacle(name, facts, needs) is None
    ]


def entry_of(shape: AttentionShape, medians: Mapping[str, float], facts: DeviceFacts) -> TableEntry | None:
    """What the table should say of these times; None of none."""
    exact = {name: seconds for name, seconds in medians.items() if not KERNELS[name].traits.lossy}
    if not exact:
        return None
    usual = choose_kernel(LayerNeeds(precision=shape.precision, head_dim=shape.head_dim, mask=shape.masked), facts)
    return TableEntry(shape=shape, kernels=ranked(exact, usual.name), seconds=exact)


def tuned_entry(seen: SeenShape, facts: DeviceFacts, device: torch.device) -> TableEntry | None:
    """Measure what a layer was called with; None where nothing runs or there is nothing to choose from."""
    names = exact_kernels(seen.needs, facts)
    if len(names) < 2:
        return None
    shape = seen.shape
    inputs = AttentionInputs.drawn(
        shape.precision,
        (seen.batch_size, seen.num_queries, shape.num_heads, shape.head_dim),
        num_keys=seen.num_keys,
        masked=shape.masked,
        device=device,
    )
    samples, _ = timed_kernels(inputs, names, device=device, warmup_runs=2, repeats=7)
    medians = {name: sorted(own)[len(own) // 2] for name, own in samples.items()}
    return entry_of(shape, medians, facts)
