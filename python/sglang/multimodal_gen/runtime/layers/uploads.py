"""What the host knows, on its way to a device that is still at work: a plain copy would wait until that has ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, in order with what is computed there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def uploaded(values: Any, device: torch.device, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers, which may be nested, as a tensor on the device."""
    return sent(torch.tensor(values, dtype=dtype), device)
