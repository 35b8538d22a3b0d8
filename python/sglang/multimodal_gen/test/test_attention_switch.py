"""Attention kernels by role and by request in a pipeline, and what the start-up log says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import AttentionNotAvailable
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.attention.registry import (
    device_facts,
)
from sglang.multimodal_gen.runtime.layers.attention.switch import AttentionSwitch
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan, LayerContext
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

CPU = torch.device("cpu")
REQUEST = {
    "prompt": "a red circle",
    "width": 32,
    "height": 32,
    "num_frames": 5,
    "num_inference_steps": 1,
    "max_sequence_length": 8,
    "seed": 3,
}


Loaded = tuple[WanPipeline, list[str]]


@pytest.fixture(scope="module")
def load(wan_checkpoint: Callable[[str], Path]) -> Callable[..., Loaded]:
    """The tiny Wan pipeline with engine options and what it reported, loaded once for each of them."""

    @cache
    def load(**options: str) -> Loaded:
        heard: list[str] = []
        execution = ExecutionArgs(device="cpu", **options)
        pipeline = build_pipeline(str(wan_checkpoint("plain")), execution, report=heard.append)
        assert isinstance(pipeline, WanPipeline)
        return pipeline, heard

    return load


@pytest.fixture(scope="module")
def pipeline_with(load: Callable[..., Loaded]) -> Callable[..., WanPipeline]:
    """The tiny Wan pipeline with engine options."""
    return lambda **options: load(**options)[0]


@contextmanager
def kernels_used(pipeline: WanPipeline) -> Iterator[set[str]]:
    """Collects `role:kernel` of every attention layer of the transformer that runs."""
    used: set[str] = set()

    def note(layer: Attention, *_: Any) -> None:
        used.add(f"{layer.source.role}:{layer.kernel.name}")

    layers = [layer for layer in pipeline.transformer.modules() if isinstance(layer, Attention)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    yield used
    for handle in handles:
        handle.remove()


def denoised(pipeline: WanPipeline, **wishes: str) -> tuple[Req, set[str]]:
    """A request's final latents, and the kernels that its transformer used."""
    with torch.inference_mode(), kernels_used(pipeline) as used:
        req = pipeline.admit("r", SamplingParams.from_values(REQUEST | wishes))
        for phase in req.phases[:2]:
            for _ in range(phase.units):
                pipeline.run_unit(phase.name, [req])
    return req, used


def test_the_engines_options_choose_kernels_by_role(pipeline_with: Callable[..., WanPipeline]) -> None:
    assert denoised(pipeline_with())[1] == {"self:torch_sdpa", "cross:torch_sdpa"}
    assert denoised(pipeline_with(attention_backend="torch_reference"))[1] == {
        "self:torch_reference",
        "cross:torch_reference",
    }
    assert denoised(pipeline_with(cross_attention_backend="torch_reference"))[1] == {
        "self:torch_sdpa",
        "cross:torch_reference",
    }


def test_a_request_runs_with_its_own_kernels_and_the_next_one_with_the_engines(
    pipeline_with: Callable[..., WanPipeline],
) -> None:
    """Tolerance: order of summation in two layers."""
    pipeline = pipeline_with()
    usual, _ = denoised(pipeline)
    wished, used = denoised(pipeline, attention_backend="torch_reference")
    assert used == {"self:torch_reference", "cross:torch_reference"}
    assert usual.latents is not None
    assert wished.latents is not None
    torch.testing.assert_close(wished.latents, usual.latents, rtol=1e-5, atol=1e-5)
    assert denoised(pipeline, self_attention_backend="torch_reference")[1] == {
        "self:torch_reference",
        "cross:torch_sdpa",
    }
    again, used = denoised(pipeline)
    assert used == {"self:torch_sdpa", "cross:torch_sdpa"}
    assert again.latents is not None
    assert torch.equal(again.latents, usual.latents)


