"""Tiny checkpoints spread over the GPUs of this machine, text encoders too, against one GPU: what the test of layouts
does on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_checks.report import Report
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.test.parallel_case import FORWARD_TOLERANCE
from sglang.multimodal_gen.test.parallel_pool import CODINGS, FAMILIES, OTHER_ENCODERS, SHAPES, Family, Pool
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, relative_error

RANKED = (*FAMILIES, *OTHER_ENCODERS)
"""What is checked by name."""

_TEXTS = ("text", "negative")
# Convolutions of other sizes may take other algorithms, whose sums round differently.
_CODING_TOLERANCE = 1e-4


def check_ranks(report: Report, device: torch.device, num_gpus: int, names: Sequence[str] = RANKED) -> None:
    """Every layout of two ranks up to `num_gpus`, each family that is named; the text encoders that one layout is
    enough for; and each autoencoder on so many strips."""
    shapes = [shape for shape in SHAPES if shape.num_ranks <= num_gpus]
    pool = Pool(num_gpus)
    try:
        for families, layouts in ((FAMILIES, shapes), (OTHER_ENCODERS, shapes[:1])):
            for name in (name for name in families if name in names):
                _check_family(report, pool, name, families[name], layouts, device)
    finally:
        pool.close()


def _check_family(
    report: Report, pool: Pool, name: str, family: Family, shapes: Sequence[ReplicaShape], device: torch.device
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, scratch = family.save(Path(directory, "checkpoint")), Path(directory)
        [saved] = pool.run(checkpoint, ReplicaShape(), family, scratch, device=device.type)
        alone = {key: saved[key] for key in saved.files}
        for shape in shapes:
            with report.check(f"ranks: {name}, {shape}") as result:
                ranks = pool.run(checkpoint, shape, family, scratch, device=device.type)
                texts = _worst(ranks, alone, _TEXTS)
                predictions, latents = _worst(ranks, alone, ("predicted",)), _worst(ranks, alone, ("latents",))
                share = max(int(rank["encoder_bytes"]) for rank in ranks) / int(alone["encoder_bytes"])
                result.expect(
                    max(texts, predictions) <= FORWARD_TOLERANCE and latents <= LATENT_TOLERANCE and share < 1,
                    f"texts {texts:.1e}, predictions {predictions:.1e} and latents {latents:.1e} from one GPU's; "
                    f"{share:.0%} of the text encoders on each",
                    texts=texts,
                    predictions=predictions,
                    error=latents,
                    encoder_share=share,
                )
        if name in CODINGS:
            _check_strips(report, pool, name, checkpoint, device)


def _check_strips(report: Report, pool: Pool, name: str, checkpoint: Path, device: torch.device) -> None:
    """Clips encoded and decoded by one GPU, and by each number of GPUs."""
    scratch, codings = checkpoint.parent, CODINGS[name]
    saved = pool.code(checkpoint, ReplicaShape(), codings, scratch, device=device.type)
    alone = {key: saved[key] for key in saved.files}
    for num_ranks in range(2, len(pool.ranks) + 1):
        with report.check(f"strips: {name}, {num_ranks} ranks") as result:
            found = pool.code(checkpoint, ReplicaShape(cfg=num_ranks), codings, scratch, device=device.type)
            worst = _worst([found], alone, ("",))
            result.expect(worst <= _CODING_TOLERANCE, f"latents and video {worst:.1e} from one GPU's", error=worst)


def _worst(ranks: Sequence[Any], alone: Mapping[str, np.ndarray], kinds: tuple[str, ...]) -> float:
    """The largest relative error of any rank in arrays whose names begin so."""
    return max(
        relative_error(torch.from_numpy(rank[key]), torch.from_numpy(values))
        for rank in ranks
        for key, values in alone.items()
        if key.startswith(kinds)
    )
