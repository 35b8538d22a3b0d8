"""On which device and in which precision a worker computes: `auto` resolved, with the reason for the start-up log."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Device and dtype of a pipeline, and the dtype of its autoencoder; `reasons` says how each was chosen."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    reasons: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The dtype as options name it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def place(execution: ExecutionArgs, *, local_rank: int = 0, num_gpus: int = 1) -> Placement:
    """The device with this number, of `num_gpus` that are wanted, and the dtype. Without a GPU every rank is on the
    CPU.

    Raises: InvalidValue when CUDA is asked for and there is none, or fewer GPUs than are wanted.
    """
    num_visible = torch.cuda.device_count() if execution.device != "cpu" else 0
    if execution.device == "cuda" and not num_visible:
        raise InvalidValue("device", "cuda", "cpu or auto; no CUDA device is visible")
    if 0 < num_visible < num_gpus:
        raise InvalidValue("num_gpus", num_gpus, f"at most {num_visible}, the CUDA devices that are visible")
    if 0 < num_visible <= local_rank:
        raise InvalidValue("gpu_ids", local_rank, f"0 to {num_visible - 1}, the CUDA devices that are visible")
    if num_visible:
        device, found = torch.device("cuda", local_rank), "a CUDA device is visible"
    else:
        device, found = torch.device("cpu"), "no CUDA device is visible"
    precision = execution.precision
    if precision == "auto":
        # On processors without native bf16 arithmetic it is 6 to 600 times slower than fp32.
        precision = "bf16" if device.type == "cuda" else "fp32"
    vae_precision = execution.vae_precision
    if vae_precision == "auto":
        vae_precision = "fp32" if precision == "fp16" else precision
    return Placement(
        device=device,
        dtype=DTYPES[precision],
        vae_dtype=DTYPES[vae_precision],
        reasons=(
            f"device {device}: {found if execution.device == 'auto' else 'asked for'}",
            f"precision {precision}: {f'default on {device.type}' if execution.precision == 'auto' else 'asked for'}",
            f"vae_precision {vae_precision}: "
            f"{f'default with {precision}' if execution.vae_precision == 'auto' else 'asked for'}",
        ),
    )
