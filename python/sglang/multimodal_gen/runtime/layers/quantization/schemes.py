"""How the weight of a linear layer becomes eight bits, and what its scales are.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
QUANTIZED_DTYPES = (FP8, torch.float8_e5m2, torch.int8)
"""What values of weights are stored in."""
# Of numbers with a scale: the whole range of the format is used.
LARGEST = {FP8: torch.finfo(FP8).max, torch.int8: 127.0}
SMALLEST_ROW = 1e-30
"""Rows of activations that are smaller become zeros: the reciprocals of their scales would be infinite."""
_DTYPES = {"fp8": FP8, "int8": torch.int8}


class QuantizedTensors(NamedTuple):
    """Values [O, I] in eight bits and scales in fp32, [O, 1], or [1, 1] for all rows: the weight is their product."""

    values: Tensor
    scales: Tensor

    @property
    def by_row(self) -> bool:
        """Whether each row has a scale of its own."""
        return self.scales.shape[0] > 1 or self.values.shape[0] == 1

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I], multiplied in fp32 and rounded once."""
        # Any value of eight bits is exact in each of the dtypes that models compute in.
        wide = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        return torch.mul(self.values.to(dtype), self.scales, out=wide)


@dataclass(frozen=True)
class Scheme:
    """fp8 (e4m3) or int8, with a scale for each output row or for the whole weight, by the largest of its numbers."""

    method: str
    granularity: str = "row"

    def __str__(self) -> str:
        return f"{self.method} with a scale for each {self.granularity}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return _DTYPES[self.method]

    def quantize(self, weight: Tensor) -> QuantizedTensors:
        """[O, I] of any floating dtype; computed in fp32, so that every device gives the same bits.

        Scales of weights that hold no number, or an infinite one, are not finite.
        """
        wide = weight.float()
        largest = wide.abs().amax(dim=1, keepdim=True) if self.granularity == "row" else wide.abs().amax().view(1, 1)
        return QuantizedTensors(*scaled(wide, largest, self.dtype))


def scaled(wide: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 numbers over scales that put `largest` at the end of the range: values and scales. Zeros have scale one."""
    limit = LARGEST[dtype]
    # Over a tensor: GPUs multiply with the reciprocal of a number, which rounds twice.
    scales = torch.where(largest == 0, 1.0, largest / torch.full_like(largest, limit))
    values = wide / scales
    if dtype == torch.int8:
        values.round_()
    # A quotient may exceed the range by the last bit, and a cast to fp8 would make that no number.
    return values.clamp_(-limit, limit).to(dtype), scales
