"""Pipelines that only diffusers has: the pixels that its own call gives, stopped between steps and taken up again."""

from __future__ import annotations

import inspect
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    CorruptCheckpoint,
    FramesNotSupported,
    InvalidRequest,
    InvalidState,
    InvalidValue,
    MissingParameter,
    PickleRefused,
    RemoteError,
    RequestCancelled,
    SizeNotDivisible,
    UnsupportedModel,
    UnsupportedParameter,
)
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
from sglang.multimodal_gen.runtime.entrypoints.generation_result import GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import Progress
from sglang.multimodal_gen.runtime.managers.worker_messages import (
    Admit,
    OutputChunk,
    Release,
    SaveState,
    StateSaved,
    Tick,
    TickDone,
    Unit,
)
from sglang.multimodal_gen.runtime.pipelines.diffusers_call import without_paths
from sglang.multimodal_gen.runtime.pipelines.diffusers_facts import CallSignature, own_defaults
from sglang.multimodal_gen.runtime.pipelines.diffusers_fallback import DiffusersPipeline
from sglang.multimodal_gen.runtime.pipelines.stepped_call import StepEnd, SteppedCall
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.state_file import write_state
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, ModelArgs
from sglang.multimodal_gen.test.media import disc, picture
from sglang.multimodal_gen.test.scripted_server import wait_for
from sglang.multimodal_gen.test.worker_case import InProcessWorker

# The library's own: of names that it uses itself, and of how it calls numpy and torch.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers", "ignore:In CPU autocast"
)

Checkpoint = Callable[[str], Path]
CPU = ExecutionArgs(device="cpu")
# width, height, frames, and what else a tiny model needs; the size is never the one that the checkpoint says.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"width": 24, "height": 16},
    "sd15_pag": {"width": 16, "height": 24},
    "sdxl": {"width": 24, "height": 16},
    "sana": {"width": 64, "height": 32},
    "pixart_sigma": {"width": 24, "height": 16},
    "chroma": {"width": 24, "height": 16},
    "lumina2": {"width": 32, "height": 16},
    "cogvideox": {"width": 48, "height": 32, "num_frames": 9, "max_sequence_length": 16},
    "mochi": {"width": 32, "height": 16, "num_frames": 7, "max_sequence_length": 16},
    "allegro": {"width": 128, "height": 128, "num_frames": 24},
    "ldm": {"width": 32, "height": 16},
}
WISH = {"prompt": "a red circle", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 5}


@pytest.fixture(scope="session")
def loaded(fallback_checkpoint: Checkpoint) -> Callable[[str], DiffusersPipeline]:
    """Each tiny checkpoint as we load it, once."""
    pipelines: dict[str, DiffusersPipeline] = {}

    def load(name: str) -> DiffusersPipeline:
        if name not in pipelines:
            built = build_pipeline(str(fallback_checkpoint(name)), CPU)
            assert isinstance(built, DiffusersPipeline)
            pipelines[name] = built
        return pipelines[name]

    return load


def wish_for(name: str, **changes: Any) -> dict[str, Any]:
    negative = {} if name == "ldm" else {"negative_prompt": "green"}
    return WISH | negative | SHAPES[name] | changes


def admitted(pipeline: Any, request_id: str, wish: dict[str, Any]) -> Req:
    req: Req = pipeline.admit(request_id, SamplingParams.from_values(wish))
    return req


def units_of(pipeline: Any, req: Req) -> Iterator[list[OutputBatch]]:
    """Each unit of the request as it is run."""
    for phase in req.phases:
        for _ in range(phase.units):
            with torch.inference_mode():
                outputs = pipeline.run_unit(phase.name, [req])
            yield outputs  # outside, since whoever leaves a generator early would stay in its mode


def generate(pipeline: Any, wish: dict[str, Any], inputs: RequestInputs = EMPTY) -> tuple[np.ndarray, Req]:
    req: Req = pipeline.admit("r", SamplingParams.from_values(wish), inputs)
    outputs = [output for unit in units_of(pipeline, req) for output in unit]
    pipeline.release(req)
    return (outputs[0].frames.numpy() if outputs else np.empty(0)), req


