"""Adapters on a running engine: set, named by requests, merged, removed, refused, and through deaths of workers."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang.multimodal_gen.errors import InvalidValue, MissingParameter, RemoteError, UnsupportedParameter
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import Progress
from sglang.multimodal_gen.test.lora_case import save_adapters
from sglang.multimodal_gen.test.parallel_pool import FAMILIES
from sglang.multimodal_gen.test.scripted_server import wait_for

pytestmark = pytest.mark.timeout(180)

WISH: dict[str, Any] = {**FAMILIES["wan"].wishes[0], "save_output": False, "return_latents": True,
                        "output_type": "latent", "guidance_scale": 1.0}  # fmt: skip
Latents = np.ndarray


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["wan"].save(tmp_path_factory.mktemp("lora") / "checkpoint")


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(checkpoint, tmp_path_factory.mktemp("adapters"), {"wide": 9, "narrow": 2})


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained(str(checkpoint), precision="fp32") as generator:
        yield generator


@pytest.fixture(scope="module")
def plain(shared: DiffGenerator) -> Latents:
    """Without any adapter."""
    return latents_of(shared, lora=[])


@pytest.fixture
def engine(shared: DiffGenerator, plain: Latents) -> Iterator[DiffGenerator]:
    """With nothing loaded; afterwards its results are what they were, to the bit."""
    yield shared
    shared.unmerge_lora_weights()
    shared.set_lora([])
    for each in shared.list_loras()["loaded_adapters"]:
        shared.remove_lora(each["nickname"])
    np.testing.assert_array_equal(latents_of(shared), plain)


def latents_of(engine: DiffGenerator, **changes: Any) -> Latents:
    result = engine.generate({**WISH, **changes})
    assert isinstance(result, GenerationResult) and result.latents is not None
    return result.latents


def active(engine: DiffGenerator) -> dict[str, tuple[float, str]]:
    found = [each for of_target in engine.list_loras()["active"].values() for each in of_target]
    return {each["nickname"]: (each["strength"], each["mode"]) for each in found}


def refusal(call: Callable[[], Any]) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        call()
    assert "Traceback" not in str(caught.value) and "bad0" not in str(caught.value), "neither code nor directories"
    return caught.value


def test_what_is_set_holds_for_requests_that_name_none(
    engine: DiffGenerator, files: Mapping[str, Path], plain: Latents
) -> None:
    engine.set_lora("wide", str(files["wide"]), strength=0.8)
    assert active(engine) == {"wide": (0.8, "unmerged")}
    wide = latents_of(engine)
    assert np.abs(wide - plain).max() > 1e-2
    np.testing.assert_array_equal(latents_of(engine, lora=["wide:0.8"]), wide)
    np.testing.assert_array_equal(latents_of(engine, lora=[]), plain)
    engine.set_lora(["wide", "narrow"], ["", str(files["narrow"])], strength=[0.5, -1.2])
    both = latents_of(engine)
    np.testing.assert_array_equal(latents_of(engine, lora=["wide:0.5", {"name": "narrow", "scale": -1.2}]), both)
    engine.set_lora([])
    assert active(engine) == {} and len(engine.list_loras()["loaded_adapters"]) == 2
    np.testing.assert_array_equal(latents_of(engine), plain)
    np.testing.assert_array_equal(latents_of(engine, lora=["wide:0.8"]), wide)


def test_requests_with_different_adapters_share_a_batch(engine: DiffGenerator, files: Mapping[str, Path]) -> None:
    engine.set_lora(["wide", "narrow"], [str(files["wide"]), str(files["narrow"])])
    wishes: list[list[Any]] = [[], ["wide"], ["narrow:2"], ["wide:0.5", "narrow:-1"]]
    alone = [latents_of(engine, lora=lora, num_inference_steps=40) for lora in wishes]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(engine.generate, {**WISH, "lora": lora, "num_inference_steps": 40}) for lora in wishes]
        results = [each.result() for each in asked]
    sizes = [size for result in results for size in result.metrics["step_batch_sizes"]]
    assert max(sizes) > 1, "some steps were shared"
    for result, expected in zip(results, alone, strict=True):
        np.testing.assert_allclose(result.latents, expected, rtol=1e-3, atol=1e-4)


def test_merging_waits_for_what_came_before_and_what_comes_later_waits_for_it(
    engine: DiffGenerator, files: Mapping[str, Path], plain: Latents
) -> None:
    """Reads never wait. The request that runs ends with the weights it began with, the later one has the new ones."""
    engine.set_lora("wide", str(files["wide"]))
    beside = latents_of(engine)
    slow = {**WISH, "lora": [], "num_inference_steps": 40}
    undisturbed = latents_of(engine, **slow)
    pool = concurrent.futures.ThreadPoolExecutor(2)
    merged: concurrent.futures.Future[str] | None = None
    later: concurrent.futures.Future[Any] | None = None
    for item in engine.stream(slow):
        if isinstance(item.event, Progress) and merged is None:
            merged = pool.submit(engine.merge_lora_weights)
            time.sleep(0.05)
            later = pool.submit(latents_of, engine)
            assert active(engine) == {}, "neither set any more nor merged yet"
        if isinstance(item.event, GenerationResult):
            assert merged is not None and later is not None and not later.done()
            np.testing.assert_array_equal(item.event.latents, undisturbed)
    assert merged is not None and "wide (1) merged into the weights" in merged.result(60)
    assert later is not None
    np.testing.assert_allclose(later.result(60), beside, rtol=1e-3, atol=1e-4)
    assert active(engine) == {"wide": (1.0, "merged")}
    assert "checkpoint" in engine.unmerge_lora_weights()
    np.testing.assert_array_equal(latents_of(engine), plain)


def test_setting_with_merge_and_setting_others_exchange_the_weights(
    engine: DiffGenerator, files: Mapping[str, Path], plain: Latents
) -> None:
    engine.set_lora("wide", str(files["wide"]), merge_mode="merge", strength=0.5)
    merged = latents_of(engine)
    engine.set_lora("narrow", str(files["narrow"]))
    assert active(engine) == {"narrow": (1.0, "unmerged")}
    np.testing.assert_array_equal(latents_of(engine, lora=[]), plain)
    np.testing.assert_allclose(latents_of(engine, lora=["wide:0.5"]), merged, rtol=1e-3, atol=1e-4)
    assert "narrow (3) merged" in engine.merge_lora_weights(strength=3.0)
    assert active(engine) == {"narrow": (3.0, "merged")}


def test_an_adapter_that_is_removed_stays_with_the_requests_that_have_it(
    engine: DiffGenerator, files: Mapping[str, Path]
) -> None:
    """Even through the death of their worker; the name may come to mean another adapter meanwhile."""
    engine.set_lora("mine", str(files["wide"]))
    wish = {**WISH, "lora": ["mine"], "num_inference_steps": 60}
    undisturbed = latents_of(engine, **wish)
    removed = threading.Event()
    for item in engine.stream(wish):
        if isinstance(item.event, Progress) and not removed.is_set():
            removed.set()
            assert "keep it until they end" in engine.remove_lora("mine")
            engine.set_lora("mine", str(files["narrow"]))
            [pid] = engine.status().worker_pids
            os.kill(pid, signal.SIGKILL)
        if isinstance(item.event, GenerationResult):
            assert item.event.metrics["attempts"] == 2
            np.testing.assert_array_equal(item.event.latents, undisturbed)
    assert removed.is_set()
    assert np.abs(latents_of(engine, **wish) - undisturbed).max() > 1e-2, "the name means the other one now"


def test_a_new_worker_has_what_was_loaded_and_merged(engine: DiffGenerator, files: Mapping[str, Path]) -> None:
    engine.set_lora("wide", str(files["wide"]))
    engine.merge_lora_weights(strength=0.7)
    engine.set_lora("narrow", str(files["narrow"]), merge_mode="dynamic", strength=0.3)
    engine.set_lora("wide", merge_mode="merge", strength=0.7)
    before = latents_of(engine, lora=["narrow:0.3"])
    [pid] = engine.status().worker_pids
    os.kill(pid, signal.SIGKILL)
    # The table of slots is narrower now, which changes the order of summation.
    np.testing.assert_allclose(latents_of(engine, lora=["narrow:0.3"]), before, rtol=1e-3, atol=1e-4)
    assert engine.status().worker_pids != (pid,)
    assert active(engine) == {"wide": (0.7, "merged")}


def test_a_new_scheduler_has_what_was_set_and_merged(checkpoint: Path, files: Mapping[str, Path]) -> None:
    """Also what took the place of the adapter that the engine started with."""
    options: dict[str, Any] = {"precision": "fp32", "lora_path": str(files["narrow"]), "lora_merge_mode": "merge"}
    with DiffGenerator.from_pretrained(str(checkpoint), **options) as engine:
        engine.set_lora("wide", str(files["wide"]), merge_mode="merge", strength=0.7)
        engine.set_lora(["wide", "default"], strength=[0.4, 0.5])
        set_now, before = active(engine), latents_of(engine)
        assert set_now == {"wide": (0.4, "unmerged"), "default": (0.5, "unmerged")}
        [pid] = engine.status().worker_pids
        scheduler = psutil.Process(pid).parent()
        assert scheduler is not None and "managers.scheduler" in " ".join(scheduler.cmdline())
        scheduler.kill()
        wait_for(lambda: has_another_worker(engine, pid), seconds=60)
        assert active(engine) == set_now
        np.testing.assert_allclose(latents_of(engine), before, rtol=1e-3, atol=1e-4)
        engine.set_lora("other", str(files["narrow"]))
        assert len(engine.list_loras()["loaded_adapters"]) == 3


def has_another_worker(engine: DiffGenerator, pid: int) -> bool:
    try:
        status = engine.status()
    except RemoteError:  # between the two schedulers
        return False
    return status.state.state == "ready" and bool(status.worker_pids) and pid not in status.worker_pids


# --- what is refused, and changes nothing ---


@pytest.fixture(scope="module")
def bad_files(files: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bad")
    tensors = load_file(files["wide"])
    first = min(key for key in tensors if "lora_A" in key)
    save_file({**tensors, first: torch.full_like(tensors[first], float("nan"))}, directory / "nan.safetensors")
    save_file({**tensors, first: tensors[first][:, :-1].contiguous()}, directory / "shape.safetensors")
    other = {key.replace(".blocks.", ".layers."): tensor for key, tensor in tensors.items()}
    save_file(other, directory / "other.safetensors")
    (directory / "pickle.safetensors").write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cposix\nsystem\n.")
    (directory / "truncated.safetensors").write_bytes(files["wide"].read_bytes()[:-100])
    (directory / "huge.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    return {path.stem: path for path in directory.iterdir()} | {"missing": directory / "missing.safetensors"}


@pytest.mark.parametrize("name", ["nan", "shape", "other", "pickle", "truncated", "huge", "missing"])
def test_a_bad_file_is_refused_and_changes_nothing(
    name: str, engine: DiffGenerator, files: Mapping[str, Path], bad_files: Mapping[str, Path]
) -> None:
    """The fixture compares the model's results with those of before, to the bit."""
    engine.set_lora("wide", str(files["wide"]), strength=0.8)
    expected = latents_of(engine)
    for mode in ("dynamic", "merge"):
        error = refusal(lambda mode=mode: engine.set_lora("bad", str(bad_files[name]), merge_mode=mode))
        assert (error.code, error.http_status, error.param) == ("invalid_lora", 400, "lora_path")
    assert active(engine) == {"wide": (0.8, "unmerged")}
    assert [each["nickname"] for each in engine.list_loras()["loaded_adapters"]] == ["wide"]
    np.testing.assert_array_equal(latents_of(engine), expected)


