"""What a model needs to build its layers, in one object handed down by the loader."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from sglang.multimodal_gen.configs.attention import AttentionOptions, AttentionRole, wish_for
from sglang.multimodal_gen.configs.encoder_dealing import Axis, EncoderDealing
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, SINGLE, ParallelContext, ProcessAxis
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.attention.dispatch import FixedKernel, KernelSelector, KernelSource
from sglang.multimodal_gen.runtime.layers.attention.kernels import TorchSDPA
from sglang.multimodal_gen.runtime.layers.attention.layouts import (
    LocalSequence,
    SequenceLayout,
    ShardedSequence,
)
from sglang.multimodal_gen.runtime.layers.attention.registry import KERNELS
from sglang.multimodal_gen.runtime.layers.attention.tabled import ChoiceMemory
from sglang.multimodal_gen.runtime.layers.attention.traits import DeviceFacts, LayerNeeds
from sglang.multimodal_gen.runtime.layers.lora import AdapterRows
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.layers.token_sharding import TokenSharding


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How one kind of attention is computed, in which precision."""

    source: KernelSource
    precision: str = "fp32"
    layout: SequenceLayout = field(default_factory=LocalSequence)

    @classmethod
    def torch(cls, role: AttentionRole) -> AttentionPlan:
        """Torch's attention, which runs everywhere, whatever the options say."""
        return cls(source=FixedKernel(role=role, fixed=TorchSDPA()))

    @classmethod
    def chosen(
        cls,
        role: AttentionRole,
        options: AttentionOptions,
        *,
        facts: DeviceFacts,
        precision: str,
        memory: ChoiceMemory | None = None,
    ) -> AttentionPlan:
        """The kernel that the options ask for, or the best one: by shape where the memory's table knows it.

        Raises: AttentionNotAvailable when device, precision or installation rule out what they ask for. What only the
            head size rules out is found when a layer is built.
        """
        source = KernelSelector(role=role, facts=facts, wish=wish_for(role, options), memory=memory)
        source.choose(LayerNeeds(precision=precision))
        return cls(source=source, precision=precision)

    def takes_mask(self, head_dim: int) -> bool:
        """Whether the kernel that serves heads of this size would take a mask as well."""
        needs = LayerNeeds(precision=self.precision, head_dim=head_dim)
        entry = KERNELS.get(self.source.usual_name(needs))
        return entry is not None and entry.traits.takes_mask

    def build(self, head_dim: int, *, mask: bool = False) -> Attention:
        """A layer with heads of that size, for calls with a mask when `mask` says so. Raises AttentionNotAvailable."""
        lse = self.layout.needs_lse and not mask
        needs = LayerNeeds(precision=self.precision, head_dim=head_dim, mask=mask, lse=lse)
        return Attention(head_dim, needs=needs, source=self.source, layout=self.layout)


@dataclass(frozen=True, kw_only=True)
class EncoderAxes:
    """The ranks to which a text encoder's attention heads, feed-forward features and vocabulary are dealt."""

    heads: ProcessAxis = ALONE
    features: ProcessAxis = ALONE
    vocabulary: ProcessAxis = ALONE

    @classmethod
    def of(cls, dealing: EncoderDealing, parallel: ParallelContext) -> EncoderAxes:
        """As decided, with this process's axes."""

        def axis(name: Axis | None) -> ProcessAxis:
            return ALONE if name is None else getattr(parallel, name)

        return cls(heads=axis(dealing.heads), features=axis(dealing.features), vocabulary=axis(dealing.vocabulary))


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Parallel axes and attention of one replica; the default is one process with torch's attention.

    Cross-attention has its own plan: text is short and whole on every rank, so it needs no exchange of tokens. `tokens`
    says how those of a sequence are dealt; the layout of self-attention reads it.
    `encoder` is the present text encoder's; each has its own.
    `frame_attention` is the autoencoders': one head as wide as their channels, often in fp32, which options leave be.
    `strips` says how the picture that they work on is dealt. `adapters` says which ones the rows of a forward have.
    """

    parallel: ParallelContext = SINGLE
    self_attention: AttentionPlan = field(default_factory=partial(AttentionPlan.torch, "self"))
    cross_attention: AttentionPlan = field(default_factory=partial(AttentionPlan.torch, "cross"))
    frame_attention: AttentionPlan = field(default_factory=partial(AttentionPlan.torch, "self"))
    tokens: TokenSharding = field(default_factory=TokenSharding)
    strips: StripSharding = field(default_factory=StripSharding)
    encoder: EncoderAxes = field(default_factory=EncoderAxes)
    adapters: AdapterRows = field(default_factory=AdapterRows)

    @classmethod
    def spread(
        cls, parallel: ParallelContext, *, self_attention: AttentionPlan, cross_attention: AttentionPlan
    ) -> LayerContext:
        """For the ranks of a replica; tokens are dealt along its sequence axis, pictures to all ranks."""
        tokens = TokenSharding(parallel.sequence)
        if parallel.sequence.size > 1:
            self_attention = replace(self_attention, layout=ShardedSequence(tokens, parallel))
        return cls(
            parallel=parallel,
            self_attention=self_attention,
            cross_attention=cross_attention,
            tokens=tokens,
            strips=StripSharding(parallel.world),
        )

    def for_whole_sequences(self) -> LayerContext:
        """For layers over tokens that every rank has, such as a text's before it is dealt."""
        plan = replace(self.self_attention, layout=LocalSequence())
        return replace(self, self_attention=plan, tokens=TokenSharding())
