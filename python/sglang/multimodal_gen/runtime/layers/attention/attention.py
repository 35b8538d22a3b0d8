"""Attention = a kernel (how one device computes) inside a sequence layout (who holds which tokens)."""

from __future__ import annotations

from torch import Tensor, nn

from sglang.multimodal_gen.configs.cost_model import MOST_PACKED_TOKENS
from sglang.multimodal_gen.runtime.layers.attention.dispatch import KernelSource
from sglang.multimodal_gen.runtime.layers.attention.layouts import Sent, SequenceLayout, TokenExchange, arrived
from sglang.multimodal_gen.runtime.layers.attention.traits import LayerNeeds


class Attention(nn.Module):
    """Scaled dot-product attention without parameters. Shapes: B batch, S tokens, P ranks, H heads, E head_dim.

    `kernel` may be exchanged between forwards: see `AttentionSwitch`.
    """

    def __init__(self, head_dim: int, *, needs: LayerNeeds, source: KernelSource, layout: SequenceLayout) -> None:
        """Raises AttentionNotAvailable when the kernel that the options ask for cannot serve the layer."""
        super().__init__()
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.needs = needs
        self.source = source
        self.kernel = source.kernel(needs)
        self.layout = layout

    def send(self, tensor: Tensor) -> Sent:
        """Begin to bring queries, keys or values to the ranks that need them; what is computed next overlaps."""
        return self.layout.send(tensor)

    def send_packed(self, packed: Tensor) -> tuple[Sent, Sent, Sent]:
        """The same for queries, keys and values [B, S/P, 3, H, E] at once."""
        return self.layout.send_packed(packed)

    def sends_packed(self, tokens: Tensor) -> bool:
        """Whether that is faster for [B, S/P, ...]: where an exchange is shorter than the host takes to begin it."""
        return self.layout.overlaps and tokens.shape[0] * tokens.shape[1] <= MOST_PACKED_TOKENS

    def forward(self, query: Sent, key: Sent, value: Sent, mask: Tensor | None = None) -> Tensor:
        """[B, S/P, H, E], [B, L/P, H, E], [B, L/P, H, E] on each of P ranks, each as `send` gave it -> [B, S/P, H, E].

        `mask`, for layers built for one: [B or 1, 1, 1, L] of all keys, as `kernels` describes it.
        """
        return arrived(self.begin(query, key, value, mask))

    def begin(self, query: Sent, key: Sent, value: Sent, mask: Tensor | None = None) -> Tensor | TokenExchange:
        """The same, maybe still under way, for who has something to compute meanwhile; `arrived` waits for it."""
        assert mask is None or self.needs.mask, "a layer that is given masks is built with mask=True"
        return self.layout.attend(self.kernel, query, key, value, mask, scale=self.scale)
