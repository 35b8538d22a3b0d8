"""What layouts are tested with: families with four heads, and a pool of ranks that take one task after the other."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.test.parallel_coding import Coding
from sglang.multimodal_gen.test.tiny_checkpoints import TinyWan, save_tiny_wan
from sglang.multimodal_gen.test.tiny_flux import TinyFlux, save_tiny_flux
from sglang.multimodal_gen.test.tiny_hunyuan_video import (
    TINY_HUNYUAN_VIDEOS,
    TinyHunyuanVideo,
    save_tiny_hunyuan_video,
)
from sglang.multimodal_gen.test.tiny_ltx import TinyLTX, save_tiny_ltx
from sglang.multimodal_gen.test.tiny_qwen_image import TINY_QWEN_IMAGES, TinyQwenImage, save_tiny_qwen_image
from sglang.multimodal_gen.test.tiny_sd3 import TINY_DUAL_TRANSFORMER, TinySD3, save_tiny_sd3
from sglang.multimodal_gen.test.tiny_zimage import TinyZImage, save_tiny_zimage

NUM_RANKS = 4
FOUR_HEADS = {"num_attention_heads": 4}

Wish = dict[str, Any]
GUIDED: Wish = {"true_cfg_scale": 3.0, "negative_prompt": "green"}
UNGUIDED: Wish = {"guidance_scale": 1.0}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint, and three requests with other step counts, of which one or two are guided by a negative prompt.
    Each of them starts from `num_pictures`. `adapters` are loaded by name, and those of `merged` are in the weights."""

    save: Callable[[Path], Path]
    wishes: tuple[Wish, ...]
    num_pictures: int = 0
    adapters: Mapping[str, Path] = field(default_factory=dict)
    merged: Mapping[str, float] = field(default_factory=dict)


def wishes(*, other: Wish, **values: Any) -> tuple[Wish, ...]:
    """`other`: what the last one wants instead."""
    return (
        {"prompt": "a red circle moving left", "seed": 1, "num_inference_steps": 3, **values},
        {"prompt": "a small star", "seed": 2, "num_inference_steps": 2, **values},
        {"prompt": "a blue square", "seed": 3, "num_inference_steps": 2, **values, **other},
    )


# Sizes that no number of ranks divides: the last rank has padding, of image and of text.
FAMILIES = {
    "wan": Family(
        save=lambda directory: save_tiny_wan(
            directory,
            TinyWan(
                seed=7,
                transformer={**FOUR_HEADS, "attention_head_dim": 12, "freq_dim": 32},
                text={"num_heads": 4},
            ),
        ),
        wishes=wishes(width=48, height=80, num_frames=9, guidance_scale=4.0, other=UNGUIDED),
    ),
    "flux": Family(
        save=lambda directory: save_tiny_flux(directory, TinyFlux(seed=3, text_heads=4, transformer=FOUR_HEADS)),
        wishes=wishes(width=48, height=80, guidance_scale=4.0, max_sequence_length=13, other=GUIDED),
    ),
    "qwen": Family(
        save=lambda directory: save_tiny_qwen_image(directory, TinyQwenImage(seed=3, transformer=FOUR_HEADS)),
        wishes=wishes(width=48, height=80, max_sequence_length=30, **GUIDED, other={"true_cfg_scale": 1.0}),
    ),
    "ltx": Family(
        save=lambda directory: save_tiny_ltx(
            directory, TinyLTX(seed=3, text_heads=4, transformer={**FOUR_HEADS, "cross_attention_dim": 40})
        ),
        wishes=wishes(width=96, height=160, num_frames=9, guidance_scale=3.0, max_sequence_length=13, other=UNGUIDED),
    ),
    "hunyuan_video": Family(
        save=lambda directory: save_tiny_hunyuan_video(
            directory,
            TinyHunyuanVideo(
                seed=3, transformer=FOUR_HEADS, text={**FOUR_HEADS, "num_key_value_heads": 2, "head_dim": 6}
            ),
        ),
        wishes=wishes(width=48, height=80, num_frames=5, guidance_scale=4.0, other=GUIDED),
    ),
    "sd3": Family(
        save=lambda directory: save_tiny_sd3(
            directory,
            TinySD3(
                seed=3, text_heads=4, transformer=TINY_DUAL_TRANSFORMER | FOUR_HEADS | {"caption_projection_dim": 32}
            ),
        ),
        wishes=wishes(width=48, height=80, guidance_scale=4.0, max_sequence_length=13, other=UNGUIDED),
    ),
    "zimage": Family(
        save=lambda directory: save_tiny_zimage(
            directory, TinyZImage(seed=3, transformer={"dim": 96, "n_heads": 4, "n_kv_heads": 4})
        ),
        wishes=wishes(width=48, height=80, guidance_scale=3.0, max_sequence_length=64, other={"guidance_scale": 0.0}),
    ),
}
FIRST_BLOCK: Wish = {
    "enable_cache_dit": True,
    "cache_dit_params": {"residual_diff_threshold": 1.2, "max_warmup_steps": 1, "max_continuous_cached_steps": 1},
}
TEACACHE: Wish = {
    "enable_teacache": True,
    "teacache_params": {"coefficients": [0.1, 0.0], "teacache_thresh": 0.1, "start_skipping": 1},
}
# Encoders that more than the text goes through, and one whose heads cannot be dealt.
OTHER_ENCODERS = {
    "odd_heads": Family(
        save=lambda directory: save_tiny_flux(directory, TinyFlux(seed=5)),
        wishes=wishes(width=48, height=80, guidance_scale=4.0, max_sequence_length=13, other=GUIDED),
    ),
    "qwen_edit": Family(
        save=lambda directory: save_tiny_qwen_image(directory, TINY_QWEN_IMAGES["edit"]),
        wishes=wishes(width=48, height=48, **GUIDED, other={"true_cfg_scale": 1.0}),
        num_pictures=1,
    ),
    "hunyuan_video_i2v": Family(
        save=lambda directory: save_tiny_hunyuan_video(
            directory, replace(TINY_HUNYUAN_VIDEOS["i2v"], text={**FOUR_HEADS, "num_key_value_heads": 2, "head_dim": 6})
        ),
        wishes=wishes(width=48, height=48, num_frames=5, guidance_scale=4.0, other=GUIDED),
        num_pictures=1,
    ),
}
# Odd numbers of latent cells along the side that is cut, rows or columns, and fewer than ranks, which stays whole.
CODINGS = {
    "wan": (
        Coding(height=48, width=72, num_frames=9, chunk_frames=1),
        Coding(height=56, width=40, num_frames=5),
        Coding(height=40, width=56, num_frames=5, chunk_frames=1, tile=32),
        Coding(height=16, width=24),
    ),
    "hunyuan_video": (Coding(height=24, width=40, num_frames=21), Coding(height=56, width=40, num_frames=5, tile=32)),
    "ltx": (Coding(height=72, width=48, num_frames=9), Coding(height=64, width=72, num_frames=5, tile=32)),
    "flux": (Coding(height=48, width=72), Coding(height=56, width=40), Coding(height=48, width=80, tile=32)),
}
SHAPES = [
    ReplicaShape(tp=2),
    ReplicaShape(ulysses=2),
    ReplicaShape(ring=2),
    ReplicaShape(cfg=2),
    ReplicaShape(ulysses=4),
    ReplicaShape(ring=2, ulysses=2),
    ReplicaShape(cfg=2, tp=2),
    ReplicaShape(ulysses=2, tp=2),
]


