"""Compare every native pipeline with diffusers and publish how far apart they are: writes docs/parity.md.

    python scripts/parity_table.py

runs the tests that compare whole pipelines on tiny random checkpoints, in fp32 and bf16, and notes what each measures.
"""

from __future__ import annotations

import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sglang.multimodal_gen.test.pipeline_parity import Measurement

_ROOT = Path(__file__).parent.parent
_TESTS = _ROOT / "python/sglang/multimodal_gen/test"
_PAGE = _ROOT / "docs/parity.md"


def table(measurements: list[Measurement]) -> str:
    """The page's table: one row for each pipeline class."""
    rows = ["| Pipeline | Comparisons | Latents, worst | Latents, median | Frames, worst | bf16 |", "|" + " --- |" * 6]
    for name in sorted({found.pipeline_class for found in measurements}):
        own = [found for found in measurements if found.pipeline_class == name]
        errors = [found.latent_error for found in own if found.latent_error is not None]
        frames = [found.frame_difference for found in own if found.frame_difference is not None]
        ratios = [found.bf16_ratio for found in own if found.bf16_ratio is not None]
        rows.append(
            f"| `{name}` | {len(errors)} | {max(errors):.1e} | {statistics.median(errors):.1e} | {max(frames)}/255 | "
            f"{f'{max(ratios):.2f}' if ratios else '–'} |"
        )
    return "\n".join(rows)


def page(measurements: list[Measurement], *, latent_tolerance: float, bf16_ratio: float) -> str:
    """The whole page."""
    torch_version = version("torch").partition("+")[0]
    return f"""# Parity

<!-- Written by scripts/parity_table.py. Run that, do not edit this page. -->

Each native pipeline is compared with the diffusers pipeline of the same class: tiny random checkpoints of several
shapes, every parameter redrawn, the same seed, fp32 on a CPU. *Latents* is the norm of the difference of the final
latents over the norm of the reference's (accepted: {latent_tolerance:.0e}), *frames* the largest difference of a pixel
(accepted: 1/255), *bf16* our error in bf16 against fp32 over diffusers' own error in bf16 (accepted: {bf16_ratio}). The
comparisons cover sizes, lengths of prompt and clip, guidance, samplers, pictures and masks; the same tests then run
requests in company and ask for the same latents.

{table(measurements)}

Made with `python scripts/parity_table.py`, torch {torch_version}, diffusers {version("diffusers")}.
"""


def main() -> int:
    """Compare, then write the page; returns 1 when a comparison fails."""
    files = [str(path) for path in sorted(_TESTS.glob("test_*_pipeline.py"))]
    status = pytest.main(["-q", "-p", "no:cacheprovider", *files])
    if status != 0:
        return 1
    # Late: what pytest is to look into must not be loaded before it.
    from sglang.multimodal_gen.test.pipeline_parity import BF16_RATIO, LATENT_TOLERANCE, MEASUREMENTS

    text = page(MEASUREMENTS, latent_tolerance=LATENT_TOLERANCE, bf16_ratio=BF16_RATIO)
    _PAGE.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(MEASUREMENTS)} measurements in {_PAGE.relative_to(_ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
