"""The Wan pipeline against diffusers' WanPipeline, alone and in company; what it refuses; what survives a failure."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    EmptyPrompt,
    FramesNotSupported,
    IncompatibleParameters,
    InsufficientMemory,
    InvalidValue,
    SizeNotDivisible,
    SizeTooLarge,
    UnsupportedModel,
    UnsupportedParameter,
)
from sglang.multimodal_gen.runtime.models.schedulers import DPMSolverSampler, FlowMatchLCMSampler
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.guidance import rescaled
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.media import clip, disc, picture
from sglang.multimodal_gen.test.pipeline_parity import (
    as_uint8,
    assert_same,
    joined,
    relative_error,
    run,
)

# diffusers' DPMSolverMultistepScheduler.set_timesteps converts a tensor in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers.schedulers"
)
BASE = {
    "prompt": "a red circle &amp; a  blue star",
    "negative_prompt": "green square",
    "width": 48,
    "height": 80,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "seed": 5,
}
# One request for each of the random checkpoints: frames, odd sizes, guidance on and off and steps all differ.
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_head": {"width": 80, "height": 48, "num_frames": 1, "guidance_scale": 1.0},
    "deep": {"width": 32, "height": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 7.5},
    "patched_vae": {"width": 48, "height": 48, "num_frames": 13, "negative_prompt": ""},
    "euler": {"num_frames": 5, "num_inference_steps": 4, "guidance_scale": 2.0},
    "dpmpp": {"width": 80, "height": 48, "num_inference_steps": 6, "max_sequence_length": 32},
    "no_cross_norm": {"width": 96, "height": 32, "num_frames": 13, "num_inference_steps": 2, "guidance_scale": 0.0},
    "wide": {"width": 48, "height": 32, "num_inference_steps": 5, "seed": 2**40 + 1, "prompt": "moving " * 600},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def pipeline_of(wan_checkpoint: Callable[[str], Path]) -> Callable[[str], WanPipeline]:
    """Our pipeline of a tiny checkpoint, loaded once."""

    @cache
    def load(name: str) -> WanPipeline:
        pipeline = build_pipeline(str(wan_checkpoint(name)), ExecutionArgs(device="cpu"))
        assert isinstance(pipeline, WanPipeline)
        return pipeline

    return load


@pytest.fixture
def pipeline(pipeline_of: Callable[[str], WanPipeline]) -> WanPipeline:
    return pipeline_of("plain")


def run_phase(pipeline: WanPipeline, name: str, req: Req, units: int | None = None) -> list[OutputBatch]:
    """The phase's next units, all that are left by default."""
    total = next(phase.units for phase in req.phases if phase.name == name)
    count = total - req.done(name) if units is None else units
    return [output for _ in range(count) for output in pipeline.run_unit(name, [req])]


