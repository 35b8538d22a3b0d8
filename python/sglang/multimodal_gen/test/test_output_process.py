"""The output process in a running engine: what it saves beside and inside a file, and when it begins."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq
from PIL import Image

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import IncompatibleParameters
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import Codec, encode
from sglang.multimodal_gen.runtime.managers.output_messages import (
    DropOutput,
    OpenOutput,
    OutputDone,
    OutputFrames,
    OutputHello,
)
from sglang.multimodal_gen.runtime.managers.output_process import OutputJob, OutputProcess
from sglang.multimodal_gen.runtime.managers.run_dir import OwnedRunDir
from sglang.multimodal_gen.runtime.postprocess.metadata import read_metadata
from sglang.multimodal_gen.runtime.postprocess.storage import LocalStorage
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.clips import decode

null_family.register()


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("null-model") as generator:
        yield generator


def save(engine: DiffGenerator, directory: Path, **wishes: Any) -> GenerationResult:
    result = engine.generate({"prompt": "x", "seed": 7, "save_output": True, "output_path": directory, **wishes})
    assert isinstance(result, GenerationResult)
    return result


def test_an_output_comes_with_its_images_and_says_what_made_it(engine: DiffGenerator, tmp_path: Path) -> None:
    result = save(engine, tmp_path, thumbnail=True, contact_sheet=True, guidance_scale=2.0, negative_prompt="y")
    assert result.output_file_path is not None
    assert decode(Path(result.output_file_path))[0].shape == (5, 16, 16, 3)
    for path, size in ((result.thumbnail_path, (16, 16)), (result.contact_sheet_path, (48, 32))):
        assert path is not None
        with Image.open(path) as image:
            assert image.size == size
    found = read_metadata(result.output_file_path)
    assert found.pop("software").startswith("sglang-diffusion ")
    assert found == {
        "prompt": "x", "negative_prompt": "y", "width": 16, "height": 16, "num_frames": 5, "fps": 8,
        "num_inference_steps": 4, "guidance_scale": 2.0, "guidance_rescale": 0.0, "seed": 7, "model": "null-model",
    }  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 3


def test_an_output_comes_alone_unless_more_is_asked_for(engine: DiffGenerator, tmp_path: Path) -> None:
    result = save(engine, tmp_path, metadata=False, num_frames=1)
    assert (result.thumbnail_path, result.contact_sheet_path) == (None, None)
    assert result.output_file_path is not None and read_metadata(result.output_file_path) == {}
    assert len(list(tmp_path.iterdir())) == 1


def test_equal_requests_give_equal_files_wherever_they_go(engine: DiffGenerator, tmp_path: Path) -> None:
    wishes = [{"output_file_name": name} for name in ("a.mp4", "b.mp4")]
    paths = [save(engine, tmp_path / str(i), **wish).output_file_path for i, wish in enumerate(wishes)]
    assert Path(paths[0] or "").read_bytes() == Path(paths[1] or "").read_bytes()


@pytest.mark.parametrize("name", ["thumbnail", "contact_sheet"])
def test_an_image_beside_nothing_is_refused(engine: DiffGenerator, name: str) -> None:
    with pytest.raises(IncompatibleParameters, match=f"^{name}: .* with save_output$"):
        engine.generate({"prompt": "x", name: True})


def test_a_file_grows_while_its_last_frames_are_still_to_be_decoded(engine: DiffGenerator, tmp_path: Path) -> None:
    marker, directory = tmp_path / "marker", tmp_path / "results"
    wishes = {"prompt": f"noise-until-{marker}", "num_frames": 201, "width": 64, "height": 64}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(save, engine, directory, **wishes)
        try:
            deadline = time.monotonic() + 30
            while unfinished_bytes(directory) == 0:
                assert time.monotonic() < deadline and not running.done(), "nothing was encoded before the last frame"
                time.sleep(0.02)
            assert not list(directory.iterdir()), "not to be seen before it is whole"
        finally:
            marker.touch()
        result = running.result()
    assert decode(Path(result.output_file_path or ""))[0].shape == (201, 64, 64, 3)


def unfinished_bytes(directory: Path) -> int:
    """What the output process of our engine has written to files of `directory` that have no name yet."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        if any(part.endswith(".output_process") for part in process.cmdline()):
            for file in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    total += file.stat().st_size if str(file.readlink()).startswith(f"{directory}/") else 0
    return total


def test_an_output_that_is_dropped_and_opened_again_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its request is put aside: taking the first one's file away may last until after the second began."""
    dropped = threading.Event()

    def abandon_late(_: OutputJob) -> None:
        time.sleep(0.3)
        dropped.set()

    monkeypatch.setattr(OutputJob, "abandon", abandon_late)
    owned = OwnedRunDir()
    paths, codec = owned.paths, Codec(OutputHello | OutputDone)
    with zmq.Context() as context, context.socket(zmq.PAIR) as scheduler:
        scheduler.bind(paths.output_address)
        threading.Thread(target=OutputProcess(paths, model="null", storage=LocalStorage()).run, daemon=True).start()
        assert isinstance(codec.decode(scheduler.recv()), OutputHello)
        params = SamplingParams.from_values({"prompt": "x", "return_frames": True})
        for message in (
            OpenOutput(request_id="r", params=params, num_frames=2, directory=None),
            DropOutput(request_id="r"),
            OpenOutput(request_id="r", params=params, num_frames=2, directory=None),
        ):
            scheduler.send(encode(message))
        assert dropped.wait(10)
        time.sleep(0.1)  # the first one's thread ends
        frames = np.full((2, 4, 4, 3), 7, dtype=np.uint8)
        scheduler.send(encode(OutputFrames(request_id="r", first_frame=0, last=True, frames=paths.put(frames))))
        assert scheduler.poll(10_000), "its frames were thrown away"
        done = codec.decode(scheduler.recv())
        assert isinstance(done, OutputDone) and done.frames is not None
        assert np.array_equal(paths.take(done.frames), frames)
    owned.close()
