"""Measures step caches on the embedded model: forwards computed, time, PSNR against none, the checker's score.

    python scripts/step_cache_table.py
    python scripts/step_cache_table.py --kind image --setting 'mine={"enable_teacache": true}'

Each setting makes the same held-out captions one after another, with the same seeds. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demo_model.checker import judge, observe
from demo_model.evaluation import Case, cases
from sglang import DiffGenerator

_PLAIN = "none"
_FIRST_BLOCK: dict[str, Any] = {"enable_cache_dit": True}
_SETTINGS: dict[str, dict[str, Any]] = {
    _PLAIN: {},
    "first block, 0.06": _FIRST_BLOCK | {"cache_dit_params": {"residual_diff_threshold": 0.06}},
    "first block, 0.12": _FIRST_BLOCK | {"cache_dit_params": {"residual_diff_threshold": 0.12}},
    "first block, 0.24 (default)": _FIRST_BLOCK,
    "first block, 0.12, Taylor": _FIRST_BLOCK
    | {"cache_dit_params": {"residual_diff_threshold": 0.12, "enable_taylorseer": True}},
    "first block, 0.24, Taylor": _FIRST_BLOCK | {"cache_dit_params": {"enable_taylorseer": True}},
    "TeaCache, 0.1": {"enable_teacache": True, "teacache_params": {"teacache_thresh": 0.1}},
    "TeaCache, 0.2 (default)": {"enable_teacache": True},
    "TeaCache, 0.4": {"enable_teacache": True, "teacache_params": {"teacache_thresh": 0.4}},
}
_HEADER = ("step cache", "steps computed", "forwards computed", "denoising", "PSNR", "right")


@dataclass(frozen=True, kw_only=True)
class Made:
    """One clip: uint8 [T, H, W, 3], what it took, and whether the checker finds what was asked for."""

    frames: np.ndarray
    metrics: dict[str, Any]
    right: bool


def main() -> None:
    """Generate, compare, print."""
    arguments = _parse()
    chosen = [case for case in cases() if not arguments.kind or case.kind in arguments.kind][:: arguments.every]
    settings = {_PLAIN: {}} | dict(arguments.setting or _SETTINGS)
    print(f"{len(chosen)} captions; steps, forwards and PSNR (dB) as means, denoising as a median\n")
    print("| " + " | ".join(_HEADER) + " |\n" + "| --- " * len(_HEADER) + "|", flush=True)
    plain: list[Made] = []
    with DiffGenerator.from_pretrained(arguments.model_path) as generator:
        _make(generator, chosen[0], {"num_inference_steps": 2})  # what only the first request takes
        for name, wish in settings.items():
            clips = [_make(generator, case, wish) for case in chosen]
            plain = plain or clips
            print("| " + " | ".join((name, *_row(clips, plain))) + " |", flush=True)


def _make(generator: DiffGenerator, case: Case, wish: dict[str, Any]) -> Made:
    asked = {"prompt": case.caption, "seed": case.seed, "num_frames": case.num_frames, "return_frames": True}
    result = generator.generate(asked | wish)
    assert not isinstance(result, list) and result.frames is not None, "asked for one output with its frames"
    right = judge(observe(result.frames), case.wanted).right
    return Made(frames=result.frames, metrics=dict(result.metrics), right=right)


def _row(clips: Sequence[Made], plain: Sequence[Made]) -> tuple[str, ...]:
    computed = np.mean([clip.metrics["computed_steps"] for clip in clips])
    steps = np.mean([len(clip.metrics["step_ms"]) for clip in clips])
    shares = [_forward_share(clip) for clip in clips]
    seconds = np.median([sum(clip.metrics["step_ms"]) / 1000 for clip in clips])
    ratios = [_psnr(clip.frames, other.frames) for clip, other in zip(clips, plain, strict=True)]
    psnr = "" if clips is plain else f"{np.mean(ratios):.1f}"
    right = sum(clip.right for clip in clips)
    return (
        f"{computed:.1f} of {steps:.0f}",
        f"{np.mean(shares):.0%}",
        f"{seconds:.2f} s",
        psnr,
        f"{right} of {len(clips)}",
    )


def _forward_share(clip: Made) -> float:
    metrics = clip.metrics
    return metrics["computed_forwards"] / metrics["num_forwards"] if "num_forwards" in metrics else 1.0


def _psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; equal clips count as 99."""
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def _setting(text: str) -> tuple[str, dict[str, Any]]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model-path", default="demo")
    add("--kind", choices=("one", "two", "image"), nargs="*", help="only captions of these kinds")
    add("--every", type=int, default=1, metavar="N", help="only every Nth of them")
    add("--setting", type=_setting, nargs="*", metavar="NAME=JSON", help="other sampling parameters to compare")
    return parser.parse_args()


if __name__ == "__main__":
    main()