def reference(checkpoint: Path, values: dict[str, Any], scheduler: Any = None) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, T, H, W] and frames [T, H, W, 3] uint8 of the same request."""
    pipeline = diffusers.WanPipeline.from_pretrained(checkpoint, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    arguments = {key: value for key, value in values.items() if key != "seed"}

    def generate(output_type: str) -> Any:
        generator = torch.Generator().manual_seed(values["seed"])
        return pipeline(**arguments, generator=generator, output_type=output_type).frames[0]

    return generate("latent"), (generate("np") * 255).round().astype(np.uint8)


@pytest.mark.parametrize("name", REQUESTS)
def test_latents_and_frames_match_diffusers(
    name: str, wan_checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], WanPipeline]
) -> None:
    values = BASE | REQUESTS[name]
    req, frames = run(pipeline_of(name), SamplingParams.from_values(values))
    assert_same((req, frames), *reference(wan_checkpoint(name), values))


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("euler", diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)),
        (
            "dpmpp_2m",
            diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ),
        ),
        (
            "unipc",
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        ),
    ],
)
def test_sampler_and_shift_of_the_request_replace_the_checkpoints(
    name: str, scheduler: Any, wan_checkpoint: Callable[[str], Path], pipeline: WanPipeline
) -> None:
    values = BASE | {"num_inference_steps": 5}
    req, frames = run(pipeline, SamplingParams.from_values(values | {"scheduler": name, "flow_shift": 5.0}))
    assert_same((req, frames), *reference(wan_checkpoint("plain"), values, scheduler))


def test_the_server_s_sampler_serves_requests_that_name_none(wan_checkpoint: Callable[[str], Path]) -> None:
    served = build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu", scheduler="dpmpp_2m"))
    assert served.model_info().defaults.scheduler == "dpmpp_2m"
    assert isinstance(served.admit("a", SamplingParams.from_values(BASE)).sampler, DPMSolverSampler)
    named = served.admit("b", SamplingParams.from_values(BASE | {"scheduler": "lcm"}))
    assert isinstance(named.sampler, FlowMatchLCMSampler)


COMPANY = [
    {"num_inference_steps": 6, "guidance_scale": 4.0, "seed": 1},
    {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 2, "prompt": "the green square", "scheduler": "lcm"},
    {"num_inference_steps": 5, "guidance_scale": 7.0, "seed": 3, "scheduler": "dpmpp_2m", "flow_shift": 7.0},
]


def test_requests_that_join_and_leave_a_batch_match_their_lone_runs(pipeline: WanPipeline) -> None:
    """They differ in steps, guidance, seed, sampler, shift and step index; only the order of summation changes."""
    params = [SamplingParams.from_values(BASE | changes) for changes in COMPANY]
    lone = [run(pipeline, each) for each in params]
    reqs = [pipeline.admit(str(i), each) for i, each in enumerate(params)]
    assert len({req.phases[1].batch_key for req in reqs}) == 1
    pipeline.run_unit("text_encode", reqs)
    for active in ([0], [0], [0, 1], [0, 1, 2], [2, 1, 0], [0, 1, 2], [2], [2]):
        pipeline.run_unit("denoise", [reqs[i] for i in active])
    for req, (alone, frames) in zip(reqs, lone, strict=True):
        assert alone.latents is not None
        assert req.done("denoise") == req.phases[1].units
        assert relative_error(req.latents, alone.latents) <= 1e-5
        found = joined(run_phase(pipeline, "decode", req))
        assert np.abs(found.astype(int) - frames.astype(int)).max() <= 1


def test_requests_of_another_shape_or_text_length_have_another_batch_key(pipeline: WanPipeline) -> None:
    changes: list[dict[str, Any]] = [{}, {"width": 80}, {"num_frames": 5}, {"max_sequence_length": 64}]
    keys = {pipeline.admit("r", SamplingParams.from_values(BASE | change)).phases[1].batch_key for change in changes}
    assert len(keys) == len(changes)


def test_guidance_branches_one_after_the_other_give_the_same_latents(pipeline: WanPipeline) -> None:
    params = SamplingParams.from_values(BASE)
    together, _ = run(pipeline, params)
    req = pipeline.admit("r", params)
    req.max_forward_rows = 1
    run_phase(pipeline, "text_encode", req)
    run_phase(pipeline, "denoise", req)
    assert together.latents is not None
    assert relative_error(req.latents, together.latents) <= 1e-5


def test_guidance_runs_branch_by_branch_when_memory_for_both_is_missing(pipeline: WanPipeline) -> None:
    stage = next(stage for stage in pipeline.stages if isinstance(stage, DenoisingStage))
    req = pipeline.admit("r", SamplingParams.from_values(BASE))
    tight = stage_with(stage, free_bytes=lambda: int(1.5 * req.phases[1].peak_bytes / 2))
    tight.admit(req)
    assert req.max_forward_rows == 1
    assert any("one after the other" in note for note in req.notes)
    phase = tight.phase(req)
    assert phase.peak_bytes == req.phases[1].peak_bytes // 2


def stage_with(stage: Any, **changes: Any) -> Any:
    """The same stage with other collaborators."""
    changed = object.__new__(type(stage))
    changed.__dict__.update(vars(stage) | changes)
    return changed


def test_rescaled_guidance_has_the_conditional_standard_deviation() -> None:
    guided, conditional = torch.randn(4, 3, 6, 6) * 5, torch.randn(4, 3, 6, 6)
    assert torch.equal(rescaled(guided, conditional, 0.0), guided)
    torch.testing.assert_close(rescaled(guided, conditional, 1.0).std(), conditional.std())
    between = rescaled(guided, conditional, 0.7).std()
    assert conditional.std() < between < guided.std()


def test_request_resumed_from_its_state_in_mid_denoising_continues_to_the_bit(pipeline: WanPipeline) -> None:
    params = SamplingParams.from_values(BASE | {"num_inference_steps": 5})
    whole, frames = run(pipeline, params)
    first = pipeline.admit("r", params)
    run_phase(pipeline, "text_encode", first)
    run_phase(pipeline, "denoise", first, units=2)
    saved = first.state_dict()
    pipeline.release(first)
    second = pipeline.admit("r", params)
    second.load_state_dict(saved)
    run_phase(pipeline, "denoise", second)
    assert whole.latents is not None and second.latents is not None
    assert torch.equal(second.latents, whole.latents)
    assert np.array_equal(joined(run_phase(pipeline, "decode", second)), frames)


def chunked(pipeline: WanPipeline, req: Req, chunk_frames: int, vae: nn.Module | None = None) -> DecodingStage:
    """The decoding stage with memory for this many latent frames at once; plans the request anew."""
    stage = next(stage for stage in pipeline.stages if isinstance(stage, DecodingStage))
    peak = stage._peak_bytes(req, chunk_frames, None)
    stage = stage_with(stage, free_bytes=lambda: 2 * peak, vae=vae or stage.vae)
    req.decoder_state = None
    req.units_done.pop("decode", None)
    stage.admit(req)
    return stage


@pytest.mark.parametrize(("chunk_frames", "num_chunks"), [(1, 4), (2, 2), (3, 2), (4, 1)])
@pytest.mark.parametrize("name", ["plain", "patched_vae"])
def test_decoding_in_chunks_gives_the_same_frames(
    name: str, chunk_frames: int, num_chunks: int, pipeline_of: Callable[[str], WanPipeline]
) -> None:
    pipeline = pipeline_of(name)
    req, frames = run(pipeline, SamplingParams.from_values(BASE | {"num_frames": 13, "num_inference_steps": 1}))
    stage = chunked(pipeline, req, chunk_frames)
    assert req.decode_plan.num_chunks == num_chunks
    outputs = []
    for unit in range(num_chunks):
        req.units_done["decode"] = unit
        outputs += stage.step([req])
    assert np.abs(joined(outputs).astype(int) - frames.astype(int)).max() <= 1


class FailsOnce(nn.Module):
    """Wraps a model whose call number `failing` raises after the work is done, as memory runs out."""

    decodes_whole_clips = False

    def __init__(self, inner: Any, failing: int) -> None:
        super().__init__()
        self.inner = inner
        self.calls_left = failing

    def new_state(self, tiling: Any, *, carry: bool) -> Any:
        return self.inner.new_state(tiling, carry=carry)

    def denormalise(self, latents: Tensor) -> Tensor:
        return self.inner.denormalise(latents)

    def decode_next(self, latents: Tensor, state: Any) -> Tensor:
        return self._counted(self.inner.decode_next(latents, state))

    def embed_text(self, *inputs: Any) -> Tensor:
        return self.inner.embed_text(*inputs)

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self._counted(self.inner(*inputs, **options))

    def _counted(self, result: Tensor) -> Tensor:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise MemoryError
        return result


def test_failed_chunk_is_decoded_again_without_a_trace(pipeline: WanPipeline) -> None:
    req, frames = run(pipeline, SamplingParams.from_values(BASE | {"num_frames": 13, "num_inference_steps": 1}))
    stage = chunked(pipeline, req, 1, vae=FailsOnce(pipeline.vae, failing=3))
    outputs: list[OutputBatch] = []
    failures = 0
    while req.done("decode") < 4:
        try:
            outputs += stage.step([req])
        except MemoryError:
            failures += 1
            continue
        req.units_done["decode"] = req.done("decode") + 1
    assert failures == 1
    assert np.abs(joined(outputs).astype(int) - frames.astype(int)).max() <= 1


class OutOfMemorySampler:
    """A sampler whose step fails."""

    draws_noise = False

    def step(self, *_: object, **__: object) -> Tensor:
        raise MemoryError


@pytest.mark.parametrize("place", ["transformer", "sampler"])
def test_failed_step_leaves_every_request_where_it_was(pipeline: WanPipeline, place: str) -> None:
    stage = next(stage for stage in pipeline.stages if isinstance(stage, DenoisingStage))
    reqs = [pipeline.admit(str(i), SamplingParams.from_values(BASE | change)) for i, change in enumerate(COMPANY)]
    pipeline.run_unit("text_encode", reqs)
    pipeline.run_unit("denoise", reqs)
    before = [(req.latents, state_of(req)) for req in reqs]
    if place == "transformer":
        reqs[1].max_forward_rows = 1
        failing = FailsOnce(pipeline.transformer, failing=4)
        stage = stage_with(stage, denoiser=stage_with(stage.denoiser, transformer=failing))
    else:
        reqs[2].sampler = OutOfMemorySampler()  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        stage.step(reqs)
    for req, (latents, state) in zip(reqs, before, strict=True):
        assert req.latents is latents
        assert state_of(req) == state


def state_of(req: Req) -> list[Any]:
    """The sampler's state by identity of its tensors, which are never written into."""
    assert req.sampler_state is not None
    state = req.sampler_state
    assert req.generator is not None
    noise = req.generator.get_state().tolist()
    return [state.step_index, state.order, [id(tensor) for tensor in state.history], id(state.last_sample), noise]


