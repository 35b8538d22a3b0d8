"""How kernels are chosen and compiled: what costs time at the start and saves it in each step."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.declare import arg


@dataclass(frozen=True, kw_only=True)
class SpeedArgs:
    """What a start may spend on faster steps."""

    enable_attention_backend_autotune: bool = arg(
        False,
        help="Time the exact attention kernels at the shapes that a warm-up request has, and remember the fastest in a "
        "table of this GPU, which later starts read; a request's kernels never change while it runs.",
        group="execution",
    )
    enable_gemm_autotune: bool = arg(
        True,
        help="On one GPU, time the algorithms of a large matrix product when its shape is first met, and remember the "
        "fastest in a table of this GPU, which later starts read; not with `deterministic`.",
        group="execution",
    )
    enable_torch_compile: bool = arg(
        False,
        help="Compile the transformer's repeated blocks with torch's compiler, once for each kind of block; the first "
        "request of a start waits for it, or for reading what an earlier start compiled.",
        group="execution",
    )

    enable_lane_overlap: bool = arg(
        False,
        help="On one GPU, encode texts and decode frames beside the denoising of other requests, in a stream of their "
        "own, where memory allows; not with weights on the host, nor while adapters are loaded.",
        group="execution",
    )

    @property
    def needs_warm_up(self) -> bool:
        """Whether something is measured or compiled with the first request, which should not be a client's."""
        return self.enable_attention_backend_autotune or self.enable_torch_compile
