"""Tiny checkpoints spread over the GPUs of this machine, against one GPU: what the test of layouts does on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from gpu_checks.report import Report
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.test.parallel_pool import FAMILIES, SHAPES, Pool
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, relative_error


def check_ranks(report: Report, device: torch.device, num_gpus: int) -> None:
    """Every layout of two ranks up to `num_gpus`, each family."""
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
                        worst = max(
                            relative_error(torch.from_numpy(found[key]), torch.from_numpy(latents))
                            for key, latents in alone.items()
                        )
                        result.expect(worst <= LATENT_TOLERANCE, f"latents {worst:.1e} from one GPU's", error=worst)
    finally:
        pool.close()
