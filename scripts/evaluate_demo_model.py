"""Generates the held-out captions with the engine and checks every clip.

    python scripts/evaluate_demo_model.py --report-dir build/evaluation

Prints how often colour, shape and motion came out as asked for; the folder gets a report and a picture of all clips.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from demo_model.evaluation import cases, contact_sheet, evaluate, summary, write_png, write_report
from sglang import DiffGenerator


def main() -> None:
    """Generate, check, print."""
    arguments = _parse()
    chosen = [case for case in cases() if not arguments.kind or case.kind in arguments.kind]
    options = json.loads(arguments.sampling)
    with DiffGenerator.from_pretrained(arguments.model_path) as generator:

        async def generate_one(caption: str, seed: int, num_frames: int) -> np.ndarray:
            result = await generator.generate_async(
                {"prompt": caption, "seed": seed, "num_frames": num_frames, "return_frames": True, **options}
            )
            assert not isinstance(result, list) and result.frames is not None, "asked for one output with its frames"
            return result.frames

        async def generate_all(captions: Sequence[str], seeds: Sequence[int], num_frames: int) -> list[np.ndarray]:
            return await asyncio.gather(*map(generate_one, captions, seeds, [num_frames] * len(captions)))

        results, clips = evaluate(lambda *asked: asyncio.run(generate_all(*asked)), chosen)
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    write_report(arguments.report_dir / "evaluation.json", results)
    write_png(arguments.report_dir / "evaluation.png", contact_sheet([clip for clip in clips if len(clip) > 1]))
    for kind, row in summary(results).items():
        print(kind, ", ".join(f"{name} {value:.3g}" for name, value in row.items()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model-path", default="demo")
    add("--kind", choices=("one", "two", "image"), nargs="*", help="only cases of these kinds")
    add("--sampling", default="{}", metavar="JSON", help="other sampling parameters, as a JSON object")
    add("--report-dir", type=Path, default=Path("build/evaluation"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
