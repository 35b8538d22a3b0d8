"""Which attention kernel a worker uses: the one asked for, or the best for the device, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel, TorchReference, TorchSDPA

KERNELS: dict[str, Callable[[], AttentionKernel]] = {
    TorchSDPA.name: TorchSDPA,
    TorchReference.name: TorchReference,
}


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """A kernel and the sentence for the start-up log that says why it was taken."""

    kernel: AttentionKernel
    reason: str


def select_kernel(name: str | None, *, device_type: str = "cpu") -> KernelChoice:
    """The kernel called `name`, or with None the best one for the device type.

    Raises:
        InvalidRequest: no kernel has that name.
    """
    if name is None:
        reason = f"the fastest kernel available on {device_type}"
        return KernelChoice(kernel=TorchSDPA(), reason=f"{TorchSDPA.name}: {reason}")
    if name not in KERNELS:
        raise InvalidRequest(
            f"attention_backend is {name!r}; available: {', '.join(KERNELS)}", param="attention_backend"
        )
    return KernelChoice(kernel=KERNELS[name](), reason=f"{name}: asked for")