def test_requests_share_a_forward_only_when_their_kernels_are_equal(
    pipeline_with: Callable[..., WanPipeline],
) -> None:
    def key(**wishes: str) -> str:
        return pipeline_with().admit("r", SamplingParams.from_values(REQUEST | wishes)).phases[1].batch_key

    assert key().endswith(":self=torch_sdpa,cross=torch_sdpa")
    assert key(attention_backend="torch_sdpa") == key()
    others = [
        key(attention_backend="torch_reference"),
        key(self_attention_backend="torch_reference"),
        key(cross_attention_backend="torch_reference"),
    ]
    assert len({key(), *others}) == 4


def test_a_requests_wish_goes_before_the_engines(pipeline_with: Callable[..., WanPipeline]) -> None:
    pipeline = pipeline_with(cross_attention_backend="torch_reference")
    assert denoised(pipeline, attention_backend="torch_sdpa")[1] == {"self:torch_sdpa", "cross:torch_sdpa"}
    assert denoised(pipeline, self_attention_backend="torch_reference")[1] == {
        "self:torch_reference",
        "cross:torch_reference",
    }


def test_a_failing_forward_leaves_the_engines_kernels(pipeline_with: Callable[..., WanPipeline]) -> None:
    layer = AttentionPlan.chosen("self", ExecutionArgs(), facts=device_facts(CPU), precision="fp32").build(8)
    with (
        pytest.raises(ZeroDivisionError),
        AttentionSwitch(layer).using(SamplingParams(attention_backend="torch_reference")),
    ):
        assert layer.kernel.name == "torch_reference"
        raise ZeroDivisionError
    assert layer.kernel.name == "torch_sdpa"


def test_a_kernel_that_cannot_serve_a_request_is_refused_at_admission(
    pipeline_with: Callable[..., WanPipeline],
) -> None:
    with pytest.raises(AttentionNotAvailable) as caught:
        pipeline_with().admit("r", SamplingParams.from_values(REQUEST | {"cross_attention_backend": "fa2"}))
    assert str(caught.value) == (
        "cross_attention_backend: got fa2, but fa2 needs a CUDA device and this one is cpu; accepted here is "
        "torch_sdpa, torch_reference"
    )


def test_a_kernel_that_cannot_serve_the_engine_is_refused_before_the_checkpoint_is_read(
    wan_checkpoint: Callable[[str], Path],
) -> None:
    heard: list[str] = []
    with pytest.raises(AttentionNotAvailable, match="attention_backend: got fa, but fa needs a CUDA device"):
        build_pipeline(
            str(wan_checkpoint("plain")), ExecutionArgs(device="cpu", attention_backend="fa"), report=heard.append
        )
    assert not any("loading" in line for line in heard)


def test_the_start_up_log_says_for_each_role_which_kernel_and_why(load: Callable[..., Loaded]) -> None:
    _, heard = load(cross_attention_backend="torch_reference")
    assert [line for line in heard if "-attention " in line] == [
        "self-attention torch_sdpa: the fastest for cpu, fp32, head size 24",
        "cross-attention torch_reference: cross_attention_backend asks for torch_reference",
    ]


def test_the_autoencoders_attention_is_torchs_whatever_is_asked_for(
    pipeline_with: Callable[..., WanPipeline],
) -> None:
    vae = pipeline_with(attention_backend="torch_reference").vae
    kernels = {layer.kernel.name for layer in vae.modules() if isinstance(layer, Attention)}
    assert kernels == {"torch_sdpa"}
    assert LayerContext().frame_attention.build(384).kernel.name == "torch_sdpa"


def test_a_fixed_kernel_refuses_to_be_exchanged() -> None:
    switch = AttentionSwitch(AttentionPlan.torch("self").build(8))
    assert switch.names(SamplingParams(attention_backend="torch_sdpa")) == "self=torch_sdpa"
    with pytest.raises(AttentionNotAvailable, match="the self-attention of this model is fixed"):
        switch.names(SamplingParams(attention_backend="torch_reference"))
