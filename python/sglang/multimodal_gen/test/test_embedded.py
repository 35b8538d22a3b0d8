"""What a transformer makes of texts and steps: computed once for many forwards, and given to each."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.cost_model import STEPS_AHEAD
from sglang.multimodal_gen.runtime.layers.block_runner import rows_of
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding
from sglang.multimodal_gen.runtime.pipelines.flux_workloads import FLUX_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video_workloads import HUNYUAN_VIDEO_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.ltx_workloads import LTX_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.qwen_image_workloads import QWEN_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.sd3_workloads import SD3_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.wan_workloads import WAN_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines.zimage_workloads import Z_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import stacked_texts
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, Workload, WorkSize
from sglang.multimodal_gen.test import tiny_hunyuan_video, tiny_ltx, tiny_qwen_image, tiny_sd3, tiny_wan, tiny_zimage
from sglang.multimodal_gen.test.pipeline_parity import admitted, finished, load, relative_error
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux
from sglang.multimodal_gen.test.tiny_wan import noise
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, save_tiny_wan_image

CPU = torch.device("cpu")
# One product of sixteen rows and one of two add up in other orders.
SAME = {"rtol": 1e-5, "atol": 1e-6}
BASE: dict[str, Any] = {"prompt": "circle", "width": 32, "height": 32, "seed": 4}

PICTURED: dict[str, Any] = {"in_channels": 12, "image_dim": 12, "added_kv_proj_dim": 48}


FAMILIES: Mapping[str, tuple[Callable[[Any], Any], Workload]] = {
    "Wan": (lambda _: tiny_wan.transformer_pair()[1], WAN_WORKLOADS["dit"]),
    "Wan with a picture": (lambda _: tiny_wan.transformer_pair(**PICTURED)[1], WAN_WORKLOADS["dit"]),
    "Wan with two pictures": (
        lambda _: tiny_wan.transformer_pair(**PICTURED, pos_embed_seq_len=2 * 257)[1],
        WAN_WORKLOADS["dit"],
    ),
    "LTX-Video": (lambda _: tiny_ltx.transformer_pair(in_channels=4, out_channels=4)[1], LTX_WORKLOADS["dit"]),
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


TIMESTEPS, TEXT, IMAGE = 1, 2, 3
"""Places among the inputs of all these workloads."""


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_forward_that_is_given_texts_and_steps_is_the_same(family: str, pipeline: Any) -> None:
    make, workload = FAMILIES[family]
    model = make(pipeline)
    size = WorkSize(
        height=64, width=32, num_frames=1, latent_shape=(4, 1, 8, 4), batch_size=2, num_text_tokens=5, chunk_frames=1
    )
    inputs = list(workload.inputs({"transformer": model.config}, size, Drawing(CPU, torch.float32)))
    inputs[TIMESTEPS] = inputs[TIMESTEPS] * torch.tensor([1.0, 0.3])
    plain = workload.forward(model, tuple(inputs), size)
    prepared = list(workload.prepared(model, tuple(inputs)))
    given = prepared[len(inputs) :]
    has_steps = hasattr(model, "step_table")
    assert len(given) == 1 + has_steps
    assert not has_steps or given[0].shape == (2, model.step_table.width)
    assert given[-1][0].numel() == given[-1].shape[-2] * model.text_width
    torch.testing.assert_close(workload.forward(model, tuple(prepared), size), plain, **SAME)
    unread = ([TIMESTEPS] if has_steps else []) + [TEXT] + ([IMAGE] if "picture" in family else [])
    if family != "HunyuanVideo":  # where the timestep, and the mean of the text, refine what is made of the text
        for place in unread:
            prepared[place] = torch.full_like(inputs[place], float("nan"))
        torch.testing.assert_close(workload.forward(model, tuple(prepared), size), plain, **SAME)
    for place in range(len(inputs), len(prepared)):
        mixed = [*prepared[:place], prepared[place].flip(0), *prepared[place + 1 :]]
        assert relative_error(workload.forward(model, tuple(mixed), size), plain) > 1e-4, "rows have their own"


@pytest.mark.parametrize("folds", [True, False])
@torch.no_grad()
def test_padding_of_a_text_is_embedded_once_or_left_out(folds: bool) -> None:
    """Texts of unequal lengths bring as many tokens as they have, and share a forward."""
    _, model = tiny_wan.transformer_pair()
    model.folds_text_padding = folds
    latents, timesteps, lengths = noise(2, model.config.in_channels, 1, 8, 4), torch.tensor([900.0, 20.0]), [3, 6]
    text = noise(2, 9, model.config.text_dim, seed=1)
    for row, length in enumerate(lengths):
        text[row, length:] = 0
    plain = model(latents, timesteps, text, text_lengths=lengths)
    own = [model.embed_text(text[row : row + 1], None, lengths[row : row + 1])[0] for row in range(2)]
    assert [each.shape[-2] for each in own] == ([4, 7] if folds else [9, 9])
    given = model(latents, timesteps, text, text_lengths=lengths, embedded=Embedded(text=stacked_texts(own)))
    torch.testing.assert_close(given, plain, **SAME)


@torch.no_grad()
def test_pictures_without_noise_have_their_own_rows() -> None:
    _, model = tiny_qwen_image.transformer_pair(zero_cond_t=True)
    shapes = ((1, 4, 3), (1, 2, 2))
    tokens, timesteps = noise(2, 16, model.config.in_channels), torch.tensor([800.0, 300.0])
    text = noise(2, 6, model.config.joint_attention_dim, seed=1)
    steps = model.embed_steps(torch.cat((timesteps, torch.zeros(2))))
    given = model(tokens, timesteps, text, shapes, embedded=Embedded(steps))
    torch.testing.assert_close(given, model(tokens, timesteps, text, shapes), **SAME)


@torch.no_grad()
def test_rows_that_leave_blocks_out_keep_their_steps() -> None:
    _, model = tiny_sd3.transformer_pair(tiny_sd3.TINY_DUAL_TRANSFORMER)
    latents, timesteps = noise(3, 4, 8, 8), torch.tensor([900.0, 500.0, 20.0])
    text, pooled = noise(3, 5, model.config.joint_attention_dim), noise(3, model.config.pooled_projection_dim, seed=2)
    skip = [(), (0,), (1,)]
    given = model(latents, timesteps, text, pooled, skip, Embedded(model.embed_steps(timesteps, pooled)))
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
    """Counts the steps that a denoiser embeds at a time, and its texts."""

    def __init__(self, denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.texts = 0
        embed_steps, embed_text = denoiser.embed_steps, denoiser.embed_text

        def counted_steps(row: Any, timesteps: Any) -> Tensor:
            self.steps.append(len(timesteps))
            return embed_steps(row, timesteps)

        def counted_text(row: Any) -> Tensor:
            self.texts += 1
            return embed_text(row)

        monkeypatch.setattr(denoiser, "embed_steps", counted_steps)
        monkeypatch.setattr(denoiser, "embed_text", counted_text)


def stage_of(pipeline: Any, name: str = "denoise") -> Any:
    return next(stage for stage in pipeline.stages if stage.name == name)


def denoiser_of(pipeline: Any) -> Any:
    return stage_of(pipeline).denoiser


def made(pipeline: Any, **wishes: Any) -> Tensor:
    with torch.inference_mode():
        [(req, _)] = finished(pipeline, admitted(pipeline, [(BASE | wishes, EMPTY)]))
    assert req.latents is not None
    assert not (req.embedded_texts or req.embedded_steps), "nothing is kept while frames are decoded"
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


@pytest.mark.parametrize("reason", ["adapters", "weights elsewhere", "little memory"])
def test_a_request_may_leave_it_to_its_forwards(reason: str, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, wishes = denoiser_of(pipeline), {"num_inference_steps": 3}
    counted = Counted(denoiser, monkeypatch)
    expected = made(pipeline, **wishes)
    assert (counted.steps, counted.texts) == ([3], 1)
    with torch.inference_mode():
        [usual] = admitted(pipeline, [(BASE | wishes, EMPTY)])
    phase = stage_of(pipeline).phase(usual)
    if reason == "weights elsewhere":
        monkeypatch.setattr(denoiser.transformer, "runs_on", torch.device("meta"), raising=False)
    elif reason == "little memory":
        monkeypatch.setattr(denoiser, "embedded_text_bytes", lambda _: usual.needed_bytes)
        monkeypatch.setattr(pipeline, "budget_bytes", lambda: usual.needed_bytes)
        monkeypatch.setattr(pipeline, "_budget_time", -math.inf)
    else:
        monkeypatch.setattr(pipeline.adapters, "find", lambda *_: (SimpleNamespace(adapter=object(), scale=1.0),))
        monkeypatch.setattr(pipeline.adapters, "using", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(pipeline.adapters, "encoding", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(pipeline.adapters, "text_key", lambda *_: ())
    counted.steps.clear()
    torch.testing.assert_close(made(pipeline, **wishes), expected, rtol=1e-4, atol=1e-5)
    assert (counted.steps, counted.texts) == ([], 1)
    with torch.inference_mode():
        [req] = admitted(pipeline, [(BASE | wishes, EMPTY)])
    assert not req.embeds_ahead and stage_of(pipeline).phase(req).held_bytes < phase.held_bytes
    assert denoiser.embedded([SimpleNamespace(req=usual), SimpleNamespace(req=req)]) is NOTHING


def test_a_text_is_embedded_once(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(denoiser_of(pipeline), monkeypatch)
    made(pipeline, num_inference_steps=STEPS_AHEAD + 2)
    assert counted.texts == 1
    made(pipeline, num_inference_steps=4, true_cfg_scale=3.0, negative_prompt="small")
    assert counted.texts == 1 + 2


def test_each_expert_embeds_a_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode(False):
        pipeline = load(save_tiny_wan_image(tmp_path / "experts", TINY_WAN_IMAGES["t2v_experts"]))
    counted = [Counted(stage_of(pipeline, name).denoiser, monkeypatch) for name in ("denoise", "denoise_2")]
    wishes = {"num_inference_steps": 5, "num_frames": 1, "guidance_scale": 3.0, "boundary_ratio": 0.95}
    with torch.inference_mode():
        [req] = admitted(pipeline, [(BASE | wishes, EMPTY)])
        while req.done("denoise_2") < 2:
            pipeline.run_unit(next(p.name for p in req.phases if req.done(p.name) < p.units), [req])
    assert all(phase.units > 1 for phase in req.phases if phase.name.startswith("denoise")), req.phases
    assert [each.texts for each in counted] == [2, 2]
    assert {text.transformer for text in req.embedded_texts} == {pipeline.transformer_2}, "the first one's are gone"


def test_a_request_that_ran_out_of_memory_keeps_less(pipeline: Any) -> None:
    with torch.inference_mode():
        [req, other] = admitted(pipeline, [(BASE, EMPTY)] * 2)
        while req.done("denoise") < 1:
            pipeline.run_unit(next(p.name for p in req.phases if req.done(p.name) < p.units), [req])
        held = stage_of(pipeline).phase(req).held_bytes
        assert req.embeds_ahead and req.embedded_texts and req.embedded_steps
        assert pipeline.shrink("denoise", req)
        assert not (req.embeds_ahead or req.embedded_texts or req.embedded_steps)
        assert stage_of(pipeline).phase(req).held_bytes < held
        other.load_state_dict(copy.deepcopy(req.state_dict()))
        assert not other.embeds_ahead, "so that it goes on with equal bits"
        assert not pipeline.shrink("denoise", req)


def test_memory_is_reckoned_for_texts_and_steps(pipeline: Any) -> None:
    denoiser = denoiser_of(pipeline)
    with torch.inference_mode():
        [req] = admitted(pipeline, [(BASE, EMPTY)])
        given_bytes = denoiser.num_text_tokens(req) * denoiser.memory.hidden_size * denoiser.memory.element_size
        config = denoiser.transformer.config
        steps = denoiser.transformer.embed_steps(
            torch.full((STEPS_AHEAD,), 500.0),
            torch.zeros(STEPS_AHEAD, config.pooled_projection_dim),
            torch.full((STEPS_AHEAD,), 3500.0),
        )
        text = denoiser.transformer.embed_text(noise(denoiser.num_text_tokens(req), config.joint_attention_dim))
    assert denoiser.held_bytes(req) == given_bytes + steps.nbytes + text.nbytes
