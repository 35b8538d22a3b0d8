"""Pictures of unfinished results: what they are made of, when there are some, and that they change nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import UnsupportedParameter
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationEvent
from sglang.multimodal_gen.runtime.entrypoints.generation_result import GenerationResult
from sglang.multimodal_gen.runtime.managers import preview_renderer, previews
from sglang.multimodal_gen.runtime.managers.fair_share import Account
from sglang.multimodal_gen.runtime.managers.messages import Preview, PreviewTaken, Progress, WatchRequest
from sglang.multimodal_gen.runtime.managers.output_link import Ledger, OutputLink
from sglang.multimodal_gen.runtime.managers.output_messages import PreviewRendered, RenderPreview
from sglang.multimodal_gen.runtime.managers.preview_renderer import PreviewRenderer
from sglang.multimodal_gen.runtime.managers.preview_source import PreviewSource
from sglang.multimodal_gen.runtime.managers.previews import Previews, preview_steps
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.run_dir import OwnedRunDir, RunDir
from sglang.multimodal_gen.runtime.managers.timing import UNLEARNED_DEADLINE_S, LearnedTimes
from sglang.multimodal_gen.runtime.managers.worker_messages import (
    Admit,
    Admitted,
    PreviewLatents,
    Release,
    Tick,
    TickDone,
    Unit,
)
from sglang.multimodal_gen.runtime.models.schedulers import build_sampler
from sglang.multimodal_gen.runtime.models.schedulers.multistep import clean_sample
from sglang.multimodal_gen.runtime.pipelines_core.previews import Previewer, fitted, small_version
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.postprocess.previews import LONGEST_SIDE, colours, encode_clip
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.media import picture
from sglang.multimodal_gen.test.pipeline_parity import load, run
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux
from sglang.multimodal_gen.test.tiny_hunyuan_video import TINY_HUNYUAN_VIDEOS, save_tiny_hunyuan_video
from sglang.multimodal_gen.test.tiny_ltx import TINY_LTXS, save_tiny_ltx
from sglang.multimodal_gen.test.worker_case import InProcessWorker

null_family.register()


# --- what a preview is made of ---


def test_a_linear_decoder_is_found_exactly() -> None:
    """Up to the 255 levels of its pixels; the first frame has a map of its own, the others are four frames each."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 3, 8, 8, generator=generator)
    maps = torch.randn(2, 4, 3, generator=generator) * 0.15
    rows = torch.cat((latents, torch.ones(1, 3, 8, 8)))
    shown = torch.stack([torch.einsum("chw,cn->hwn", rows[:, t], maps[min(t, 1)]) for t in range(3)])
    pixels = ((shown + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    frames = torch.cat([pixels[:1], pixels[1:].repeat_interleave(4, dim=0)])
    frames = frames.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    basis = fitted(latents, frames, frame_stride=4, patch=2)
    found = colours(latents.numpy(), basis.weights.numpy(), patch=2)
    assert found.shape == (3, 16, 16, 3)
    expected = pixels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).numpy()
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 3


def test_a_large_result_is_decoded_small_and_a_small_one_as_it_is() -> None:
    small = torch.randn(4, 2, 12, 16)
    assert small_version(small, 8) == (small, True)
    shrunk, is_whole = small_version(torch.randn(4, 2, 64, 128), 8)
    assert (tuple(shrunk.shape), is_whole) == ((4, 2, 8, 16), False)
    assert small_version(torch.randn(4, 1, 16, 16), 32)[0].shape[2:] == (8, 8)


def test_the_clean_sample_is_found_at_any_noise_level_in_both_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
    for inverted in (False, True):
        sampler = build_sampler({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": inverted})
        state = sampler.begin(sampler.schedule(4))
        state.step_index = 2
        velocity = clean - noise if inverted else noise - clean
        found = clean_sample(velocity, sampler.add_noise(clean, noise, state), state)
        torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5)  # fp32 rounding


FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], RequestInputs]] = {
    "pictures": (
        lambda path: save_tiny_flux(path, next(iter(TINY_FLUXES.values()))),
        {"width": 64, "height": 32, "num_frames": 1},
        EMPTY,
    ),
    "a decoder with noise of its own": (
        lambda path: save_tiny_ltx(path, TINY_LTXS["noisy"]),
        {"width": 64, "height": 32, "num_frames": 17},
        EMPTY,
    ),
    "frames before the clip": (
        lambda path: save_tiny_ltx(path, TINY_LTXS["condition"]),
        {"width": 64, "height": 32, "num_frames": 9},
        RequestInputs(last_image=picture(64, 32)),
    ),
    "skipped frames": (
        lambda path: save_tiny_hunyuan_video(path, TINY_HUNYUAN_VIDEOS["i2v_33ch"]),
        {"width": 48, "height": 32, "num_frames": 9, "max_sequence_length": 16},
        RequestInputs(images=(picture(37, 50),)),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_latents_can_be_seen_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    save, size, inputs = FAMILIES[name]
    pipeline = load(save(tmp_path / "m"))
    wish = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 5, **size}
    plain, frames = run(pipeline, wish, inputs)
    previewer = Previewer(pipeline.stages, frame_stride=pipeline.limits().frame_stride)
    req = pipeline.admit("seen", SamplingParams.from_values(wish), inputs)
    steps, outputs = [], []
    with torch.inference_mode():
        for phase in req.phases:
            for _ in range(phase.units):
                req.keeps_clean = phase.lane == "denoise"
                outputs += pipeline.run_unit(phase.name, [req])
                view = previewer.view(req) if phase.lane == "denoise" else None
                if view is not None:
                    steps.append(view.step)
                    assert req.latent_shape is not None and view.latents.shape[1] == req.latent_shape[1]
                    shown = colours(view.latents.numpy(), view.basis.weights.numpy(), patch=view.basis.patch)
                    assert shown.shape[1] * wish["width"] == shown.shape[2] * wish["height"]
    assert steps == [1, 2, 3, 4]
    assert plain.latents is not None and req.latents is not None and torch.equal(plain.latents, req.latents)
    assert np.array_equal(torch.cat([output.frames for output in outputs]).numpy(), frames)
    previewer.forget("seen")


def test_the_last_picture_on_the_way_is_the_result(tmp_path: Path) -> None:
    """After the last step nothing is left to predict; a small picture is fitted on all of itself."""
    pipeline = load(save_tiny_flux(tmp_path / "m", next(iter(TINY_FLUXES.values()))))
    wish = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 1, "width": 64, "height": 64, "num_frames": 1}
    req = pipeline.admit("r", SamplingParams.from_values(wish))
    previewer = Previewer(pipeline.stages, frame_stride=1)
    outputs, views = [], []
    with torch.inference_mode():
        for phase in req.phases:
            for _ in range(phase.units):
                req.keeps_clean = phase.lane == "denoise"
                outputs += pipeline.run_unit(phase.name, [req])
                views += [previewer.view(req)] if phase.lane == "denoise" else []
    last = views[-1]
    assert last is not None and req.latents is not None
    torch.testing.assert_close(last.latents, req.latents, rtol=1e-4, atol=1e-4)  # as Euler's last step, summed up
    shown = colours(last.latents.numpy(), last.basis.weights.numpy(), patch=last.basis.patch)[0]
    result = np.asarray(Image.fromarray(outputs[0].frames[0].numpy()).resize(shown.shape[1::-1], Image.Resampling.BOX))
    # Random weights make decoders that are far from linear; the mean colour is what they cannot get wrong.
    assert np.abs(shown.mean((0, 1)) - result.mean((0, 1))).max() < 3


