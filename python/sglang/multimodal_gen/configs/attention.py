"""What options and requests call the attention kernels and their roles; the kernels are in runtime/layers/attention."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

AttentionRole = Literal["self", "cross"]
ATTENTION_ROLES: tuple[AttentionRole, ...] = ("self", "cross")
ATTENTION_BACKENDS = (
    "torch_sdpa",
    "torch_cudnn_sdpa",
    "fa",
    "fa2",
    "fa3",
    "fa4",
    "fa3_fp8",
    "sage_attn",
    "torch_reference",
)


class AttentionOptions(Protocol):
    """What asks for kernels: the engine's options or one request's parameters."""

    @property
    def attention_backend(self) -> str | None: ...

    @property
    def self_attention_backend(self) -> str | None: ...

    @property
    def cross_attention_backend(self) -> str | None: ...


class Wish(NamedTuple):
    """A kernel that was asked for, and the parameter that asked."""

    param: str
    backend: str


def wish_for(role: AttentionRole, options: AttentionOptions) -> Wish | None:
    """What the role's own parameter asks for, else what `attention_backend` asks for, else None."""
    own = options.self_attention_backend if role == "self" else options.cross_attention_backend
    if own is not None:
        return Wish(f"{role}_attention_backend", own)
    return None if options.attention_backend is None else Wish("attention_backend", options.attention_backend)
