"""Every layout gives the pictures of one process: fp32 on the CPU, ranks over gloo, one pool of them for the file."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import InvalidValue, RemoteError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, load, relative_error, run_together
from sglang.multimodal_gen.test.tiny_checkpoints import TinyWan, save_tiny_wan
from sglang.multimodal_gen.test.tiny_flux import TinyFlux, save_tiny_flux
from sglang.multimodal_gen.test.tiny_hunyuan_video import TinyHunyuanVideo, save_tiny_hunyuan_video
from sglang.multimodal_gen.test.tiny_ltx import TinyLTX, save_tiny_ltx
from sglang.multimodal_gen.test.tiny_qwen_image import TinyQwenImage, save_tiny_qwen_image
from sglang.multimodal_gen.test.tiny_sd3 import TINY_DUAL_TRANSFORMER, TinySD3, save_tiny_sd3
from sglang.multimodal_gen.test.tiny_zimage import TinyZImage, save_tiny_zimage

pytestmark = pytest.mark.timeout(180)
NUM_RANKS = 4
FOUR_HEADS = {"num_attention_heads": 4}

Wish = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint with four heads, and two requests that stand at other steps and may have no guidance."""

    save: Callable[[Path], Path]
    wishes: tuple[Wish, ...]


def wishes(**values: Any) -> tuple[Wish, ...]:
    return (
        {"prompt": "a red circle moving left", "seed": 1, "num_inference_steps": 3, **values},
        {"prompt": "a small star", "seed": 2, "num_inference_steps": 2, **values},
    )


# Sizes that no number of ranks divides: the last rank has padding, of image and of text.
FAMILIES = {
    "wan": Family(
        save=lambda directory: save_tiny_wan(
            directory, TinyWan(seed=7, transformer={**FOUR_HEADS, "attention_head_dim": 12, "freq_dim": 32})
        ),
        wishes=wishes(width=48, height=80, num_frames=9, guidance_scale=4.0),
    ),
    "flux": Family(
        save=lambda directory: save_tiny_flux(directory, TinyFlux(seed=3, transformer=FOUR_HEADS)),
        wishes=wishes(width=48, height=80, guidance_scale=4.0, max_sequence_length=13),
    ),
    "qwen": Family(
        save=lambda directory: save_tiny_qwen_image(directory, TinyQwenImage(seed=3, transformer=FOUR_HEADS)),
        wishes=wishes(width=48, height=80, true_cfg_scale=3.0, negative_prompt="green", max_sequence_length=30),
    ),
    "ltx": Family(
        save=lambda directory: save_tiny_ltx(
            directory, TinyLTX(seed=3, transformer={**FOUR_HEADS, "cross_attention_dim": 40})
        ),
        wishes=wishes(width=96, height=160, num_frames=9, guidance_scale=3.0, max_sequence_length=13),
    ),
    "hunyuan_video": Family(
        save=lambda directory: save_tiny_hunyuan_video(directory, TinyHunyuanVideo(seed=3, transformer=FOUR_HEADS)),
        wishes=wishes(width=48, height=80, num_frames=5, guidance_scale=4.0),
    ),
    "sd3": Family(
        save=lambda directory: save_tiny_sd3(
            directory,
            TinySD3(seed=3, transformer=TINY_DUAL_TRANSFORMER | FOUR_HEADS | {"caption_projection_dim": 32}),
        ),
        wishes=wishes(width=48, height=80, guidance_scale=4.0, max_sequence_length=13),
    ),
    "zimage": Family(
        save=lambda directory: save_tiny_zimage(
            directory, TinyZImage(seed=3, transformer={"dim": 96, "n_heads": 4, "n_kv_heads": 4})
        ),
        wishes=wishes(width=48, height=80, guidance_scale=3.0, max_sequence_length=64),
    ),
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


class Pool:
    """Ranks that take one task after the other."""

    def __init__(self, num_ranks: int = NUM_RANKS) -> None:
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
        self, directory: Path, shape: ReplicaShape, requests: Sequence[Wish], scratch: Path, *, device: str = "cpu"
    ) -> Any:
        """What the leader saved of the requests, run together."""
        out = scratch / "out.npz"
        task = {
            "directory": str(directory),
            "shape": asdict(shape),
            "wishes": list(requests),
            "store": str(scratch / "store"),
            "out": str(out),
            "device": device,
        }
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(task) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline().strip() for rank in self.ranks if rank.stdout is not None]
        assert answers == ["ok"] * len(self.ranks), "\n".join(json.loads(text) for text in answers if text != "ok")
        return np.load(out)

    def close(self) -> None:
        for rank in self.ranks:
            rank.communicate(timeout=30)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool()
    yield found
    found.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("parallel")
    return functools.cache(lambda name: FAMILIES[name].save(root / name))