def test_latent_output_has_no_decode_phase_and_keeps_the_latents(pipeline: WanPipeline) -> None:
    params = SamplingParams.from_values(BASE)
    req, frames = run(pipeline, dataclasses.replace(params, output_type="latent"))
    assert [phase.name for phase in req.phases] == ["text_encode", "denoise"]
    assert frames.size == 0
    assert req.latents is not None and req.latents.shape == (4, 3, 10, 6)
    pipeline.release(req)
    assert req.latents is None


def test_cut_prompt_is_noted(pipeline: WanPipeline) -> None:
    req = pipeline.admit("r", SamplingParams.from_values(BASE | {"prompt": "red " * 630}))
    assert "prompt cut to 512 of 631 tokens" in req.notes
    assert pipeline.admit("r", SamplingParams.from_values(BASE)).notes == []


def test_negative_prompt_costs_nothing_without_guidance(pipeline: WanPipeline) -> None:
    req, _ = run(pipeline, SamplingParams.from_values(BASE | {"guidance_scale": 1.0}))
    assert req.negative_prompt is None
    assert req.negative_text is None


def test_seed_left_open_is_drawn_and_kept_in_the_parameters(pipeline: WanPipeline) -> None:
    values = {key: value for key, value in BASE.items() if key != "seed"}
    seeds = {pipeline.admit("r", SamplingParams.from_values(values)).params.seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(isinstance(seed, int) for seed in seeds)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": " \n "}, EmptyPrompt, "prompt"),
        ({"prompt": "&nbsp; "}, EmptyPrompt, "prompt"),
        ({"width": 50}, SizeNotDivisible, "multiples of 16.*nearest: 48x80"),
        ({"height": 88}, SizeNotDivisible, "nearest"),
        ({"width": 8000, "height": 8000}, SizeTooLarge, "64000000 pixels"),
        ({"num_frames": 8}, FramesNotSupported, r"4k\+1.*nearest: 9"),
        ({"num_frames": 4001}, FramesNotSupported, "up to 1025"),
        ({"max_sequence_length": 513}, InvalidValue, "at most 512"),
    ],
)
def test_what_the_checkpoint_cannot_do_is_refused_at_admission(
    pipeline: WanPipeline, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipeline.admit("r", SamplingParams.from_values(BASE | change))


def test_size_without_the_memory_for_it_is_refused_with_both_numbers(
    pipeline: WanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "free_bytes", lambda: 2**20)
    # What was free is remembered for a moment, before this test as well as after it.
    monkeypatch.setattr(pipeline, "_budget", 0)
    monkeypatch.setattr(pipeline, "_budget_time", -math.inf)
    with pytest.raises(InsufficientMemory, match=r"48x80 with 9 frames needs about .* GiB, but .* GiB are free"):
        pipeline.admit("r", SamplingParams.from_values(BASE))


def test_components_that_do_not_fit_together_are_refused(wan_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(wan_checkpoint("plain"), tmp_path / "model")
    other = diffusers.WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        num_layers=1,
        ffn_dim=8,
    )
    other.save_pretrained(directory / "transformer")
    with pytest.raises(UnsupportedModel, match=r"text_dim is 24, but text_encoder\.d_model wants 20"):
        build_pipeline(str(directory))


def test_loaded_model_describes_itself(pipeline: WanPipeline) -> None:
    info = pipeline.model_info()
    modules = (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    expected = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert (info.pipeline_class, info.precision, info.device) == ("WanPipeline", "fp32", "cpu")
    assert info.num_parameters == expected
    assert info.weight_bytes == 4 * expected
    assert (info.limits.size_multiple, info.limits.frame_stride, info.limits.max_sequence_length) == (16, 4, 512)


def test_each_choice_made_for_the_user_is_reported(wan_checkpoint: Callable[[str], Path]) -> None:
    heard: list[str] = []
    build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu"), report=heard.append)
    for word in ("device cpu", "precision fp32", "attention torch_sdpa", "loading transformer"):
        assert any(word in line for line in heard), word


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", ["plain", "euler"])
def test_video_to_video_matches_diffusers(
    name: str, strength: float, wan_checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], WanPipeline]
) -> None:
    values = BASE | {"strength": strength, "num_inference_steps": 5}
    frames = clip(9, 60, 50)
    theirs = diffusers.WanVideoToVideoPipeline.from_pretrained(wan_checkpoint(name), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in values.items() if key not in ("seed", "num_frames")}

    def generate(output_type: str) -> Any:
        return theirs(
            **arguments,
            video=[Image.fromarray(frame) for frame in frames],
            generator=torch.Generator().manual_seed(values["seed"]),
            output_type=output_type,
        ).frames

    expected = generate("latent")[0], as_uint8(generate("np")[0])
    assert_same(run(pipeline_of(name), values, RequestInputs(video=frames)), *expected)


