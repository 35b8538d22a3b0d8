"""The order of memory of an autoencoder on GPUs: channels last, of activations and of convolution kernels.

There convolutions are fastest so, and norms run along contiguous memory. On the CPU everything is as torch makes it, of
whose norms over groups only those in that order are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def settle_convolutions(module: nn.Module) -> None:
    """On GPUs, let the kernels of a module's convolutions lie in memory as activations do. Elsewhere they stay."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.weight.data = in_order(layer.weight.data)


def in_order(frames: Tensor) -> Tensor:
    """Pictures [B, C, H, W] or clips [B, C, T, H, W], or kernels, in the order of their device."""
    if not frames.is_cuda:
        return frames
    return frames.contiguous(memory_format=torch.channels_last if frames.ndim == 4 else torch.channels_last_3d)