def reference(directory: Path, wish: dict[str, Any], **extra: Any) -> Any:
    """What diffusers' own call gives, without the batch axis."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, diffusers.AllegroPipeline):
        pipeline.vae.enable_tiling()
    arguments = {name: value for name, value in wish.items() if name != "seed"}
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        arguments["use_resolution_binning"] = False
    generator = torch.Generator("cpu").manual_seed(wish["seed"])
    output = pipeline(**({"output_type": "np"} | arguments | extra), generator=generator)
    return (output.frames if hasattr(output, "frames") else output.images)[0]


def as_pixels(frames: np.ndarray) -> np.ndarray:
    pixels = (frames * 255).round().astype(np.uint8)
    return pixels if pixels.ndim == 4 else pixels[None]


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "stepped-call"]


# --- the same as diffusers ---


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_pixels_are_those_of_diffusers_own_call(
    name: str, loaded: Callable[[str], DiffusersPipeline], fallback_checkpoint: Checkpoint
) -> None:
    wish = wish_for(name)
    frames, req = generate(loaded(name), wish)
    expected = as_pixels(reference(fallback_checkpoint(name), wish))
    assert frames.shape == (wish.get("num_frames", 1), wish["height"], wish["width"], 3)
    assert 8 < frames.std() < 100, "a picture of one colour, or of black and white alone, would show little"
    assert np.array_equal(frames, expected)
    assert [phase.units for phase in req.phases] == [3, 1]
    assert req.notes == [f"run by diffusers' {loaded(name).signature.class_name}: no native pipeline"]
    assert no_thread_is_left()


@pytest.mark.parametrize("name", ["sd15", "chroma", "cogvideox"])
def test_latents_are_given_as_diffusers_gives_them(
    name: str, loaded: Callable[[str], DiffusersPipeline], fallback_checkpoint: Checkpoint
) -> None:
    """Of an image, packed, and of a video; beside the frames and alone."""
    wish = wish_for(name)
    expected = reference(fallback_checkpoint(name), wish, output_type="latent")
    kept: list[torch.Tensor | None] = []
    for asked in ({"return_latents": True}, {"output_type": "latent"}):
        pipeline = loaded(name)
        req = admitted(pipeline, "r", wish | asked)
        assert [phase.lane for phase in req.phases] == (["denoise", "decode"] if len(kept) == 0 else ["denoise"])
        for _ in units_of(pipeline, req):
            pass
        kept.append(req.latents)
        pipeline.release(req)
    assert all(latents is not None and torch.equal(latents, expected) for latents in kept)


def test_what_nobody_set_is_the_pipelines_own(
    loaded: Callable[[str], DiffusersPipeline], fallback_checkpoint: Checkpoint
) -> None:
    """Also where a request arrives completed by the model's defaults, as it does from the scheduler."""
    wish = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 2}
    expected = as_pixels(reference(fallback_checkpoint("sd15"), wish))
    frames, req = generate(loaded("sd15"), wish)
    assert np.array_equal(frames, expected)
    again = admitted(loaded("sd15"), "s", {n: v for n in wish if (v := getattr(req.params, n))})
    assert again.params == req.params


def test_further_arguments_reach_the_call(
    loaded: Callable[[str], DiffusersPipeline], fallback_checkpoint: Checkpoint
) -> None:
    wish = wish_for("sd15_pag")
    plain, _ = generate(loaded("sd15_pag"), wish)
    changed, _ = generate(loaded("sd15_pag"), wish | {"diffusers_kwargs": {"pag_scale": 0.5, "eta": 0.3}})
    expected = reference(fallback_checkpoint("sd15_pag"), wish, pag_scale=0.5, eta=0.3)
    assert np.array_equal(changed, as_pixels(expected))
    assert not np.array_equal(changed, plain)


def test_lists_become_tuples_where_the_call_wants_them() -> None:
    signature = CallSignature.of(diffusers.StableDiffusionXLPipeline)
    params = SamplingParams(prompt="x", diffusers_kwargs={"original_size": [64, 48], "sigmas": [1.0, 0.5]})
    given = signature.call_arguments(params, SamplingParams())
    assert given["original_size"] == (64, 48)
    assert given["sigmas"] == [1.0, 0.5]


def test_a_schedule_of_ones_own_says_how_many_units_there_are(loaded: Callable[[str], DiffusersPipeline]) -> None:
    req = admitted(loaded("chroma"), "r", wish_for("chroma", diffusers_kwargs={"sigmas": [1.0, 0.8, 0.5, 0.2]}))
    assert req.phases[0].units == 4


# --- stopped between steps ---


