"""What a transformer makes of its steps: computed for many at once, and given to each forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.cost_model import STEPS_AHEAD
from sglang.multimodal_gen.runtime.layers.block_runner import rows_of
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding
from sglang.multimodal_gen.runtime.pipelines.flux_workloads import FLUX_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video_workloads import HUNYUAN_VIDEO_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.qwen_image_workloads import QWEN_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.sd3_workloads import SD3_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.zimage_workloads import Z_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, Workload, WorkSize
from sglang.multimodal_gen.test import tiny_hunyuan_video, tiny_qwen_image, tiny_sd3, tiny_zimage
from sglang.multimodal_gen.test.pipeline_parity import admitted, finished, load, relative_error
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux
from sglang.multimodal_gen.test.tiny_wan import noise

CPU = torch.device("cpu")
# One product of sixteen rows and one of two add up in other orders.
SAME = {"rtol": 1e-5, "atol": 1e-6}
BASE: dict[str, Any] = {"prompt": "circle", "width": 32, "height": 32, "seed": 4}


FAMILIES: Mapping[str, tuple[Callable[[Any], Any], Workload]] = {
    "FLUX.1": (lambda pipeline: pipeline.transformer, FLUX_WORKLOADS["dit"]),
    "Qwen-Image": (lambda _: tiny_qwen_image.transformer_pair()[1], QWEN_IMAGE_WORKLOADS["dit"]),
    "Z-Image": (lambda _: tiny_zimage.transformer_pair()[1], Z_IMAGE_WORKLOADS["dit"]),
    "SD3": (lambda _: tiny_sd3.transformer_pair(tiny_sd3.TINY_DUAL_TRANSFORMER)[1], SD3_WORKLOADS["dit"]),
    "HunyuanVideo": (lambda _: tiny_hunyuan_video.transformer_pair()[1], HUNYUAN_VIDEO_WORKLOADS["dit"]),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with torch.inference_mode(False):
        return load(save_tiny_flux(tmp_path_factory.mktemp("flux") / "dev", TINY_FLUXES["dev"]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_forward_that_is_given_its_steps_is_the_same(family: str, pipeline: Any) -> None:
    make, workload = FAMILIES[family]
    model = make(pipeline)
    size = WorkSize(
        height=64, width=32, num_frames=1, latent_shape=(4, 1, 8, 4), batch_size=2, num_text_tokens=5, chunk_frames=1
    )
    timesteps = 1
    inputs = list(workload.inputs({"transformer": model.config}, size, Drawing(CPU, torch.float32)))
    inputs[timesteps] = inputs[timesteps] * torch.tensor([1.0, 0.3])
    plain = workload.forward(model, tuple(inputs), size)
    prepared = list(workload.prepared(model, tuple(inputs)))
    assert len(prepared) == len(inputs) + 1 and prepared[-1].shape == (2, model.step_table.width)
    prepared[timesteps] = torch.full_like(inputs[timesteps], float("nan"))
    if family != "HunyuanVideo":  # whose text is refined by the timestep
        torch.testing.assert_close(workload.forward(model, tuple(prepared), size), plain, **SAME)
    prepared[timesteps] = inputs[timesteps]
    torch.testing.assert_close(workload.forward(model, tuple(prepared), size), plain, **SAME)
    prepared[-1] = prepared[-1].flip(0)
    assert relative_error(workload.forward(model, tuple(prepared), size), plain) > 1e-3, "rows have their own"


@torch.no_grad()
def test_pictures_without_noise_have_their_own_rows() -> None:
    _, model = tiny_qwen_image.transformer_pair(zero_cond_t=True)
    shapes = ((1, 4, 3), (1, 2, 2))
    tokens, timesteps = noise(2, 16, model.config.in_channels), torch.tensor([800.0, 300.0])
    text = noise(2, 6, model.config.joint_attention_dim, seed=1)
    embedded = model.embed_steps(torch.cat((timesteps, torch.zeros(2))))
    given = model(tokens, timesteps, text, shapes, embedded=embedded)
    torch.testing.assert_close(given, model(tokens, timesteps, text, shapes), **SAME)


@torch.no_grad()
def test_rows_that_leave_blocks_out_keep_their_steps() -> None:
    _, model = tiny_sd3.transformer_pair(tiny_sd3.TINY_DUAL_TRANSFORMER)
    latents, timesteps = noise(3, 4, 8, 8), torch.tensor([900.0, 500.0, 20.0])
    text, pooled = noise(3, 5, model.config.joint_attention_dim), noise(3, model.config.pooled_projection_dim, seed=2)
    skip = [(), (0,), (1,)]
    embedded = model.embed_steps(timesteps, pooled)
    given = model(latents, timesteps, text, pooled, skip, embedded)
    torch.testing.assert_close(given, model(latents, timesteps, text, pooled, skip), **SAME)


def test_a_run_deals_its_numbers_to_its_blocks_and_rows() -> None:
    step = StepEmbedding(torch.arange(6.0).view(3, 2), torch.arange(21.0).view(3, 7), (3, 4))
    assert step.of_layer(1).values is not None
    assert torch.equal(step.of_layer(0).values, step.values[:, :3])  # type: ignore[index, arg-type]
    assert torch.equal(step.of_layer(1).values, step.values[:, 3:])  # type: ignore[index, arg-type]
    some = rows_of(step, [2, 0], 3)
    assert some.widths == (3, 4) and torch.equal(some.of_layer(1).values, step.values[[2, 0], 3:])  # type: ignore[index]
    alone = StepEmbedding(step.temb)
    assert alone.of_layer(1) is alone and rows_of(alone, [1], 3).values is None


class Counted:
    """Counts the steps that a denoiser embeds at a time."""

    def __init__(self, denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        plain = denoiser.embed_steps

        def counted(row: Any, timesteps: Any) -> Tensor:
            self.steps.append(len(timesteps))
            return plain(row, timesteps)

        monkeypatch.setattr(denoiser, "embed_steps", counted)


def denoiser_of(pipeline: Any) -> Any:
    return next(stage.denoiser for stage in pipeline.stages if stage.name == "denoise")


def made(pipeline: Any, **wishes: Any) -> Tensor:
    with torch.inference_mode():
        [(req, _)] = finished(pipeline, admitted(pipeline, [(BASE | wishes, EMPTY)]))
    assert req.latents is not None
    assert not req.embedded_steps or req.embedded_steps[-1].values.shape[0] <= STEPS_AHEAD
    return req.latents


def test_a_request_embeds_its_steps_in_few_parts(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(denoiser_of(pipeline), monkeypatch)
    made(pipeline, num_inference_steps=STEPS_AHEAD + 3)
    assert counted.steps == [STEPS_AHEAD, 3]
    counted.steps.clear()
    made(pipeline, num_inference_steps=2, true_cfg_scale=3.0, negative_prompt="small")
    assert counted.steps == [2, 2], "the texts' vectors are part of it, so each branch has its own"


def test_the_parts_begin_at_the_same_steps_wherever_a_request_goes_on(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one that was interrupted goes on with equal bits."""
    denoiser = denoiser_of(pipeline)
    wishes = BASE | {"num_inference_steps": STEPS_AHEAD + 4}
    with torch.inference_mode():
        [whole] = admitted(pipeline, [(wishes, EMPTY)])
        [(whole, _)] = finished(pipeline, [whole])
        first, second = admitted(pipeline, [(wishes, EMPTY)] * 2)
        while first.sampler_state is None or first.sampler_state.step_index < STEPS_AHEAD - 2:
            pipeline.run_unit(next(p.name for p in first.phases if first.done(p.name) < p.units), [first])
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        counted = Counted(denoiser, monkeypatch)
        [(second, _)] = finished(pipeline, [second])
    assert counted.steps == [STEPS_AHEAD, 4]
    assert torch.equal(second.latents, whole.latents)  # type: ignore[arg-type]