def _cached(name: str) -> Family:
    """Requests of a family that skip steps by either cache, and one that skips none."""
    caches = zip(FAMILIES[name].wishes, (FIRST_BLOCK, TEACACHE, {}), (7, 6, 3), strict=True)
    wishes = tuple(wish | cache | {"num_inference_steps": steps} for wish, cache, steps in caches)
    return replace(FAMILIES[name], wishes=wishes)


# Video tokens alone, and in one sequence with text.
CACHED = {
    "wan": (
        _cached("wan"),
        [ReplicaShape(tp=2), ReplicaShape(ulysses=2), ReplicaShape(cfg=2), ReplicaShape(cfg=2, ulysses=2)],
    ),
    "hunyuan_video": (_cached("hunyuan_video"), [ReplicaShape(ulysses=2)]),
}


class Pool:
    """Ranks that take one task after the other."""

    def __init__(self, num_ranks: int = NUM_RANKS) -> None:
        self._numbers = itertools.count()
        command = [sys.executable, "-P", "-m", "sglang.multimodal_gen.test.parallel_rank"]
        self.ranks = [
            subprocess.Popen(
                [*command, str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(num_ranks)
        ]

    def run(
        self,
        directory: Path,
        shape: ReplicaShape,
        family: Family,
        scratch: Path,
        *,
        device: str = "cpu",
        execution: Mapping[str, Any] | None = None,
        **memory: Any,
    ) -> list[Any]:
        """What each rank of the shape saved of the family's requests, which share forwards; `execution` are options."""
        adapters = {name: str(path) for name, path in family.adapters.items()}
        work = {"wishes": list(family.wishes), "num_pictures": family.num_pictures, "codings": []}
        work |= {"memory": memory, "execution": dict(execution or {})}
        work |= {"adapters": adapters, "merged": dict(family.merged)}
        return self._run(directory, shape, scratch, device, work)

    def code(
        self, directory: Path, shape: ReplicaShape, codings: Sequence[Coding], scratch: Path, *, device: str = "cpu"
    ) -> Any:
        """What the leader saved of clips that the checkpoint's autoencoder encodes and decodes."""
        return self._run(directory, shape, scratch, device, {"codings": [asdict(coding) for coding in codings]})[0]

    def _run(self, directory: Path, shape: ReplicaShape, scratch: Path, device: str, work: dict[str, Any]) -> list[Any]:
        out = str(scratch / "out-{rank}.npz")
        task = {
            **work,
            "directory": str(directory),
            "shape": asdict(shape),
            "store": str(scratch / f"store-{next(self._numbers)}"),  # a store that ends removes its file, some time
            "out": out,
            "device": device,
        }
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(task) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline().strip() for rank in self.ranks if rank.stdout is not None]
        assert answers == ["ok"] * len(self.ranks), "\n".join(json.loads(text) for text in answers if text != "ok")
        return [np.load(out.format(rank=rank)) for rank in range(shape.num_ranks)]

    def close(self) -> None:
        for rank in self.ranks:
            rank.communicate(timeout=30)