@pytest.mark.parametrize("name", ["sdxl", "sd15_pag", "pixart_sigma", "ldm"])
def test_requests_taken_in_turn_are_as_if_alone(name: str, loaded: Callable[[str], DiffusersPipeline]) -> None:
    """They differ in all that a pipeline keeps on itself, on its sampler, and on the modules that all share."""
    pipeline = loaded(name)
    first = wish_for(name)
    second = wish_for(name, prompt="a blue star", num_inference_steps=5, guidance_scale=6.0, seed=9)
    alone = [generate(pipeline, wish)[0] for wish in (first, second)]
    requests = [admitted(pipeline, str(index), wish) for index, wish in enumerate((first, second))]
    left = [units_of(pipeline, req) for req in requests]
    frames: dict[int, np.ndarray] = {}
    while len(frames) < 2:
        for index, units in enumerate(left):
            for output in next(units, []):
                frames[index] = output.frames.numpy()
    assert np.array_equal(frames[0], alone[0])
    assert np.array_equal(frames[1], alone[1])
    for req in requests:
        pipeline.release(req)
    assert no_thread_is_left()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart_sigma", "ldm"])
def test_each_unit_is_about_a_step(name: str, loaded: Callable[[str], DiffusersPipeline]) -> None:
    """One step more than asked for, two for one, and one for one."""
    pipeline = loaded(name)
    req = admitted(pipeline, "r", wish_for(name))
    steps = [req.library_call.num_steps for _ in units_of(pipeline, req)]
    assert steps == {"sd15": [2, 3, 4, 4], "sdxl": [2, 4, 5, 5]}.get(name, [1, 2, 3, 3])
    pipeline.release(req)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_release_ends_the_call_wherever_it_is(done: int, loaded: Callable[[str], DiffusersPipeline]) -> None:
    pipeline = loaded("sd15")
    req = admitted(pipeline, "r", wish_for("sd15"))
    units = units_of(pipeline, req)
    for _ in range(done):
        next(units)
    pipeline.release(req)
    pipeline.release(req)
    assert req.library_call is None and req.latents is None
    assert no_thread_is_left()


def test_a_state_is_of_nothing_done(loaded: Callable[[str], DiffusersPipeline], tmp_path: Path) -> None:
    pipeline = loaded("sd15")
    req = admitted(pipeline, "r", wish_for("sd15"))
    next(units_of(pipeline, req))
    state = pipeline.saved_state(req)
    assert state["units_done"] == {}
    write_state(tmp_path / "s", state, identity=pipeline.state_identity(req))
    pipeline.release(req)
    again = admitted(pipeline, "r", wish_for("sd15"))
    with pytest.raises(InvalidState, match="cannot go on in the middle"):
        pipeline.restore(again, tmp_path / "s")
    assert again.units_done == {}


def three_steps(step_ended: StepEnd) -> str:
    for number in range(3):
        step_ended(torch.tensor(number))
    return "whole"


def stepped(call: Callable[[StepEnd], Any]) -> SteppedCall:
    return SteppedCall(call, device=torch.device("cpu"))


def test_a_call_goes_as_far_as_it_is_told() -> None:
    call = stepped(three_steps)
    assert call.num_steps == 0 and not call.is_over
    call.advance(1)
    call.advance(1)
    assert call.num_steps == 1 and call.latents == torch.tensor(0)
    call.advance(3)
    assert call.num_steps == 3 and not call.is_over
    call.advance(None)
    assert call.is_over and call.result == "whole"
    call.advance(7)
    call.close()
    assert call.result is None and no_thread_is_left()


def test_a_call_that_ends_early_lets_nobody_wait() -> None:
    call = stepped(three_steps)
    call.advance(50)
    assert (call.num_steps, call.is_over, call.result) == (3, True, "whole")
    call.close()


def test_a_call_is_ended_past_handlers_of_exceptions() -> None:
    caught: list[Exception] = []

    def keeps_going(step_ended: StepEnd) -> None:
        for _ in range(3):
            try:
                step_ended(None)
            except Exception as error:
                caught.append(error)

    call = stepped(keeps_going)
    call.advance(2)
    call.close()
    assert (call.num_steps, call.is_over, caught) == (2, True, [])


def test_an_error_comes_out_where_the_call_is_waited_for() -> None:
    def fails(step_ended: StepEnd) -> None:
        step_ended(None)
        raise ZeroDivisionError("in the second step")

    call = stepped(fails)
    call.advance(1)
    with pytest.raises(ZeroDivisionError, match="second step"):
        call.advance(2)
    assert call.is_over
    call.close()
    assert no_thread_is_left()


