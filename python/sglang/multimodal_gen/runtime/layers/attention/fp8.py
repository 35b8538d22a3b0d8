"""FlashAttention 3 on queries, keys and values in 8 bits (e4m3), one scale for each head of each sample.

Shapes: B batch, S query tokens, L key tokens, H heads, E head_dim.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.attention.third_party import FlashAttention3
from sglang.multimodal_gen.runtime.layers.attention.traits import KernelTraits

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Heads that are all zeros have no scale of their own; bf16 has this number and its inverse.
_SMALLEST_AMAX = 2.0**-60


def quantised_heads(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, H, E] -> the same in e4m3, and the factors [B, H] in fp32 that give it back.

    A factor is a power of two, the smallest with which the head's largest number can be said: dividing by it is exact
    in half precision, so that a number is rounded once. Nothing waits for the device.
    """
    largest = tensor.abs().amax(dim=(1, 3)).float().clamp_min(_SMALLEST_AMAX)
    descale = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST)))
    scaled = tensor * descale.reciprocal().to(tensor.dtype)[:, None, :, None]
    return scaled.to(torch.float8_e4m3fn), descale


class FlashAttention3FP8:
    """FlashAttention 3 in 8 bits: up to twice as many products a second, and not exact. Source: arXiv:2407.08608

    The function is `flash_attn_func` of the package of FlashAttention 3, which takes e4m3 with `q_descale`, `k_descale`
    and `v_descale` [B, H], and gives bf16. Head sizes are multiples of 16 then.
    """

    name: str = "fa3_fp8"
    package: ClassVar[str] = FlashAttention3.package
    traits: ClassVar[KernelTraits] = KernelTraits(
        precisions=("bf16",),
        device_types=("cuda",),
        min_capability=(9, 0),
        capability_majors=(9,),
        head_multiple=16,
        max_head_size=256,
        gives_lse=True,
        lossy=True,
    )
    _FACTORS = ("q_descale", "k_descale", "v_descale")

    def __init__(self) -> None:
        """Raises ImportError with a phrase that follows the kernel's name."""
        self._attend = FlashAttention3.function()
        accepted = inspect.signature(self._attend).parameters
        if missing := [factor for factor in self._FACTORS if factor not in accepted]:
            raise ImportError(f"is installed in a release of {self.package} without {missing[0]}, which it needs")
        self._with_lse = {FlashAttention3.lse_switch: True} if FlashAttention3.lse_switch in accepted else {}
        if torch.cuda.is_available():
            self._try_out()

    def _try_out(self) -> None:
        """Builds of the package may leave 8 bits out, which only a call tells."""
        few = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16, device="cuda")
        try:
            self(few, few, few, scale=1.0)
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise ImportError(f"is installed in a build that refuses 8 bits ({str(error).splitlines()[0]})") from error

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionKernel`."""
        result = self._attended(query, key, value, scale, {})
        return result[0] if isinstance(result, tuple) else result

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """See `LseKernel`."""
        out, lse, *_ = self._attended(query, key, value, scale, self._with_lse)
        assert lse is not None, f"this release of {self.package} gives no log-sum-exp"
        return out, lse

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, options: dict[str, bool]
    ) -> Tensor | tuple[Tensor, ...]:
        (query, of_query), (key, of_key), (value, of_value) = map(quantised_heads, (query, key, value))
        attended: Tensor | tuple[Tensor, ...] = self._attend(
            query, key, value, softmax_scale=scale, q_descale=of_query, k_descale=of_key, v_descale=of_value, **options
        )
        return attended
