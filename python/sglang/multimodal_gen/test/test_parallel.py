"""Every layout gives the pictures of one process: fp32 on the CPU, ranks over gloo, one pool of them for the file."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import InvalidValue, RemoteError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.server_args import ModelArgs, ParallelArgs, ServerArgs
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.parallel_case import FORWARD_TOLERANCE, Arrays, made_of
from sglang.multimodal_gen.test.parallel_coding import coded
from sglang.multimodal_gen.test.parallel_pool import (
    CACHED,
    CODINGS,
    FAMILIES,
    OTHER_ENCODERS,
    SHAPES,
    Pool,
)
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, load, relative_error

pytestmark = pytest.mark.timeout(180)


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
def alone(checkpoints: Callable[[str], Path]) -> Callable[[str], Arrays]:
    """What one process makes of a family's requests."""
    return functools.cache(lambda name: made_of(load(checkpoints(name)), FAMILIES[name].wishes))


@pytest.fixture(scope="module")
def cached_alone(checkpoints: Callable[[str], Path]) -> Callable[[str], Arrays]:
    """What one process makes of requests with step caches."""
    return functools.cache(lambda name: made_of(load(checkpoints(name)), CACHED[name][0].wishes))


@pytest.fixture(scope="module")
def coded_alone(checkpoints: Callable[[str], Path]) -> Callable[[str], dict[str, np.ndarray]]:
    """What one process makes of a family's clips."""

    @functools.cache
    def run(name: str) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return coded(load(checkpoints(name)), CODINGS[name])

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape.sizes)))
@pytest.mark.parametrize("name", FAMILIES)
def test_several_ranks_give_the_texts_predictions_and_pictures_of_one(
    name: str,
    shape: ReplicaShape,
    pool: Pool,
    checkpoints: Callable[[str], Path],
    alone: Callable[[str], Arrays],
    tmp_path: Path,
) -> None:
    """Text encoders are dealt to the ranks as well. The requests of a batch differ in step, step count and guidance."""
    assert_same(alone(name), pool.run(checkpoints(name), shape, FAMILIES[name], tmp_path))


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, (_, shapes) in CACHED.items() for shape in shapes], ids=str
)
def test_several_ranks_skip_the_steps_that_one_skips(
    name: str,
    shape: ReplicaShape,
    pool: Pool,
    checkpoints: Callable[[str], Path],
    cached_alone: Callable[[str], Arrays],
    tmp_path: Path,
) -> None:
    """Requests with either step cache and with none share forwards; each rank finds the same of every one."""
    expected = cached_alone(name)
    for number in (0, 1):
        _, computed, rows = expected[f"computed{number}"]
        assert 0 < computed < rows, "some forwards are skipped, some are not"
    assert_same(expected, pool.run(checkpoints(name), shape, CACHED[name][0], tmp_path))


@pytest.mark.parametrize("shape", [ReplicaShape(tp=2), ReplicaShape(cfg=2)], ids=lambda s: "x".join(map(str, s.sizes)))
def test_ranks_whose_weights_are_on_the_host_give_the_same(
    shape: ReplicaShape,
    pool: Pool,
    checkpoints: Callable[[str], Path],
    alone: Callable[[str], Arrays],
    tmp_path: Path,
) -> None:
    found = pool.run(checkpoints("wan"), shape, FAMILIES["wan"], tmp_path, performance_mode="memory")
    assert_same(alone("wan"), found)


@pytest.mark.parametrize("name", OTHER_ENCODERS)
def test_encoders_that_see_pictures_or_are_dealt_in_part_give_the_texts_of_one_rank(
    name: str, pool: Pool, tmp_path: Path
) -> None:
    family = OTHER_ENCODERS[name]
    checkpoint = family.save(tmp_path / name)
    expected = made_of(load(checkpoint), family.wishes, num_pictures=family.num_pictures)
    assert_same(expected, pool.run(checkpoint, ReplicaShape(ulysses=2), family, tmp_path))


def assert_same(expected: Arrays, found: Sequence[Mapping[str, Any]]) -> None:
    """The leader's frames and every rank's tensors, with no rank holding its text encoders whole."""
    leader, *others = found
    assert sum(key.startswith("predicted") for key in expected) in (4, 5), "some are guided, some are not"
    for key, values in expected.items():
        if key.startswith("frames"):
            assert int(np.abs(leader[key].astype(int) - values.astype(int)).max()) <= 1
            assert values.std() > 5, "a flat picture would agree with anything"
            continue
        tolerance = LATENT_TOLERANCE if key.startswith("latents") else FORWARD_TOLERANCE
        for rank in (leader, *others):
            assert relative_error(torch.from_numpy(rank[key]), torch.from_numpy(values)) <= tolerance, key
    assert len({int(rank["num_parameters"]) for rank in (leader, *others)}) == 1
    assert max(int(rank["encoder_bytes"]) for rank in (leader, *others)) < leader["num_parameters"] * 4 * 0.9