def test_a_call_computes_without_gradients() -> None:
    call = stepped(lambda step_ended: torch.is_inference_mode_enabled())
    call.advance(None)
    assert call.result is True


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"num_frames": 5}, UnsupportedParameter, "num_frames: .*StableDiffusionPipeline takes none"),
        ({"flow_shift": 3.0}, UnsupportedParameter, "flow_shift: "),
        ({"scheduler": "euler"}, UnsupportedParameter, "scheduler: "),
        ({"max_sequence_length": 20}, UnsupportedParameter, "max_sequence_length: "),
        ({"attention_backend": "torch_sdpa"}, UnsupportedParameter, "attention_backend: "),
        ({"profile": True}, UnsupportedParameter, "profile: "),
        ({"mu": 1.0}, UnsupportedParameter, "mu: "),
        ({"diffusers_kwargs": {"etta": 1}}, InvalidValue, "etta, .*did you mean eta"),
        ({"diffusers_kwargs": {"callback": 1}}, InvalidValue, "an argument of StableDiffusionPipeline: .*eta"),
        ({"diffusers_kwargs": {"clip_skip": 1}}, InvalidValue, "the parameter clip_skip"),
        ({"diffusers_kwargs": {"generator": 1}}, InvalidValue, "an argument of StableDiffusionPipeline"),
        ({"diffusers_kwargs": {"guidance_scale": 1}}, InvalidValue, "the parameter guidance_scale"),
    ],
)
def test_what_the_call_does_not_take_is_refused_at_admission(
    changes: dict[str, Any],
    error: type[InvalidRequest],
    text: str,
    loaded: Callable[[str], DiffusersPipeline],
) -> None:
    with pytest.raises(error, match=text):
        admitted(loaded("sd15"), "r", wish_for("sd15", **changes))


def test_a_size_that_the_library_refuses_names_the_size(loaded: Callable[[str], DiffusersPipeline]) -> None:
    with pytest.raises(InvalidRequest, match=r"SanaPipeline refuses .*`height` and `width` .* 32") as caught:
        generate(loaded("sana"), wish_for("sana", width=48))
    assert caught.value.param == "size"


def test_sizes_and_frames_that_it_would_round_are_refused_at_the_door(
    loaded: Callable[[str], DiffusersPipeline],
) -> None:
    for name, changes in (("chroma", {"width": 26}), ("lumina2", {"height": 24})):
        with pytest.raises(SizeNotDivisible):
            loaded(name).limits().check(SamplingParams(**wish_for(name, num_frames=1) | changes))
    with pytest.raises(FramesNotSupported):
        loaded("cogvideox").limits().check(SamplingParams(**wish_for("cogvideox", num_frames=6)))


def test_an_error_of_the_model_is_not_the_clients(loaded: Callable[[str], DiffusersPipeline]) -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        generate(loaded("cogvideox"), wish_for("cogvideox", max_sequence_length=20))
    assert no_thread_is_left()


def test_a_cut_prompt_is_told(loaded: Callable[[str], DiffusersPipeline]) -> None:
    req = admitted(loaded("cogvideox"), "r", wish_for("cogvideox", prompt="red " * 40))
    assert req.notes[1:] == ["prompt cut to 16 of 41 tokens by the tokenizer"]


def test_no_message_repeats_a_path_or_is_endless() -> None:
    text = without_paths("no file in /home/someone/models/tiny/vae.\n see a/b" + " and on" * 100)
    assert text.startswith("no file in vae.")
    assert "a/b" in text and "someone" not in text
    assert len(text) == 300


# --- which class, which files ---


def changed(source: Path, target: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def renamed(name: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        file = directory / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))

    return change


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PixArtSigmPipeline", "neither this package nor diffusers .*did you mean PixArtSigmaPipeline"),
        ("WanPipelin", "did you mean WanPipeline"),
        ("AudioLDM2Pipeline", "takes no height, width"),
        ("DDPMPipeline", "takes no prompt, height, width"),
        ("UNet2DModel", "neither this package nor diffusers"),
    ],
)
def test_a_class_that_cannot_run_is_named(
    name: str, text: str, fallback_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = changed(fallback_checkpoint("pixart_sigma"), tmp_path / "m", renamed(name))
    with pytest.raises(UnsupportedModel, match=text):
        build_pipeline(str(directory), CPU)


def without_tensor(component: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        [file] = (directory / component).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[sorted(tensors)[3]]
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def pickled(directory: Path) -> None:
    [file] = (directory / "vae").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))


