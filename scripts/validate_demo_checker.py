"""Checks the demo model's checker on drawn clips, whose contents are known: as they are, and made worse.

    python scripts/validate_demo_checker.py

Prints for both kinds how often colour, shape and motion, and how often every attribute, are read rightly.
"""

from __future__ import annotations

import argparse
import io

import numpy as np
from PIL import Image, ImageFilter

from demo_model.checker import judge, observe
from demo_model.clips import render, to_uint8
from demo_model.scenes import sample_scenes

_NOISE, _BLUR, _QUALITY = 6.0, 0.8, 60
_SEED = 20_251_124
_AT_ONCE = 20


def main() -> None:
    """Draw, perturb, judge, print."""
    arguments = _parse()
    rng = np.random.default_rng(_SEED)
    for name, count, worse in (("as drawn", arguments.clean, False), ("perturbed", arguments.perturbed, True)):
        right = complete = 0
        for start in range(0, count, _AT_ONCE):
            scenes = sample_scenes(rng, min(_AT_ONCE, count - start), training=False)
            for row, clip in enumerate(to_uint8(render(scenes))):
                facts = scenes.facts(row, video=True)
                verdict = judge(observe(perturb(clip, rng) if worse else clip), facts)
                right += verdict.right
                complete += all(value is not False for value in vars(verdict).values())
        print(f"{name}: {count} clips, right {right / count:.1%}, every attribute right {complete / count:.1%}")


def perturb(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise, blur and JPEG on each frame of [T, H, W, 3] uint8."""
    noisy = np.clip(clip + rng.normal(0, _NOISE, clip.shape), 0, 255).astype(np.uint8)
    frames = []
    for frame in noisy:
        buffer = io.BytesIO()
        Image.fromarray(frame).filter(ImageFilter.GaussianBlur(_BLUR)).save(buffer, "JPEG", quality=_QUALITY)
        frames.append(np.asarray(Image.open(buffer)))
    return np.stack(frames)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clean", type=int, default=520, help="clips as drawn")
    parser.add_argument("--perturbed", type=int, default=300, help="clips with noise, blur and JPEG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