class Worker(InProcessWorker):
    """`fits` are the ticks whose previews took time."""

    def __init__(self, pipeline: Any, directory: Path) -> None:
        super().__init__(pipeline, directory)
        self.fits: list[int] = []
        self._seq = 0

    def hold(self, *request_ids: str) -> None:
        """Admit them and encode their prompts."""
        wish = {"prompt": "x", "num_inference_steps": 40, "seed": 1, "width": 64, "height": 64, "num_frames": 1}
        for request_id in request_ids:
            assert isinstance(
                self._answer(Admit(request_id=request_id, params=SamplingParams.from_values(wish))), Admitted
            )
            for phase in self.worker.requests[request_id].phases:
                if phase.lane == "encode":
                    self.tick(encode=(Unit(request_id, phase.name, 0),))

    def step(self, *request_ids: str, seen: tuple[str, ...]) -> None:
        done = self.tick(denoise=tuple(Unit(each, "denoise", 0) for each in request_ids), previews=seen)
        if done.preview_ms > 0:
            self.fits.append(done.seq)

    def release(self, request_id: str) -> None:
        self.channel.inbox.put(Release(request_id=request_id))

    def tick(self, **lanes: Any) -> TickDone:
        """One with these lanes, which may be none."""
        self._seq += 1
        done = self._answer(Tick(seq=self._seq, epoch=0, **lanes))
        assert isinstance(done, TickDone) and not done.failures
        return done

    def _answer(self, message: Any) -> Any:
        """The last one: of a tick, what previews there are comes before."""
        return self.take(message, until=Admitted if isinstance(message, Admit) else TickDone)[-1]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(save_tiny_flux(tmp_path_factory.mktemp("flux") / "m", next(iter(TINY_FLUXES.values()))))


