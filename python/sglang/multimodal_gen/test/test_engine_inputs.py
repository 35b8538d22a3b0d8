"""Images, masks and videos on their way to the worker and back out of the run directory: real processes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq
from PIL import Image

from sglang.cli.main import main
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import RemoteError, ServingError, StorageError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.entrypoints.engine_client import EngineClient
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import Clip, DecodedInputs
from sglang.multimodal_gen.runtime.managers.messages import (
    Cancelled,
    CancelRequest,
    Codec,
    Failed,
    GenerateRequest,
    MappedArray,
    MediaInputs,
    Progress,
    Started,
    ToClient,
    encode,
)
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, ModelArgs
from sglang.multimodal_gen.test import null_family

null_family.register()


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("image-model", batching_max_size=2) as generator:
        yield generator


@pytest.fixture(autouse=True)
def _nothing_stays(engine: DiffGenerator) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while left := files(engine):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert engine.status().ledger_files == 0


def files(engine: DiffGenerator) -> list[str]:
    paths = run_dir(engine)
    return [p.name for d in (paths.base, paths.fast) if d is not None for p in d.glob("m-*")]


def run_dir(engine: DiffGenerator) -> RunDir:
    return engine._engine.client.run_dir


def picture(value: int, width: int = 32, height: int = 16) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


MASK = np.full((16, 32), 9, np.uint8)


def saw(results: GenerationResult | list[GenerationResult]) -> list[list[int]]:
    """Of each output, what the worker saw; see `null_family.seen`."""
    each = results if isinstance(results, list) else [results]
    return [result.frames[0, 0, :6, 0].tolist() for result in each if result.frames is not None]


def wish(**more: Any) -> dict[str, Any]:
    return {"prompt": "x", "return_frames": True, "image_path": picture(7), **more}


# --- what arrives ---


def test_all_kinds_of_inputs_arrive_as_they_were_given(engine: DiffGenerator, tmp_path: Path) -> None:
    Image.fromarray(picture(4)).save(tmp_path / "four.png")
    inputs = {
        "image_path": [tmp_path / "four.png", Image.fromarray(picture(5))],
        "mask_path": MASK,
        "last_image_path": picture(6),
        "video_path": [picture(8), picture(8), picture(8)],
        "strength": 0.5,
    }
    assert saw(engine.generate(wish(**inputs))) == [[4, 5, 9, 6, 8, 3]]


def test_several_outputs_share_the_content_and_each_way_in_takes_inputs(engine: DiffGenerator) -> None:
    several = wish(prompt=["a", "b"], num_outputs_per_prompt=2)
    expected = [[7, 0, 0, 0, 0, 0]] * 4
    assert saw(engine.generate(several)) == expected
    assert saw(asyncio.run(engine.generate_async(several))) == expected
    results = [e.event for e in engine.stream(several) if isinstance(e.event, GenerationResult)]
    assert saw(results) == expected


def test_the_size_follows_from_the_first_image_unless_it_is_given(engine: DiffGenerator) -> None:
    def size(**more: Any) -> tuple[int, int]:
        result = engine.generate(wish(image_path=[picture(1, 64, 16), picture(2)], **more))
        assert isinstance(result, GenerationResult)
        return result.size[1], result.size[0]

    assert size() == (128, 32)
    assert size(max_area=256 * 256) == (512, 128)
    assert size(width=48, height=16) == (48, 16)
    with pytest.raises(ServingError, match="height: not given, accepted is height with width, or neither") as caught:
        size(width=48)
    assert (caught.value.code, caught.value.param) == ("incompatible_parameters", "height")


def test_writing_into_an_input_stays_in_the_process_that_does(engine: DiffGenerator) -> None:
    paths = run_dir(engine)
    ref = paths.put(picture(7))
    mapped = paths.map(ref)
    mapped[...] = 0
    assert paths.map(ref)[0, 0, 0] == 7
    paths.discard(ref)


# --- what is refused ---


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ({"image_path": [picture(1)] * 3}, "too_many_images", "image_path: got 3 images, accepted is up to 2 images"),
        ({"image_path": None, "mask_path": MASK}, "incompatible_parameters", "accepted is mask_path with image_path"),
        ({"image_path": None, "strength": 0.5}, "incompatible_parameters", "accepted is strength with image_path"),
        ({"strength": 0}, "out_of_range", "strength: got 0.0, accepted is a number from 0.001 to 1"),
        ({"mask_path": MASK[:, :16]}, "invalid_mask", "mask_path: has 16x16 pixels, accepted are the 32x16 of image"),
        ({"image_path": "no/such.png"}, "invalid_image", "image_path: no/such.png: cannot be read: No such file"),
        ({"image_path": [picture(1), "."]}, "invalid_image", "image_path 2: .: cannot be read: Is a directory"),
        ({"image_path": 5}, "invalid_type", "image_path: got 5, accepted is a path, a PIL image or a uint8 array"),
        ({"image_path": []}, "invalid_type", "accepted is an image or a list of images"),
        ({"cfg_interval_start": 0.6, "cfg_interval_end": 0.5}, "invalid_value", "at most cfg_interval_end, which is"),
    ],
)
def test_what_the_model_does_not_take_is_refused_at_the_door(
    engine: DiffGenerator, more: dict[str, Any], code: str, says: str
) -> None:
    ticks = engine.status().ticks
    with pytest.raises(ServingError, match=says) as caught:
        engine.generate(wish(**more))
    assert caught.value.code == code
    assert engine.status().ticks == ticks


# --- nothing stays: the fixture looks after each test ---


def test_inputs_stay_while_the_request_may_run_again(engine: DiffGenerator, tmp_path: Path) -> None:
    """Its worker dies, so that it is admitted a second time."""
    result = engine.generate(wish(prompt=f"die-once-{tmp_path / 'died'}"))
    assert isinstance(result, GenerationResult)
    assert result.metrics["attempts"] == 2
    assert saw(result) == [[7, 0, 0, 0, 0, 0]]


def test_a_failing_and_a_killing_request_leave_no_inputs(engine: DiffGenerator) -> None:
    for fault in ("fail", "die"):
        with pytest.raises(RemoteError):
            engine.generate(wish(prompt=fault))


def test_a_cancelled_request_leaves_no_inputs(engine: DiffGenerator) -> None:
    with contextlib.closing(engine.stream(wish(prompt="sleep-20", num_inference_steps=500))) as events:
        for item in events:
            if isinstance(item.event, Progress):
                assert len(files(engine)) == engine.status().ledger_files == 1
                break


def test_a_refused_message_leaves_its_inputs_only_when_they_are_another_requests(engine: DiffGenerator) -> None:
    params = SamplingParams(
        prompt="sleep-50", width=16, height=16, num_frames=5, fps=8, num_inference_steps=100, seed=1
    )  # fmt: skip
    paths = run_dir(engine)
    shared, own = (MediaInputs(images=(paths.put(picture(1)),)) for _ in range(2))
    with raw_client(engine) as socket:
        for inputs in (shared, shared, own):
            socket.send(encode(GenerateRequest(request_id="twice", params=params, inputs=inputs)))
        answers = [Codec(ToClient).decode(socket.recv()) for _ in range(3)]
        assert sum(isinstance(answer, Failed) for answer in answers) == 2
        assert files(engine) == [shared.images[0].file]
        socket.send(encode(CancelRequest(request_id="twice")))
        while not isinstance(Codec(ToClient).decode(socket.recv()), Cancelled):
            pass


@pytest.mark.parametrize("file", ["m-gone", "../scheduler.sock", "lock"])
def test_inputs_that_are_not_there_fail_the_request_alone(engine: DiffGenerator, file: str) -> None:
    params = SamplingParams(prompt="x", width=16, height=16, num_frames=5, fps=8, num_inference_steps=1, seed=1)
    inputs = MediaInputs(images=(MappedArray(file=file, shape=(16, 16, 3), dtype="|u1"),))
    with raw_client(engine) as socket:
        socket.send(encode(GenerateRequest(request_id="lost", params=params, inputs=inputs)))
        while not isinstance(answer := Codec(ToClient).decode(socket.recv()), Failed):
            pass
        assert answer.error.code == StorageError.code
    assert len(saw(engine.generate(wish()))) == 1


@contextlib.contextmanager
def raw_client(engine: DiffGenerator) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger, socket.rcvtimeo = 0, 10_000
        socket.connect(run_dir(engine).scheduler_address)
        yield socket


def test_a_scheduler_that_dies_leaves_no_inputs(engine: DiffGenerator) -> None:
    """The client that sent them is still there and knows them."""
    children = psutil.Process(engine._engine._child.pid).children(recursive=True)
    scheduler = next(p for p in children if any("managers.scheduler" in part for part in p.cmdline()))
    events = engine.stream(wish(prompt="sleep-20", num_inference_steps=1000))
    started = next(item for item in events if isinstance(item.event, Started))
    assert started.request_id
    threading.Timer(0.1, scheduler.kill).start()
    assert isinstance([item.event for item in events][-1], ServingError)
    assert files(engine) == []
    assert saw(engine.generate(wish())) == [[7, 0, 0, 0, 0, 0]]


def test_a_saved_state_belongs_to_the_inputs_that_it_was_made_with() -> None:
    images = [RequestInputs(images=(picture(value),)) for value in (1, 1, 2)]
    masked = RequestInputs(images=(picture(1),), mask=MASK)
    last = RequestInputs(last_image=picture(1))
    video = [RequestInputs(video=picture(1)[None], video_fps=fps) for fps in (8.0, 16.0)]
    digests = [inputs.digest() for inputs in (*images, masked, last, *video, EMPTY)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1
    pipeline = build_pipeline(ModelArgs(model_path="image-model"), ExecutionArgs())
    params = SamplingParams(prompt="x", seed=1)
    identities = {pipeline.state_identity(pipeline.admit("r", params, inputs)) for inputs in images}
    assert len(identities) == 2
    assert pipeline.admit("r", params, masked).inputs is masked
    with pytest.raises(ServingError, match="got 3 images, accepted is up to 2 images"):
        pipeline.admit("r", params, RequestInputs(images=(picture(1),) * 3))


# --- the client ---


def test_stored_inputs_are_linked_once_per_request_and_go_with_the_block(tmp_path: Path) -> None:
    paths = RunDir(tmp_path, None)
    client = EngineClient(str(tmp_path), name="test")
    client.run_dir = paths
    decoded = DecodedInputs(images=(picture(3),), mask=MASK, video=Clip(frames=np.stack([picture(4)] * 2), fps=8.0))

    async def use() -> MediaInputs:
        async with client.stored(decoded) as stored:
            assert stored is not None and len(list(tmp_path.glob("m-*"))) == 3
            own = client._linked(stored)
            assert not {a.file for a in own.arrays} & {a.file for a in stored.arrays}
            with pytest.raises(StorageError):
                client._linked(MediaInputs(images=(*stored.images, MappedArray(file="m-no", shape=(1,), dtype="|u1"))))
            assert len(list(tmp_path.glob("m-*"))) == 6
        return own

    async def give_up() -> None:
        storing = asyncio.create_task(client.stored(decoded).__aenter__())
        await asyncio.sleep(0)
        storing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await storing

    asyncio.run(give_up())
    assert list(tmp_path.iterdir()) == [], "what was cancelled in the middle left nothing"
    own = asyncio.run(use())
    assert {p.name for p in tmp_path.iterdir()} == {a.file for a in own.arrays}
    assert (paths.map(own.images[0])[0, 0, 0], own.video_fps) == (3, 8.0)
    client._context.destroy(linger=0)


# --- warm-up ---


def test_a_model_that_needs_an_image_is_warmed_up_with_a_black_one() -> None:
    with DiffGenerator.from_pretrained("i2v-model", warmup_mode="server") as generator:
        assert generator.status().ticks > 0, "the warm-up ran"
        assert files(generator) == []
        assert saw(generator.generate(wish())) == [[7, 0, 0, 0, 0, 0]]
        with pytest.raises(ServingError, match="image_path: got nothing, accepted is one image"):
            generator.generate(wish(image_path=None))
        with pytest.raises(ServingError, match="mask_path: not supported here, the model works from text and one"):
            generator.generate(wish(mask_path=MASK))


def test_a_warm_up_before_a_request_has_inputs_of_the_same_shapes() -> None:
    with DiffGenerator.from_pretrained("image-model", warmup_mode="request") as generator:
        result = generator.generate(wish(mask_path=MASK, video_path=[picture(1)] * 2))
        assert isinstance(result, GenerationResult)
        assert result.metrics["warmup_excluded"]
        assert saw(result) == [[7, 0, 9, 0, 1, 2]]
        assert files(generator) == []


# --- the command line ---


def test_the_command_line_takes_files_and_says_at_once_which_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 40), ("b", 80), ("m", 255)):
        Image.fromarray(picture(value, 64, 64)).save(f"{name}.png")
    base = ["generate", "--model-path", "image-model", "--prompt", "x", "--num-frames", "1"]
    images = ["--image-path", "a.png", "--image-path", "b.png", "--mask-path", "m.png", "--strength", "0.6"]
    assert main([*base, *images, "--output-file-name", "out.png"]) == 0
    with Image.open("outputs/out.png") as made:
        assert made.size == (64, 64)
        assert np.asarray(made)[0, :3, 0].tolist() == [40, 80, 255]
        assert "png" not in str(made.info) and "0.6" in str(made.info), "the strength is recorded, paths are not"
    capfd.readouterr()
    begin = time.monotonic()
    assert main([*base, "--image-path", "missing.png"]) != 0
    assert time.monotonic() - begin < 1.0, "no engine was started for it"
    assert "image_path: missing.png: cannot be read: No such file or directory" in capfd.readouterr().err