@pytest.mark.parametrize(
    "shape",
    [ReplicaShape(ulysses=2), ReplicaShape(ring=3), ReplicaShape(ulysses=4)],
    ids=lambda shape: str(shape.num_ranks),
)
@pytest.mark.parametrize("name", CODINGS)
def test_an_autoencoder_on_strips_gives_what_it_gives_on_whole_pictures(
    name: str,
    shape: ReplicaShape,
    pool: Pool,
    checkpoints: Callable[[str], Path],
    coded_alone: Callable[[str], dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    """The tolerance is fp32's rounding in another order; a line that a neighbour did not send changes 1e-2."""
    expected = coded_alone(name)
    found = pool.code(checkpoints(name), shape, CODINGS[name], tmp_path)
    assert set(found.files) == set(expected)
    for key, values in expected.items():
        assert relative_error(torch.from_numpy(found[key]), torch.from_numpy(values)) <= 1e-5, key


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


def test_a_layout_that_the_model_cannot_have_is_refused_before_it_loads(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidValue, match="tp_size: got 3, accepted is 1, 2, 4: what divides the transformer's 4"):
        DiffGenerator.from_pretrained(str(checkpoints("wan")), tp_size=3)


def test_a_layout_that_the_loaded_model_cannot_have_ends_in_its_own_error(checkpoints: Callable[[str], Path]) -> None:
    """As with a model that is only known once it is downloaded."""
    model, parallel = ModelArgs(model_path=str(checkpoints("wan"))), ParallelArgs(num_gpus=3, tp_size=3)
    with (
        DiffGenerator.from_server_args(ServerArgs(model=model, parallel=parallel)) as generator,
        pytest.raises(RemoteError, match="tp_size: got 3, accepted is 1, 2, 4: what divides the transformer's 4"),
    ):
        generator.wait_ready()


@pytest.fixture(scope="module")
def engine(checkpoints: Callable[[str], Path]) -> Iterator[DiffGenerator]:
    """Two ranks that share the tokens, and the text encoder."""
    options: dict[str, Any] = {
        "ulysses_degree": 2,
        "encoder_parallel": "on",
        "checkpoint_every": 5,
        "precision": "fp32",
    }
    with DiffGenerator.from_pretrained(str(checkpoints("wan")), **options) as generator:
        yield generator


WISH: dict[str, Any] = {**FAMILIES["wan"].wishes[0], "save_output": False, "return_frames": True}


def test_replicas_of_several_ranks_give_the_pictures_of_one_rank(
    checkpoints: Callable[[str], Path], alone: Callable[[str], Arrays]
) -> None:
    """Two replicas of two ranks each, and a request for each of them, whose guidance and steps differ."""
    options: dict[str, Any] = {"dp_size": 2, "tp_size": 2, "precision": "fp32", "encoder_parallel": "on"}
    wishes = [{**wish, "save_output": False, "return_frames": True} for wish in FAMILIES["wan"].wishes[:2]]
    with DiffGenerator.from_pretrained(str(checkpoints("wan")), **options) as generator:
        assert generator.status().num_workers == 4
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            results = list(executor.map(generator.generate, wishes))
    for index, result in enumerate(results):
        assert isinstance(result, GenerationResult) and result.frames is not None
        expected = alone("wan")[f"frames{index}"]
        assert int(np.abs(result.frames.astype(int) - expected.astype(int)).max()) <= 1


def frames_of(engine: DiffGenerator, **changes: Any) -> np.ndarray:
    result = engine.generate(WISH | changes)
    assert isinstance(result, GenerationResult) and result.frames is not None
    return result.frames


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_in_a_step_is_replaced_with_its_replica_and_requests_go_on(
    engine: DiffGenerator, sent: signal.Signals
) -> None:
    """The other rank waits for it in a collective, for ever where it was stopped."""
    wish = {**WISH, "num_inference_steps": 60}
    undisturbed = engine.generate(wish)
    pids = engine.status().worker_pids
    assert len(pids) == 2
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        result = executor.submit(engine.generate, wish)
        deadline = time.monotonic() + 30
        while not engine.status().num_running:
            assert time.monotonic() < deadline and not result.done(), "it is not being made"
        time.sleep(0.3)
        os.kill(pids[1], sent)
        resumed = result.result()
    assert resumed.metrics["attempts"] == 2
    assert set(engine.status().worker_pids).isdisjoint(pids)
    np.testing.assert_array_equal(resumed.frames, undisturbed.frames)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_an_error_of_one_rank_alone_replaces_the_replica(tmp_path: Path) -> None:
    """The others may wait for it in a collective; the request goes on with new ranks."""
    null_family.register()
    with DiffGenerator.from_pretrained("null-model", num_gpus=2, checkpoint_every=1) as generator:
        pids = generator.status().worker_pids
        result = generator.generate({"prompt": f"rank-bug-1-{tmp_path / 'once'}", "num_inference_steps": 8})
        assert isinstance(result, GenerationResult) and result.metrics["attempts"] == 2
        assert len(pids) == 2 and set(generator.status().worker_pids).isdisjoint(pids)


def test_dealt_encoders_live_through_caching_flushes_released_memory_and_new_weights(engine: DiffGenerator) -> None:
    """All ranks find the same texts in their caches, or one of them would wait for the others in a collective."""

    def done(operation: Any) -> str:
        return str(engine._engine.spawn(engine._engine.client.control(operation)).result(100))

    fresh = frames_of(engine)
    np.testing.assert_array_equal(frames_of(engine), fresh)
    assert frames_of(engine, prompt="a small star").std() > 5, "one text is known, the other is not"
    assert not done("flush_cache").startswith("0.0 MiB")
    np.testing.assert_array_equal(frames_of(engine), fresh)
    done("release_memory_occupation")
    done("resume_memory_occupation")
    np.testing.assert_array_equal(frames_of(engine), fresh)
    assert "loaded" in done("update_weights_from_disk")
    np.testing.assert_array_equal(frames_of(engine), fresh)
