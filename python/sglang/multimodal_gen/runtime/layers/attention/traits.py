"""What attention kernels can do, what a layer needs, and what a device is, all as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """All of a device that the choice of a kernel depends on.

    `capability` is the CUDA compute capability. `problem_of` says why a kernel that suits the device does not load, as
    a phrase that follows its name, or None when it loads; it is asked only of kernels that the choice comes to.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    problem_of: Callable[[str], str | None]

    def __str__(self) -> str:
        return self.device_type if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True, kw_only=True)
class LayerNeeds:
    """What a layer asks of its kernel; `head_dim` is None while it is not known yet."""

    precision: str
    head_dim: int | None = None
    mask: bool = False
    lse: bool = False

    def __str__(self) -> str:
        parts = [self.precision]
        if self.head_dim is not None:
            parts.append(f"head size {self.head_dim}")
        parts += [word for needed, word in ((self.mask, "masks"), (self.lse, "log-sum-exp")) if needed]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class KernelTraits:
    """What one kernel can do.

    `capability_majors` empty: every GPU from `min_capability` on. `head_sizes` empty: all multiples of `head_multiple`
    up to `max_head_size`. `lossy`: computes in 8 bits or otherwise differs from the formula by more than rounding.
    """

    precisions: tuple[str, ...] = PRECISIONS
    device_types: tuple[str, ...] = ("cpu", "cuda")
    min_capability: tuple[int, int] = (0, 0)
    capability_majors: tuple[int, ...] = ()
    head_sizes: tuple[int, ...] = ()
    head_multiple: int = 1
    max_head_size: int | None = None
    takes_mask: bool = False
    gives_lse: bool = False
    lossy: bool = False

    def device_obstacle(self, device_type: str, capability: tuple[int, int] | None) -> str | None:
        """Why the kernel cannot run on such a device, as a phrase that follows its name; None when it can."""
        if device_type not in self.device_types:
            return f"needs a {' or '.join(self.device_types).upper()} device and this one is {device_type}"
        if capability is None:
            return None
        found = f"{capability[0]}.{capability[1]}"
        if capability < self.min_capability:
            least = ".".join(map(str, self.min_capability))
            return f"needs compute capability {least} or newer and this GPU has {found}"
        if self.capability_majors and capability[0] not in self.capability_majors:
            majors = _either([f"{major}.x" for major in self.capability_majors])
            return f"needs compute capability {majors} and this GPU has {found}"
        return None

    def needs_obstacle(self, needs: LayerNeeds) -> str | None:
        """Why the kernel cannot serve such a layer, as a phrase that follows its name; None when it can."""
        if needs.precision not in self.precisions:
            return f"takes {_either(self.precisions)}, not {needs.precision}"
        if needs.head_dim is not None and not self._takes_head_size(needs.head_dim):
            return f"takes head sizes {self.head_sizes_in_words()}, not {needs.head_dim}"
        if needs.mask and not self.takes_mask:
            return "takes no mask"
        if needs.lse and not self.gives_lse:
            return "gives no log-sum-exp"
        return None

    def _takes_head_size(self, size: int) -> bool:
        if self.head_sizes:
            return size in self.head_sizes
        return size % self.head_multiple == 0 and (self.max_head_size is None or size <= self.max_head_size)

    def head_sizes_in_words(self) -> str:
        """Such as `64, 96 or 128`."""
        if self.head_sizes:
            return _either([str(size) for size in self.head_sizes])
        step = "any" if self.head_multiple == 1 else f"in multiples of {self.head_multiple}"
        return step if self.max_head_size is None else f"{step} up to {self.max_head_size}"

    def device_in_words(self) -> str:
        """Such as `cuda, compute capability 9.x`."""
        devices = ", ".join(self.device_types)
        if self.capability_majors:
            return f"{devices}, compute capability {_either([f'{major}.x' for major in self.capability_majors])}"
        if self.min_capability == (0, 0):
            return devices
        return f"{devices}, compute capability {'.'.join(map(str, self.min_capability))} or newer"


def _either(words: tuple[str, ...] | list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