def test_a_picture_starts_a_picture_and_its_mask_keeps_the_rest(pipeline: WanPipeline) -> None:
    values = BASE | {"num_frames": 1, "strength": 1.0}
    image, mask = picture(48, 80), disc(48, 80)
    kept, _ = run(pipeline, values | {"strength": 0.3, "num_inference_steps": 4}, RequestInputs(images=(image,)))
    free, _ = run(pipeline, values)
    masked, _ = run(pipeline, values, RequestInputs(images=(image,), mask=mask))
    encoded = masked.conditioning["initial_latents"]
    anew = masked.conditioning["mask"].bool().expand_as(encoded)
    assert masked.latents is not None and free.latents is not None and kept.latents is not None
    assert torch.equal(masked.latents[~anew], encoded[~anew])
    assert relative_error(masked.latents[anew], encoded[anew]) > 0.1
    assert relative_error(kept.latents, encoded) < relative_error(free.latents, encoded)


def test_what_a_model_of_text_cannot_start_from_is_refused(pipeline: WanPipeline) -> None:
    params = SamplingParams.from_values(BASE)
    with pytest.raises(IncompatibleParameters, match="accepted is an image with num_frames 1"):
        pipeline.admit("r", params, RequestInputs(images=(picture(48, 80),)))
    with pytest.raises(InvalidValue, match="at most the 5 frames of the video"):
        pipeline.admit("r", params, RequestInputs(video=clip(5, 48, 80)))
    with pytest.raises(UnsupportedParameter, match="last_image"):
        pipeline.admit("r", params, RequestInputs(last_image=picture(48, 80)))
