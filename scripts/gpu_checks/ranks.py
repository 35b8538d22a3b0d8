"""Tiny checkpoints spread over the GPUs of this machine, against one GPU: what the test of layouts does on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_checks.report import Report
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.test.parallel_pool import CODINGS, FAMILIES, SHAPES, Pool
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, relative_error

# Convolutions of other sizes may take other algorithms, whose sums round differently.
_CODING_TOLERANCE = 1e-4


def check_ranks(report: Report, device: torch.device, num_gpus: int) -> None:
    """Every layout of two ranks up to `num_gpus`, each family; then each autoencoder on so many strips."""
    shapes = [shape for shape in SHAPES if shape.num_ranks <= num_gpus]
    pool = Pool(num_gpus)
    try:
        for name, family in FAMILIES.items():
            with tempfile.TemporaryDirectory() as directory:
                checkpoint, scratch = family.save(Path(directory, "checkpoint")), Path(directory)
                saved = pool.run(checkpoint, ReplicaShape(), family.wishes, scratch, device=device.type)
                alone = {key: saved[key] for key in saved.files if key.startswith("latents")}
                for shape in shapes:
                    with report.check(f"ranks: {name}, {shape}") as result:
                        found = pool.run(checkpoint, shape, family.wishes, scratch, device=device.type)
                        worst = _worst(found, alone)
                        result.expect(worst <= LATENT_TOLERANCE, f"latents {worst:.1e} from one GPU's", error=worst)
                if name in CODINGS:
                    _check_strips(report, pool, name, checkpoint, device)
    finally:
        pool.close()


def _check_strips(report: Report, pool: Pool, name: str, checkpoint: Path, device: torch.device) -> None:
    """Clips encoded and decoded by one GPU, and by each number of GPUs."""
    scratch, codings = checkpoint.parent, CODINGS[name]
    saved = pool.code(checkpoint, ReplicaShape(), codings, scratch, device=device.type)
    alone = {key: saved[key] for key in saved.files}
    for num_ranks in range(2, len(pool.ranks) + 1):
        with report.check(f"strips: {name}, {num_ranks} ranks") as result:
            found = pool.code(checkpoint, ReplicaShape(cfg=num_ranks), codings, scratch, device=device.type)
            worst = _worst(found, alone)
            result.expect(worst <= _CODING_TOLERANCE, f"latents and video {worst:.1e} from one GPU's", error=worst)


def _worst(found: Any, alone: dict[str, Any]) -> float:
    return max(relative_error(torch.from_numpy(found[key]), torch.from_numpy(values)) for key, values in alone.items())
