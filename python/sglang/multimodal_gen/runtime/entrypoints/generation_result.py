"""`GenerationResult`: what one output of `DiffGenerator` is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.runtime.postprocess.object_store import StoredFile

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One output. `frames` uint8 [T, H, W, 3] with `return_frames`, `latents` float32 [C, T, H, W] with
    `return_latents`; times are seconds. Paths are absolute, or None where nothing of the kind was saved.
    `stored` tells where the `output`, the `thumbnail` and the `contact_sheet` were uploaded, where results are: the key
    in the bucket, and a presigned URL that anybody can use until it expires.

    `metrics` holds `queue_seconds`, `stage_seconds` (by stage; `encode_file` runs beside the others, `upload` is part
    of the waiting), `step_ms` of each denoising step with `step_batch_sizes` (requests that shared it),
    `waiting_seconds` (others' units, the end of the file, the upload), `stage_peak_mb` (by stage), `attempts`,
    `warmup_excluded` (its size had been warmed up before), `computed_steps` (the others were taken from a step cache),
    of a request with a step cache `computed_forwards` and `num_forwards` (guidance makes several a step) and, of one
    that was profiled, `profile_path`.
    `generation_time` is the sum of the stages but `encode_file` and `upload`, and of the waiting.
    """

    prompt: str
    prompt_index: int
    output_index: int
    seed: int
    size: tuple[int, int, int]
    output_file_path: str | None
    generation_time: float
    peak_memory_mb: float
    thumbnail_path: str | None = None
    contact_sheet_path: str | None = None
    stored: Mapping[str, StoredFile] = field(default_factory=dict)
    frames: np.ndarray | None = None
    latents: np.ndarray | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