def truncated(directory: Path) -> None:
    [file] = (directory / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])


def without_files(component: str, pattern: str) -> Callable[[Path], object]:
    return lambda directory: [file.unlink() for file in (directory / component).glob(pattern)]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (without_tensor("transformer"), CorruptCheckpoint, "transformer do not fit .*missing"),
        (without_tensor("text_encoder"), CorruptCheckpoint, "T5EncoderModel do not fit .*missing"),
        (lambda directory: shutil.rmtree(directory / "text_encoder"), CorruptCheckpoint, "lists text_encoder"),
        (without_files("vae", "*.safetensors"), CorruptCheckpoint, "no file named .* in directory vae"),
        (without_files("tokenizer", "*"), CorruptCheckpoint, "tokenizer has no vocabulary"),
        (pickled, PickleRefused, "vae holds pickled weights"),
        (truncated, CorruptCheckpoint, "truncated"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(
    change: Callable[[Path], object],
    error: type[Exception],
    text: str,
    fallback_checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    directory = changed(fallback_checkpoint("pixart_sigma"), tmp_path / "m", change)
    with pytest.raises(error, match=text) as caught:
        build_pipeline(str(directory), CPU)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("option", ["attention_backend", "cross_attention_backend"])
def test_options_that_the_library_does_not_hear_of_are_refused(option: str, fallback_checkpoint: Checkpoint) -> None:
    with pytest.raises(UnsupportedParameter, match=option):
        build_pipeline(str(fallback_checkpoint("sd15")), ExecutionArgs(device="cpu", **{option: "torch_sdpa"}))


def test_random_weights_are_refused(fallback_checkpoint: Checkpoint) -> None:
    with pytest.raises(UnsupportedParameter, match="random_weights"):
        build_pipeline(ModelArgs(model_path=str(fallback_checkpoint("sd15")), random_weights=True), CPU)


def test_a_pipeline_says_what_it_is(loaded: Callable[[str], DiffusersPipeline]) -> None:
    image, video = loaded("sd15").model_info(), loaded("cogvideox").model_info()
    assert (image.pipeline_class, image.tasks) == ("diffusers.StableDiffusionPipeline", ("T2I",))
    assert (video.pipeline_class, video.tasks) == ("diffusers.CogVideoXPipeline", ("T2V",))
    modules = loaded("sd15").library.components.values()
    parameters = [p for module in modules if isinstance(module, torch.nn.Module) for p in module.parameters()]
    assert image.num_parameters == sum(p.numel() for p in parameters)
    assert image.weight_bytes >= 4 * image.num_parameters
    d = video.defaults
    assert (d.width, d.height, d.num_frames, d.fps) == (32, 32, 9, 8)
    assert (d.num_inference_steps, d.guidance_scale, d.max_sequence_length) == (50, 6.0, 226)


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("StableVideoDiffusionPipeline", None),
        ("CogVideoXImageToVideoPipeline", ("I2V",)),
        ("LTXImageToVideoPipeline", ("I2V",)),
        ("FluxKontextPipeline", ("T2I",)),
        ("StableDiffusionInpaintPipeline", ("I2I",)),
        ("SanaVideoPipeline", ("T2V",)),
        ("LattePipeline", ("T2V",)),
    ],
)
def test_the_signature_says_the_task(name: str, tasks: tuple[str, ...] | None) -> None:
    if tasks is None:
        with pytest.raises(UnsupportedModel, match="takes no prompt"):
            CallSignature.of(getattr(diffusers, name))
    else:
        assert CallSignature.of(getattr(diffusers, name)).tasks() == tasks


def test_frames_and_rates_go_by_the_names_that_a_call_has() -> None:
    params = SamplingParams(prompt="x", num_frames=17, fps=12)
    for name, frames, rate in (
        ("SanaVideoPipeline", "frames", None),
        ("LattePipeline", "video_length", None),
        ("LTXPipeline", "num_frames", "frame_rate"),
    ):
        signature = CallSignature.of(getattr(diffusers, name))
        given = signature.call_arguments(params, own_defaults(object(), signature))
        assert given[frames] == 17
        assert given.get("frame_rate") == (12 if rate else None)
        assert "fps" not in given