@pytest.fixture(scope="module")
def alone(checkpoints: Callable[[str], Path]) -> Callable[[str], list[Any]]:
    """What one process makes of a family's requests."""

    @functools.cache
    def run(name: str) -> list[Any]:
        with torch.inference_mode():
            return run_together(load(checkpoints(name)), [(wish, EMPTY) for wish in FAMILIES[name].wishes])

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape.sizes)))
@pytest.mark.parametrize("name", FAMILIES)
def test_several_ranks_give_the_pictures_of_one(
    name: str,
    shape: ReplicaShape,
    pool: Pool,
    checkpoints: Callable[[str], Path],
    alone: Callable[[str], list[Any]],
    tmp_path: Path,
) -> None:
    expected = alone(name)
    found = pool.run(checkpoints(name), shape, FAMILIES[name].wishes, tmp_path)
    for index, (req, frames) in enumerate(expected):
        assert relative_error(torch.from_numpy(found[f"latents{index}"]), req.latents) <= LATENT_TOLERANCE
        assert int(np.abs(found[f"frames{index}"].astype(int) - frames.astype(int)).max()) <= 1
        assert frames.std() > 5, "a flat picture would agree with anything"


@pytest.mark.parametrize(
    ("shape", "num_heads", "sentence"),
    [
        (ReplicaShape(ulysses=4), 30, "ulysses_degree: got 4, accepted is 1, 2, 3, 5, 6, 10, 15, 30: what divides"),
        (
            ReplicaShape(ulysses=4, tp=2),
            12,
            "ulysses_degree: got 4, accepted is 1, 2, 3, 6: .*12 attention heads at tp_",
        ),
        (ReplicaShape(tp=5), 12, "tp_size: got 5, accepted is 1, 2, 3, 4, 6, 12: what divides"),
    ],
)
def test_degrees_that_do_not_divide_the_heads_name_those_that_do(
    shape: ReplicaShape, num_heads: int, sentence: str
) -> None:
    with pytest.raises(InvalidValue, match=f"^{sentence}"):
        shape.check_heads(num_heads)
    ReplicaShape(cfg=7, ring=7, tp=2).check_heads(num_heads)


# --- the engine with ranks on the CPU ---


def test_a_layout_that_the_model_cannot_have_ends_in_its_own_error(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(RemoteError, match="tp_size: got 3, accepted is 1, 2, 4: what divides the transformer's 4"):
        DiffGenerator.from_pretrained(str(checkpoints("wan")), tp_size=3)


def test_a_rank_that_is_killed_is_replaced_with_its_replica_and_requests_go_on(
    checkpoints: Callable[[str], Path], alone: Callable[[str], list[Any]]
) -> None:
    wish = {**FAMILIES["wan"].wishes[0], "num_inference_steps": 60, "save_output": False, "return_frames": True}
    options: dict[str, Any] = {"ulysses_degree": 2, "checkpoint_every": 5, "precision": "fp32"}
    with DiffGenerator.from_pretrained(str(checkpoints("wan")), **options) as engine:
        undisturbed = engine.generate(wish)
        pids = engine.status().worker_pids
        assert len(pids) == 2
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            result = executor.submit(engine.generate, wish)
            deadline = time.monotonic() + 30
            while not engine.status().num_running:
                assert time.monotonic() < deadline and not result.done(), "it is not being made"
            time.sleep(0.3)
            os.kill(pids[1], signal.SIGKILL)
            resumed = result.result()
        assert resumed.metrics["attempts"] == 2
        assert set(engine.status().worker_pids).isdisjoint(pids)
        np.testing.assert_array_equal(resumed.frames, undisturbed.frames)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