def test_a_request_alone_is_fitted_after_each_quarter_of_its_steps(flux: Any, tmp_path: Path) -> None:
    worker = Worker(flux, tmp_path)
    worker.hold("a")
    for _ in range(39):
        worker.step("a", seen=("a",))
    assert len(worker.fits) == 4


def test_who_shares_the_worker_waits_for_one_fit_in_twenty_ticks(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests are looked at, and each of them comes to its own."""
    worker, shown = Worker(flux, tmp_path), []
    monkeypatch.setattr(worker.previews, "_let_go", lambda request_id, view: shown.append(request_id))
    worker.hold("bystander", "a", "b")
    for _ in range(20):
        worker.step("bystander", "a", "b", seen=("a", "b"))
    assert len(worker.fits) == 1 and shown == ["a"] * 20
    for _ in range(19):
        worker.step("bystander", "a", "b", seen=("a", "b"))
    assert len(worker.fits) == 2 and shown[20:] == ["a", "b"] * 19


def test_what_many_requests_taught_stands_in_while_others_wait(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, shown = Worker(flux, tmp_path), []
    monkeypatch.setattr(worker.previews, "_let_go", lambda request_id, view: shown.append(request_id))
    for index in range(8):  # one after the other, alone
        worker.hold(f"alone {index}")
        worker.step(f"alone {index}", seen=(f"alone {index}",))
        worker.release(f"alone {index}")
    assert len(worker.fits) == len(shown) == 8
    worker.hold("bystander", "a", "b")
    for _ in range(11):
        worker.step("bystander", "a", "b", seen=("a", "b"))
    assert len(worker.fits) <= 9 and shown[8:] == ["a", "b"] * 11, "nobody waits for a picture"


def test_a_kind_of_result_that_cannot_be_fitted_is_not_tried_at_every_tick(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def broken(self: Previewer, req: Req, *_: Any) -> Any:
        tried.append(req.request_id)
        raise RuntimeError("no memory")

    monkeypatch.setattr(Previewer, "_decoded", broken)
    worker = Worker(flux, tmp_path)
    worker.hold("a", "b", "c")
    for _ in range(3):
        worker.step("a", "b", "c", seen=("a", "b", "c"))
    assert tried == ["a"]


def test_a_tick_with_previews_may_take_as_long_as_the_slowest_before() -> None:
    learned = LearnedTimes()
    learned.record("a", 2.0, 1)
    assert learned.deadline_s({"a": 1}, has_previews=True) == UNLEARNED_DEADLINE_S
    for seconds in (1.5, 0.1):
        learned.record_preview(seconds)
    assert learned.deadline_s({"a": 1}, has_previews=True) == learned.deadline_s({"a": 1}) + 2 * 1.5


# --- when there are previews ---


@pytest.mark.parametrize(
    ("number", "total", "steps"),
    [(0, 10, []), (1, 10, [5]), (3, 20, [5, 10, 15]), (3, 4, [1, 2, 3]), (3, 2, [1]), (3, 1, []), (100, 4, [1, 2, 3])],
)
def test_previews_are_spread_between_start_and_result(number: int, total: int, steps: list[int]) -> None:
    assert sorted(preview_steps(number, total)) == steps


class Desk:
    """The scheduler's side with one running request of 10 steps, and what it sends."""

    def __init__(self, run_dir: RunDir, *, num_previews: int = 0, max_per_second: float = 2.0) -> None:
        params = SamplingParams(prompt="x", num_previews=num_previews)
        self.record = RequestRecord(request_id="r", client=b"me", params=params, order=0, max_attempts=1)
        phases = (
            Phase(name="high", lane="denoise", units=4, batch_key="a", cost=1.0, peak_bytes=1),
            Phase(name="low", lane="denoise", units=6, batch_key="b", cost=1.0, peak_bytes=1),
        )
        self.record.begin(Admitted(request_id="r", phases=phases), Account())
        self.requests = {"r": self.record}
        self.told: list[Preview] = []
        self.ledger = Ledger(run_dir)
        self.previews = Previews(
            self.requests,
            lambda record, preview: self.told.append(preview),
            ledger=self.ledger,
            output=OutputLink(socket=None),  # type: ignore[arg-type] - nothing is sent before an output process is there
            max_per_second=max_per_second,
        )

    def steps(self) -> list[int]:
        """Those after which there is a preview, of all in a row."""
        units = [Unit("r", "high", index) for index in range(4)] + [Unit("r", "low", index) for index in range(6)]
        return [step for step, unit in enumerate(units, 1) if self.previews.choose((unit,), self.requests)]

    def render(self, step: int) -> None:
        self.previews.on_rendered(PreviewRendered(request_id="r", step=step, media_type="image/png", image=b"x"))

    def heard(self, message: WatchRequest | PreviewTaken, client: bytes = b"me") -> None:
        self.previews.heard(client, message)


@pytest.fixture
def run_dir() -> Iterator[RunDir]:
    owned = OwnedRunDir()
    yield owned.paths
    owned.close()


def test_steps_count_over_all_phases_and_the_last_has_no_preview(run_dir: RunDir) -> None:
    assert Desk(run_dir, num_previews=4).steps() == [2, 4, 6, 8]
    assert Desk(run_dir).steps() == []


def test_a_watched_request_has_no_more_previews_a_second_than_allowed(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(np.arange(100, 200, 0.2))  # a step takes 0.2 s
    monkeypatch.setattr(previews.time, "monotonic", lambda: float(next(now)))
    desk = Desk(run_dir, max_per_second=2.0)
    desk.heard(WatchRequest(request_id="r", watched=True))
    assert desk.steps() == [1, 4, 7]
    desk.heard(WatchRequest(request_id="r", watched=False))
    assert desk.steps() == []


def test_a_server_that_makes_no_previews_makes_none_for_anybody(run_dir: RunDir) -> None:
    none = Desk(run_dir, num_previews=4, max_per_second=0.0)
    assert none.steps() == []
    none.heard(WatchRequest(request_id="r", watched=True))
    assert none.steps() == []


def test_only_the_client_that_asked_is_listened_to(run_dir: RunDir) -> None:
    desk = Desk(run_dir)
    desk.heard(WatchRequest(request_id="r", watched=True), client=b"another")
    desk.heard(WatchRequest(request_id="no such", watched=True))
    assert desk.steps() == []


def test_a_slow_client_gets_the_newest_and_is_never_sent_more_than_one(run_dir: RunDir) -> None:
    desk = Desk(run_dir)
    desk.heard(WatchRequest(request_id="r", watched=True))
    for step in (1, 2, 3):
        desk.render(step)
    assert [preview.step for preview in desk.told] == [1]
    assert desk.steps() == [], "nothing is made for who does not take what there is"
    desk.heard(PreviewTaken(request_id="r"))
    assert [(preview.step, preview.total_steps) for preview in desk.told] == [(1, 10), (3, 10)]
    desk.heard(PreviewTaken(request_id="r"))
    assert len(desk.told) == 2 and desk.steps() == [1]
    del desk.requests["r"]
    desk.previews.forget("r")
    desk.render(4)
    assert len(desk.told) == 2


def test_latents_of_a_request_that_has_ended_are_thrown_away(run_dir: RunDir) -> None:
    desk = Desk(run_dir)
    kept, gone = (run_dir.put(np.zeros((1, 1, 2, 2), np.float32)) for _ in range(2))
    for request_id, array in (("r", kept), ("ended", gone)):
        desk.previews.on_latents(PreviewLatents(request_id=request_id, step=1, latents=array, basis=b"", patch=1))
    assert run_dir.exists(kept.file) and not run_dir.exists(gone.file)
    desk.ledger.drop_request("r")
    assert not run_dir.exists(kept.file)


# --- how they are made ---


def to_render(run_dir: RunDir, step: int, **params: Any) -> RenderPreview:
    latents = run_dir.put(np.full((1, 3, 2, 4), step / 10, np.float32))
    basis = np.ones((2, 2, 3), np.float32).tobytes()
    values = {"prompt": "x", "width": 640, "height": 320, "num_frames": 9, "fps": 4, **params}
    return RenderPreview(
        latents=PreviewLatents(request_id="r", step=step, latents=latents, basis=basis, patch=1),
        params=SamplingParams.from_values(values),
    )


def test_while_one_is_made_the_newest_takes_the_place_of_what_waits(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, render = threading.Event(), threading.Event(), preview_renderer.render

    def slow(message: RenderPreview, latents: np.ndarray) -> Any:
        begun.set()
        assert go_on.wait(10)
        return render(message, latents)

    monkeypatch.setattr(preview_renderer, "render", slow)
    made: list[int] = []
    renderer = PreviewRenderer(run_dir, lambda done: made.append(done.step))
    renderer.submit(to_render(run_dir, 1))
    assert begun.wait(10)
    replaced = to_render(run_dir, 2)
    for message in (replaced, to_render(run_dir, 3)):
        renderer.submit(message)
    assert not run_dir.exists(replaced.latents.latents.file)
    go_on.set()
    deadline = time.monotonic() + 10
    while made != [1, 3]:
        assert time.monotonic() < deadline, made
        time.sleep(0.01)


def test_what_cannot_be_made_is_left_out_and_the_next_is_made(run_dir: RunDir) -> None:
    made: list[int] = []
    renderer = PreviewRenderer(run_dir, lambda done: made.append(done.step))
    lost = to_render(run_dir, 1)
    run_dir.discard(lost.latents.latents)
    renderer.submit(lost)
    deadline = time.monotonic() + 10
    while renderer._waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    renderer.submit(to_render(run_dir, 2))
    while made != [2]:
        assert time.monotonic() < deadline, made
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("wish", "media_type", "size", "num_frames"),
    [
        ({}, "image/webp", (LONGEST_SIDE, LONGEST_SIDE // 2), 3),
        ({"num_frames": 1}, "image/png", (640, 320), 1),
        ({"num_frames": 1, "output_format": "jpeg", "output_compression": 90}, "image/jpeg", (640, 320), 1),
        ({"num_frames": 1, "output_format": "webp"}, "image/webp", (640, 320), 1),
        ({"num_frames": 1, "output_format": "mp4"}, "image/webp", (LONGEST_SIDE, LONGEST_SIDE // 2), 1),
        ({"width": 32, "height": 16}, "image/webp", (32, 16), 3),
    ],
)
def test_a_picture_is_as_its_result_and_a_clip_small_and_animated(
    run_dir: RunDir, wish: dict[str, Any], media_type: str, size: tuple[int, int], num_frames: int
) -> None:
    message = to_render(run_dir, 0, **wish)
    # Frames that are alike would be one.
    latents = run_dir.take(message.latents.latents)[:, :num_frames] - np.arange(num_frames)[:, None, None] / 2
    encoded = preview_renderer.render(message, latents)
    with Image.open(io.BytesIO(encoded.image)) as image:
        assert (encoded.media_type, image.get_format_mimetype()) == (media_type, media_type)
        assert (image.size, getattr(image, "n_frames", 1)) == (size, num_frames)


def test_an_animation_takes_as_long_as_its_clip() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_clip(frames, width=8, height=8, seconds=2.0).image)) as image:
        image.load()
        assert image.info["duration"] == 500


class Broken:
    """Stands for a pipeline whose decoder fails."""

    gives_previews = True
    stages = ()

    @staticmethod
    def limits() -> Any:
        return null_family.NullPipeline.limits(null_family.NullPipeline.__new__(null_family.NullPipeline))


def test_a_preview_that_fails_costs_its_request_the_others_and_nothing_else(run_dir: RunDir) -> None:
    sent: list[PreviewLatents] = []
    source = PreviewSource(Broken(), run_dir, sent.append)
    req = Req(request_id="r", params=SamplingParams(prompt="x", seed=1, height=16))
    req.latent_shape, req.latents = (1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    [wanted] = source.want([req])
    wanted.clean_latents = torch.zeros(1, 1, 2, 2)
    source.take([wanted], failed=False)
    assert (source.want([req]), sent) == ([], [])
    source.release("r")
    assert source.want([req]) == [req]
    source.take([req], failed=True)
    assert not req.keeps_clean


# --- the engine ---


@pytest.fixture(scope="module")
def engine(wan_checkpoint: Callable[[str], Path]) -> Iterator[DiffGenerator]:
    path = str(wan_checkpoint("plain"))
    with DiffGenerator.from_pretrained(path, device="cpu", preview_max_per_second=30.0) as generator:
        yield generator


WISH = {
    "prompt": "a red circle",
    "width": 48,
    "height": 32,
    "seed": 3,
    "num_inference_steps": 60,
    "return_frames": True,
}


def seen(events: list[GenerationEvent]) -> list[Preview]:
    return [item.event for item in events if isinstance(item.event, Preview)]


@pytest.mark.parametrize(("num_frames", "media_type"), [(1, "image/png"), (9, "image/webp")])
def test_a_request_is_seen_on_the_way_and_ends_with_equal_bytes(
    engine: DiffGenerator, num_frames: int, media_type: str
) -> None:
    wish = WISH | {"num_frames": num_frames}
    events = list(engine.stream(wish | {"num_previews": 3}))
    found = seen(events)
    # The newest replaces what was not sent, and the result does not wait for what is still being made.
    assert found and {preview.step for preview in found} <= {15, 30, 45}
    for preview in found:
        assert (preview.total_steps, preview.media_type) == (60, media_type)
        with Image.open(io.BytesIO(preview.image)) as image:
            assert image.size == (48, 32)
    result, plain = events[-1].event, engine.generate(wish)
    assert isinstance(result, GenerationResult) and isinstance(plain, GenerationResult)
    assert result.frames is not None and plain.frames is not None and np.array_equal(result.frames, plain.frames)
    assert engine.status().ledger_files == 0


def test_a_request_is_seen_while_somebody_watches_it(engine: DiffGenerator) -> None:
    """It asked for no previews itself."""
    found: list[Preview] = []
    events = engine.stream(WISH | {"num_frames": 9, "num_inference_steps": 1000})
    for item in events:
        if isinstance(item.event, Progress) and item.event.step == 1:
            engine.watch(item.request_id)
        if isinstance(item.event, Preview):
            found.append(item.event)
        if len(found) == 2:
            break
    events.close()
    assert found[0].step < found[1].step


def test_an_asyncio_program_sees_the_same_events_and_may_leave_early(engine: DiffGenerator) -> None:
    async def watch() -> list[GenerationEvent]:
        return [item async for item in engine.stream_async(WISH | {"num_frames": 1, "num_previews": 3})]

    async def leave() -> str:
        async with contextlib.aclosing(engine.stream_async(WISH | {"num_inference_steps": 1000})) as events:
            async for item in events:
                if isinstance(item.event, Progress) and item.event.step >= 2:
                    return item.request_id
        raise AssertionError("it ended before its time")

    items = asyncio.run(watch())
    steps = [item.event.step for item in items if isinstance(item.event, Progress)]
    assert steps == sorted(steps) and steps[-1] == 60
    assert {preview.step for preview in seen(items)} <= {15, 30, 45} and seen(items)
    assert isinstance(items[-1].event, GenerationResult)
    asyncio.run(leave())
    deadline = time.monotonic() + 10
    while engine.status().num_running:
        assert time.monotonic() < deadline, "who leaves early takes the request along"
        time.sleep(0.02)


def test_a_model_without_previews_says_so() -> None:
    with (
        DiffGenerator.from_pretrained("null-model") as engine,
        pytest.raises(UnsupportedParameter, match=r"^num_previews: not supported here, null-model"),
    ):
        engine.generate({"prompt": "x", "num_previews": 1})
