"""Warm-up: before the first request, before the first of each size, or never."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator

import pytest
from msgspec import structs

from sglang.multimodal_gen.configs.model_info import InputLimits
from sglang.multimodal_gen.configs.sample.cache_params import check_caches
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue, RemoteError
from sglang.multimodal_gen.runtime.entrypoints.cli.reporting import LineDisplay, Reporter
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import EngineState
from sglang.multimodal_gen.runtime.managers.warm_up import InputShapes, WarmUp, input_shapes
from sglang.multimodal_gen.runtime.server_args import ServerArgs, WarmupArgs
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.test_admission import MODEL

null_family.register()


def test_only_a_server_on_a_gpu_warms_up_unasked() -> None:
    def mode(asked: str | None, *, serves_http: bool, device: str) -> str:
        return WarmUp(WarmupArgs(warmup_mode=asked)).choose_mode(serves_http=serves_http, device=device)

    assert mode(None, serves_http=True, device="cuda:0") == "server"
    assert mode(None, serves_http=True, device="cpu") == "off"
    assert mode(None, serves_http=False, device="cuda:0") == "off"
    assert mode("request", serves_http=True, device="cuda:0") == "request"
    assert mode("off", serves_http=True, device="cuda:0") == "off"


@pytest.mark.parametrize("size", ["832", "832x", "0x16", "axb", "1x2x3", "-16x16"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(InvalidValue, match=r"warmup_resolutions: got .*, accepted is WIDTHxHEIGHT"):
        ServerArgs.from_kwargs(warmup_resolutions=[size])


def test_a_warm_up_has_every_input_that_the_model_requires() -> None:
    limits = InputLimits(min_images=1, max_images=1, requires_last_image=True, requires_video=True)
    shapes = input_shapes(limits, SamplingParams(width=32, height=16, num_frames=5))
    assert shapes == InputShapes(images=((16, 32, 3),), last_image=(16, 32, 3), video=(5, 16, 32, 3))
    assert input_shapes(InputLimits(max_images=1), SamplingParams(width=32, height=16)) == InputShapes()


def test_a_warm_up_leaves_the_settings_of_a_cache_that_is_off_to_the_model() -> None:
    defaults = SamplingParams(width=32, height=32, num_frames=1, teacache_params={"teacache_thresh": 0.2})
    model = structs.replace(MODEL, defaults=defaults)
    [params] = WarmUp(WarmupArgs()).for_server(model)
    assert (params.width, params.height, params.prompt) == (32, 32, "a warm-up")
    check_caches(params)  # refuses such settings


def only(result: GenerationResult | list[GenerationResult]) -> GenerationResult:
    assert isinstance(result, GenerationResult)
    return result


@pytest.fixture(scope="module")
def states() -> list[EngineState]:
    return []


@pytest.fixture(scope="module")
def warm_server(states: list[EngineState]) -> Iterator[DiffGenerator]:
    """Two sizes, three steps each."""
    options = {"warmup_mode": "server", "warmup_resolutions": ["16x32", "32x32"], "warmup_steps": 3}
    args = ServerArgs.from_kwargs(model_path="null-model", warmup_num_frames=9, batching_max_size=1, **options)
    with DiffGenerator.from_server_args(args) as generator:
        generator.wait_ready(on_state=states.append)
        yield generator


def test_the_engine_is_ready_only_after_its_warm_up(warm_server: DiffGenerator, states: list[EngineState]) -> None:
    details = [state.detail for state in states]
    assert details.index("warming up") < [state.state for state in states].index("ready")
    assert warm_server.status().ticks >= 6, "three steps of two sizes ran"


def test_a_size_that_was_warmed_up_says_so(warm_server: DiffGenerator) -> None:
    wish = {"prompt": "x", "width": 32, "height": 32, "num_frames": 9}
    assert only(warm_server.generate(wish)).metrics["warmup_excluded"] is True
    assert only(warm_server.generate(wish | {"height": 48})).metrics["warmup_excluded"] is False


def test_the_timing_line_says_that_the_warm_up_is_excluded(
    warm_server: DiffGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    for height in (32, 48):
        with Reporter(LineDisplay(), several=False) as reporter:
            for event in warm_server.stream({"prompt": "x", "width": 32, "height": height, "num_frames": 9}):
                reporter.event(event)
    warm, cold = [line for line in out.getvalue().splitlines() if line.startswith("Pixel data")]
    assert warm.endswith(" seconds (warmup excluded)")
    assert cold.endswith(" seconds")


def test_each_new_size_is_warmed_up_before_its_first_request() -> None:
    with DiffGenerator.from_pretrained("null-model", warmup_mode="request", batching_max_size=1) as generator:
        ticks = [generator.status().ticks]
        for width in (16, 16, 32):
            result = only(generator.generate({"prompt": "sleep-20", "width": width, "num_inference_steps": 6}))
            assert result.metrics["warmup_excluded"] is True
            assert len(result.metrics["step_ms"]) == 6
            ticks.append(generator.status().ticks)
    with_warm_up, without, again_with = (b - a for a, b in itertools.pairwise(ticks))
    assert with_warm_up == again_with > without


def test_sizes_asked_for_that_the_model_cannot_do_end_the_engine_with_their_error() -> None:
    with pytest.raises(RemoteError, match="17x16, accepted are multiples of 16") as caught:
        DiffGenerator.from_pretrained("null-model", warmup_mode="server", warmup_resolutions=["17x16"])
    assert caught.value.code == "invalid_size"


def test_a_warm_up_that_kills_the_worker_is_given_up_and_the_engine_serves() -> None:
    """The model's own size, so nobody asked for it: serving without is better than not serving."""
    with DiffGenerator.from_pretrained("fragile-model", warmup_mode="server") as generator:
        result = only(generator.generate({"prompt": "x"}))
        assert result.metrics["warmup_excluded"] is False
        assert generator.status().num_worker_restarts == 1
