"""The captions that training never saw, what the checker makes of the clips generated for them, and a picture."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from demo_model.checker import Observation, Verdict, judge, observe
from demo_model.held_out import is_held_out_caption, is_held_out_motion, is_held_out_pair
from demo_model.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    NUM_FRAMES,
    POSITIONS,
    SHAPES,
    ClipFacts,
    ObjectFacts,
)

Generate = Callable[[Sequence[str], Sequence[int], int], Sequence[np.ndarray]]
"""(captions, seeds, number of frames) -> one uint8 clip [T, H, W, 3] for each caption."""

_MOTION_WORDS = {
    **{direction: f"moving {direction}" for direction in DIRECTIONS},
    "growing": "growing",
    "shrinking": "shrinking",
    "spinning": "spinning",
    "still": "standing still",
}
_PLACE_WORDS = {"center": "in the center", "top": "at the top", "bottom": "at the bottom"}
_PLACE_WORDS |= {"left": "on the left", "right": "on the right"}
_PLACE_WORDS |= {name: f"in the {name} corner" for name in POSITIONS if " " in name}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A caption to generate from and what must come out."""

    kind: str  # "one", "two" or "image"
    caption: str
    wanted: ClipFacts
    seed: int

    @property
    def num_frames(self) -> int:
        return 1 if self.kind == "image" else NUM_FRAMES


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case with what the checker saw."""

    case: Case
    seen: Observation
    verdict: Verdict


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def cases() -> list[Case]:
    """All cases: 76 with one object, 36 with two, 24 images. Always the same."""
    rows = [*_one_object(), *_two_objects(), *_images()]
    return [
        Case(kind=kind, caption=caption, wanted=wanted, seed=1000 + index)
        for index, (kind, caption, wanted) in enumerate(rows)
    ]


def _one_object() -> list[tuple[str, str, ClipFacts]]:
    """Every coloured shape in the held-out form, twice the held-out motions: plain, and with place or background."""
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    rows = []
    for index, (colour, shape) in enumerate(looks):
        direction = DIRECTIONS[(index + index // 4) % 4]
        caption = f"{_article(f'{colour} {shape}')} moving {direction}"
        rows.append(("one", caption, ClipFacts(objects=(ObjectFacts(colour=colour, shape=shape, motion=direction),))))
    backgrounds = tuple(BACKGROUNDS)
    held_out = [(*look, motion) for look in looks for motion in MOTIONS if is_held_out_motion(*look, motion)]
    held_out = [key for key in held_out if key[1:] != ("circle", "spinning")]
    for index, (colour, shape, motion) in enumerate(held_out):
        item = ObjectFacts(colour=colour, shape=shape, motion=motion)
        words = f"the {colour} {shape} is {_MOTION_WORDS[motion]}"
        rows.append(("one", words, ClipFacts(objects=(item,))))
        background = next(name for name in (*backgrounds[index % 8 :], *backgrounds) if name != colour)
        size = ("small", "large")[index % 2]
        item = ObjectFacts(colour=colour, shape=shape, motion=motion, size=size)
        words = f"{_article(f'{size} {colour} {shape}')} {_MOTION_WORDS[motion]} on a {background} background"
        rows.append(("one", words, ClipFacts(objects=(item,), background=background)))
    return rows


def _two_objects() -> list[tuple[str, str, ClipFacts]]:
    """Held-out pairs, in motions that training shows each of them in."""
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [
        (first, second)
        for index, first in enumerate(looks)
        for second in looks[index + 1 :]
        if first[0] != second[0] and is_held_out_pair(first, second)
    ]
    rows = []
    for index, pair in enumerate(pairs[:: max(1, len(pairs) // 36)][:36]):
        items = tuple(
            ObjectFacts(colour=colour, shape=shape, motion=_seen_motion(colour, shape, index + 3 * place))
            for place, (colour, shape) in enumerate(pair)
        )
        phrases = [f"{_article(f'{item.colour} {item.shape}')} {_MOTION_WORDS[str(item.motion)]}" for item in items]
        rows.append(("two", " and ".join(phrases), ClipFacts(objects=items)))
    return rows


def _seen_motion(colour: str, shape: str, start: int) -> str:
    """The first motion from `start` on that training shows this coloured shape in."""
    order = [MOTIONS[(start + step) % len(MOTIONS)] for step in range(len(MOTIONS))]
    return next(
        motion
        for motion in order
        if not is_held_out_motion(colour, shape, motion) and (shape, motion) != ("circle", "spinning")
    )


def _images() -> list[tuple[str, str, ClipFacts]]:
    """Half in the held-out form, half with place and background."""
    rows = []
    for index in range(24):
        colour, shape = tuple(COLOURS)[(index * 3 + index // 8) % 8], SHAPES[(index + index // 4) % 4]
        if index < 12:
            item = ObjectFacts(colour=colour, shape=shape)
            rows.append(("image", _article(f"{colour} {shape}"), ClipFacts(objects=(item,))))
            continue
        position = POSITIONS[index % 9]
        background = next(name for name in (*tuple(BACKGROUNDS)[index % 8 :], *BACKGROUNDS) if name != colour)
        words = f"{_article(f'{colour} {shape}')} {_PLACE_WORDS[position]} on a {background} background"
        item = ObjectFacts(colour=colour, shape=shape, position=position)
        rows.append(("image", words, ClipFacts(objects=(item,), background=background)))
    return rows


def evaluate(generate: Generate, chosen: Sequence[Case]) -> tuple[list[Result], list[np.ndarray]]:
    """Generate and check; clips of the same length are asked for together."""
    clips: dict[int, np.ndarray] = {}
    for num_frames in sorted({case.num_frames for case in chosen}):
        rows = [row for row, case in enumerate(chosen) if case.num_frames == num_frames]
        captions, seeds = [chosen[row].caption for row in rows], [chosen[row].seed for row in rows]
        clips.update(zip(rows, generate(captions, seeds, num_frames), strict=True))
    ordered = [clips[row] for row in range(len(chosen))]
    results = []
    for case, clip in zip(chosen, ordered, strict=True):
        seen = observe(clip)
        results.append(Result(case=case, seen=seen, verdict=judge(seen, case.wanted)))
    return results, ordered


def summary(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """For each kind: number of cases, share right, and share right of each attribute where one was wanted."""
    table: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(result.case.kind for result in results):
        part = [result for result in results if result.case.kind == kind]
        row = {"cases": float(len(part)), "right": float(np.mean([result.verdict.right for result in part]))}
        for name in ("colour", "shape", "motion", "background", "size", "position"):
            values = [value for result in part if (value := getattr(result.verdict, name)) is not None]
            if values:
                row[name] = float(np.mean(values))
        row["flicker"] = float(np.mean([result.seen.flicker for result in part]))
        table[kind] = row
    return table


def write_report(path: Path, results: Sequence[Result]) -> None:
    """Summary and every case with what was wanted and seen, as JSON."""
    cases_seen = [
        {
            "kind": result.case.kind,
            "caption": result.case.caption,
            "seed": result.case.seed,
            "held_out_form": is_held_out_caption(result.case.caption),
            "right": result.verdict.right,
            "verdict": asdict(result.verdict),
            "seen": asdict(result.seen),
        }
        for result in results
    ]
    path.write_text(json.dumps({"summary": summary(results), "cases": cases_seen}, indent=1) + "\n")


def contact_sheet(clips: Sequence[np.ndarray], *, num_columns: int = 2, num_moments: int = 5) -> np.ndarray:
    """Moments of each clip side by side, clips below each other in columns: uint8 [H, W, 3]."""
    strips = []
    for clip in clips:
        moments = clip[np.linspace(0, len(clip) - 1, num_moments if len(clip) > 1 else 1).round().astype(int)]
        framed = np.pad(moments, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)
        strips.append(np.concatenate(list(framed), axis=1))
    strips += [np.full_like(strips[0], 255)] * (-len(strips) % num_columns)
    rows = len(strips) // num_columns
    return np.concatenate([np.concatenate(strips[row::rows], axis=1) for row in range(rows)], axis=0)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3]; the machine that trains may have no imaging library."""
    height, width = image.shape[:2]
    rows = np.concatenate((np.zeros((height, 1), dtype=np.uint8), image.reshape(height, -1)), axis=1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