def test_of_several_adapters_one_bad_one_refuses_all(
    engine: DiffGenerator, files: Mapping[str, Path], bad_files: Mapping[str, Path]
) -> None:
    refusal(lambda: engine.set_lora(["wide", "bad"], [str(files["wide"]), str(bad_files["nan"])]))
    assert engine.list_loras() == {"loaded_adapters": [], "active": {}}


def test_names_that_are_taken_or_unknown_are_refused(engine: DiffGenerator, files: Mapping[str, Path]) -> None:
    engine.set_lora("wide", str(files["wide"]))
    taken = refusal(lambda: engine.set_lora("wide", str(files["narrow"])))
    assert (taken.code, taken.param) == ("lora_name_taken", "lora_nickname")
    engine.set_lora("wide", str(files["wide"]), strength=0.1)
    for call in (
        lambda: engine.set_lora("wibe"),
        lambda: engine.remove_lora("wibe"),
        lambda: latents_of(engine, lora=["wibe"]),
    ):
        unknown = refusal(call)
        assert unknown.code == "unknown_lora" and "loaded are wide" in unknown.message
    engine.set_lora([])
    assert refusal(engine.merge_lora_weights).code == "invalid_lora"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"lora_nickname": "a/b"}, InvalidValue),
        ({"lora_nickname": ["a", "a"]}, InvalidValue),
        ({"lora_nickname": ["a", "b"], "strength": [1.0]}, InvalidValue),
        ({"lora_nickname": ["a", "b"], "lora_path": "x"}, InvalidValue),
        ({"lora_nickname": "a", "strength": float("nan")}, InvalidValue),
        ({"lora_nickname": "a", "merge_mode": "perhaps"}, InvalidValue),
        ({"lora_nickname": None}, MissingParameter),
    ],
)
def test_fields_that_say_nothing_possible_are_refused(
    values: dict[str, Any], error: type[Exception], shared: DiffGenerator
) -> None:
    with pytest.raises(error):
        shared.set_lora(**values)
    with pytest.raises(UnsupportedParameter):
        shared.merge_lora_weights(target="transformer")


