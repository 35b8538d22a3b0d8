"""How much memory is free, and how much a unit of work will take: estimates from shapes, before anything runs.

The factors count the tensors alive at the peak of a forward without gradients. Measured peaks on the CPU in fp32 were
81 to 98 % of the estimate for transformers and 56 to 95 % for decoders of clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from sglang.multimodal_gen.errors import ModelTooLarge
from sglang.multimodal_gen.runtime.layers.forward_graphs import cuda_capture
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding

# Of the free memory, what one unit may plan with; the rest is for allocator waste and for other requests.
USABLE_SHARE = 0.9
# Decoding shares the device with the denoising of other requests.
_DECODER_SHARE = 0.5
# A longer chunk of a clip is no faster, and frames leave later: docs/performance.md.
_ENOUGH_FOR_A_CHUNK = 5 << 30
_FP32_BYTES = 4
_SIGNS = ("can't allocate memory", "could not create a primitive", "could not create a memory object")


# Of a GPU, what a process takes beside what torch allocates.
_CONTEXT_BYTES = 3 << 28


def limit_memory(device: torch.device, gib: float | None) -> None:
    """This process shall take no more of a GPU; what it takes outside of torch is counted too. On the CPU nothing."""
    if device.type != "cuda" or gib is None:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = max(0.0, gib * (1 << 30) - _CONTEXT_BYTES)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device; on the CPU within the limits of the container."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        own = max(0, reserved - torch.cuda.memory_allocated(device) - cuda_capture.held_bytes)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free, max(0, allowed - reserved)) + own
    available = _proc_bytes("meminfo", "MemAvailable")
    limit = _cgroup_headroom()
    return available if limit is None else min(available, limit)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. On the CPU torch has no class of its own for that, and oneDNN names
    only what it could not make."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def model_too_large(device: torch.device) -> ModelTooLarge:
    """What to say when memory ran out while weights were loaded; this process still holds them."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
    else:
        free, total, own = free_bytes(device), _proc_bytes("meminfo", "MemTotal"), _proc_bytes("self/status", "VmRSS")
    return ModelTooLarge(str(device), total_bytes=total, free_bytes=free, own_bytes=own)


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that the device failed: every later call of this process would fail as well."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _proc_bytes(file: str, field: str) -> int:
    for line in Path("/proc", file).read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"/proc/{file} has no {field}")


def _cgroup_headroom() -> int | None:
    """What a container's memory limit leaves; None without a limit. Cached file pages can be given back, so count."""
    for root, limit_name, used_name, cache_name in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (root / limit_name).read_text(encoding="ascii").strip()
            used = int((root / used_name).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:
            continue
        if limit.isdigit():
            return max(0, int(limit) - used + int(stat.get(cache_name, 0)))
    return None


def longest_chunk(lengths: Sequence[int], peak_bytes: Callable[[int], int], free_bytes: float) -> int | None:
    """How many latent frames of a clip to decode at a time, of these lengths, of which each takes `peak_bytes`: as many
    as fit and make it faster; None if not even the fewest fit."""
    enough = min(_DECODER_SHARE * free_bytes, max(_ENOUGH_FOR_A_CHUNK, peak_bytes(min(lengths))))
    return max((length for length in lengths if peak_bytes(length) <= enough), default=None)


@dataclass(frozen=True, kw_only=True)
class TransformerMemory:
    """Activations of a transformer; attention is assumed not to write its scores unless `score_heads` says so."""

    hidden_size: int
    ffn_dim: int
    element_size: int
    score_heads: int = 0

    def row_bytes(self, num_tokens: int, num_text_tokens: int = 0) -> int:
        """Peak of one forward of one row: residual stream and its fp32 norms, then attention or MLP."""
        residual = num_tokens * self.hidden_size * (4 * _FP32_BYTES + 2 * self.element_size)
        attention = (5 * num_tokens + 3 * num_text_tokens) * self.hidden_size * self.element_size
        mlp = 3 * num_tokens * self.ffn_dim * self.element_size
        scores = 2 * self.score_heads * num_tokens**2 * _FP32_BYTES
        return residual + max(attention + scores, mlp)


@dataclass(frozen=True, kw_only=True)
class DecoderMemory:
    """Activations of a convolutional decoder at its last and largest resolution.

    `channels` are those of the widest layer there, `patch_size` pixels are one cell. `carried_channels`: for one cell,
    the frames that its causal layers remember between chunks, times their channels. `activations` of those widest
    layers are alive at the peak.
    """

    channels: int
    carried_channels: int
    patch_size: int
    element_size: int
    activations: int = 4

    @classmethod
    def of_pictures(cls, widths: Sequence[int], element_size: int) -> Self:
        """For a decoder with these channels at each resolution: at full size its last stage gets the second width, and
        narrows it to the first."""
        return cls(channels=max(widths[:2]), carried_channels=0, patch_size=1, element_size=element_size)

    def carried_bytes(self, height: int, width: int) -> int:
        """What is remembered between the chunks of a clip."""
        return (height // self.patch_size) * (width // self.patch_size) * self.carried_channels * self.element_size

    def chunk_bytes(self, num_frames: int, height: int, width: int) -> int:
        """Peak for video frames of height x width pixels: activations, and the pixels as fp32, fp32 and uint8."""
        cells = num_frames * (height // self.patch_size) * (width // self.patch_size)
        pixel_bytes = num_frames * height * width * 3 * (2 * _FP32_BYTES + 1)
        return self.activations * cells * self.channels * self.element_size + pixel_bytes

    def encoding_bytes(self, strips: StripSharding, num_frames: int, height: int, width: int, *, ratio: int) -> int:
        """Peak of encoding, which is decoding in reverse. A rank with a strip, of latent cells of `ratio` pixels along
        each side, has the whole clip beside it."""
        held = strips.largest(height, width, ratio=ratio)
        clip = 0 if held == (height, width) else num_frames * height * width * 3 * _FP32_BYTES
        return self.chunk_bytes(num_frames, *held) + clip