def test_an_input_that_a_call_cannot_do_without_is_named() -> None:
    signature = CallSignature.of(diffusers.CogVideoXImageToVideoPipeline)
    with pytest.raises(MissingParameter, match=r"image: .*CogVideoXImageToVideoPipeline needs image"):
        signature.call_arguments(SamplingParams(prompt="x"), SamplingParams())


@pytest.mark.parametrize(
    ("class_name", "masked"), [("StableDiffusionImg2ImgPipeline", False), ("StableDiffusionInpaintPipeline", True)]
)
def test_pictures_and_masks_reach_the_call(
    class_name: str, masked: bool, fallback_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = changed(fallback_checkpoint("sd15"), tmp_path / "m", renamed(class_name))
    pipeline = build_pipeline(str(directory), CPU)
    image, mask = picture(24, 16), disc(24, 16)
    wish = wish_for("sd15", strength=0.7)
    frames, _ = generate(pipeline, wish, RequestInputs(images=(image,), mask=mask if masked else None))
    given: dict[str, Any] = {"image": Image.fromarray(image)}
    if masked:
        given["mask_image"] = Image.fromarray(mask)
    theirs = {name: value for name, value in wish.items() if masked or name not in ("width", "height")}
    assert np.array_equal(frames, as_pixels(reference(directory, theirs, **given)))
    limits = pipeline.limits().inputs
    assert (limits.min_images, limits.max_images, limits.takes_mask) == (0, 1, masked)
    assert limits.takes_strength and not limits.takes_video


def test_which_inputs_a_call_takes_is_read_from_it() -> None:
    for name, minimum, most, mask, last, video in (
        ("CogVideoXImageToVideoPipeline", 1, 1, False, False, False),
        ("CogVideoXVideoToVideoPipeline", 0, 0, False, False, True),
        ("SkyReelsV2ImageToVideoPipeline", 1, 1, False, True, False),
        ("StableDiffusionXLInpaintPipeline", 0, 1, True, False, False),
        ("SanaPipeline", 0, 0, False, False, False),
    ):
        limits = CallSignature.of(getattr(diffusers, name)).input_limits()
        found = (limits.min_images, limits.max_images, limits.takes_mask, limits.takes_last_image, limits.takes_video)
        assert found == (minimum, most, mask, last, video), name


# --- natively or not ---


def test_a_native_class_is_run_by_diffusers_when_asked(wan_checkpoint: Checkpoint) -> None:
    directory, said = wan_checkpoint("plain"), list[str]()
    wish = WISH | {"negative_prompt": "green", "width": 48, "height": 32, "num_frames": 5, "max_sequence_length": 16}
    forced = build_pipeline(ModelArgs(model_path=str(directory), backend="diffusers"), CPU, report=said.append)
    frames, req = generate(forced, wish)
    assert req.notes == ["run by diffusers' WanPipeline: asked for"]
    assert req.notes[0] in said
    assert np.array_equal(frames, as_pixels(reference(directory, wish)))
    # The door refuses it before; here the pipeline rounds, and its result is not passed off as what was asked for.
    with pytest.raises(InvalidRequest, match=r"48x32 with 6 frames, .*WanPipeline makes 48x32 with 5") as caught:
        generate(forced, wish | {"num_frames": 6})
    assert caught.value.param == "num_frames"


def test_a_native_pipeline_takes_no_arguments_of_diffusers(wan_checkpoint: Checkpoint) -> None:
    native = build_pipeline(str(wan_checkpoint("plain")), CPU)
    with pytest.raises(UnsupportedParameter, match="diffusers_kwargs"):
        admitted(native, "r", WISH | {"width": 48, "height": 32, "num_frames": 5, "diffusers_kwargs": {"eta": 0.5}})


def test_a_class_without_a_native_pipeline_is_refused_when_only_those_are_wanted(
    fallback_checkpoint: Checkpoint,
) -> None:
    with pytest.raises(UnsupportedModel, match=r"PixArtSigmaPipeline; supported natively are .*WanPipeline"):
        build_pipeline(ModelArgs(model_path=str(fallback_checkpoint("pixart_sigma")), backend="native"), CPU)


# --- the engine ---


@pytest.fixture(scope="module")
def engine(fallback_checkpoint: Checkpoint) -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained(str(fallback_checkpoint("sdxl")), device="cpu", checkpoint_every=2) as started:
        yield started


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def result_of(engine: DiffGenerator, wish: dict[str, Any]) -> GenerationResult:
    result = engine.generate(wish)
    assert isinstance(result, GenerationResult)
    return result


def test_the_engine_shows_progress_and_gives_diffusers_pixels(
    engine: DiffGenerator, fallback_checkpoint: Checkpoint
) -> None:
    extra = {"original_size": [64, 48]}
    wish = wish_for("sdxl", clip_skip=1, diffusers_kwargs=extra, num_inference_steps=4)
    events = [item.event for item in engine.stream(wish | {"return_frames": True, "return_latents": True})]
    assert sorted({event.step for event in events if isinstance(event, Progress)}) == [1, 2, 3, 4]
    result = events[-1]
    assert isinstance(result, GenerationResult)
    assert result.notes == ("run by diffusers' StableDiffusionXLPipeline: no native pipeline",)
    plain = {name: value for name, value in wish.items() if name != "diffusers_kwargs"}
    expected = reference(fallback_checkpoint("sdxl"), plain, original_size=(64, 48))
    assert np.array_equal(result.frames, as_pixels(expected))
    assert result.latents is not None and result.latents.shape == (4, 8, 12)


def test_several_outputs_are_each_as_if_alone(engine: DiffGenerator) -> None:
    """They wait for the same worker, which takes them in turn and none together."""
    wish = wish_for("sdxl", return_frames=True)
    results = engine.generate(wish | {"num_outputs_per_prompt": 3})
    assert isinstance(results, list)
    for offset, result in enumerate(results):
        assert np.array_equal(result.frames, result_of(engine, wish | {"seed": wish["seed"] + offset}).frames)
        assert result.metrics["step_batch_sizes"] == [1, 1, 1]


def test_a_cancelled_request_leaves_no_thread(engine: DiffGenerator) -> None:
    [pid] = engine.status().worker_pids
    result_of(engine, wish_for("sdxl"))
    threads = num_threads(pid)
    seen: list[int] = []
    last: Any = None
    for item in engine.stream(wish_for("sdxl", num_inference_steps=1000)):
        last = item.event
        if isinstance(last, Progress):
            seen.append(last.step)
            engine.cancel(item.request_id)
    assert isinstance(last, RequestCancelled)
    assert max(seen) < 1000
    result_of(engine, wish_for("sdxl"))
    assert engine.status().worker_pids == (pid,)
    # The last call's own thread ends after its result has left.
    wait_for(lambda: num_threads(pid) <= threads, seconds=20)


def test_a_bad_parameter_is_refused_by_the_engine(engine: DiffGenerator) -> None:
    for changes, code in (
        ({"num_frames": 5}, "unsupported_parameter"),
        ({"diffusers_kwargs": {"no_such": 1}}, "invalid_value"),
        ({"width": 20}, "invalid_value"),
    ):
        with pytest.raises(RemoteError) as caught:
            engine.generate(wish_for("sdxl", **changes))
        assert caught.value.code == code


def test_previews_are_refused_since_latents_are_laid_out_in_the_librarys_own_way(engine: DiffGenerator) -> None:
    with pytest.raises(UnsupportedParameter, match=r"^num_previews: not supported here"):
        engine.generate(wish_for("sdxl", num_previews=1))


# --- put aside ---


def test_a_request_that_was_put_aside_starts_again(loaded: Callable[[str], DiffusersPipeline], tmp_path: Path) -> None:
    pipeline, wish = loaded("sdxl"), wish_for("sdxl")
    undisturbed, _ = generate(pipeline, wish)
    worker, params = InProcessWorker(pipeline, tmp_path), SamplingParams.from_values(wish)
    steps = [Tick(seq=n, epoch=0, denoise=(Unit("r", "denoise", n),)) for n in range(3)]
    save = SaveState(request_id="r", state_file="state-1")
    [*_, saved] = worker.take(Admit(request_id="r", params=params), *steps[:2], save, until=StateSaved)
    assert (saved.error, saved.units_done) == (None, {})
    decode = Tick(seq=3, epoch=0, decode=(Unit("r", "decode", 0),))
    again = Admit(request_id="r", params=params, state_file="state-1")
    admitted_again, *_, chunk = worker.take(Release(request_id="r"), again, *steps, decode, until=OutputChunk)
    assert admitted_again.units_done == {}
    assert np.array_equal(worker.run_dir.take(chunk.frames), undisturbed)
    worker.take(Release(request_id="r"), until=TickDone)
    assert no_thread_is_left()