# --- at launch ---


@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_an_engine_starts_with_an_adapter(
    mode: str, checkpoint: Path, files: Mapping[str, Path], shared: DiffGenerator, plain: Latents
) -> None:
    shared.set_lora("w", str(files["wide"]))
    expected = latents_of(shared, lora=["w:0.6"])
    shared.remove_lora("w")
    options: dict[str, Any] = {"lora_path": str(files["wide"].parent), "lora_weight_name": "wide.safetensors",
                               "lora_scale": 0.6, "lora_merge_mode": mode, "precision": "fp32"}  # fmt: skip
    with DiffGenerator.from_pretrained(str(checkpoint), **options) as engine:
        assert active(engine) == {"default": (0.6, "merged" if mode == "merge" else "unmerged")}
        np.testing.assert_allclose(latents_of(engine), expected, rtol=1e-3, atol=1e-4)
        [pid] = engine.status().worker_pids
        if mode == "merge":
            engine.unmerge_lora_weights()
            os.kill(pid, signal.SIGKILL)
        np.testing.assert_array_equal(latents_of(engine, lora=[]), plain)


def test_an_engine_with_a_bad_adapter_does_not_start(checkpoint: Path, bad_files: Mapping[str, Path]) -> None:
    with pytest.raises(RemoteError, match="holds values that are not finite"):
        DiffGenerator.from_pretrained(str(checkpoint), lora_path=str(bad_files["nan"]))