def test_adapters_and_weights_elsewhere_leave_it_to_the_forward(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = denoiser_of(pipeline)
    counted = Counted(denoiser, monkeypatch)
    adapted = SimpleNamespace(req=SimpleNamespace(adapters=("one",)))
    assert denoiser.embedded([adapted]) is None
    expected = made(pipeline, num_inference_steps=3)
    assert counted.steps == [3]
    monkeypatch.setattr(denoiser.transformer, "runs_on", torch.device("meta"), raising=False)
    counted.steps.clear()
    torch.testing.assert_close(made(pipeline, num_inference_steps=3), expected, rtol=1e-4, atol=1e-5)
    assert counted.steps == []


def test_memory_is_reckoned_for_the_steps(pipeline: Any) -> None:
    denoiser = denoiser_of(pipeline)
    with torch.inference_mode():
        [req] = admitted(pipeline, [(BASE, EMPTY)])
        text_bytes = denoiser.num_text_tokens(req) * denoiser.memory.hidden_size * denoiser.memory.element_size
        table = denoiser.transformer.embed_steps(
            torch.full((STEPS_AHEAD,), 500.0),
            torch.zeros(STEPS_AHEAD, denoiser.transformer.config.pooled_projection_dim),
            torch.full((STEPS_AHEAD,), 3500.0),
        )
    assert denoiser.held_bytes(req) == text_bytes + table.nbytes
