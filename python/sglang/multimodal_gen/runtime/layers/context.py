"""What a model needs to build its layers, in one object handed down by the loader."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE, ParallelContext
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel, TorchSDPA
from sglang.multimodal_gen.runtime.layers.attention.layouts import LocalSequence, SequenceLayout


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How one kind of attention is computed."""

    kernel: AttentionKernel = field(default_factory=TorchSDPA)
    layout: SequenceLayout = field(default_factory=LocalSequence)

    def build(self, head_dim: int) -> Attention:
        return Attention(head_dim, kernel=self.kernel, layout=self.layout)


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Parallel axes and attention of one replica; the default is one process with torch's attention.

    Cross-attention has its own plan: text is short and whole on every rank, so it needs no exchange of tokens.
    """

    parallel: ParallelContext = SINGLE
    self_attention: AttentionPlan = field(default_factory=AttentionPlan)
    cross_attention: AttentionPlan = field(default_factory=AttentionPlan)
